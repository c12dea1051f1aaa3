"""Calls that launch every kernel in every way that gives other machine code: head dims, dtypes, options, and layouts. A model
has the first layout; a user may have the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.static.launches import DEVICE, Call
from entra_kernels import copies, first_places, incoming_attention, linear_token_logprobs, redundancy, token_logprobs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128, 192, 256, 512)
BATCH, HEADS, KV_HEADS, TOKENS, ROWS = 2, 8, 2, 1024, 512


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


LAYOUTS: dict[str, Callable[[int, int, int, int, torch.dtype], Tensor]] = {
    "": lambda b, h, n, d, dtype: empty(b, n, h, d, dtype=dtype).transpose(1, 2),
    "tokens within heads": lambda b, h, n, d, dtype: empty(b, h, n, d, dtype=dtype),
    "fused projection": lambda b, h, n, d, dtype: (
        empty(b, n, 2 * h * d, dtype=dtype)[..., h * d :].unflatten(-1, (h, d)).transpose(1, 2)
    ),
    "rows with a gap": lambda b, h, n, d, dtype: empty(b, n, h, d + 1, dtype=dtype)[..., :d].transpose(1, 2),
    "every second dim": lambda b, h, n, d, dtype: empty(b, h, n, 2 * d, dtype=dtype)[..., ::2],
    "tokens innermost": lambda b, h, n, d, dtype: empty(b, h, d, n, dtype=dtype).transpose(2, 3),
    "not aligned": lambda b, h, n, d, dtype: empty(b * h * n * d + 3, dtype=dtype)[3:].view(b, h, n, d),
    "one row for all": lambda b, h, n, d, dtype: empty(1, h, n, d, dtype=dtype).expand(b, h, n, d),
    "tokens far apart": lambda b, h, n, d, dtype: empty(1, dtype=dtype).as_strided((b, h, n, d), (2**40, 2**36, 2**24, 1)),
}
"""How q and k [B, H, N, D] lie in memory; the first is a model's."""


def calls() -> Iterator[Call]:
    """All of them. A case has the label of the first call that launches it."""
    for dtype in ("bf16", "fp32", "fp16"):
        yield from _attention(dtype)
    yield from _other_attention()
    for dtype in ("bf16", "fp32"):
        yield from _head(dtype)
        yield from _token_logprobs(dtype)
    yield from _redundancy()
    yield from _copies()


def _attend(
    label: str,
    dtype: str = "bf16",
    *,
    head_dim: int = 128,
    layout: str = "",
    batch: int = BATCH,
    q_heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    tokens: int = TOKENS,
    packed: bool = False,
    rows: int | None = None,
    **options: Any,
) -> Call:
    """A call of `incoming_attention`. Options that are functions are called where the tensors that they make are wanted. `rows`
    is the number of queries; None: as many as keys."""

    def run() -> None:
        kind = DTYPES[dtype]
        q = LAYOUTS[layout](batch, q_heads, tokens if rows is None else rows, head_dim, kind)
        k = LAYOUTS[layout](batch, kv_heads, tokens, head_dim, kind)
        given = {name: option() if callable(option) else option for name, option in options.items()}
        if packed:
            q, k = (x[0].transpose(0, 1) for x in (q, k))
            given.setdefault("cu_seqlens", empty(4, dtype=torch.int64))
        incoming_attention(q, k, **given)

    return Call(label, dtype, run)


def _attention(dtype: str) -> Iterator[Call]:
    """Both passes for each head dim: plain, with a window and every option that goes with it, and with a softcap on top. Some
    head dims also run with what needs no other launch size than plain. And the same from a sample of rows."""
    kind = DTYPES[dtype]
    sinks: dict[str, Any] = {"sinks": lambda: empty(HEADS, dtype=kind)}
    window: dict[str, Any] = {"sliding_window": 256, "row_weights": lambda: empty(TOKENS), "per_head": True, **sinks}
    sampled: dict[str, Any] = {"sample_rows": 300}
    for head_dim in HEAD_DIMS if dtype != "fp16" else (64, 128, 256):
        shape: dict[str, Any] = {"dtype": dtype, "head_dim": head_dim}
        yield _attend(f"d={head_dim}", **shape)
        if dtype == "fp16":
            continue
        if head_dim in (64, 128, 256):
            yield _attend(f"d={head_dim} sinks per head packed", **shape, packed=True, batch=1, per_head=True, **sinks)
        yield _attend(f"d={head_dim} window", **shape, packed=True, batch=1, **window)
        yield _attend(f"d={head_dim} window softcap", **shape, packed=True, batch=1, softcap=30.0, **window)
        if head_dim in (64, 128, 256):
            yield from _queries(f"d={head_dim}", **shape)
        yield _attend(f"d={head_dim}", **shape, **sampled)
        more: dict[str, Any] = {"sliding_window": 256, "softcap": 30.0, **sinks, **sampled}
        yield _attend(f"d={head_dim} window softcap", **shape, packed=True, batch=1, **more)


