"""`incoming_attention` in Triton: a pass over rows for the log-sum-exp, a pass over columns for the sums.

The column pass has the keys on the matrix unit's M side, S^T = K Q^T, so that the sum over queries runs along the registers
of a thread: 8 shuffles per 64 exponentials where S = Q K^T needs 192. A program owns one tile of keys of one kv head, keeps it
resident, and walks over the group's query heads and over a piece of the queries from the diagonal on: the sum over the group
is free, no key is repeated, nothing is added atomically. The causal comparison is made on the diagonal's tiles only. A last
kernel adds up pieces and kv heads in a fixed order.

Tiles are counted from a sequence's own start and sums run in a fixed order, so the result does not depend on the batch. Who
works on what is in `plan.py`, launch sizes with their reasons are in `launch.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from entra_kernels._spans import Spans
from entra_kernels._triton.launch import (
    FUSED,
    AttentionLaunch,
    Chip,
    KernelCase,
    attention_launch,
    check_products,
    chip_of,
    gluon_is_known,
)
from entra_kernels._triton.plan import PIECE_FIELDS, TILE_FIELDS, plan

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: two of them subtracted give 0, not NaN
HIGHEST = tl.constexpr(3.0e38)


@triton.jit
def _tanh(x):
    """To float32 precision and without libdevice, which the interpreter lacks. The quotient cancels near 0: a series there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))  # at most 1: cannot overflow
    quotient = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _load_tile(
    rows, stride, stride_dim, count, cut, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr
):
    """[TOKENS, DEPTH] from dimension `cut` on; `rows` is the address of the first token. 0 from token `count` on.

    Offsets within a tile are 32 bits unless WIDE: as 64 bits they take twice the registers, which spill."""
    token = tl.arange(0, TOKENS)
    dim = cut + tl.arange(0, DEPTH)
    mask = (token < count)[:, None]
    if HEAD_DIM % DEPTH != 0:
        mask &= (dim < HEAD_DIM)[None, :]
    if WIDE:
        offsets = token.to(tl.int64)[:, None] * stride + dim.to(tl.int64)[None, :] * stride_dim
    else:
        offsets = token[:, None] * stride + dim[None, :] * stride_dim
    return tl.load(rows + offsets, mask=mask, other=0.0)


