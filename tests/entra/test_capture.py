"""Captured incoming attention against the matrices that eager attention returns, on tiny random models.

The reference is every sequence alone and unpadded through the eager model, the scored layer's matrix reduced in
float64. Both sides run their layers in float32.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from eager_reference import TOLERANCE, eager_attentions, reduce_heads
from packaging.version import Version
from tiny_models import FAMILIES, VOCABULARY, WINDOW, build
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    T5ForConditionalGeneration,
)
from transformers.utils.generic import is_flash_attention_requested

from entra.capture import CapturedLayer, capture_attention, capture_incoming_attention

pytestmark = pytest.mark.usefixtures("one_thread")

# What has to be told apart (another layer of the same model) differs by at least this.
DISTINCT = 1e-2

LENGTHS = (23, 16, 2, 1)
TOKENS = max(LENGTHS)

# index, window, softcap, scale, sinks: what config.json says must arrive.
EXPECTED_LAYER: dict[str, tuple[int, int | None, float | None, float, bool]] = {
    "qwen2": (1, None, None, 20**-0.5, False),
    "qwen3": (1, None, None, 20**-0.5, False),
    "llama": (1, None, None, 20**-0.5, False),
    "phi3": (1, WINDOW, None, 24**-0.5, False),
    "gemma2": (1, None, 2.0, 30**-0.5, False),
    "gemma3": (1, None, None, 30**-0.5, False),
    "gemma4": (3, None, None, 1.0, False),
    "gpt_oss": (1, None, None, 20**-0.5, True),
    "deepseek_v3": (1, None, None, 20**-0.5, False),
    "qwen3_next": (1, None, None, 20**-0.5, False),
    "qwen3_5": (1, None, None, 20**-0.5, False),
    "glm4_moe": (1, None, None, 20**-0.5, False),
    "olmo3": (1, None, None, 20**-0.5, False),
    "mistral": (1, WINDOW, None, 20**-0.5, False),
    "qwen2_moe": (1, None, None, 20**-0.5, False),
    "phimoe": (1, WINDOW, None, 20**-0.5, False),
    "cohere2": (1, None, None, 20**-0.5, False),
}


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], PreTrainedModel]:
    """Each family's model with its default attention, built once."""
    models: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in models:
            models[family] = build(family)
        return models[family]

    return get


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, attention mask [B, N], start, length [B] of `sequences()` padded on one side with a token that is in use."""
    ids = torch.full((len(LENGTHS), TOKENS), 5)
    mask = torch.zeros_like(ids)
    length = torch.tensor(LENGTHS)
    start = TOKENS - length if side == "left" else torch.zeros_like(length)
    for row, sequence in enumerate(sequences()):
        span = slice(int(start[row]), int(start[row]) + LENGTHS[row])
        ids[row, span] = sequence
        mask[row, span] = 1
    return ids, mask, start, length


def capture(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, CapturedLayer]:
    with torch.no_grad(), capture_incoming_attention(model, **options) as captured:
        model(ids, attention_mask=mask, use_cache=False)
    return captured.incoming, captured.layer


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a capture could leave behind, by module: config object and content, hooks, mode, attributes."""
    return {
        name: (
            id(module.__dict__.get("config")),
            str(module.__dict__.get("config")),
            getattr(module.__dict__.get("config"), "_attn_implementation", None),
            module.training,
            type(module),
            sorted(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_incoming_matches_eager(family: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of(family)
    index, window, softcap, scale, sinks = EXPECTED_LAYER[family]
    alone = [capture(model, sequence[None])[0][0] for sequence in sequences()]
    ids, mask, start, length = padded("left")
    left, layer = capture(model, ids, mask, start=start, length=length)
    right, _ = capture(model, padded("right")[0], start=torch.zeros_like(length), length=length)

    assert (layer.index, layer.sliding_window, layer.softcap, layer.has_sinks) == (index, window, softcap, sinks)
    assert layer.scale == pytest.approx(scale)
    assert model.get_submodule(layer.name).layer_idx == index
    for row, sequence in enumerate(sequences()):
        matrices = eager_attentions(family, sequence)
        expected = reduce_heads(matrices[index], window).mean(0)
        inside = slice(int(start[row]), None)
        for layout, got in (
            ("alone", alone[row]),
            ("left", left[row, inside]),
            ("right", right[row, : LENGTHS[row]]),
        ):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE, msg=lambda m, at=layout: f"{at}: {m}")
        assert not left[row, : start[row]].any()
        assert not right[row, LENGTHS[row] :].any()
        if len(sequence) == TOKENS:
            others = [reduce_heads(m, window).mean(0) for other, m in matrices.items() if other != index]
            assert all((other - expected).abs().max() > DISTINCT for other in others)
            if sinks:  # the sinks' share is in the denominator only
                assert matrices[index].sum(-1).min() < 1 - DISTINCT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical_and_state_is_restored(
    family: str, side: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model = model_of(family)
    ids, mask, start, length = padded(side)
    before = state_of(model)
    with torch.no_grad():
        without = model(ids, attention_mask=mask, use_cache=False).logits
        with capture_incoming_attention(model, start=start, length=length):
            within = model(ids, attention_mask=mask, use_cache=False).logits
        after = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(without, within)
    assert torch.equal(without, after)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param("gemma3", {"layer_types": ["sliding_attention"] * 3}, id="gemma3"),
        pytest.param("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, id="qwen2_moe-passes-no-window"),
    ],
)
def test_all_layers_windowed_takes_the_last_with_its_window(family: str, overrides: dict[str, Any]) -> None:
    ids = sequences()[0]
    model = build(family, **overrides)
    incoming, layer = capture(model, ids[None])
    last = model.config.num_hidden_layers - 1
    assert (layer.index, layer.layer_type, layer.sliding_window) == (last, "sliding_attention", WINDOW)
    matrix = eager_attentions(family, ids, **overrides)[last]
    assert matrix.tril(-WINDOW).count_nonzero() == 0
    torch.testing.assert_close(incoming[0].double(), reduce_heads(matrix, WINDOW).mean(0), rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers to 5.10, at the least, cannot run so small a Zamba2",
)
@pytest.mark.parametrize("last", ["hybrid", "linear_attention"])
def test_the_index_of_a_shared_block_is_that_of_its_layer(last: str) -> None:
    """Zamba2: every attention module has layer_idx -1."""
    types = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", last]
    sizes = {"hidden_size": 48, "attention_hidden_size": 96, "attention_head_dim": 24, "intermediate_size": 64}
    mamba = {"mamba_d_state": 8, "mamba_headdim": 24, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 2}
    config = AutoConfig.for_model(
        "zamba2",
        vocab_size=VOCABULARY,
        num_hidden_layers=len(types),
        num_attention_heads=4,
        layers_block_type=types,
        **sizes,
        **mamba,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), capture_incoming_attention(model) as captured:
        matrix = model(sequences()[0][None], use_cache=False, output_attentions=True).attentions[-1]
    layer = captured.layer
    index = max(i for i, layer_type in enumerate(types) if layer_type == "hybrid")
    assert (layer.index, layer.layer_type) == (index, "hybrid")
    assert layer.name == f"model.layers.{index}.shared_transformer.self_attn"
    expected = reduce_heads(matrix[0].double(), None).mean(0)
    torch.testing.assert_close(captured.incoming[0].double(), expected, rtol=0, atol=TOLERANCE)


def test_a_window_in_the_config_that_the_model_never_reads_is_ignored() -> None:
    model = build("llama", sliding_window=WINDOW)
    incoming, layer = capture(model, sequences()[0][None])
    assert (layer.layer_type, layer.sliding_window) == ("full_attention", None)
    expected = reduce_heads(eager_attentions("llama", sequences()[0])[1], None).mean(0)
    torch.testing.assert_close(incoming[0].double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("head_reduction", ["mean", "max"])
@pytest.mark.parametrize("statistic", ["mean", "lift"])
def test_statistics_and_head_reductions(
    family: str, statistic: str, head_reduction: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    ids, mask, start, length = padded("left")
    incoming, layer = capture(
        model_of(family), ids, mask, start=start, length=length, statistic=statistic, head_reduction=head_reduction
    )
    for row, sequence in enumerate(sequences()):
        heads = reduce_heads(eager_attentions(family, sequence)[layer.index], layer.sliding_window, lift=statistic == "lift")
        expected = heads.amax(0) if head_reduction == "max" else heads.mean(0)
        # Lift multiplies attention, and its error, by up to the number of visible keys.
        tolerance = TOLERANCE * (len(sequence) if statistic == "lift" else 1)
        torch.testing.assert_close(incoming[row, start[row] :].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lift_is_one_under_uniform_attention(family: str) -> None:
    model = build(family)
    for module in model.modules():
        if hasattr(module, "q_proj"):
            nn.init.zeros_(module.q_proj.weight)
    ids, mask, start, length = padded("left")
    incoming, _ = capture(model, ids, mask, start=start, length=length, statistic="lift")
    for row in range(len(LENGTHS)):
        ones = torch.ones(LENGTHS[row] - 1)
        torch.testing.assert_close(incoming[row, start[row] : -1], ones, rtol=0, atol=1e-5)


def test_the_original_attention_sees_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention reads module.config, and MLA asks for "flash" in the name before it calls."""
    model = build("llama")
    attention = model.model.layers[1].self_attn
    own = attention.config = copy.copy(attention.config)
    seen = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(module.config)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_like", attend)
    own._attn_implementation_internal = "flash_like"
    name_while_calling = []
    attention.q_proj.register_forward_hook(lambda *_: name_while_calling.append(is_flash_attention_requested(attention.config)))
    ids = sequences()[0][None]
    incoming, _ = capture(model, ids)
    assert [id(config) for config in seen] == [id(own)]
    assert name_while_calling == [True]
    torch.testing.assert_close(incoming, capture(build("llama"), ids)[0], rtol=0, atol=TOLERANCE)


def test_multimodal_models_are_scored_in_their_text_decoder() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = build("gemma3").config.to_dict()
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "image_size": 28})
    model = AutoModelForImageTextToText.from_config(config).eval()
    decoder = build("gemma3")
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    ids = sequences()[0][None]
    incoming, layer = capture(model, ids)
    assert layer.name == "model.language_model.layers.1.self_attn"
    torch.testing.assert_close(incoming, capture(decoder, ids)[0], rtol=0, atol=TOLERANCE)


def test_geometry_as_lists_and_the_default_span(model_of: Callable[[str], PreTrainedModel]) -> None:
    ids = padded("right")[0]
    listed, _ = capture(model_of("qwen3"), ids, start=[0, 0, 0, 0], length=[TOKENS] * 4)
    default, _ = capture(model_of("qwen3"), ids, reuse_lse=False)  # with a start the log-sum-exp is never reused
    assert torch.equal(listed, default)


@pytest.mark.parametrize("where", ["lm_head", "scored attention", "with block"])
def test_everything_is_restored_when_the_forward_raises(where: str) -> None:
    model = build("qwen3")
    ids = sequences()[0][None]
    with torch.no_grad():
        without = model(ids, use_cache=False).logits

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    at = {"lm_head": "lm_head", "scored attention": "model.layers.1.self_attn.o_proj"}.get(where)
    handle = model.get_submodule(at).register_forward_hook(fail) if at else None
    before = state_of(model)

    def score() -> None:
        with capture_incoming_attention(model), torch.no_grad():
            model(ids, use_cache=False)
            fail()

    with pytest.raises(ZeroDivisionError):
        score()
    assert state_of(model) == before
    if handle is not None:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, without)


def test_no_forward_inside_the_block_is_an_error_that_says_so(model_of: Callable[[str], PreTrainedModel]) -> None:
    with capture_incoming_attention(model_of("llama")) as captured:
        pass
    with pytest.raises(RuntimeError, match=r"nothing was captured.*model\.layers\.1\.self_attn"):
        _ = captured.incoming
    with pytest.raises(RuntimeError, match="nothing was captured"):
        _ = captured.layer


def test_the_last_forward_wins(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    first, second = sequences()[0][None], sequences()[1][None]
    with torch.no_grad(), capture_incoming_attention(model) as captured:
        model(first, use_cache=False)
        model(second, use_cache=False)
    assert torch.equal(captured.incoming, capture(model, second)[0])


def test_nested_captures_do_not_disturb_each_other(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    ids = sequences()[0][None]
    with (
        torch.no_grad(),
        capture_incoming_attention(model) as outer,
        capture_incoming_attention(model, statistic="lift") as inner,
    ):
        model(ids, use_cache=False)
    assert torch.equal(outer.incoming, capture(model, ids)[0])
    assert torch.equal(inner.incoming, capture(model, ids, statistic="lift")[0])


def behind_cache(model: PreTrainedModel, ids: Tensor, queries: int, mask: Tensor | None = None, **options: Any) -> Tensor:
    """What the last `queries` tokens of ids [B, N] yield, the others in a cache."""
    with torch.no_grad():
        cached = ids.shape[1] - queries
        masks = (None, None) if mask is None else (mask[:, :cached], mask)
        cache = model(ids[:, :cached], attention_mask=masks[0], use_cache=True).past_key_values
        with capture_incoming_attention(model, **options) as captured:
            model(ids[:, cached:], attention_mask=masks[1], past_key_values=cache)
    return captured.incoming


def reduce_last(matrix: Tensor, window: int | None, queries: int, *, lift: bool = False) -> Tensor:
    """float64 [H, N]: each head's mean attention from those of the last queries that see the key from later on."""
    tokens = matrix.shape[-1]
    place = torch.arange(tokens)
    if lift:
        matrix = matrix * (place + 1).clamp(max=window or tokens)[:, None]
    sees = (place > place[:, None]) & (place < place[:, None] + (window or tokens))  # key, query
    sees = sees.T & (place >= tokens - queries)[:, None]
    return (matrix * sees).sum(-2) / sees.sum(-2).clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_a_cache_the_queries_are_those_of_the_forward(family: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    """With windows the cache has dropped keys by then."""
    index, window, *_ = EXPECTED_LAYER[family]
    sequence = sequences()[0]
    # In transformers 5.3 the recurrent layers of hybrids go on from a cache by one token, and forget it with more.
    queries = 1 if family in ("qwen3_next", "qwen3_5") else 7
    incoming = behind_cache(model_of(family), sequence[None], queries)
    expected = reduce_last(eager_attentions(family, sequence)[index], window, queries).mean(0)
    torch.testing.assert_close(incoming[0].double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("statistic", ["mean", "lift"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_behind_a_cache_of_padded_rows(family: str, statistic: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    """Prompts are padded on the left, completions on the right."""
    index, window, *_ = EXPECTED_LAYER[family]
    rows = [sequences()[0][:18], sequences()[1][:15]]
    start, length = torch.tensor([0, 5]), torch.tensor([18, 15])
    ids = torch.full((2, 20), 5)
    ids[0, :18], ids[1, 5:] = rows
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    incoming = behind_cache(model_of(family), ids, 8, mask, start=start, length=length, statistic=statistic)
    for row, (tokens, own) in enumerate(zip(rows, (6, 8), strict=True)):
        matrix = eager_attentions(family, tokens)[index]
        expected = reduce_last(matrix, window, own, lift=statistic == "lift").mean(0)
        got = incoming[row, start[row] : start[row] + length[row]]
        tolerance = TOLERANCE * (len(tokens) if statistic == "lift" else 1)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    assert not incoming[1, :5].any()
    assert not incoming[0, 18:].any()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_step_by_step(kind: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    ids, matrix = sequences()[0], eager_attentions("llama", sequences()[0])[1]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    with torch.no_grad(), capture_incoming_attention(model) as captured:
        for first, end in ((0, 9), (9, 20), (20, 21), (21, 22)):
            model(ids[None, first:end], past_key_values=cache)
            expected = reduce_last(matrix[:, :end, :end], None, end - first).mean(0)
            torch.testing.assert_close(captured.incoming[0].double(), expected, rtol=0, atol=TOLERANCE)


def test_a_prompt_padded_on_the_right_is_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    """What follows such a prompt does not see its pads, which lie between the tokens that it sees."""
    ids = torch.stack([sequences()[0], sequences()[0]])
    mask = torch.ones_like(ids)
    mask[1, 7:9] = 0
    with pytest.raises(RuntimeError, match=r"token 0 of row 1 see other tokens.*pad prompts on the left"):
        behind_cache(model_of("llama"), ids, 14, mask, start=[0, 0])


def test_packed_rows_behind_a_cache_are_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(RuntimeError, match="cu_seqlens describes whole sequences"):
        behind_cache(model_of("llama"), sequences()[0][None], 7, cu_seqlens=[0, 10, 23])


# What `capture_attention` reduces a layer's matrix to, by the plain formula.
def reduce_by_hand(
    matrix: Tensor,
    counts: Tensor,
    window: int | None = None,
    *,
    heads: str = "mean",
    reduction: str = "mean",
    include_diagonal: bool = False,
) -> Tensor:
    """float64 [H, N, N] over the queries that count, bool [N], then over heads: [N], or with heads [H, N] or [Hkv, N]."""
    place = torch.arange(matrix.shape[-1])
    distance = place[:, None] - place  # query, key
    seen = (distance >= (0 if include_diagonal else 1)) & (distance < (window or len(place))) & counts[:, None]
    received = matrix * seen
    over = received.amax(-2) if reduction == "max" else received.sum(-2)
    if reduction == "mean":
        over = over / seen.sum(-2).clamp(min=1)
    return {"mean": over.mean(0), "max": over.amax(0), "query": over, "kv": over.view(2, -1, len(place)).mean(1)}[heads]


@pytest.mark.parametrize("include_diagonal", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("heads", ["mean", "max", "query", "kv"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_layers_heads_and_reductions(
    family: str, heads: str, reduction: str, include_diagonal: bool, model_of: Callable[[str], PreTrainedModel]
) -> None:
    """gemma3's layers: a window, all, a window."""
    options: dict[str, Any] = {"heads": heads, "reduction": reduction, "include_diagonal": include_diagonal}
    sequence = sequences()[0]
    with torch.no_grad(), capture_attention(model_of(family), **options) as captured:
        model_of(family)(sequence[None], use_cache=False)
    matrices = eager_attentions(family, sequence)
    assert list(captured) == list(matrices)
    for index, layer in captured.items():
        window = layer.layer.sliding_window
        assert window == (WINDOW if family == "gemma3" and index != 1 else None)
        everyone = torch.ones(len(sequence), dtype=torch.bool)
        expected = reduce_by_hand(matrices[index], everyone, window, **options)
        torch.testing.assert_close(layer.incoming[0].double(), expected, rtol=0, atol=TOLERANCE * len(sequence))


@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
@pytest.mark.parametrize("layout", ["left", "packed", "cached"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_queries(family: str, layout: str, reduction: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    """The last three of each sequence, and chosen ones, in all layouts."""
    model, window = model_of(family), WINDOW if family == "mistral" else None
    long, short = sequences()[:2]
    rows = [long, short]
    if layout == "packed":
        ids, places = torch.cat(rows)[None], [(0, slice(0, 23)), (0, slice(23, 39))]
    else:
        rows = [long, short] if layout == "left" else [long, long.flip(0)]
        ids, places = torch.full((2, TOKENS), 5), [(row, slice(TOKENS - len(own), TOKENS)) for row, own in enumerate(rows)]
        for own, place in zip(rows, places, strict=True):
            ids[place] = own
    chosen = torch.zeros(ids.shape, dtype=torch.bool)
    chosen[:, 10::3] = True
    for queries in (3, chosen):
        options: dict[str, Any] = {"heads": "kv", "reduction": reduction}
        cached = 9 if layout == "cached" else 0
        with torch.no_grad():
            cache = model(ids[:, :cached], use_cache=True).past_key_values if cached else None
            given = queries if isinstance(queries, int) else queries[:, cached:]
            start = [0, 7] if layout == "left" else None
            mask = None if start is None else torch.arange(TOKENS) >= torch.tensor(start)[:, None]
            # position_ids that start again are what packs a row.
            positions = torch.cat([torch.arange(len(own)) for own in rows])[None] if layout == "packed" else None
            with capture_attention(model, layers=-1, queries=given, start=start, **options) as captured:
                model(
                    ids[:, cached:],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=cached > 0,
                )
        (layer,) = captured.values()
        for own, (row, place) in zip(rows, places, strict=True):
            counts = torch.zeros(len(own), dtype=torch.bool)
            if isinstance(queries, int):
                counts[-queries:] = True
            else:
                counts = chosen[row, place].clone()
                counts[:cached] = False
            expected = reduce_by_hand(eager_attentions(family, own)[1], counts, window, **options)
            got = layer.incoming[row, :, place]
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE * len(own))


@pytest.mark.parametrize("heads", ["mean", "max", "query", "kv"])
@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_and_steps_add_up_to_one_forward(
    family: str, reduction: str, heads: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model, ids = model_of(family), sequences()[0][None]
    options: dict[str, Any] = {"heads": heads, "reduction": reduction, "include_diagonal": True}
    with torch.no_grad(), capture_attention(model, **options) as whole:
        model(ids, use_cache=False)
    cache = None
    with torch.no_grad(), capture_attention(model, accumulate=True, **options) as captured:
        for first, end in ((0, 9), (9, 20), (20, 21), (21, 22), (22, 23)):
            cache = model(ids[:, first:end], past_key_values=cache, use_cache=True).past_key_values
    assert list(captured) == list(whole)
    for index, layer in captured.items():
        torch.testing.assert_close(layer.incoming, whole[index].incoming, rtol=0, atol=TOLERANCE * TOKENS)


@pytest.mark.parametrize(("layers", "indices"), [(None, [0, 1, 2]), (-1, [2]), ([2, 0], [0, 2]), ([-1, 2], [2])], ids=str)
def test_which_layers(layers: Any, indices: list[int], model_of: Callable[[str], PreTrainedModel]) -> None:
    """A layer asked for twice is there once; all come in the model's order."""
    model = model_of("olmo3")
    before = state_of(model)
    with torch.no_grad(), capture_attention(model, layers=layers) as captured:
        model(sequences()[0][None], use_cache=False)
    assert [layer.layer.index for layer in captured.values()] == list(captured) == indices
    assert state_of(model) == before


def test_layers_without_a_softmax_are_left_out_and_refused_by_name(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("qwen3_next")
    with capture_attention(model) as captured:
        assert list(captured) == [1]
    for layers in (2, [1, 7], []):
        with (
            pytest.raises(ValueError, match=r"layers=.*of the 4 layers of this model these can: 1"),
            capture_attention(model, layers=layers),
        ):
            pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": "sum"}, ValueError, "heads='sum' must be one of 'mean', 'max', 'query', 'kv'"),
        ({"reduction": "median"}, ValueError, "reduction='median' must be one of 'mean', 'lift', 'sum', 'max'"),
        ({"accumulate": True}, ValueError, "accumulate=True needs reduction='sum' or 'max'"),
        ({"queries": torch.ones(1, 23)}, TypeError, "queries has dtype torch.float32"),
        ({"queries": torch.ones(23, dtype=torch.bool)}, ValueError, r"queries has shape \(23,\).*shape \(1, 23\)"),
        ({"queries": 0}, ValueError, "last=0"),
    ],
    ids=str,
)
def test_bad_options_of_capture_attention(
    options: dict[str, Any], error: type[Exception], message: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    with pytest.raises(error, match=message), torch.no_grad(), capture_attention(model_of("llama"), **options):
        model_of("llama")(sequences()[0][None], use_cache=False)


@pytest.mark.parametrize(
    ("model_type", "fields", "named"),
    [
        # Before transformers 5.18 Mamba's layers have another name or none, and sparse attention shows in the call alone.
        pytest.param(
            "mamba", {"state_size": 4}, "layers are of type (linear_attention|mamba)|built from MambaBlock", id="linear"
        ),
        pytest.param(
            "glm_moe_dsa",
            {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 64,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 12,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "index_n_heads": 2,
                "index_head_dim": 16,
                "index_topk": 4,
            },
            "of type (indexed_attention|deepseek_sparse_attention)|attends with indices",
            id="sparse",
        ),
        pytest.param("bloom", {}, "BloomAttention", id="own-attention-code"),
        pytest.param("doge", {"intermediate_size": 64}, "a mask per head", id="dynamic-mask"),
        pytest.param(
            "diffllama",
            {"num_key_value_heads": 2},
            "softmax maps, which may be negative|DiffLlamaSdpaAttention",
            id="differential",
        ),
    ],
)
def test_models_that_cannot_be_scored_are_refused_by_layer_type(model_type: str, fields: dict[str, Any], named: str) -> None:
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, **fields
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = state_of(model)
    with pytest.raises((ValueError, RuntimeError), match=named) as refusal:
        capture(model, sequences()[0][None])
    assert "model with plain attention" in str(refusal.value) or "score with another model" in str(refusal.value)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})],
    ids=["llama", "gemma3"],
)
def test_bidirectional_models_are_refused(family: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a causal softmax layer"):
        capture(build(family, **overrides), sequences()[0][None])


def test_a_bidirectional_forward_is_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    with torch.no_grad(), capture_incoming_attention(model), pytest.raises(RuntimeError, match="is_causal=False"):
        model(sequences()[0][None], use_cache=False, is_causal=False)


def test_what_is_not_a_causal_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear without a transformers config"), capture_incoming_attention(nn.Linear(2, 2)):
        pass
    config = AutoConfig.for_model("t5", d_model=16, d_kv=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="encoder-decoder"), capture_incoming_attention(T5ForConditionalGeneration(config)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "median"}, "statistic='median' must be one of 'mean', 'lift'"),
        ({"head_reduction": "sum"}, "head_reduction='sum' must be one of 'mean', 'max'"),
        ({"start": [0, 0]}, r"start has shape \(2,\) but the forward ran a batch of 1"),
        ({"length": torch.ones(1, 1, dtype=torch.long)}, r"length has shape \(1, 1\)"),
    ],
    ids=["statistic", "head_reduction", "start", "length"],
)
def test_bad_options(options: dict[str, Any], message: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=message):
        capture(model_of("llama"), sequences()[0][None], **options)


def test_fractions_of_tokens_are_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(TypeError, match=r"start=\[0.5\] must hold whole numbers of tokens"):
        capture(model_of("llama"), sequences()[0][None], start=[0.5])


def test_training_forward_under_gradient_checkpointing() -> None:
    ids = sequences()[0][None]
    gradients = {}
    for captures in (False, True):
        model = build("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if captures:
            with capture_incoming_attention(model) as captured:
                model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
            assert not captured.incoming.requires_grad
            expected = capture(build("llama"), ids)[0]
            torch.testing.assert_close(captured.incoming, expected, rtol=0, atol=TOLERANCE)
            assert model.training
        else:
            model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients[captures] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(gradient, gradients[True][name]) for name, gradient in gradients[False].items())


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graph-breaks-allowed", "fullgraph"])
def test_compiled_model_captures_without_recompiling_per_batch(fullgraph: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(build("llama"), backend="eager", fullgraph=fullgraph)
    plain = build("llama")
    ids, _, start, length = padded("right")
    with torch.no_grad():
        without = compiled(ids, use_cache=False).logits
        with capture_incoming_attention(compiled, start=start, length=length) as captured:
            within = compiled(ids, use_cache=False).logits
        assert captured.layer.name == "_orig_mod.model.layers.1.self_attn"
        with torch.compiler.set_stance("fail_on_recompile"):
            for longest in (TOKENS, 9):
                spans = {"start": start, "length": length.clamp(max=longest)}
                with capture_incoming_attention(compiled, **spans) as captured:
                    compiled(ids, use_cache=False)
                torch.testing.assert_close(captured.incoming, capture(plain, ids, **spans)[0], rtol=0, atol=TOLERANCE)
            after = compiled(ids, use_cache=False).logits
    assert torch.equal(without, within)
    assert torch.equal(without, after)


def test_peft_adapter() -> None:
    peft = pytest.importorskip("peft")
    ids = sequences()[0][None]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        build("qwen3"), peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    ).eval()
    before = state_of(adapted)
    incoming, layer = capture(adapted, ids)
    assert layer.name == "base_model.model.model.layers.1.self_attn"
    assert state_of(adapted) == before
    base = capture(build("qwen3"), ids)[0]
    assert (incoming - base).abs().max() > DISTINCT  # the adapter takes part
    with adapted.disable_adapter():
        torch.testing.assert_close(capture(adapted, ids)[0], base, rtol=0, atol=TOLERANCE)


@pytest.fixture
def _process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_distributed_wrappers(wrapper: str) -> None:
    ids = sequences()[0][None]
    expected = capture(build("qwen3"), ids)[0]
    model: nn.Module = build("qwen3")
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before = state_of(model)
    torch.testing.assert_close(capture(model, ids)[0], expected, rtol=0, atol=TOLERANCE)
    assert state_of(model) == before