def _queries(label: str, **shape: Any) -> Iterator[Call]:
    """Fewer queries than keys: the sum and the maximum of what a key gets, plain, weighted, and with every option."""
    weights: dict[str, Any] = {"row_weights": lambda: empty(ROWS)}
    packed: dict[str, Any] = {"packed": True, "batch": 1, "cu_seqlens_q": lambda: empty(4, dtype=torch.int64), **weights}
    options: dict[str, Any] = {"sliding_window": 256, "softcap": 30.0, "include_diagonal": True, **packed}
    for reduction in ("mean", "max"):
        name = f"{label} queries" + (" max" if reduction == "max" else "")
        given: dict[str, Any] = {"rows": ROWS, "reduction": reduction, **shape}
        yield _attend(name, **given)
        yield _attend(f"{name} weights", **given, **packed)
        yield _attend(f"{name} window softcap", **given, **options)


def _other_attention() -> Iterator[Call]:
    """What else makes other code: layouts, the types and strides of the options, small shapes."""
    for layout in [name for name in LAYOUTS if name]:
        for head_dim in (128, 256):
            yield _attend(f"d={head_dim} {layout}", head_dim=head_dim, layout=layout)
        yield _attend(f"d=128 window {layout}", layout=layout, sliding_window=256)
        yield _attend(f"d=128 queries {layout}", layout=layout, rows=ROWS)
        yield _attend(f"d=128 {layout}", layout=layout, sample_rows=300)
    for dtype in ("bf16", "fp32"):
        yield _attend("d=128 every second dim", dtype, layout="every second dim")
        for scale, softcap in ((-1.0, None), (-1.0, 30.0)):
            label = "d=128 negative scale" + (" softcap" if softcap else "")
            yield _attend(label, dtype, scale=scale, softcap=softcap)
            yield _attend(label, dtype, scale=scale, softcap=softcap, sample_rows=300)

    shape = (BATCH, HEADS, TOKENS)
    for kind, lse in (
        ("", lambda: empty(*shape)),
        ("bf16", lambda: empty(*shape, dtype=torch.bfloat16)),
        ("transposed", lambda: empty(BATCH, TOKENS, HEADS).transpose(1, 2)),
        ("padded", lambda: empty(BATCH, HEADS, TOKENS + 31)[..., :TOKENS]),
        ("expanded", lambda: empty(1, 1, 1).expand(shape)),
    ):
        yield _attend(f"given lse {kind}".strip(), lse=lse)
        yield _attend(f"given lse {kind}".strip(), lse=lse, sample_rows=300)
    for kind, weights in (
        ("", lambda: empty(BATCH, TOKENS)),
        ("bf16", lambda: empty(BATCH, TOKENS, dtype=torch.bfloat16)),
        ("expanded", lambda: empty(1, 1).expand(BATCH, TOKENS)),
        ("of a column", lambda: empty(BATCH, TOKENS, 3)[..., 0]),
    ):
        yield _attend(f"row weights {kind}".strip(), row_weights=weights)
    for kind, sinks in (
        ("fp32", lambda: empty(HEADS)),
        ("every second", lambda: empty(2 * HEADS, dtype=torch.bfloat16)[::2]),
        ("expanded", lambda: empty(1, dtype=torch.bfloat16).expand(HEADS)),
        ("not aligned", lambda: empty(HEADS + 1, dtype=torch.bfloat16)[1:]),
    ):
        yield _attend(f"sinks {kind}", sinks=sinks)
        yield _attend(f"sinks {kind} window", sinks=sinks, sliding_window=256)

    for name, integer in (("int32", torch.int32), ("int64", torch.int64)):
        bound = partial(empty, BATCH, dtype=integer)
        yield _attend(f"length {name}", length=bound)
        yield _attend(f"start {name}", start=bound)
        yield _attend(f"packed {name}", batch=1, packed=True, cu_seqlens=partial(empty, 3, dtype=integer))
    yield _attend("length not aligned", length=lambda: empty(BATCH + 1, dtype=torch.int64)[1:])
    for per_head in (False, True):
        name = "per head" if per_head else "summed"
        yield _attend(f"{name}, not normalized", per_head=per_head, normalize=False)
        yield _attend(f"{name}, packed", per_head=per_head, packed=True, batch=1)
        yield _attend(f"{name}, window", per_head=per_head, sliding_window=256)
        yield _attend(f"{name}, window, not normalized", per_head=per_head, sliding_window=256, normalize=False)
    for heads in ("mean", "query", "kv"):
        for reduction in ("mean", "sum", "max"):
            form: dict[str, Any] = {"heads": heads, "reduction": reduction}
            yield _attend(f"{heads} {reduction}", **form)
            yield _attend(f"queries, {heads} {reduction}", rows=ROWS, query_start=bound, return_lse=True, **form)
            yield _attend(f"queries, {heads} {reduction}, window", rows=ROWS, sliding_window=256, **form)
    yield _attend("queries, own tokens", include_diagonal=True, length=bound)
    yield _attend("queries, last", last=64, start=bound)
    yield _attend("queries, not causal", causal=False, include_diagonal=True)
    yield _attend("queries, one", rows=1, include_diagonal=True)
    cu_seqlens = partial(empty, 3, dtype=torch.int32)
    yield _attend("queries, packed", rows=ROWS, packed=True, batch=1, cu_seqlens=cu_seqlens, cu_seqlens_q=cu_seqlens)
    yield _attend("sampled, not normalized", sample_rows=300, normalize=False)
    yield _attend("sampled, weights", sample_rows=300, row_weights=lambda: empty(BATCH, TOKENS))
    yield _attend("2**20 tokens", batch=1, q_heads=64, tokens=2**20, per_head=True)
    shapes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("one token", {"batch": 1, "q_heads": 1, "kv_heads": 1, "tokens": 1, "head_dim": 1}),
        ("one token per row", {"q_heads": 1, "kv_heads": 1, "tokens": 1, "head_dim": 1}),
        ("one head", {"q_heads": 1, "kv_heads": 1, "tokens": 301}),
        ("odd sizes", {"batch": 3, "q_heads": 9, "kv_heads": 3, "tokens": 301, "head_dim": 24}),
    )
    for name, sizes in shapes:
        for kind in ("", "tokens within heads"):
            yield _attend(f"{name} {kind}".strip(), layout=kind, **sizes)
        yield _attend(f"{name}, sampled", sample_rows=4, **sizes)