@triton.jit
def _products(
    a_tile, a_rows, a_stride, a_stride_dim, a_count, b_rows, b_stride, b_stride_dim, b_count,
    A_TOKENS: tl.constexpr, B_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Dot products [a, b] in float32. `a_tile` is resident; where the head dim is cut into pieces it is read again instead."""
    if DEPTH >= HEAD_DIM:
        b_tile = _load_tile(b_rows, b_stride, b_stride_dim, b_count, 0, B_TOKENS, HEAD_DIM, DEPTH, WIDE)
        return tl.dot(a_tile, tl.trans(b_tile), input_precision="ieee")
    products = tl.zeros((A_TOKENS, B_TOKENS), dtype=tl.float32)
    for cut in range(0, HEAD_DIM, DEPTH):
        a_tile = _load_tile(a_rows, a_stride, a_stride_dim, a_count, cut, A_TOKENS, HEAD_DIM, DEPTH, WIDE)
        b_tile = _load_tile(b_rows, b_stride, b_stride_dim, b_count, cut, B_TOKENS, HEAD_DIM, DEPTH, WIDE)
        products = tl.dot(a_tile, tl.trans(b_tile), products, input_precision="ieee")
    return products


@triton.jit
def _scan_keys(
    highest, total, q_tile, q_rows, q_stride, q_stride_dim, q_count, k_head, k_stride, k_stride_dim,
    query, first, stop, tokens, window, scale, softcap,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, FLIPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp over keys: the highest score so far, in log2 units, and the sum of exp2(score - highest)."""
    for start in range(first, stop, STREAMED):
        k_rows = k_head + tl.cast(start, tl.int64) * k_stride
        scores = _products(
            q_tile, q_rows, q_stride, q_stride_dim, q_count, k_rows, k_stride, k_stride_dim, tokens - start,
            RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE,
        )  # fmt: skip  # [query, key]
        if FLIPPED:
            scores = -scores
        if SOFTCAP:
            scores = _tanh(scores * scale) * softcap
        elif MASKED:
            scores = scores * scale  # now, so that the -inf of the mask never meets a scale of 0
        if MASKED:
            key = start + tl.arange(0, STREAMED)
            visible = key[None, :] <= query[:, None]
            if WINDOW:
                visible &= query[:, None] - key[None, :] < window
            scores = tl.where(visible, scores, float("-inf"))
        if SOFTCAP or MASKED:
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            summands = tl.exp2(scores - higher[:, None])
        else:
            # The maximum of the bare products spares a multiplication per score; scale is not negative, see FLIPPED.
            higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
            summands = tl.exp2(tl.fma(scores, scale, -higher[:, None]))
        total = total * tl.exp2(highest - higher) + tl.sum(summands, axis=1)
        highest = higher
    return highest, total


@triton.jit
def _negative_lse(highest, total, sinks, sinks_stride, head, inside):
    """-log2 of the softmax denominator, with the sink in it; -inf outside, where the probability then is 0."""
    if sinks is not None:
        sink = tl.load(sinks + head * sinks_stride).to(tl.float32) * LOG2_E
        sink = tl.where(sink > HIGHEST, HIGHEST, sink)  # not a minimum, which would drop NaN
        higher = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - higher) + tl.exp2(sink - higher)
        highest = higher
    return tl.where(inside, -(highest + tl.log2(tl.where(inside, total, 1.0))), float("-inf"))


