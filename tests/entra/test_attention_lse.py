"""The log-sum-exp that attention computes anyway: which calls it is taken from, and that it gives what two passes give.

On a CPU the fused kernel behind SDPA runs for real. No CPU can run the CUDA operations and those of flash-attn. A plain
implementation under the same name and schema stands in for them, so what is checked is what the observer makes of them.
flash-attn itself was never run. The tests marked `gpu` run PyTorch's CUDA operations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, build
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, masking_utils

import entra.capture
from entra.attention_lse import OPERATIONS, LseObserver, flex_attention_lse
from entra.capture import CapturedLayer, capture_incoming_attention
from entra_kernels import incoming_attention

CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Scored with a window, sinks, eager attention, or head dims of q and v that differ: none of these reaches the fused kernel
# with nothing but is_causal.
OWN_PASS = {"phi3", "mistral", "phimoe", "gpt_oss", "gemma2", "deepseek_v3"}
TOKENS = 70


def exact_lse(q: Tensor, k: Tensor, scale: float, *, window: int | None = None, softcap: float | None = None) -> Tensor:
    """float64 [B, H, N] of q [B, H, N, D] and k [B, Hkv, N, D]."""
    return masked_scores(q.double(), k.double(), scale, window=window, softcap=softcap).logsumexp(-1)


def masked_scores(
    q: Tensor, k: Tensor, scale: float, *, window: int | None = None, softcap: float | None = None, causal: bool = True
) -> Tensor:
    """[B, H, N, N], -inf where a query does not see a key."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if window is not None:
        visible = visible.triu(1 - window)
    return scores.masked_fill(~visible, -math.inf)