def _project(label: str, dtype: str, hidden: Callable[[], Tensor], weight: Callable[[], Tensor], **options: Any) -> Call:
    def run() -> None:
        given = {name: option() if callable(option) else option for name, option in options.items()}
        states = hidden()
        targets = given.pop("targets", None)
        if targets is None:
            targets = empty(states.shape[0], dtype=torch.int64)
        linear_token_logprobs(states, weight(), targets, **given)

    return Call(label, dtype, run)


def _head(dtype: str) -> Iterator[Call]:
    """The fused head, and the chunked one, which a shape of so many channels takes where a BLAS multiplies into float32."""
    kind = DTYPES[dtype]

    def matrix(rows: int, columns: int) -> Callable[[], Tensor]:
        return partial(empty, rows, columns, dtype=kind)

    bias = partial(empty, 4096, dtype=kind)
    every = {"bias": bias, "logit_scale": 0.5, "softcap": 30.0, "return_entropy": True}
    for more, options in (("", {}), ("with entropy", {"return_entropy": True}), ("with all options", every)):
        for channels in (1024, 16_384):
            yield _project(more, dtype, matrix(4096, channels), matrix(4096, channels), **options)
        yield _project(f"{more} uneven channels".strip(), dtype, matrix(150, 1040), matrix(4096, 1040), **options)
    if dtype == "fp32":
        return
    yield _project("odd channels", dtype, matrix(150, 90), matrix(4096, 90))
    yield _project("odd channels with all options", dtype, matrix(150, 90), matrix(4096, 90), **every)
    yield _project("uneven sizes", dtype, matrix(151, 97), matrix(3001, 97))
    yield _project("one row", dtype, matrix(1, 64), matrix(1, 64))
    yield _project("one of all", dtype, matrix(1, 1), matrix(1, 1))
    yield _project("int32 targets", dtype, matrix(150, 64), matrix(3001, 64), targets=lambda: empty(150, dtype=torch.int32))
    yield _project("rows", dtype, matrix(150, 64), matrix(3001, 64), rows=lambda: empty(40, dtype=torch.int64))
    for name, lying in (
        ("transposed", lambda rows, columns: empty(columns, rows, dtype=kind).t()),
        ("rows with a gap", lambda rows, columns: empty(rows, columns + 1, dtype=kind)[:, :columns]),
        ("every second channel", lambda rows, columns: empty(rows, 2 * columns, dtype=kind)[:, ::2]),
        ("not aligned", lambda rows, columns: empty(rows * columns + 1, dtype=kind)[1:].view(rows, columns)),
    ):
        for channels in (1024, 16_384):
            both = partial(lying, 4096, channels)
            yield _project(name, dtype, both, both)
    for name, other_bias in (
        ("every second", lambda: empty(8192, dtype=kind)[::2]),
        ("expanded", lambda: empty(1, dtype=kind).expand(4096)),
        ("not aligned", lambda: empty(4097, dtype=kind)[1:]),
    ):
        for channels in (1024, 16_384):
            yield _project(f"bias {name}", dtype, matrix(4096, channels), matrix(4096, channels), bias=other_bias)
    for channels in (1024, 16_384):
        both = partial(empty, 4096, channels, dtype=torch.float16)
        yield _project("", "fp16", both, both)


