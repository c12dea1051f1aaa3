"""The operations as torch custom ops, so that torch.compile sees one opaque node instead of tracing a kernel launch.

The public functions have checked shapes and dtypes by the time these run. What depends on values is checked here, on the CPU
only. On a GPU that would wait for the device. There spans are clamped to the memory they index instead.

Annotations are real types in this module (no `from __future__ import annotations`): torch infers the schemas of the other ops
from them.
"""

import importlib.util
import math
import os
from dataclasses import fields
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from ._checks import accumulation_dtype, choose_backend
from ._ops import add_op_namespace_prefix
from ._sampling import draw
from ._spans import Queries, Spans
from .reference import AttentionOptions, RedundancyOptions

_MODULES = {"reference": ".reference", "torch": "._torch", "triton": "._triton"}


def _implementation(backend: str, tensor: Tensor) -> ModuleType:
    """The backend's module; each has the same functions. "auto" is decided here, where the tensor is.

    Raises:
        RuntimeError: for Triton without Triton, or without a GPU and outside its interpreter.
    """
    backend = choose_backend(backend, tensor)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError(
                "backend='triton' needs triton, which the CUDA and ROCm builds of torch bring along. Install such a build. "
                "For tests on a CPU: pip install 'entra-reward[triton]', or use backend='torch'"
            )
        if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "backend='triton' runs on CUDA and ROCm tensors, and these are on the CPU; move them to a GPU, use "
                "backend='torch', or set TRITON_INTERPRET=1 before triton is imported (slow, for tests)"
            )
    return importlib.import_module(_MODULES[backend], __package__)


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Products in the precision of what they multiply: a trainer's autocast, inside whose forward scoring happens, would round
    the float32 ones of the reference to bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            remedy = "check the tokenizer"
            if low == -100:
                remedy = (
                    "-100 marks positions that do not count: leave them out, by linear_token_logprobs(rows=targets != -100), "
                    "or by indexing logits and targets"
                )
            raise ValueError(f"targets holds id {wrong}, outside the vocabulary 0 to {vocabulary - 1}; {remedy}")


OPTIONS = tuple(field.name for field in fields(AttentionOptions))
_SCHEMA = {
    "float": "float",
    "bool": "bool",
    "str": "str",
    "int | None": "SymInt?",
    "float | None": "float?",
    "Tensor | None": "Tensor?",
}
_ATTENTION = "Tensor q, Tensor k, Tensor? starts, Tensor? ends, SymInt sequences"
_QUERIES = "Tensor? query_bounds, Tensor? query_places, SymInt? last"
_FLAT_OPTIONS = ", ".join(f"{_SCHEMA[str(field.type)]} {field.name}" for field in fields(AttentionOptions))
"""A custom op takes no dataclass: its last arguments are the fields of `AttentionOptions`, in their order."""


def _attention_call(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sequences: int,
    backend: str,
    flat: tuple[Any, ...],
    queries: Queries | None = None,
) -> tuple[ModuleType, Spans, AttentionOptions]:
    """The backend, where the sequences lie, and the options again."""
    module = _implementation(backend, q)
    spans = Spans(starts, ends, sequences, tokens=k.shape[2], batch=q.shape[0], queries=queries)
    spans.check(q.device)
    return module, spans, AttentionOptions(**dict(zip(OPTIONS, flat, strict=True)))


@torch.library.custom_op(
    add_op_namespace_prefix("incoming_attention"),
    mutates_args=(),
    schema=f"({_ATTENTION}, {_QUERIES}, str backend, {_FLAT_OPTIONS}) -> Tensor[]",
)
def incoming_attention(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sequences: int,
    query_bounds: Tensor | None,
    query_places: Tensor | None,
    last: int | None,
    backend: str,
    *flat: Any,
) -> list[Tensor]:
    """q [B, H, Nq, D], k [B, Hkv, N, D] with any strides, and the fields of `Spans` and `Queries`. Returns [B, N], or
    [B, H or Hkv, N], and the log-sum-exp [B, H, Nq] if wanted."""
    queries = Queries(q.shape[2], query_bounds, query_places, last)
    own = q.shape[2] == k.shape[2] and query_bounds is None and query_places is None and last is None
    module, spans, options = _attention_call(q, k, starts, ends, sequences, backend, flat, None if own else queries)
    with _without_autocast(q):
        incoming, lse = module.incoming_attention(q, k, spans, options)
    return [incoming] if lse is None else [incoming, lse]