def inputs(dtype: torch.dtype = torch.float32, *, heads: int = 6, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    """q, k, v [2, heads, 37, dim]; scores wide enough that rows are far from uniform."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, heads, 37, dim), (2, kv_heads, 37, dim), (2, kv_heads, 37, dim))
    return tuple((2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)


def capture(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, CapturedLayer]:
    with torch.no_grad(), capture_incoming_attention(model, **options) as captured:
        model(ids, attention_mask=mask, use_cache=False)
    return captured.incoming, captured.layer


def token_ids(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(7))


# --- the observer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lse_of_the_fused_cpu_kernel(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype)
    with torch.no_grad(), LseObserver() as observer:
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    known = observer.lse_of(q, k, scale=0.3)
    assert known is not None
    lse, source = known
    assert source == CPU_FLASH
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = exact_lse(q, k, 0.3)
    # Budget: twice what the plain arithmetic loses in the accumulation dtype, and the rounding of the result. For half
    # precision the kernel has a faster exponential; its LSE was off by 6.4e-5 at most, at 37 to 1,500 tokens: twice that.
    loss = (masked_scores(q.to(lse.dtype), k.to(lse.dtype), 0.3).logsumexp(-1) - exact).abs().max()
    budget = 2 * loss + torch.finfo(lse.dtype).eps * exact.abs().max() if dtype.itemsize > 2 else 1.3e-4
    assert (lse - exact).abs().max() <= budget


UNFIT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "not causal": (lambda q, k, v: scaled_dot_product_attention(q, k, v), {}),
    "a mask": (lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(37, 37).tril().bool()), {}),
    "another scale": (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), {}),
    "a copy of q": (lambda q, k, v: scaled_dot_product_attention(q.clone(), k, v, is_causal=True), {}),
    "a copy of k": (lambda q, k, v: scaled_dot_product_attention(q, k.clone(), v, is_causal=True), {}),
    "a view of q": (lambda q, k, v: scaled_dot_product_attention(q.flip(1), k, v, is_causal=True), {}),
    "a window": (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), {"sliding_window": 36}),
    "a softcap": (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), {"softcap": 20.0}),
    "two calls": (lambda q, k, v: [scaled_dot_product_attention(q, k, v, is_causal=True) for _ in range(2)], {}),
    "no fused kernel": (lambda q, k, v: scaled_dot_product_attention(q, k, v[..., :8], is_causal=True), {}),
    "no call": (lambda q, k, v: q @ k.mT, {}),
}


@pytest.mark.parametrize("case", UNFIT)
def test_the_lse_of_other_scores_is_not_taken(case: str) -> None:
    attend, options = UNFIT[case]
    q, k, v = inputs(kv_heads=6)
    with torch.no_grad(), LseObserver() as observer:
        attend(q, k, v)
    assert observer.lse_of(q, k, scale=16**-0.5, **options) is None


def test_what_hides_nothing_is_no_obstacle() -> None:
    q, k, v = inputs(kv_heads=6)
    with torch.no_grad(), LseObserver() as observer:
        scaled_dot_product_attention(q, k, v, is_causal=True)
    assert observer.lse_of(q, k, scale=16**-0.5, sliding_window=37, softcap=0.0) is not None


# --- operations that a CPU cannot run, stood in for under their own names ---

_CUDA_OPERATIONS = {
    "_scaled_dot_product_flash_attention": {},
    "_scaled_dot_product_efficient_attention": {"attn_bias": None, "compute_log_sumexp": False},
    "_scaled_dot_product_cudnn_attention": {"attn_bias": None, "compute_log_sumexp": False},
}


def test_schemas_of_the_aten_operations() -> None:
    """The observer goes by these names: the arguments it compares, the one it sets, and those that must not be set."""
    names = sorted(name for name in OPERATIONS if name.startswith("aten::"))
    assert len(names) == 4
    for name in names:
        schema = getattr(torch.ops.aten, name.removeprefix("aten::")).default._schema
        arguments = {argument.name for argument in schema.arguments}
        assert {"query", "key", "value", "is_causal", "scale", "dropout_p"} <= arguments
        others = arguments - {"query", "key", "value", "is_causal", "scale", "dropout_p", "return_debug_mask"}
        asked = {"compute_log_sumexp"} if "efficient" in name or "cudnn" in name else set()
        assert others - {"attn_bias", "attn_mask"} == asked
        assert schema.returns[1].name in ("logsumexp", "log_sumexp")


@pytest.fixture
def cuda_operations() -> Iterator[list[str]]:
    """CPU stand-ins for PyTorch's CUDA operations; yields which of them ran, and whether they were to return an LSE."""
    ran: list[str] = []

    def implementation(name: str) -> Callable[..., Any]:
        def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, scale: float | None = None) -> Any:
            schema = getattr(torch.ops.aten, name).default._schema
            given = dict(zip([argument.name for argument in schema.arguments][3:], args, strict=False))
            wants = given.get("compute_log_sumexp", True)
            ran.append(f"{name} {'with' if wants else 'without'} lse")
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            scores = masked_scores(query.float(), key.float(), factor, causal=given["is_causal"])
            values = value.float().repeat_interleave(query.shape[1] // value.shape[1], 1)
            output, lse = (scores.softmax(-1) @ values).to(query.dtype), scores.logsumexp(-1)
            if "efficient" in name:  # padded to a multiple of 32 rows
                rows = -(-lse.shape[-1] // 32) * 32
                lse = nn.functional.pad(lse, (0, rows - lse.shape[-1]), value=math.nan)[..., : rows if wants else 0]
            if "cudnn" in name:
                lse = lse.unsqueeze(-1) if wants else None
            rest = [torch.empty(0) if "Tensor" in str(output.type) else 0 for output in schema.returns[2:]]
            return (output, lse, *rest)

        return forward

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in _CUDA_OPERATIONS:
            library.impl(name, implementation(name), "CPU")
        yield ran


@pytest.mark.parametrize("name", _CUDA_OPERATIONS)
def test_cuda_operations_are_asked_for_their_lse(
    name: str, cuda_operations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        operation = getattr(torch.ops.aten, name)
        output = operation(query, key, value, *_CUDA_OPERATIONS[name].values(), 0.0, True, scale=scaling)[0]
        return output.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)
    model, ids = build("llama"), token_ids()
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        cuda_operations.clear()
        with capture_incoming_attention(model) as captured:
            within = model(ids, use_cache=False).logits
    asks = "with" if name == "_scaled_dot_product_flash_attention" else "without"  # flash attention always computes it
    assert cuda_operations == [f"{name} {asks} lse", f"{name} with lse"]  # the scored layer is the second
    assert torch.equal(without, within)
    assert captured.layer.lse_source == f"aten::{name}"
    own, layer = capture(model, ids, reuse_lse=False)
    assert layer.lse_source is None
    torch.testing.assert_close(captured.incoming, own, rtol=0, atol=1e-7)


# The schemas were read in flash-attn 2 (flash_attn/flash_attn_interface.py) and flash-attn 3 (hopper/flash_api.cpp, hopper/
# flash_attn_interface.py). The tail of flash-attn 3's is without the arguments that are passed as None here.
_FLASH_ATTN_SCHEMAS = {
    "flash_attn::_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left, "
        "int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn_3::_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, Tensor? out_=None, "
        "Tensor? cu_seqlens_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, Tensor? page_table=None, "
        "float? softmax_scale=None, bool causal=False, int window_size_left=-1, int window_size_right=-1, "
        "int attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None, "
        "int num_splits=1, bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn_3::fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, float? softmax_scale=None, bool is_causal=False, "
        "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
        "bool is_rotary_interleaved=False, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


@pytest.fixture(params=_FLASH_ATTN_SCHEMAS)
def flash_attn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A flash-attn of plain arithmetic; yields its operation's name, transformers' name for it, and more arguments to pass."""
    name: str = request.param
    namespace, operation = name.split("::")
    if hasattr(getattr(torch.ops, namespace), operation):
        pytest.skip(f"{name} is installed: a stand-in cannot take its name")
    extra: dict[str, Any] = {}

    def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        schema = getattr(getattr(torch.ops, namespace), operation).default._schema
        given = {argument.name: argument.default_value for argument in schema.arguments}
        given |= dict(zip([argument.name for argument in schema.arguments][3:], args, strict=False)) | kwargs
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        scores = masked_scores(
            q,
            k,
            given["softmax_scale"],
            window=given["window_size_left"] + 1 or None,
            softcap=given["softcap"],
            causal=given.get("causal", given.get("is_causal")),
        )
        output = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return output.transpose(1, 2).contiguous(), scores.logsumexp(-1), torch.empty(0), torch.empty(0)

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> Any:
        """What transformers' flash_attention_forward passes on."""
        windowed = sliding_window is not None and key.shape[2] > sliding_window
        options = {
            "softmax_scale": scaling,
            "is_causal" if operation == "fwd" else "causal": True,
            "window_size_left": sliding_window - 1 if windowed else -1,
            "window_size_right": sliding_window - 1 if windowed else -1,
            "softcap": softcap or 0.0,
        }
        if namespace == "flash_attn":
            options |= {"dropout_p": 0.0, "alibi_slopes": None, "return_softmax": False}
        heads_last = (x.transpose(1, 2) for x in (query, key, value))
        return getattr(getattr(torch.ops, namespace), operation)(*heads_last, **(options | extra))[0], None

    version = "flash_attention_3" if namespace == "flash_attn_3" else "flash_attention_2"
    monkeypatch.setitem(AttentionInterface._global_mapping, version, attend)
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define(operation + _FLASH_ATTN_SCHEMAS[name])
        library.impl(operation, forward, "CPU")
        yield name, version, extra


def with_flash_attention(family: str, version: str) -> nn.Module:
    """A model whose every layer asks for transformers' `version`; loading it that way would look for the package."""
    model = build(family)
    model.config._attn_implementation_internal = version
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_flash_attn(family: str, flash_attn: tuple[str, str, dict[str, Any]]) -> None:
    """With the window of Mistral and the softcap of Gemma 2, which the operation applies itself."""
    name, version, _ = flash_attn
    model, ids = with_flash_attention(family, version), token_ids()
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        with capture_incoming_attention(model, length=[TOKENS, 41]) as captured:
            within = model(ids, use_cache=False).logits
    assert torch.equal(without, within)
    assert captured.layer.lse_source == name
    own, layer = capture(model, ids, length=[TOKENS, 41], reuse_lse=False)
    assert layer.lse_source is None
    torch.testing.assert_close(captured.incoming, own, rtol=0, atol=1e-7)


@pytest.mark.parametrize("argument", ["alibi_slopes", "attention_chunk", "window_size_left", "softmax_scale", "softcap"])
def test_flash_attn_whose_arguments_change_the_scores(argument: str, flash_attn: tuple[str, str, dict[str, Any]]) -> None:
    name, version, extra = flash_attn
    if argument not in _FLASH_ATTN_SCHEMAS[name]:
        return  # flash-attn 2 has no chunks, 3 no slopes
    model, ids = with_flash_attention("llama", version), token_ids()
    values = {"alibi_slopes": torch.ones(4), "attention_chunk": 8, "window_size_left": 9, "softmax_scale": 0.1, "softcap": 9.0}
    extra[argument] = values[argument]
    incoming, layer = capture(model, ids)
    assert layer.lse_source is None
    assert incoming.isfinite().all()


# --- FlexAttention ---


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch's uncompiled FlexAttention behind transformers' name; "lse": what becomes of the LSE before it is returned."""
    options: dict[str, Any] = {"lse": lambda lse: lse}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        output, aux = flex_attention(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        return output.transpose(1, 2).contiguous(), options["lse"](aux.lse)

    def uncompiled(**arguments: Any) -> Any:
        return create_block_mask(**{**arguments, "_compile": False})  # compiling takes 20 s

    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)
    return options


def test_flex_attention(flex: dict[str, Any]) -> None:
    """transformers' own flex_attention_forward returns no LSE on a CPU; torch's does, with the same conventions."""
    model, ids = build("llama", attn_implementation="flex_attention"), token_ids()
    incoming, layer = capture(model, ids)
    assert layer.lse_source == "flex_attention"
    own, _ = capture(model, ids, reuse_lse=False)
    torch.testing.assert_close(incoming, own, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", ["rounded", "none", "padded left", "window"])
def test_flex_attention_whose_lse_is_not_taken(case: str, flex: dict[str, Any]) -> None:
    flex["lse"] = {"rounded": lambda lse: lse.bfloat16(), "none": lambda lse: None}.get(case, flex["lse"])
    model, ids = build("mistral" if case == "window" else "llama", attn_implementation="flex_attention"), token_ids()
    mask = torch.ones_like(ids)
    mask[1, :9] = case != "padded left"
    incoming, layer = capture(model, ids, mask)
    assert layer.lse_source is None
    assert torch.equal(incoming, capture(model, ids, mask, reuse_lse=False)[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flex_attention_of_packed_rows(family: str, flex: dict[str, Any]) -> None:
    """Its log-sum-exp would be right, but is not taken; the BlockMask tells which sequences there are."""
    model = build(family, attn_implementation="flex_attention")
    ids, lengths = token_ids(1), (31, 1, TOKENS - 32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad(), capture_incoming_attention(model) as captured:
        model(ids, position_ids=positions, use_cache=False)
    assert captured.layer.lse_source is None
    assert captured.cu_seqlens is not None
    assert captured.cu_seqlens.tolist() == [0, 31, 32, TOKENS]
    alone = torch.cat([capture(model, row, reuse_lse=False)[0] for row in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(captured.incoming, alone, rtol=0, atol=5e-6)


def test_flex_attention_without_a_mask_is_not_causal() -> None:
    q, k, _ = inputs()
    lse = torch.zeros(q.shape[:3])
    assert flex_attention_lse((None, lse), None, q, k, scale=1.0, sliding_window=None, softcap=None) is None


# --- inside a capture ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_agrees_with_two(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def spy(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, options))
        return incoming_attention(q, k, **options)

    monkeypatch.setattr(entra.capture, "incoming_attention", spy)
    model, ids = build(family, dtype=dtype), token_ids()
    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        with capture_incoming_attention(model, length=[TOKENS, 41]) as captured:
            within = model(ids, use_cache=False).logits
    assert torch.equal(without, within)
    own, layer = capture(model, ids, length=[TOKENS, 41], reuse_lse=False)
    assert captured.layer.lse_source == (None if family in OWN_PASS else CPU_FLASH)
    assert layer.lse_source is None
    (q, k, reusing), (_, _, two_passes) = calls
    assert (reusing["lse"] is None) == (family in OWN_PASS)
    assert two_passes["lse"] is None
    if family in OWN_PASS:
        assert torch.equal(captured.incoming, own)
        return
    # Budget: twice what the same formula loses against float64 on the same q and k, in float32 with probabilities rounded to
    # this dtype. Besides, two roundings of the result, and the error of the log-sum-exp that is taken. Another processor's SDPA
    # rounds otherwise; `test_lse_of_the_fused_cpu_kernel` has a budget for that.
    assert q.dtype == dtype
    exact = incoming_attention(q.double(), k.double(), scale=reusing["scale"], length=reusing["length"])
    scores = masked_scores(q.float(), k.float(), reusing["scale"])
    eager = (scores - scores.logsumexp(-1, keepdim=True)).exp().to(dtype).float()
    rows = torch.arange(TOKENS)
    eager = eager.masked_fill(rows[:, None] >= reusing["length"][:, None, None, None], 0.0).tril(-1).sum(-2).mean(1)
    divisor = (reusing["length"][:, None] - 1 - rows).clamp(min=1)
    budget = 2 * (eager / divisor - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.max()
    assert (own - exact).abs().max() <= budget
    off = (reusing["lse"] - exact_lse(q, k, reusing["scale"])).abs().max()
    assert (captured.incoming - exact).abs().max() <= budget + off * exact.max()


def test_when_the_lse_is_not_that_of_the_scored_rows() -> None:
    model, ids = build("qwen2"), token_ids()
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    assert capture(model, ids)[1].lse_source == CPU_FLASH
    assert capture(model, ids, torch.ones_like(ids))[1].lse_source == CPU_FLASH
    assert capture(model, ids, length=[5, TOKENS])[1].lse_source == CPU_FLASH
    assert capture(model, ids, length=[5, TOKENS], statistic="lift", head_reduction="max")[1].lse_source == CPU_FLASH
    assert capture(model, ids, padding)[1].lse_source is None
    assert capture(model, ids, padding, start=[9, 0])[1].lse_source is None
    assert capture(model, ids, start=[0, 0])[1].lse_source is None
    assert capture(model, ids, reuse_lse=False)[1].lse_source is None
    assert capture(build("qwen2", attn_implementation="eager"), ids)[1].lse_source is None
    with sdpa_kernel(SDPBackend.MATH):
        assert capture(model, ids)[1].lse_source is None


def test_right_padding_needs_no_mask() -> None:
    model, ids = build("llama"), token_ids()
    together, layer = capture(model, ids, length=[TOKENS, 23])
    alone, _ = capture(model, ids[1:, :23], reuse_lse=False)
    assert layer.lse_source == CPU_FLASH
    torch.testing.assert_close(together[1:, :23], alone, rtol=0, atol=5e-6)  # another shape is another rounding in the model
    assert not together[1, 23:].any()


def test_sinks_are_not_in_the_lse(flash_attn: tuple[str, str, dict[str, Any]]) -> None:
    model = with_flash_attention("gpt_oss", flash_attn[1])
    layer = capture(model, token_ids())[1]
    assert layer.has_sinks
    assert layer.lse_source is None


@pytest.fixture
def _no_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("attention was observed")

    monkeypatch.setattr(entra.capture, "LseObserver", refuse)


@pytest.mark.usefixtures("_no_observer")
def test_attention_is_not_observed_when_its_lse_could_not_be_taken() -> None:
    model, ids = build("llama"), token_ids()
    padding = torch.ones_like(ids)
    padding[0, :9] = 0
    capture(model, ids, padding)
    capture(model, ids, start=[0, 0])
    capture(model, ids, reuse_lse=False)
    capture(build("llama", attn_implementation="eager"), ids)
    with pytest.raises(AssertionError, match="attention was observed"):
        capture(model, ids)


@pytest.mark.usefixtures("_no_observer")
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_compiled_models_compute_their_own(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While tracing, transformers gives SDPA a mask, but flash attention none: only there it depends on being compiled."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", AttentionInterface()["sdpa"])
    torch._dynamo.reset()
    compiled = torch.compile(with_flash_attention("llama", implementation), backend="eager", fullgraph=True)
    incoming, layer = capture(compiled, token_ids())
    assert layer.lse_source is None
    own, _ = capture(build("llama"), token_ids(), reuse_lse=False)
    torch.testing.assert_close(incoming, own, rtol=0, atol=5e-6)


def test_a_forward_that_records_gradients() -> None:
    ids = token_ids()
    gradients = []
    for reuse_lse in (True, False):
        model = build("llama").train()
        with capture_incoming_attention(model, reuse_lse=reuse_lse) as captured:
            model(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert captured.layer.lse_source == (CPU_FLASH if reuse_lse else None)
        assert not captured.incoming.requires_grad
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_beside_a_mode_that_takes_arguments_by_position() -> None:
    model, ids = build("llama"), token_ids()
    with FlopCounterMode(display=False) as counter:
        layer = capture(model, ids)[1]
    assert layer.lse_source == CPU_FLASH
    assert counter.get_total_flops() > 0


def test_nested_captures_both_reuse() -> None:
    model, ids = build("llama"), token_ids()
    with torch.no_grad(), capture_incoming_attention(model) as outer, capture_incoming_attention(model) as inner:
        model(ids, use_cache=False)
    assert outer.layer.lse_source == inner.layer.lse_source == CPU_FLASH
    assert torch.equal(outer.incoming, inner.incoming)


def test_an_attention_function_of_someone_else_runs_unobserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a torch.compile, which a dispatch mode would turn off."""
    modes = []

    def attend(*args: Any, **kwargs: Any) -> Any:
        modes.append(torch._C._len_torch_dispatch_stack())
        return AttentionInterface()["sdpa"](*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "another", attend)
    model = build("llama")
    model.model.layers[1].self_attn.config = config = type(model.config)(**model.config.to_dict())
    config._attn_implementation_internal = "another"
    assert capture(model, token_ids())[1].lse_source is None
    assert modes == [0]


def test_no_mode_is_left_when_attention_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = AttentionInterface()["sdpa"]

    def fail_when_observed(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack() == 0:
            return sdpa(*args, **kwargs)
        raise ZeroDivisionError

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", fail_when_observed)
    model = build("llama")
    config = model.model.layers[1].self_attn.config
    with pytest.raises(ZeroDivisionError):
        capture(model, token_ids())
    assert torch._C._len_torch_dispatch_stack() == 0
    assert model.model.layers[1].self_attn.config is config


# --- CUDA ---


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_cuda_backends(backend: str, dtype: torch.dtype, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {
        "FLASH_ATTENTION": "aten::_scaled_dot_product_flash_attention",
        "EFFICIENT_ATTENTION": "aten::_scaled_dot_product_efficient_attention",
        "CUDNN_ATTENTION": "aten::_scaled_dot_product_cudnn_attention",
    }[backend]
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def spy(q: Tensor, k: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, options))
        return incoming_attention(q, k, **options)

    monkeypatch.setattr(entra.capture, "incoming_attention", spy)
    model = build("llama", head_dim=64, num_key_value_heads=kv_heads, dtype=dtype).cuda()
    ids = token_ids(2, 301).cuda()  # not a multiple of 32
    with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            without = model(ids, use_cache=False).logits
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            pytest.skip(f"{backend} does not run {dtype} with {kv_heads} kv heads here")
        with capture_incoming_attention(model, length=[301, 100]) as captured:
            within = model(ids, use_cache=False).logits
    assert torch.equal(without, within)
    assert captured.layer.lse_source == name
    q, k, options = calls[0]
    lse, exact_rows = options["lse"], exact_lse(q, k, options["scale"])
    # The kernels accumulate in float32 whatever the inputs are, and TF32 is off; 1e-4 is what a fast exponential may cost.
    assert (lse - exact_rows).abs().max() <= 1e-4
    exact = incoming_attention(q.double(), k.double(), scale=options["scale"], length=options["length"], backend="reference")
    assert ((captured.incoming - exact).abs() <= 2e-4 * exact + 1e-7).all()