def _token_logprobs(dtype: str) -> Iterator[Call]:
    kind = DTYPES[dtype]
    for name, logits in (
        ("", lambda: empty(150, 4096, dtype=kind)),
        ("odd vocabulary", lambda: empty(150, 50_257, dtype=kind)),
        ("one row", lambda: empty(3001, dtype=kind)),
        ("one logit", lambda: empty(1, 1, dtype=kind)),
        ("all but the last row", lambda: empty(4, 9, 3001, dtype=kind)[:, :-1]),
        ("transposed", lambda: empty(4, 3001, 9, dtype=kind).transpose(1, 2)),
        ("not aligned", lambda: empty(4 * 3001 + 1, dtype=kind)[1:].view(4, 3001)),
        ("expanded", lambda: empty(1, 1, 3001, dtype=kind).expand(4, 5, 3001)),
    ):
        for integer in (torch.int64, torch.int32) if not name else (torch.int64,):

            def run(logits: Callable[[], Tensor] = logits, integer: torch.dtype = integer) -> None:
                values = logits()
                token_logprobs(values, empty(*values.shape[:-1], dtype=integer))

            yield Call(name, dtype, run)


def _redundancy() -> Iterator[Call]:
    def reward(
        label: str, tokens: int = 4000, sequences: int = 4, last: Callable[[], Tensor] | None = None, **inputs: Any
    ) -> Call:
        def run() -> None:
            given = {
                "logprobs": empty(tokens),
                "incoming": empty(tokens),
                "token_ids": empty(tokens, dtype=torch.int64),
                "cu_seqlens": empty(sequences + 1, dtype=torch.int64),
            }
            given |= {name: made() for name, made in inputs.items()}
            redundancy(*given.values(), protect_last=None if last is None else last())

        return Call(label, "fp32", run)

    yield reward("")
    yield reward("one token", 1, 1)
    yield reward("no token", 0, 1)
    yield reward("2**28 tokens", 2**28, 3)
    yield reward("int32 ids", token_ids=lambda: empty(4000, dtype=torch.int32))
    yield reward("int32 bounds", cu_seqlens=lambda: empty(5, dtype=torch.int32))
    yield reward("bf16", logprobs=lambda: empty(4000, dtype=torch.bfloat16), incoming=lambda: empty(4000, dtype=torch.bfloat16))
    yield reward("every second", logprobs=lambda: empty(8000)[::2], token_ids=lambda: empty(8000, dtype=torch.int64)[::2])
    yield reward("not aligned", incoming=lambda: empty(4001)[1:], token_ids=lambda: empty(4001, dtype=torch.int64)[1:])
    for name, last in (
        ("", lambda: empty(4000, dtype=torch.bool)),
        ("every second", lambda: empty(8000, dtype=torch.bool)[::2]),
        ("not aligned", lambda: empty(4001, dtype=torch.bool)[1:]),
    ):
        yield reward(f"protect last {name}".strip(), last=last)


def _copies() -> Iterator[Call]:
    def find(
        label: str,
        ids: Callable[[], Tensor] = lambda: empty(4000, dtype=torch.int64),
        sequences: int = 4,
        bounds: torch.dtype = torch.int64,
        ngram: int = 4,
        operation: Callable[..., Tensor] = copies,
    ) -> Call:
        def run() -> None:
            operation(ids(), empty(sequences + 1, dtype=bounds), ngram=ngram)

        return Call(label, "i64", run)

    yield find("")
    yield find("one token", lambda: empty(1, dtype=torch.int64), 1)
    yield find("no token", lambda: empty(0, dtype=torch.int64), 1)
    yield find("2**28 tokens", lambda: empty(2**28, dtype=torch.int64), 3)
    yield find("int32 ids", lambda: empty(4000, dtype=torch.int32))
    yield find("int32 bounds", bounds=torch.int32)
    yield find("1-grams", ngram=1)
    yield find("16-grams", ngram=16)
    yield find("every second", lambda: empty(8000, dtype=torch.int64)[::2])
    yield find("not aligned", lambda: empty(4001, dtype=torch.int64)[1:])
    yield find("first places", operation=first_places)
    yield find("first places, one token", lambda: empty(1, dtype=torch.int64), 1, operation=first_places)
    yield find("first places, 2**28 tokens", lambda: empty(2**28, dtype=torch.int64), 3, operation=first_places)
    yield find("first places, int32 bounds", bounds=torch.int32, operation=first_places)