@incoming_attention.register_fake
def _(q, k, starts, ends, sequences, query_bounds, query_places, last, backend, *flat):  # type: ignore[no-untyped-def]
    batch, heads, rows, _ = q.shape
    option = dict(zip(OPTIONS, flat, strict=True))
    lines = {"mean": (), "query": (heads,), "kv": (k.shape[1],)}[option["heads"]]
    dtype = accumulation_dtype(q.dtype)
    incoming = q.new_empty((batch, *lines, k.shape[2]), dtype=dtype)
    return [incoming, q.new_empty((batch, heads, rows), dtype=dtype)] if option["return_lse"] else [incoming]


@torch.library.custom_op(
    add_op_namespace_prefix("sampled_incoming_attention"),
    mutates_args=(),
    schema=f"({_ATTENTION}, str backend, SymInt sample_rows, SymInt seed, {_FLAT_OPTIONS}) -> (Tensor, Tensor)",
)
def sampled_incoming_attention(
    q: Tensor,
    k: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    sequences: int,
    backend: str,
    sample_rows: int,
    seed: int,
    *flat: Any,
) -> tuple[Tensor, Tensor]:
    """As `incoming_attention`. Returns estimate and standard error, [B, N] each."""
    module, spans, options = _attention_call(q, k, starts, ends, sequences, backend, flat)
    with _without_autocast(q):
        return module.sampled_incoming_attention(q, k, spans, draw(spans, sample_rows, seed, q.device), options)


@sampled_incoming_attention.register_fake
def _(q, *arguments):  # type: ignore[no-untyped-def]
    batch, _, tokens, _ = q.shape
    return tuple(q.new_empty((batch, tokens), dtype=accumulation_dtype(q.dtype)) for _ in range(2))


@torch.library.custom_op(add_op_namespace_prefix("token_logprobs"), mutates_args=())
def token_logprobs(logits: Tensor, targets: Tensor, temperature: float, backend: str) -> Tensor:
    """logits [..., V] with any strides, targets [...]. Returns [...]."""
    module = _implementation(backend, logits)
    _check_targets(targets, logits.shape[-1])
    return module.token_logprobs(logits, targets, temperature=temperature)


