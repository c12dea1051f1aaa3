"""`incoming_attention`: the public operation. It checks, brings both layouts to one, chooses a backend and calls it."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _custom_ops
from ._checks import (
    FLOATS,
    INTEGERS,
    check_backend,
    check_dtype,
    check_last,
    check_same_device,
    check_sample,
    check_scoring_only,
    check_shape,
    shown,
    under_autocast,
)
from .reference import AttentionOptions


class SampledAttention(NamedTuple):
    """Incoming attention from a sample of the query rows; both [B, N] (packed: [T])."""

    estimate: Tensor
    """Unbiased: its mean over seeds is the exact value."""
    standard_error: Tensor
    """Of the estimate, from the two rows of each stratum. Its square is unbiased for the variance. 0 where nothing was left
    out. Peaked attention, where a few rows hold most of what a token receives, needs care. Both rows of a stratum can miss
    these rows. Then the estimate is too low and this is too small, so intervals of +-1.96 standard errors cover less than 95 %
    (docs/method.md, "Sampling")."""


@overload
def incoming_attention(
    q: Tensor,
    k: Tensor,
    *,
    start: Tensor | None = ...,
    length: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    query_start: Tensor | None = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    lse: Tensor | None = ...,
    row_weights: Tensor | None = ...,
    causal: bool = ...,
    include_diagonal: bool = ...,
    last: int | None = ...,
    reduction: str = ...,
    heads: str = ...,
    per_head: bool = ...,
    normalize: bool = ...,
    return_lse: Literal[False] = ...,
    into: Tensor | None = ...,
    sample_rows: None = ...,
    seed: int = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def incoming_attention(
    q: Tensor,
    k: Tensor,
    *,
    start: Tensor | None = ...,
    length: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    query_start: Tensor | None = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    lse: Tensor | None = ...,
    row_weights: Tensor | None = ...,
    causal: bool = ...,
    include_diagonal: bool = ...,
    last: int | None = ...,
    reduction: str = ...,
    heads: str = ...,
    per_head: bool = ...,
    normalize: bool = ...,
    return_lse: Literal[True],
    into: Tensor | None = ...,
    sample_rows: None = ...,
    seed: int = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def incoming_attention(
    q: Tensor,
    k: Tensor,
    *,
    start: Tensor | None = ...,
    length: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    query_start: Tensor | None = ...,
    scale: float | None = ...,
    sliding_window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    lse: Tensor | None = ...,
    row_weights: Tensor | None = ...,
    causal: bool = ...,
    include_diagonal: bool = ...,
    last: int | None = ...,
    reduction: str = ...,
    heads: str = ...,
    per_head: bool = ...,
    normalize: bool = ...,
    return_lse: Literal[False] = ...,
    into: Tensor | None = ...,
    sample_rows: int,
    seed: int = ...,
    backend: str = ...,
) -> SampledAttention: ...


def incoming_attention(
    q: Tensor,
    k: Tensor,
    *,
    start: Tensor | None = None,
    length: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    query_start: Tensor | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    row_weights: Tensor | None = None,
    causal: bool = True,
    include_diagonal: bool = False,
    last: int | None = None,
    reduction: str = "mean",
    heads: str = "mean",
    per_head: bool = False,
    normalize: bool = True,
    return_lse: bool = False,
    into: Tensor | None = None,
    sample_rows: int | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor] | SampledAttention:
    """`softmax(scale * q @ k.T + causal_mask).tril(-1).sum(rows) / arange(N - 1, -1, -1)`, without the N x N matrix.

    For every token i: the attention probability from a query to i, mean over the future queries j > i and over the query heads.
    This is mu_i of docs/method.md, in [0, 1]. The diagonal is excluded, and the last token of a sequence gets 0. With a sliding
    window W, key i is visible to query j iff j - W < i <= j. The divisor is then min(N - i, W - 1) instead of N - i (i counted
    from 1). The result does not depend on what else is in the batch, and is the same bit for bit in every run.

    There are two layouts. Neither is copied, and strides may be any:

    - padded: q [B, H, Nq, D] and k [B, Hkv, N, D]. The tokens of batch element b are start[b] ... start[b] + length[b] - 1.
      That describes left and right padding. Everything outside gets 0 and influences nothing.
    - packed: q [Tq, H, D], k [T, Hkv, D] and cu_seqlens [S + 1], as for FlashAttention's varlen functions.

    Every token has a key, and not every one needs a query. Where there are fewer queries than keys, the last query stands at
    the last key, as in FlashAttention, unless `query_start` says otherwise. `last` takes the last queries of each sequence
    alone. docs/kernels.md has a table of what goes together.

    Args:
        q: queries after RoPE; bfloat16, float16, float32 or (not with Triton) float64. D is 1 to 512.
        k: keys after RoPE, same dtype. H must be a multiple of Hkv (GQA, MQA); keys are not repeated. Under
            autocast, q and k of two dtypes become autocast's.
        start: int [B], padded layout only. None: 0.
        length: int [B], padded layout only. None: up to the last token.
        cu_seqlens: int [S + 1], packed layout only: 0, then the running sums of the sequence lengths. On a CPU, sequences that
            leave their tokens and a cu_seqlens that falls are errors. On a GPU a look would wait for the device, so sequences
            are clamped to the tokens; those that then overlap may count as empty.
        cu_seqlens_q: int [S + 1], packed layout only: the same of the queries. None: a query for every key.
        query_start: int [B], the token at which the first query of a batch element stands, counted as `start` is. Packed: int
            [S], counted from the first token of each sequence. Queries that then stand outside their sequence do not count.
        scale: factor on q @ k.T. None: D ** -0.5.
        sliding_window: W >= 1, in tokens, the query itself counted. None: full attention.
        softcap: c > 0 (1e-30 to 1e30) turns each scaled score s into c * tanh(s / c). None or 0: no softcap.
        sinks: [H] logits that only add to the softmax denominator, as in gpt-oss.
        lse: float [B, H, Nq] (packed: [H, Tq]), the row log-sum-exp of the scores (natural log, sinks included), if the
            attention forward already knows it. It saves one of the two passes. Excludes `sinks`.
        row_weights: float [B, Nq] (packed: [Tq]), a weight w_j of each query. The result is sum_{j>i} w_j A_ji over the same
            divisor, not over the sum of the weights. w_j = j gives lift. 1 / inclusion probability gives unbiased row sampling.
        causal: False lets every query see every key. It needs `include_diagonal=True`.
        include_diagonal: a query counts for its own key as well.
        last: w >= 1 lets only the last w queries of each sequence count, in time O(N w).
        reduction: over the queries that see a key: "mean", "sum" or "max". Where there are none the result is 0.
        heads: "mean" over all query heads, "query" for every query head by itself, or "kv" for the mean over the query heads of
            each kv head. It comes after the reduction over queries, also after "max".
        per_head: True is heads="query".
        normalize: False is reduction="sum".
        return_lse: return (result, log-sum-exp). The latter is [B, H, Nq] (packed: [H, Tq]), natural log, sinks included, and
            -inf for queries that do not count.
        into: a tensor like the result, with at least as many tokens. The result is added to its first tokens (reduction
            "sum"), or the larger one is kept ("max", with heads="query"), and it is returned. Pieces of a prompt and steps of
            decoding, each with all keys so far, then give what one call gives.
        sample_rows: m >= 4 takes m query rows of each sequence instead of all, in time O(N m), and returns a
            `SampledAttention`. A quarter of them are the last rows. The others come from equal strata of neighbouring rows, two
            from each. The estimate is unbiased. A sequence of up to m tokens is exact, and needs no more memory. The sampled
            rows of q are copied. Every token must be a query; it goes with causal attention, mean heads and no maximum.
        seed: of the draw, with `sample_rows` only. With the same seed, sequences of the same length get the same rows.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        float32 (float64 for float64 inputs), [B, N] (packed: [T]). With heads="query" or "kv": [B, H or Hkv, N] (packed:
        [H or Hkv, T]). With sample_rows: a `SampledAttention` of two such tensors.

    Raises:
        ValueError: shapes, layouts or options that do not go together, an option out of its range, or (on a CPU only) a
            start, length or cu_seqlens outside the tokens.
        TypeError: a dtype that is not supported, an option that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend that you named cannot run here.

    Source: arXiv 2601.07123; docs/method.md.
    """
    floats = {"q": q, "k": k, "sinks": sinks, "lse": lse, "row_weights": row_weights}
    places = {
        "start": start,
        "length": length,
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_q": cu_seqlens_q,
        "query_start": query_start,
    }
    check_dtype(FLOATS, **floats, into=into)
    check_dtype(INTEGERS, **places)
    check_same_device(**floats, **places, into=into)
    check_scoring_only(**floats, into=into)
    q, k = under_autocast(q, k)
    if q.dtype != k.dtype:
        raise TypeError(f"k has dtype {k.dtype} but q has {q.dtype}; they must be the same: use k.to(q.dtype)")

    packed = cu_seqlens is not None
    last = check_last(last)
    starts: Tensor | None
    ends: Tensor | None
    query_bounds = None
    if cu_seqlens is not None:
        if start is not None or length is not None:
            raise ValueError(
                "start and length belong to the padded layout, cu_seqlens to the packed one; pass one or the other"
            )
        if q.ndim != 3 or k.ndim != 3:
            raise ValueError(
                f"q has shape {list(q.shape)} and k {list(k.shape)}; with cu_seqlens they must be [T, H, D] and [T, Hkv, D]"
            )
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1]")
        rows, q_heads, head_dim = q.shape
        tokens = rows if cu_seqlens_q is None else k.shape[0]
        check_shape("k", k, (tokens, k.shape[1], head_dim), "[T, Hkv, D]")
        check_shape("cu_seqlens_q", cu_seqlens_q, tuple(cu_seqlens.shape), "[S + 1]")
        check_shape("query_start", query_start, (cu_seqlens.shape[0] - 1,), "[S]")
        check_shape("lse", lse, (q_heads, rows), "[H, Tq]")
        check_shape("row_weights", row_weights, (rows,), "[Tq]")
        # The packed layout is the padded one with a single batch element that holds every sequence.
        q, k = q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0)
        starts, ends, sequences = cu_seqlens[:-1], cu_seqlens[1:], cu_seqlens.shape[0] - 1
        if cu_seqlens_q is not None or query_start is not None or last is not None:
            query_bounds = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
        lse = None if lse is None else lse.unsqueeze(0)
        row_weights = None if row_weights is None else row_weights.unsqueeze(0)
    elif q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q has shape {list(q.shape)} and k {list(k.shape)}; they must be [B, H, N, D] and [B, Hkv, N, D], "
            "or [T, H, D] and [T, Hkv, D] with cu_seqlens"
        )

    batch, q_heads, rows, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    if not packed:
        if cu_seqlens_q is not None:
            raise ValueError("cu_seqlens_q belongs to the packed layout; pass cu_seqlens of the keys with it")
        _check_layout(q, k)
        check_shape("k", k, (batch, kv_heads, tokens, head_dim), "[B, Hkv, N, D]")
        if rows > tokens:
            raise ValueError(
                f"q has {rows} tokens and k {tokens}; a query stands at one of the keys, so there cannot be more of them: pass "
                "all keys so far, or check that q and k are [B, H, N, D]"
            )
        check_shape("lse", lse, (batch, q_heads, rows), "[B, H, Nq]")
        check_shape("row_weights", row_weights, (batch, rows), "[B, Nq]")
        check_shape("start", start, (batch,), "[B]")
        check_shape("length", length, (batch,), "[B]")
        check_shape("query_start", query_start, (batch,), "[B]")
        starts, ends, sequences = start, _ends(start, length), batch
    if q_heads == 0:
        raise ValueError("q_heads=0 must be at least 1; check the shape of q, [B, H, N, D] or packed [T, H, D]")
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q_heads={q_heads} must be a multiple of kv_heads={kv_heads}; check the model's config")
    if not 1 <= head_dim <= 512:
        raise ValueError(f"head_dim={head_dim} must be 1 to 512")
    check_shape("sinks", sinks, (q_heads,), "[H]")
    options = AttentionOptions(
        scale=head_dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        lse=lse,
        row_weights=row_weights,
        causal=causal,
        include_diagonal=include_diagonal,
        reduction=_either("reduction", reduction, "sum", not normalize, "normalize=False"),
        heads=_either("heads", heads, "query", per_head, "per_head=True"),
        return_lse=return_lse,
    )
    flat = [getattr(options, name) for name in _custom_ops.OPTIONS]
    backend = check_backend(backend, q)
    if sample_rows is not None:
        own = rows == tokens and query_start is None and query_bounds is None
        _check_sampled(options, own=own and last is None and into is None)
        sampled = _custom_ops.sampled_incoming_attention(
            q, k, starts, ends, sequences, backend, check_sample(sample_rows, seed, tokens), int(seed), *flat
        )  # fmt: skip
        return SampledAttention(*(out.squeeze(0) if packed else out for out in sampled))

    out = _custom_ops.incoming_attention(q, k, starts, ends, sequences, query_bounds, query_start, last, backend, *flat)
    out = [part.squeeze(0) if packed else part for part in out]
    if into is not None:
        out[0] = _put_into(into, out[0], options)
    return (out[0], out[1]) if return_lse else out[0]


def _either(name: str, value: str, other: str, wanted: bool, short: str) -> str:
    """`other` where the older `short` asks for it, else `value`. Raises a ValueError where they differ."""
    if wanted and value not in ("mean", other):
        raise ValueError(f"{name}={shown(value)} and {short}, which is {name}={other!r}; pass one of them")
    return other if wanted else value


def _check_sampled(options: AttentionOptions, *, own: bool) -> None:
    """Raises a ValueError for what has no sampled form. `own`: every token is a query, and the result goes into no tensor."""
    if options.heads != "mean":
        raise ValueError(f"heads={options.heads!r} has no sampled form; drop sample_rows, or take the mean over heads")
    if not own or options.include_diagonal or options.reduction == "max" or options.return_lse:
        raise ValueError(
            "sample_rows goes with a query for every key and causal attention without the diagonal, and not with last, "
            "reduction='max', return_lse or into; drop sample_rows"
        )


def _put_into(into: Tensor, result: Tensor, options: AttentionOptions) -> Tensor:
    """`into`, whose first tokens now hold `result` as well. Raises a ValueError where they do not go together."""
    if options.reduction == "mean":
        raise ValueError("into adds up sums or keeps maxima, and a mean is neither; pass reduction='sum' or 'max'")
    if options.reduction == "max" and options.heads != "query":
        raise ValueError(
            f"heads={options.heads!r} is a mean over heads, and maxima of means are not means of maxima; with into and "
            "reduction='max' pass heads='query'"
        )
    tokens = result.shape[-1]
    if into.shape[:-1] != result.shape[:-1] or into.shape[-1] < tokens or into.dtype != result.dtype:
        given, right = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (into, result))
        raise ValueError(f"into is {given}; it must be {right}, or have more tokens")
    part = into[..., :tokens]
    if options.reduction == "sum":
        part += result
    else:
        torch.maximum(part, result, out=part)
    return into


def _check_layout(q: Tensor, k: Tensor) -> None:
    """Raises a ValueError where q and k [B, H, N, D] look like [B, N, H, D], as FlashAttention takes them."""
    (_, heads, tokens, _), (_, kv_heads, keys, _) = q.shape, k.shape
    # With GQA the second sizes agree instead of the third. Without it only the numbers tell: no model has that many heads.
    if (heads == kv_heads and 0 < keys < tokens and tokens % keys == 0) or (heads > 512 and heads >= 4 * tokens):
        raise ValueError(
            f"q has shape {list(q.shape)} and k {list(k.shape)}, which look like [B, N, H, D]; they must be [B, H, N, D] and "
            "[B, Hkv, N, D]: pass q.transpose(1, 2) and k.transpose(1, 2), which copy nothing"
        )


def _ends(start: Tensor | None, length: Tensor | None) -> Tensor | None:
    """One past each sequence's last token; None for all tokens. As few operations on the device as can be."""
    if start is None or length is None:
        return length
    return start + length
