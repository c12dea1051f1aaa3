"""Several sequences packed into a row: each is scored like the same sequence in a row to itself, or the forward is refused.

The reference is that of test_capture.py: every sequence alone through the eager model, reduced in float64.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_reference import TOLERANCE, eager_attentions, reduce_heads
from tiny_models import FAMILIES, VOCABULARY, build
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DataCollatorWithFlattening,
    PreTrainedModel,
)
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

import entra.capture
from entra.capture import Capture, capture_incoming_attention
from entra_kernels import incoming_attention

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 14, 1, 6)
TOKENS = sum(LENGTHS)
CU_SEQLENS = [0, 9, 23, 24, 30]

# Layers that carry a state over, and masks that are built without position_ids.
REFUSED = {"qwen3_next": "linear_attention", "qwen3_5": "linear_attention", "gpt_oss": "does not keep it apart"}


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], PreTrainedModel]:
    """Each family's model with its default attention, built once."""
    return functools.cache(build)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def packed(order: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
    """ids and position_ids [1, T] of the sequences one after the other."""
    rows = [sequences()[i] for i in order]
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


def capture(
    model: nn.Module, ids: Tensor, positions: Tensor | None, call: dict[str, Any] | None = None, **options: Any
) -> Capture:
    """A finished capture of a forward without cache."""
    with torch.no_grad(), capture_incoming_attention(model, **options) as captured:
        model(ids, **{"position_ids": positions, "use_cache": False, **(call or {})})
    return captured


def expected(model: nn.Module, **options: Any) -> Tensor:
    """float32 [T], every sequence in a row to itself, one after the other."""
    return torch.cat([capture(model, row[None], None, **options).incoming[0] for row in sequences()])


def assert_each_as_alone(captured: Capture, model: nn.Module, **options: Any) -> None:
    torch.testing.assert_close(captured.incoming, expected(model, **options)[None], rtol=0, atol=TOLERANCE)
    cu_seqlens = captured.cu_seqlens
    assert cu_seqlens is not None
    assert cu_seqlens.tolist() == CU_SEQLENS
    assert captured.layer.lse_source is None


# Sequences that are found, or given.


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_packed_sequences_are_scored_like_rows_of_their_own(family: str, model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of(family)
    ids, positions = packed()
    found = capture(model, ids, positions)
    given = capture(model, ids, positions, cu_seqlens=CU_SEQLENS)
    assert_each_as_alone(found, model)
    assert torch.equal(given.incoming, found.incoming)
    layer = found.layer
    for row, first in zip(sequences(), CU_SEQLENS, strict=False):
        exact = reduce_heads(eager_attentions(family, row)[layer.index], layer.sliding_window).mean(0)
        got = found.incoming[0, first : first + len(row)].double()
        torch.testing.assert_close(got, exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("given", [None, CU_SEQLENS], ids=["found", "given"])
def test_models_that_packing_breaks_are_refused_when_packed(
    family: str, given: list[int] | None, model_of: Callable[[str], PreTrainedModel]
) -> None:
    model = model_of(family)
    with pytest.raises(RuntimeError, match=REFUSED[family]) as refusal:
        _ = capture(model, *packed(), cu_seqlens=given).incoming
    assert "one sequence per row" in str(refusal.value)
    alone = sequences()[1][None]
    assert torch.equal(
        capture(model, alone, None, cu_seqlens=[0, 14]).incoming, capture(model, alone, None, start=[0]).incoming
    )


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("falcon_h1", {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_ssm": 96}),
        ("minimax", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_other_layers_that_carry_a_state_are_refused_when_packed(model_type: str, fields: dict[str, Any]) -> None:
    common = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **{**common, "num_key_value_heads": 2, "intermediate_size": 64, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert capture(model, sequences()[0][None], None).incoming.any()
    with pytest.raises(RuntimeError, match="carries a state from each into the next"):
        capture(model, *packed())


def test_packed_sequences_equal_the_kernel_alone_bit_for_bit(
    model_of: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def spy(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, options))
        return incoming_attention(q, k, **options)

    monkeypatch.setattr(entra.capture, "incoming_attention", spy)
    for family in ("qwen3", "mistral", "gemma2"):
        captured = capture(model_of(family), *packed())
        q, k, options = calls.pop()
        assert not calls
        options = {name: options[name] for name in ("scale", "sliding_window", "softcap", "sinks", "backend")}
        for first, end in itertools.pairwise(CU_SEQLENS):
            alone = incoming_attention(*(x[first:end].transpose(0, 1)[None] for x in (q, k)), **options)
            assert torch.equal(captured.incoming[0, first:end], alone[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{"statistic": "lift"}, {"head_reduction": "max"}], ids=["lift", "max"])
def test_statistics_of_packed_rows(family: str, options: dict[str, Any], model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of(family)
    # Lift multiplies attention, and its error, by up to the number of visible keys.
    tolerance = TOLERANCE * (max(LENGTHS) if "statistic" in options else 1)
    got = capture(model, *packed(), **options).incoming[0]
    torch.testing.assert_close(got, expected(model, **options), rtol=0, atol=tolerance)


def test_a_batch_of_packed_rows(model_of: Callable[[str], PreTrainedModel]) -> None:
    model = model_of("llama")
    rows = [packed(order) for order in ((0, 1, 2, 3), (3, 1, 0, 2))]
    ids, positions = (torch.cat(parts) for parts in zip(*rows, strict=True))
    captured = capture(model, ids, positions)
    assert captured.cu_seqlens is not None
    assert captured.cu_seqlens.tolist() == [0, 9, 23, 24, 30, 36, 50, 59, 60]
    for row, alone in enumerate(rows):
        got, want = captured.incoming[row], capture(model, *alone).incoming[0]
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_a_row_of_one_sequence_is_not_packed(model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of("llama"), sequences()[1][None]
    captured = capture(model, ids, torch.arange(14)[None])
    assert captured.cu_seqlens is None
    assert torch.equal(captured.incoming, capture(model, ids, None).incoming)


def test_tokens_beyond_the_length_of_a_packed_sequence_count_for_nothing(model_of: Callable[[str], PreTrainedModel]) -> None:
    """A trailing EOS, say: it attends, but it is not scored."""
    model, length = model_of("mistral"), [6, 14, 0, 5]
    for statistic in ("mean", "lift"):
        got = capture(model, *packed(), cu_seqlens=CU_SEQLENS, length=length, statistic=statistic).incoming[0]
        for row, first, count in zip(sequences(), CU_SEQLENS, length, strict=False):
            assert not got[first + count : first + len(row)].any()
            if count:
                alone = capture(model, row[None], None, length=[count], statistic=statistic).incoming[0, :count]
                torch.testing.assert_close(got[first : first + count], alone, rtol=0, atol=TOLERANCE * max(LENGTHS))


# Attention implementations.


def test_the_batches_of_transformers_own_collator(model_of: Callable[[str], PreTrainedModel]) -> None:
    """It gives position_ids and flash attention's arguments, which SDPA does not look at."""
    rows = [{"input_ids": row.tolist()} for row in sequences()]
    batch = dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(rows))
    ids, positions = batch.pop("input_ids"), batch.pop("position_ids")
    batch.pop("labels")
    assert "cu_seq_lens_q" in batch
    assert_each_as_alone(capture(model_of("llama"), ids, positions, batch), model_of("llama"))


def test_packed_rows_of_eager_attention() -> None:
    model = build("qwen3", attn_implementation="eager")
    assert_each_as_alone(capture(model, *packed()), model)


def test_a_hand_made_mask_of_packed_sequences(model_of: Callable[[str], PreTrainedModel]) -> None:
    ids, positions = packed()
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    mask = (sequence[:, None] == sequence[None]).tril()
    model = model_of("llama")
    assert_each_as_alone(capture(model, ids, positions, {"attention_mask": mask[None, None]}), model)
    mask[20, 10] = False  # a token of the second sequence that does not see all of it
    with pytest.raises(RuntimeError, match=r"mask of .* lets token 20 of row 0 see other tokens"):
        _ = capture(model, ids, positions, {"attention_mask": mask[None, None]}).incoming


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model whose attention is a stand-in for flash attention, in plain arithmetic, that packs by transformers' own rules."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        scaling: float,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Any:
        cuts = [0, query.shape[2]]
        if mask is None and None not in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k):
            cuts = cu_seq_lens_q.tolist()
        elif mask is None and _is_packed_sequence(position_ids, len(query)):
            cuts = prepare_fa_kwargs_from_position_ids(position_ids)[0][0].tolist()
        output = torch.zeros_like(query)
        for first, end in itertools.pairwise(cuts):
            q, k, v = (x[:, :, first:end] for x in (query, key, value))
            output[:, :, first:end] = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
        return output.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def varlen(cu_seqlens: list[int]) -> dict[str, Any]:
    """What flash attention is told of packed sequences."""
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32)
    longest = int(boundaries.diff().max())
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest}


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens", "both"])
def test_packed_rows_of_flash_attention(told: str, flash: PreTrainedModel) -> None:
    ids, positions = packed()
    call = {} if told == "position_ids" else varlen(CU_SEQLENS)
    if told == "cu_seq_lens":  # then positions are what the caller makes of them
        positions = torch.arange(TOKENS)[None]
        captured = capture(flash, ids, positions, call)
        with torch.no_grad():
            alone = [
                capture(flash, row[None], positions[:, a : a + len(row)])
                for row, a in zip(sequences(), CU_SEQLENS, strict=False)
            ]
        want = torch.cat([one.incoming[0] for one in alone])
        torch.testing.assert_close(captured.incoming[0], want, rtol=0, atol=TOLERANCE)
        assert captured.cu_seqlens is not None
        assert captured.cu_seqlens.tolist() == CU_SEQLENS
        return
    assert_each_as_alone(capture(flash, ids, positions, call), flash)
    assert_each_as_alone(capture(flash, ids, positions, call, cu_seqlens=CU_SEQLENS), flash)


def test_flash_attention_does_not_pack_a_batch(flash: PreTrainedModel) -> None:
    ids, positions = (x.expand(2, -1) for x in packed())
    with pytest.raises(RuntimeError, match=r"begins at token 9 of row 0 .* does not keep it apart"):
        _ = capture(flash, ids, positions).incoming


def test_positions_that_flash_attention_reads_otherwise_are_refused(flash: PreTrainedModel) -> None:
    """It takes every lowest position for a beginning, and leaves out what stands before the first."""
    ids, _ = packed()
    positions = torch.cat([torch.arange(3, 12), torch.arange(TOKENS - 9)])[None]
    with pytest.raises(RuntimeError, match="begins at token 0 of row 0"):
        _ = capture(flash, ids, positions).incoming


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_of_a_prompt_in_the_cache_of_flash_attention(side: str, flash: PreTrainedModel) -> None:
    """A completion does not see them, and between tokens that it sees they would be taken for seen."""
    ids = packed()[0].expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    with torch.no_grad():
        cache = flash(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).past_key_values
        with capture_incoming_attention(flash, start=[0, 3 if side == "left" else 0]) as captured:
            flash(ids[:, 9:], attention_mask=mask, past_key_values=cache)
    if side == "left":
        assert captured.incoming.shape == ids.shape
    else:
        with pytest.raises(RuntimeError, match=r"token 0 of row 1 see other tokens.*pad prompts on the left"):
            _ = captured.incoming


# What cannot be scored one by one.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"use_cache": True}, "does not keep it apart"),
        ({"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}, "does not keep it apart"),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor(CU_SEQLENS, dtype=torch.int32)}, "does not keep it apart"),
    ],
    ids=["a cache", "an attention mask", "cu_seq_lens of SDPA"],
)
def test_sequences_that_see_each_other_are_refused(
    call: dict[str, Any], message: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    ids, positions = packed()
    for options in ({}, {"length": [TOKENS]}, {"cu_seqlens": CU_SEQLENS}):
        with pytest.raises(RuntimeError, match=message) as refusal:
            _ = capture(model_of("llama"), ids, positions, call, **options).incoming
        assert "token 9" in str(refusal.value)
        assert "position_ids that start again" in str(refusal.value)


def test_positions_that_the_model_does_not_hand_on_to_attention_are_seen() -> None:
    """GPT-BigCode keeps them to itself."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_bigcode", **sizes)).eval()
    before = len(model._forward_pre_hooks)
    ids, positions = packed()
    assert_each_as_alone(capture(model, ids, positions), model)
    with pytest.raises(RuntimeError, match=r"token 9 of row 0 .* does not keep it apart"):
        _ = capture(model, ids, positions, {"use_cache": True}).incoming
    assert len(model._forward_pre_hooks) == before


def test_positions_that_are_not_given_by_name_are_seen() -> None:
    """GPT-BigCode takes them as its fifth argument, wrappers hand them on."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_bigcode", **sizes)).eval()
    ids, positions = packed()
    for called in (model, torch.nn.DataParallel(model)):
        with torch.no_grad(), capture_incoming_attention(called) as captured:
            called(ids, None, torch.ones_like(ids), None, positions, use_cache=False)
        with pytest.raises(RuntimeError, match=r"token 9 of row 0 .* does not keep it apart"):
            _ = captured.incoming


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def multimodal(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model whose positions have three planes: time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    tokens = {"image_token_id": 95, "video_token_id": 96, "vision_start_token_id": 97, "vision_end_token_id": 98}
    config = AutoConfig.for_model(
        request.param, text_config={**sizes, **heads, "rope_parameters": rope}, vision_config=vision, **tokens
    )
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("planes", [0, 3, 4])
def test_multimodal_positions_that_start_again_are_scored_apart_or_refused(planes: int, multimodal: PreTrainedModel) -> None:
    """The models cut their masks by a plane of text positions, which is the first of four; Qwen3-VL by two dimensions too."""
    ids, positions = packed()
    positions = positions if planes == 0 else positions.expand(planes, 1, -1)
    captured = capture(multimodal, ids, positions)
    if planes == 4 or (planes == 0 and multimodal.config.model_type == "qwen3_vl"):
        assert_each_as_alone(captured, multimodal)
        return
    with pytest.raises(RuntimeError, match=r"token 9 of row 0 .* does not keep it apart"):
        _ = captured.incoming


def test_positions_inside_of_a_picture_begin_no_sequence(multimodal: PreTrainedModel) -> None:
    """Height falls at the next frame of a video and width at the next line, but never time; text goes on after the last."""
    picture = torch.tensor([[2] * 4 + [3] * 4, [2, 2, 3, 3] * 2, [2, 3] * 4])
    text = torch.arange(2).expand(3, -1)
    positions = torch.cat([text, picture, 4 + torch.arange(4).expand(3, -1)], dim=1)[:, None]
    ids = packed()[0][:, : positions.shape[-1]]
    assert capture(multimodal, ids, positions).cu_seqlens is None


@pytest.mark.parametrize("fill", [-1e9, -1e4, torch.finfo(torch.float32).min, -float("inf")])
def test_hand_made_float_masks_cut_whatever_they_are_filled_with(
    fill: float, model_of: Callable[[str], PreTrainedModel]
) -> None:
    ids, positions = packed()
    seen = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).tril().bool()
    mask = torch.where(seen, 0.0, fill)[None, None]
    for given in (None, positions):
        captured = capture(model_of("llama"), ids, given, {"attention_mask": mask})
        assert_each_as_alone(captured, model_of("llama"))


def test_masks_that_bias_scores_are_refused(model_of: Callable[[str], PreTrainedModel]) -> None:
    model, ids = model_of("llama"), packed()[0]
    hidden = torch.full((TOKENS, TOKENS), -1e9).triu(1)
    slope = -0.1 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(min=0)  # ALiBi
    for options in ({}, {"length": [TOKENS]}, {"cu_seqlens": [0, TOKENS]}):
        with pytest.raises(RuntimeError, match=r"adds a number to the scores of token 1 of row 0 .* pass a bool mask"):
            _ = capture(model, ids, None, {"attention_mask": (hidden + slope)[None, None]}, **options).incoming
    apart = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).tril().bool()
    mask = torch.where(apart, 0.0, -1e9)
    mask[20, 10] = -3.0
    with pytest.raises(RuntimeError, match="adds a number to the scores of token 20"):
        _ = capture(model, ids, None, {"attention_mask": mask[None, None]}).incoming


def test_geometry_that_is_not_that_of_the_call(model_of: Callable[[str], PreTrainedModel]) -> None:
    ids, positions = packed()
    model = model_of("llama")
    with pytest.raises(RuntimeError, match=r"row 0 packs several sequences, .* keeps token 9 apart"):
        _ = capture(model, ids, positions, length=[TOKENS]).incoming
    assert capture(model, ids, positions, length=[9]).incoming.any()  # what lies outside the span does not matter
    with pytest.raises(RuntimeError, match="keeps token 23 apart from the one before it, but cu_seqlens begins no sequence"):
        _ = capture(model, ids, positions, cu_seqlens=[0, 9, 24, 30]).incoming
    with pytest.raises(RuntimeError, match="cu_seqlens begins a sequence at token 12, but the attention"):
        _ = capture(model, ids, positions, cu_seqlens=[0, 9, 12, 23, 24, 30]).incoming


def test_attention_functions_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "another", AttentionInterface()["sdpa"])
    model = build("llama")
    model.config._attn_implementation_internal = "another"
    ids, positions = packed()
    assert capture(model, ids, None).incoming.any()
    with pytest.raises(RuntimeError, match=r"token 9 of row 0 .* function 'another' .* is not known; pass cu_seqlens"):
        _ = capture(model, ids, positions).incoming
    assert capture(model, ids, positions, cu_seqlens=CU_SEQLENS).incoming.any()
    assert capture(model, ids, positions, length=[9]).incoming.any()  # what lies outside the span does not matter


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cu_seqlens": [0, 30], "start": [0]}, ValueError, "start and cu_seqlens were both given"),
        ({"cu_seqlens": [[0, 30]]}, ValueError, r"cu_seqlens has shape \(1, 2\); it must be \(S \+ 1,\)"),
        ({"cu_seqlens": [0]}, ValueError, r"cu_seqlens has shape \(1,\)"),
        ({"cu_seqlens": [3, 30]}, ValueError, r"cu_seqlens=\[3, 30\] must start at 0 and never fall"),
        ({"cu_seqlens": [0, 9, 8]}, ValueError, "must start at 0 and never fall"),
        ({"cu_seqlens": [0, 9, 31]}, ValueError, "sequence 1 spans tokens 9 to 31"),
        ({"cu_seqlens": [0, 9.5]}, TypeError, "cu_seqlens=.* must hold whole numbers"),
        ({"cu_seqlens": CU_SEQLENS, "length": [3]}, ValueError, r"length has shape \(1,\) but cu_seqlens has 4 sequences"),
        ({"cu_seqlens": CU_SEQLENS, "length": [9, 15, 1, 6]}, ValueError, "must lie in 0 to the sequences' lengths"),
    ],
)
def test_cu_seqlens_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str, model_of: Callable[[str], PreTrainedModel]
) -> None:
    with pytest.raises(error, match=message):
        capture(model_of("llama"), *packed(), **options)


def test_cu_seqlens_of_several_rows(model_of: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=r"one row of packed sequences, .* but the forward ran a batch of 2"):
        capture(model_of("llama"), packed()[0].expand(2, -1), None, cu_seqlens=CU_SEQLENS)


def test_packed_rows_of_a_compiled_model() -> None:
    """Values cannot be looked at inside a graph: sequences that are given are scored, sequences to be found are refused."""
    torch._dynamo.reset()
    model = build("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, positions = packed()
    given = capture(compiled, ids, positions, cu_seqlens=CU_SEQLENS)
    torch.testing.assert_close(given.incoming[0], expected(model), rtol=0, atol=TOLERANCE)
    with pytest.raises(RuntimeError, match="cannot be counted inside a compiled model; pass cu_seqlens"):
        _ = capture(compiled, ids, positions).incoming