@token_logprobs.register_fake
def _(logits, targets, temperature, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty(targets.shape, dtype=accumulation_dtype(logits.dtype))


def _selected(hidden: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [M, C] and targets [M] of the positions `rows` [M], and which of these exist. Those that do not are an error on
    the CPU; elsewhere they read position 0. Only what is selected is copied, whatever the strides of hidden [..., C]."""
    positions = targets.numel()
    outside = (rows < 0) | (rows >= positions)
    if rows.device.type == "cpu" and outside.any():
        wrong = int(rows[outside][0])
        raise ValueError(f"rows holds {wrong}, outside the positions 0 to {positions - 1}; index targets.reshape(-1)")
    rest = rows.long().masked_fill(outside, 0)
    place: tuple[Tensor, ...] = ()
    for size in reversed(targets.shape[1:]):
        place = (rest % size, *place)
        rest = rest // size
    place = (rest, *place)
    return torch.atleast_2d(hidden)[place], torch.atleast_1d(targets)[place], ~outside


@torch.library.custom_op(add_op_namespace_prefix("linear_token_logprobs"), mutates_args=())
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    logit_scale: float,
    softcap: Optional[float],  # noqa: UP045
    temperature: float,
    entropy: bool,
    backend: str,
) -> list[Tensor]:
    """hidden [..., C], weight [V, C], targets [...], rows [M] of the flattened positions, or None for all of them. Returns the
    log-probs [M] and, if wanted, the entropies [M]."""
    module = _implementation(backend, hidden)
    exist = None
    if rows is None:
        hidden, targets = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    else:
        hidden, targets, exist = _selected(hidden, targets, rows)
    _check_targets(targets, weight.shape[0])
    with _without_autocast(hidden):
        results: list[Tensor] = module.linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            entropy=entropy,
        )
    if softcap is not None and hidden.shape[-1]:  # which makes a finite logit of one that is not
        finite = torch.linalg.vector_norm(hidden, math.inf, dim=-1).isfinite()
        results = [result.masked_fill_(~finite, math.nan) for result in results]
    return results if exist is None else [result.masked_fill_(~exist, math.nan) for result in results]


@linear_token_logprobs.register_fake
def _(hidden, weight, targets, rows, bias, logit_scale, softcap, temperature, entropy, backend):  # type: ignore[no-untyped-def]
    count = targets.numel() if rows is None else rows.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    return [hidden.new_empty(count, dtype=dtype) for _ in range(2 if entropy else 1)]


@torch.library.custom_op(add_op_namespace_prefix("copies"), mutates_args=())
def copies(token_ids: Tensor, cu_seqlens: Tensor, ngram: int, backend: str) -> Tensor:
    """Packed, [T] and [S + 1]. Returns bool [T]."""
    module = _implementation(backend, token_ids)
    _check_packed(cu_seqlens, token_ids)
    return module.copies(token_ids, cu_seqlens, ngram=ngram)


@copies.register_fake
def _(token_ids, cu_seqlens, ngram, backend):  # type: ignore[no-untyped-def]
    return token_ids.new_empty(token_ids.shape, dtype=torch.bool)


@torch.library.custom_op(add_op_namespace_prefix("first_places"), mutates_args=())
def first_places(token_ids: Tensor, cu_seqlens: Tensor, ngram: int, backend: str) -> Tensor:
    """Packed, [T] and [S + 1]. Returns int64 [T]."""
    module = _implementation(backend, token_ids)
    _check_packed(cu_seqlens, token_ids)
    return module.first_places(token_ids, cu_seqlens, ngram=ngram)


@first_places.register_fake
def _(token_ids, cu_seqlens, ngram, backend):  # type: ignore[no-untyped-def]
    return token_ids.new_empty(token_ids.shape, dtype=torch.int64)


def _check_packed(cu_seqlens: Tensor, packed: Tensor) -> None:
    """Raises a ValueError for a sequence that leaves the tokens [T] of `packed`. On a CPU only."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    Spans(starts, ends, starts.shape[0], tokens=packed.shape[0], batch=1).check(packed.device)


@torch.library.custom_op(add_op_namespace_prefix("redundancy"), mutates_args=())
def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    protect_last: Optional[Tensor],  # noqa: UP045
    attention_weight: float,
    protect_fraction: float,
    degenerate_reward: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """All packed, [T] and [S + 1]. Returns reward [S], importance [T], protected [T]."""
    module = _implementation(backend, logprobs)
    _check_packed(cu_seqlens, logprobs)
    if token_ids.device.type == "cpu" and token_ids.numel() and int(token_ids.min()) < 0:
        raise ValueError(
            f"token_ids holds {int(token_ids.min())}; ids are at least 0: leave padding out, and pass packed tokens"
        )
    options = RedundancyOptions(attention_weight, protect_fraction, degenerate_reward)
    return module.redundancy(logprobs, incoming, token_ids, cu_seqlens, protect_last, options)


@redundancy.register_fake
def _(logprobs, incoming, token_ids, cu_seqlens, *options):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(torch.promote_types(logprobs.dtype, incoming.dtype))
    return (
        logprobs.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype),
        logprobs.new_empty(logprobs.shape, dtype=dtype),
        logprobs.new_empty(logprobs.shape, dtype=torch.bool),
    )