@triton.jit(do_not_specialize=["slots", "heads", "group", "window"])
def _row_lse_kernel(
    q, k, sinks, negative_lse, tiles, spans,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    sinks_stride, slots, heads, group, window, scale, softcap,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of every row, laid out as `_lay_out_kernel` does. A program owns one query head's tile of queries and
    walks over the keys that they see."""
    entry = tiles + TILE_FIELDS * (tl.program_id(0) // heads)
    head = (tl.program_id(0) % heads).to(tl.int64)
    listed = tl.load(entry)  # tile of keys + 1, or 0
    sequence = tl.load(entry + 1)
    start = tl.load(spans + 2 * sequence).to(tl.int64)
    tokens = tl.load(spans + 2 * sequence + 1)
    if listed == 0:
        return
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    begin = (tl.cdiv(tokens, RESIDENT) - listed) * RESIDENT
    batch = 0 if PACKED else sequence.to(tl.int64)
    k_head = k + batch * k_stride_batch + head // group * k_stride_head + start * k_stride
    q_rows = q + batch * q_stride_batch + head * q_stride_head + (start + begin) * q_stride

    query = begin + tl.arange(0, RESIDENT)
    q_count = tokens - begin
    q_tile = _load_tile(q_rows, q_stride, q_stride_dim, q_count, 0, RESIDENT, HEAD_DIM, DEPTH, WIDE)  # [query, dim]
    highest = tl.full((RESIDENT,), LOWEST, tl.float32)
    total = tl.zeros((RESIDENT,), tl.float32)

    # Tiles of keys at the window's far edge are masked, then come those which every query sees, then the diagonal.
    diagonal = begin // STREAMED * STREAMED
    first = 0
    if WINDOW:
        edge = tl.maximum(begin - window + 1, 0) // STREAMED * STREAMED
        first = tl.minimum(tl.cdiv(tl.maximum(begin + RESIDENT - window, 0), STREAMED) * STREAMED, diagonal)
        highest, total = _scan_keys(
            highest, total, q_tile, q_rows, q_stride, q_stride_dim, q_count, k_head, k_stride, k_stride_dim,
            query, edge, first, tokens, window, scale, softcap,
            RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, FLIPPED, True,
        )  # fmt: skip
    highest, total = _scan_keys(
        highest, total, q_tile, q_rows, q_stride, q_stride_dim, q_count, k_head, k_stride, k_stride_dim,
        query, first, diagonal, tokens, window, scale, softcap,
        RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, FLIPPED, False,
    )  # fmt: skip
    highest, total = _scan_keys(
        highest, total, q_tile, q_rows, q_stride, q_stride_dim, q_count, k_head, k_stride, k_stride_dim,
        query, diagonal, tl.minimum(begin + RESIDENT, tokens), tokens, window, scale, softcap,
        RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, FLIPPED, True,
    )  # fmt: skip
    out = negative_lse + (head * slots + tl.load(entry + 2)) * RESIDENT + query
    tl.store(out, _negative_lse(highest, total, sinks, sinks_stride, head, query < tokens))


@triton.jit
def _query_scores(
    k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, tile, tokens,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Products of the resident keys with one tile of queries of one head, [key, query]."""
    start = tile * STREAMED
    q_rows = q_head + tl.cast(start, tl.int64) * q_stride
    return _products(
        k_tile, k_rows, k_stride, k_stride_dim, k_count, q_rows, q_stride, q_stride_dim, tokens - start,
        RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE,
    )  # fmt: skip


@triton.jit
def _add_received(
    sums, scores, negative_lse, weights, key, tile, window, scale, softcap,
    STREAMED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`sums` with the probabilities that each key receives from one tile of queries."""
    start = tile * STREAMED  # a product, so that the compiler knows the alignment and loads vectors
    lane = tl.arange(0, STREAMED)
    shift = tl.load(negative_lse + start + lane)[None, :]  # -inf past the end: there the probability is 0
    if SOFTCAP:
        received = tl.exp2(tl.fma(_tanh(scores * scale), softcap, shift))
    else:
        received = tl.exp2(tl.fma(scores, scale, shift))
    if MASKED:
        query = start + lane
        visible = key[:, None] < query[None, :]
        if WINDOW:
            visible &= query[None, :] - key[:, None] < window
        received = tl.where(visible, received, 0.0)
    if weights is not None:
        received *= tl.load(weights + start + lane)[None, :]
    return sums + tl.sum(received, axis=1)


@triton.jit
def _scan_queries(
    sums, k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, negative_lse, weights,
    key, first, stop, tokens, window, scale, softcap,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Adds the probabilities that each key receives from the tiles first ... stop - 1 of queries of one head."""
    if AHEAD and not MASKED:
        # The product of the next tile is under way while the exponentials of this one are taken.
        if first < stop:
            scores = _query_scores(
                k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, first, tokens,
                RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE,
            )  # fmt: skip
            for tile in range(first, stop - 1):
                following = _query_scores(
                    k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, tile + 1, tokens,
                    RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE,
                )  # fmt: skip
                sums = _add_received(
                    sums, scores, negative_lse, weights, key, tile, window, scale, softcap, STREAMED, SOFTCAP, WINDOW, MASKED
                )
                scores = following
            sums = _add_received(
                sums, scores, negative_lse, weights, key, stop - 1, window, scale, softcap, STREAMED, SOFTCAP, WINDOW, MASKED
            )
    else:
        for tile in range(first, stop):
            scores = _query_scores(
                k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, tile, tokens,
                RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE,
            )  # fmt: skip
            sums = _add_received(
                sums, scores, negative_lse, weights, key, tile, window, scale, softcap, STREAMED, SOFTCAP, WINDOW, MASKED
            )
    return sums


@triton.jit(do_not_specialize=["slots", "kv_heads", "group", "window"])
def _column_sum_kernel(
    q, k, negative_lse, weights, partial_out, pieces, spans,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    slots, kv_heads, group, window, scale, softcap,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries, [entries, Hkv, RESIDENT], or per query head, [entries, H, RESIDENT].

    A program owns one kv head's tile of keys and walks over the group's query heads and the queries of its piece.
    """
    entry = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    piece = pieces + PIECE_FIELDS * entry
    listed = tl.load(piece)  # tile + 1, or 0
    sequence = tl.load(piece + 1)
    first = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    start = tl.load(spans + 2 * sequence).to(tl.int64)
    tokens = tl.load(spans + 2 * sequence + 1)
    if listed == 0:
        return
    begin = (listed - 1) * RESIDENT
    batch = 0 if PACKED else sequence.to(tl.int64)
    k_rows = k + batch * k_stride_batch + kv_head * k_stride_head + (start + begin) * k_stride
    key = begin + tl.arange(0, RESIDENT)
    k_count = tokens - begin
    k_tile = _load_tile(k_rows, k_stride, k_stride_dim, k_count, 0, RESIDENT, HEAD_DIM, DEPTH, WIDE)  # [key, dim]

    # Tiles of queries on the diagonal are masked, then come those which see every key, then the window's far edge.
    diagonal_end = tl.minimum(tl.maximum(listed * (RESIDENT // STREAMED), first), stop)
    full_end = stop
    if WINDOW:
        stop = tl.minimum(stop, tl.cdiv(begin + RESIDENT - 1 + window, STREAMED))
        full_end = (begin + RESIDENT + tl.maximum(window - RESIDENT, 0)) // STREAMED
        full_end = tl.maximum(tl.minimum(full_end, stop), diagonal_end)

    first_slot = tl.load(piece + 2).to(tl.int64)
    if weights is not None:
        weights += first_slot * RESIDENT
    q_head = q + batch * q_stride_batch + kv_head * group * q_stride_head + start * q_stride
    lse_head = negative_lse + (kv_head * group * slots + first_slot) * RESIDENT
    if PER_HEAD:
        partial_out += tl.program_id(0).to(tl.int64) * group * RESIDENT
    sums = tl.zeros((RESIDENT,), tl.float32)
    for _ in tl.range(0, group, disable_licm=True):  # hoisting out of it spills
        sums = _scan_queries(
            sums, k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, lse_head, weights,
            key, first, diagonal_end, tokens, window, scale, softcap,
            RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, True, AHEAD,
        )  # fmt: skip
        sums = _scan_queries(
            sums, k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, lse_head, weights,
            key, diagonal_end, full_end, tokens, window, scale, softcap,
            RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, False, AHEAD,
        )  # fmt: skip
        if WINDOW:
            sums = _scan_queries(
                sums, k_tile, k_rows, k_stride, k_stride_dim, k_count, q_head, q_stride, q_stride_dim, lse_head, weights,
                key, full_end, stop, tokens, window, scale, softcap,
                RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, SOFTCAP, WINDOW, True, AHEAD,
            )  # fmt: skip
        if PER_HEAD:
            tl.store(partial_out + tl.arange(0, RESIDENT), sums)
            partial_out += RESIDENT
            sums = tl.zeros((RESIDENT,), tl.float32)
        q_head += q_stride_head
        lse_head += slots * RESIDENT
    if not PER_HEAD:
        # Not computed before the loops, which would hold it in registers.
        tl.store(partial_out + tl.program_id(0).to(tl.int64) * RESIDENT + tl.arange(0, RESIDENT), sums)


@triton.jit(do_not_specialize=["slots", "rows"])
def _lay_out_kernel(
    values, out, tiles, spans, stride_batch, stride_row, stride, slots, rows, factor, outside,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """values [B, rows, N] times `factor`, in float32, as [rows, slots, RESIDENT]: each sequence begins at its first tile and
    fills its last one up with `outside`. So the column pass reads whole aligned vectors, without masks or strides."""
    entry = tiles + TILE_FIELDS * (tl.program_id(0) // rows)
    row = (tl.program_id(0) % rows).to(tl.int64)
    listed = tl.load(entry)
    sequence = tl.load(entry + 1)
    start = tl.load(spans + 2 * sequence).to(tl.int64)
    tokens = tl.load(spans + 2 * sequence + 1)
    if listed == 0:
        return
    token = (listed - 1) * RESIDENT + tl.arange(0, RESIDENT)
    inside = token < tokens
    batch = 0 if PACKED else sequence.to(tl.int64)
    address = values + batch * stride_batch + row * stride_row + (start + token) * stride
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + (row * slots + tl.load(entry + 2)) * RESIDENT + token, tl.where(inside, value, outside))


@triton.jit(do_not_specialize=["row_tokens", "kv_heads", "heads", "rows", "window"])
def _add_kernel(
    partial, out, tiles, of_slot, spans, row_tokens, kv_heads, heads, rows, window,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """out [B, rows, N]: a tile's pieces, and kv heads unless PER_HEAD, added in ascending order and divided."""
    entry = tiles + TILE_FIELDS * (tl.program_id(0) // rows)
    row = (tl.program_id(0) % rows).to(tl.int64)
    listed = tl.load(entry)
    sequence = tl.load(entry + 1)
    slot = of_slot + 2 * (tl.load(entry + 2) + listed - 1)
    start = tl.load(spans + 2 * sequence).to(tl.int64)
    tokens = tl.load(spans + 2 * sequence + 1)
    if listed == 0:
        return
    first = tl.load(slot).to(tl.int64)
    pieces = tl.load(slot + 1)
    lane = tl.arange(0, RESIDENT)
    total = tl.zeros((RESIDENT,), tl.float32)
    if PER_HEAD:
        for piece in range(pieces):
            total += tl.load(partial + ((first + piece) * heads + row) * RESIDENT + lane)
    else:
        for kv_head in range(kv_heads):
            for piece in range(pieces):
                total += tl.load(partial + ((first + piece) * kv_heads + kv_head) * RESIDENT + lane)

    key = (listed - 1) * RESIDENT + lane
    divisor = tl.full((RESIDENT,), 1.0, tl.float32)
    if NORMALIZE:
        future = tokens - 1 - key
        if WINDOW:
            future = tl.minimum(future, window - 1)
        divisor = tl.maximum(future, 1).to(tl.float32)
    if not PER_HEAD:
        divisor *= heads
    batch = 0 if PACKED else sequence.to(tl.int64)
    tl.store(out + (batch * rows + row) * row_tokens + start + key, total / divisor, mask=key < tokens)


def incoming_attention(
    q: Tensor,
    k: Tensor,
    spans: Spans,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    row_weights: Tensor | None,
    per_head: bool,
    normalize: bool,
) -> Tensor:
    """See `entra_kernels.incoming_attention`; spans as in `entra_kernels/_spans.py`. q and k are read where they are.

    Beside the result it takes 4 bytes per token for each query head (the log-sum-exp) and for each kv head (the sums; with
    `per_head` for each query head), each sequence rounded up to whole tiles; and the sums of further pieces, `plan._most_cuts`
    tiles of them: for one sequence at most 528 KiB, times G with `per_head`.
    """
    check_products(q)
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = heads if per_head else 1
    out = torch.zeros(batch, rows, tokens, dtype=torch.float32, device=q.device)
    if spans.count and out.numel():
        options = any(option is not None for option in (sliding_window, softcap, row_weights))
        size = attention_launch(head_dim, group, q.element_size(), chip_of(q.device), options=options)
        with torch.cuda.device_of(q):
            _launch(
                q, k, spans, out, size,
                scale=scale, window=sliding_window, softcap=softcap, sinks=sinks, lse=lse, row_weights=row_weights,
                per_head=per_head, normalize=normalize,
            )  # fmt: skip
    return out if per_head else out[:, 0]


def _launch(
    q: Tensor,
    k: Tensor,
    spans: Spans,
    out: Tensor,
    size: AttentionLaunch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    row_weights: Tensor | None,
    per_head: bool,
    normalize: bool,
) -> None:
    """Fills `out` [B, rows, N], which is 0 outside the spans."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    packed = batch == 1
    tables = plan(spans, size=size, kv_heads=kv_heads, window=window, device=q.device)
    strides = (*q.stride(), *k.stride())
    factor, cap = score_factors(scale, softcap)
    constexprs = {
        "HEAD_DIM": head_dim,
        "DEPTH": size.depth,
        "RESIDENT": size.resident,
        "STREAMED": size.streamed,
        "WIDE": wide_tiles(q, size) or wide_tiles(k, size),
        "PACKED": packed,
        "SOFTCAP": softcap is not None,
        "WINDOW": window is not None,
        **size.options,
    }

    def lay_out(values: Tensor, factor: float, outside: float) -> Tensor:
        rows = values.shape[1]
        laid_out = torch.empty(rows, tables.slots, size.resident, dtype=torch.float32, device=q.device)
        _lay_out_kernel[(tables.slots * rows,)](
            values, laid_out, tables.tiles, tables.spans, *values.stride(), tables.slots, rows, factor, outside,
            RESIDENT=size.resident, PACKED=packed, **FUSED,
        )  # fmt: skip
        return laid_out

    views = None
    if size.ring is not None and q.is_cuda and gluon_is_known() and not triton.knobs.runtime.interpret:
        from entra_kernels._triton import hopper  # Gluon is loaded where it runs only

        views = hopper.Views.of(q, k, scale)

    if lse is not None:
        negative_lse = lay_out(lse, -LOG2_E.value, -math.inf)
    else:
        negative_lse = torch.empty(heads, tables.slots, size.resident, dtype=torch.float32, device=q.device)
        if size.ring is not None and views is not None:
            hopper.row_lse(views, size.ring, size.streamed, sinks, negative_lse, tables, packed=packed, scale=factor)
        else:
            _row_lse_kernel[(tables.slots * heads,)](
                q, k, sinks, negative_lse, tables.tiles, tables.spans, *strides, 0 if sinks is None else sinks.stride(0),
                tables.slots, heads, group, window or 0, abs(factor), cap, FLIPPED=scale < 0, **constexprs,
            )  # fmt: skip
    weights = None if row_weights is None else lay_out(row_weights.unsqueeze(1), 1.0, 0.0)
    sums = heads if per_head else kv_heads
    partial = torch.empty(tables.entries, sums, size.resident, dtype=torch.float32, device=q.device)
    if size.ring is not None and views is not None:
        hopper.column_sum(
            views, size.ring, size.streamed, negative_lse, partial, tables, packed=packed, per_head=per_head, scale=factor
        )
    else:
        _column_sum_kernel[(tables.entries * kv_heads,)](
            q, k, negative_lse, weights, partial, tables.pieces, tables.spans, *strides,
            tables.slots, kv_heads, group, window or 0, factor, cap, PER_HEAD=per_head, AHEAD=size.ahead, **constexprs,
        )  # fmt: skip
    rows = out.shape[1]
    _add_kernel[(tables.slots * rows,)](
        partial, out, tables.tiles, tables.of_slot, tables.spans, tokens, kv_heads, heads, rows, window or 0,
        RESIDENT=size.resident, PACKED=packed, WINDOW=window is not None, PER_HEAD=per_head, NORMALIZE=normalize,
        **FUSED,
    )  # fmt: skip


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Scores are in log2 units, because the hardware has exp2: log2(e) * s, or log2(e) * softcap * tanh(s / softcap)."""
    if softcap:
        return scale / softcap, softcap * LOG2_E.value
    return scale * LOG2_E.value, 0.0


def wide_tiles(tensor: Tensor, size: AttentionLaunch) -> bool:
    """Whether an offset within a tile of `tensor` [B, H, N, D] needs more than 32 bits."""
    last = size.resident * tensor.stride(-2) + max(size.depth, tensor.shape[-1]) * tensor.stride(-1)
    return last >= 2**31


HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128, 192, 256, 512)


def aot_cases(dtype: str, chip: Chip) -> Iterator[KernelCase]:
    """Both passes for every head dim: plain, with a window and every option that goes with it, and with a softcap on top; for
    some also with what needs no other launch size than plain; and the small kernels.

    All for a stride of 1 along the head dim, see `benchmarks/static/aot.py`."""
    for head_dim in HEAD_DIMS:
        for variant in ("", " sinks per head packed", " window", " window softcap"):
            if variant == " sinks per head packed" and head_dim not in (64, 128, 256):
                continue
            for kernel, name in ((_row_lse_kernel, "row_lse"), (_column_sum_kernel, "column_sum")):
                softcap, window = "softcap" in variant, "window" in variant
                size = attention_launch(head_dim, 4, 4 if dtype == "fp32" else 2, chip, options=window)
                values: dict[str, object] = {
                    "HEAD_DIM": head_dim,
                    "DEPTH": size.depth,
                    "RESIDENT": size.resident,
                    "STREAMED": size.streamed,
                    "WIDE": False,
                    "q_stride_dim": 1,
                    "k_stride_dim": 1,
                    "PACKED": variant != "",
                    "SOFTCAP": softcap,
                    "WINDOW": window,
                    "FLIPPED": False,
                    "PER_HEAD": variant != "",
                    "AHEAD": size.ahead,
                }
                if not variant:
                    values["sinks"] = None
                if not window:
                    values["weights"] = None
                pointers = {"q": f"*{dtype}", "k": f"*{dtype}", "sinks": f"*{dtype}"}
                pointers |= dict.fromkeys(("negative_lse", "weights", "partial_out"), "*fp32")
                pointers |= dict.fromkeys(("tiles", "pieces", "spans"), "*i32")
                types = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, "scale": "fp32", "softcap": "fp32"}
                strides = ("q_stride_batch", "q_stride_head", "q_stride", "k_stride_batch", "k_stride_head", "k_stride")
                yield KernelCase(
                    label=f"{name} d={head_dim}{variant}",
                    kernel=kernel,
                    arguments={name: types[name] for name in kernel.arg_names if name not in values},
                    constexprs={name: values[name] for name in kernel.arg_names if name in values},
                    divisible=tuple(n for n in (*pointers, *strides) if n in kernel.arg_names and n not in values),
                    num_warps=size.num_warps,
                    num_stages=size.num_stages,
                    max_registers=size.max_registers,
                    head_dim=head_dim,
                )
    tables = dict.fromkeys(("tiles", "of_slot", "spans"), "*i32")
    yield KernelCase(
        label="lay_out",
        kernel=_lay_out_kernel,
        arguments={"values": "*fp32", "out": "*fp32", "tiles": "*i32", "spans": "*i32"}
        | dict.fromkeys(("stride_batch", "stride_row", "slots", "rows"), "i32")
        | dict.fromkeys(("factor", "outside"), "fp32"),
        constexprs={"RESIDENT": 128, "PACKED": False, "stride": 1},
        divisible=("values", "out", "tiles", "spans"),
    )
    yield KernelCase(
        label="add",
        kernel=_add_kernel,
        arguments={"partial": "*fp32", "out": "*fp32"}
        | tables
        | dict.fromkeys(("row_tokens", "kv_heads", "heads", "rows", "window"), "i32"),
        constexprs={"RESIDENT": 128, "PACKED": False, "WINDOW": False, "PER_HEAD": False, "NORMALIZE": True},
        divisible=("partial", "out", *tables),
    )
