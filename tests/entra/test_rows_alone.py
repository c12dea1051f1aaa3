"""A row scored in a batch against the same row alone: what a model computes from its longest row must not reach the others."""

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, build

import entra
from entra.forward import token_signals
from entra.rope import has_seen_longer, sees_left_pads, transformers_version

# The same numbers up to the order of additions in the model's own matrix products; another RoPE is off by more than 1e-2.
LOGPROB_TOLERANCE, INCOMING_TOLERANCE = 2e-5, 1e-6
ORIGINAL = 16  # tokens that a model was trained on before its RoPE was stretched
LENGTHS = (40, 9, ORIGINAL, ORIGINAL + 1, 27, 40)
PROMPT = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def longrope(head_dim, **more):
    half = head_dim // 2
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * half,
            "long_factor": [1.0 + 0.5 * i for i in range(half)],
            "original_max_position_embeddings": ORIGINAL,
            "factor": 4.0,
            **more,
        },
        "max_position_embeddings": 4 * ORIGINAL,
        "original_max_position_embeddings": ORIGINAL,
    }


DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "max_position_embeddings": ORIGINAL,
}
LLAMA_4_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "llama_4_scaling_beta": 1.0,
}
STRETCHED = {
    "longrope-phi3": ("phi3", longrope(24)),
    "longrope-llama": ("llama", longrope(20)),
    "longrope-qwen2": ("qwen2", longrope(20)),
    "longrope-mla": ("deepseek_v3", longrope(8)),
    "longrope-one-kind-of-layer": (
        "gemma3",
        {
            **longrope(20),
            "rope_parameters": {
                "full_attention": longrope(20)["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "mscale-phimoe": ("phimoe", longrope(20, short_mscale=1.0, long_mscale=1.5)),
    "dynamic-llama": ("llama", DYNAMIC),
    "dynamic-qwen3": ("qwen3", DYNAMIC),
}
if transformers_version() < (5, 21):  # where transformers itself fails beyond the original length
    del STRETCHED["longrope-one-kind-of-layer"]
CASES = [pytest.param(*case, id=name) for name, case in STRETCHED.items()]


@pytest.fixture(scope="module")
def rows():
    """Token ids of each row, prompt first; the longest is not the first."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def score(model, rows):
    return token_signals(model, rows, [len(row) - PROMPT for row in rows], entra.ScoreConfig(token_budget=10_000))


def assert_equal(got, alone):
    torch.testing.assert_close(got.logprobs, alone.logprobs, rtol=0, atol=LOGPROB_TOLERANCE)
    torch.testing.assert_close(got.incoming, alone.incoming, rtol=0, atol=INCOMING_TOLERANCE)


@pytest.mark.parametrize(("family", "overrides"), [pytest.param(family, {}, id=family) for family in FAMILIES] + CASES)
def test_a_row_in_a_batch_is_scored_as_alone(family, overrides, rows):
    model = build(family, **overrides)
    for got, row in zip(score(model, rows), rows, strict=True):
        assert_equal(got, *score(model, [row]))


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_a_row_is_scored_as_if_no_longer_one_had_run_before(family, overrides, rows):
    """Dynamic RoPE keeps the frequencies of the longest row so far; a fresh model has seen none."""
    model = build(family, **overrides)
    with torch.no_grad():
        model(torch.tensor([rows[0]]), use_cache=False)  # whoever runs the model, not only scoring
    for i in (4, 2, 1):
        assert_equal(*score(model, [rows[i]]), *score(build(family, **overrides), [rows[i]]))


def capture(model, ids, **options):
    positions = options.pop("position_ids", None)
    with torch.no_grad(), entra.capture_incoming_attention(model, **options) as captured:
        model(torch.as_tensor(ids), position_ids=positions, use_cache=False)
    return captured


@pytest.mark.parametrize(("family", "overrides"), [*CASES, pytest.param("llama", {}, id="default-llama")])
@pytest.mark.parametrize("layout", ["found", "cu_seqlens", "length", "start"])
def test_a_captured_sequence_has_the_rope_it_has_alone_or_is_refused(family, overrides, layout, rows):
    def joined(first, second):
        """Both sequences in one forward, in the layout asked for."""
        model = build(family, **overrides)
        lengths, width = [len(first), len(second)], max(len(first), len(second))
        if layout in ("found", "cu_seqlens"):
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            given = {} if layout == "found" else {"cu_seqlens": [0, lengths[0], sum(lengths)]}
            return capture(model, [first + second], position_ids=positions, **given)
        starts = [0, 0] if layout == "length" else [width - n for n in lengths]
        padded = [[0] * s + row + [0] * (width - s - len(row)) for s, row in zip(starts, (first, second), strict=True)]
        given = {"length": lengths} if layout == "length" else {"start": starts}
        mask = torch.tensor([[s <= i < s + n for i in range(width)] for s, n in zip(starts, lengths, strict=True)])
        with torch.no_grad(), entra.capture_incoming_attention(model, **given) as captured:
            model(torch.tensor(padded), attention_mask=mask.long(), use_cache=False)
        return captured

    def assert_as_alone(first, second):
        incoming = joined(first, second).incoming
        for r, row in enumerate((first, second)):
            alone = capture(build(family, **overrides), [row]).incoming[0]
            at = 0 if layout == "length" else incoming.shape[1] - len(row)
            got = incoming[r, at : at + len(row)] if len(incoming) > 1 else incoming[0].split([len(first), len(second)])[r]
            torch.testing.assert_close(got, alone, rtol=0, atol=INCOMING_TOLERANCE)

    short, long = rows[1], rows[4]
    assert_as_alone(short, rows[2])
    assert_as_alone(rows[0], rows[5])
    if not overrides:
        assert_as_alone(short, long)
        return
    with pytest.raises(RuntimeError, match="another RoPE in this forward than its sequence alone"):
        _ = joined(short, long).incoming


def test_pads_that_stretch_rope_are_refused_in_a_capture(rows):
    model = build("llama", **longrope(20))
    with pytest.raises(RuntimeError, match="token 0 of row 0 has another RoPE"):
        _ = capture(model, [rows[1] + [0] * 20], length=[9]).incoming


def test_dynamic_rope_is_as_before_after_scoring(rows):
    model = build("llama", **DYNAMIC)
    ids = torch.tensor([rows[4]])
    with torch.no_grad():
        before = model(ids).logits
        score(model, [rows[0], rows[1]])
        # A forward of the same length neither grows nor forgets.
        assert torch.equal(model(ids).logits, before)


def test_rows_share_a_forward_where_their_rope_is_the_same(rows):
    def forwards(overrides):
        model, shapes = build("llama", **overrides), []
        model.register_forward_pre_hook(
            lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        score(model, rows)
        return shapes

    assert forwards({}) == [(6, 40)]
    assert forwards(longrope(20)) == [(4, 40), (2, 16)]
    assert forwards(DYNAMIC) == [(2, 40), (1, 27), (1, 17), (2, 16)]


def test_a_trainers_pass_after_a_longer_row_is_noticed(rows):
    model = build("llama", **DYNAMIC)
    assert not has_seen_longer(model)
    with torch.no_grad():
        model(torch.tensor([rows[0]]), use_cache=False)
    assert has_seen_longer(model)


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        *(
            pytest.param(family, {}, transformers_version() < (5, 15) and family in ("qwen3_next", "qwen3_5"), id=family)
            for family in FAMILIES
        ),
        pytest.param("llama", {"model_type": "hunyuan_v1_dense"}, True, id="a-norm-after-rope"),
        pytest.param(
            "mistral",
            {"model_type": "ministral3", "rope_parameters": LLAMA_4_SCALING, "max_position_embeddings": 64},
            True,
            id="attention-scaled-by-position",
        ),
    ],
)
def test_pads_before_a_row_are_seen_where_positions_are_more_than_rope(family, overrides, expected, rows):
    """`sees_left_pads` against a forward with 30 pads before the row, as trainers pad prompts."""
    model = build(family, **overrides)
    assert sees_left_pads(model) == expected
    ids = torch.tensor([[5] * 30 + rows[1]])
    mask = (torch.arange(ids.shape[1]) >= 30).long()[None]
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits[0, 30:]
        alone = model(torch.tensor([rows[1]]), use_cache=False).logits[0]
    assert bool((padded - alone).abs().max() > 1e-2) == expected


def test_ranks_agree_on_the_number_of_forwards_after_the_split(rows, monkeypatch):
    """A rank with rows on one side of the length runs an empty forward where another has two."""
    monkeypatch.setattr(entra.forward, "forwards_are_collective", lambda model: True)
    asked = []
    monkeypatch.setattr(entra.forward, "_most_forwards", lambda ours: asked.append(ours) or 2)
    model, shapes = build("llama", **longrope(20)), []
    model.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    score(model, rows)
    score(model, rows[1:3])
    assert asked == [2, 1]
    assert shapes == [(4, 40), (2, 16), (2, 16), (1, 2)]
