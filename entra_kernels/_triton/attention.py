"""`incoming_attention` in Triton: a pass over rows for the log-sum-exp, a pass over columns for the sums.

The column pass has the keys on the matrix unit's M side, S^T = K Q^T. So the sum over queries runs along the registers of a
thread: 8 shuffles per 64 exponentials, where S = Q K^T needs 192. A program owns one tile of keys of one kv head and keeps it
resident. It walks over the group's query heads and over a piece of the queries from the diagonal on. The sum over the group is
free, no key is repeated, and nothing is added atomically. The causal comparison is made on the diagonal's tiles only. A last
kernel adds up pieces and kv heads in a fixed order.

Tiles are counted from a sequence's own start and sums run in a fixed order, so the result does not depend on the batch. Who
works on what is in `plan.py`, launch sizes with their reasons are in `launch.py`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spans import Spans
from ..reference import AttentionOptions
from .launch import (
    FUSED,
    AttentionLaunch,
    attention_launch,
    check_products,
    chip_of,
    gluon_is_known,
)
from .plan import plan
from .primitives import (
    LOG2_E,
    LOWEST,
    Factors,
    Scoring,
    Shape,
    Tile,
    first_slot,
    load_tile,
    negative_log_sum,
    probabilities,
    products,
    read_piece,
    read_span,
    read_tile,
    scan_keys,
    tile_from,
    walk,
)


@triton.jit(do_not_specialize=["slots", "heads", "group", "window"])
def _row_lse_kernel(
    q, k, sinks, negative_lse, tiles, spans,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    sinks_stride, slots, heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of every row, laid out as `_lay_out_kernel` does. A program owns one query head's tile of queries and
    walks over the keys that they see."""
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, FLIPPED)
    scoring = Scoring(score_factors, window)
    entry = read_tile(tiles, tl.program_id(0) // heads)
    head = (tl.program_id(0) % heads).to(tl.int64)
    start, tokens = read_span(spans, entry.sequence)
    start = start.to(tl.int64)
    if entry.listed == 0:
        return
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    begin = (tl.cdiv(tokens, RESIDENT) - entry.listed) * RESIDENT
    batch = 0 if PACKED else entry.sequence.to(tl.int64)
    k_first = k + batch * k_stride_batch + head // group * k_stride_head + start * k_stride
    q_first = q + batch * q_stride_batch + head * q_stride_head + (start + begin) * q_stride
    keys = Tile(k_first, k_stride, k_stride_dim, tokens)
    queries = Tile(q_first, q_stride, q_stride_dim, tokens - begin)

    query = begin + tl.arange(0, RESIDENT)
    loaded = load_tile(queries, 0, shape, RESIDENT)  # [query, dim]
    highest = tl.full((RESIDENT,), LOWEST, tl.float32)
    total = tl.zeros((RESIDENT,), tl.float32)

    # Tiles of keys at the window's far edge are masked, then come those which every query sees, then the diagonal.
    diagonal = begin // STREAMED * STREAMED
    first = 0
    if WINDOW:
        edge = tl.maximum(begin - window + 1, 0) // STREAMED * STREAMED
        first = tl.minimum(tl.cdiv(tl.maximum(begin + RESIDENT - window, 0), STREAMED) * STREAMED, diagonal)
        highest, total = scan_keys(highest, total, loaded, queries, keys, query, edge, first, scoring, shape, True)
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, first, diagonal, scoring, shape, False)
    end = tl.minimum(begin + RESIDENT, tokens)
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, diagonal, end, scoring, shape, True)
    out = negative_lse + (head * slots + first_slot(entry)) * RESIDENT + query
    tl.store(out, negative_log_sum(highest, total, sinks, sinks_stride, head, query < tokens))


@triton.jit
def _query_products(loaded, keys, queries, tile, shape):
    """Products of the resident keys with one tile of queries of one head, [key, query]."""
    return products(loaded, keys, tile_from(queries, tile * shape.STREAMED), shape)


@triton.jit
def _add_received(sums, product, negative_lse, weights, key, tile, scoring, shape, MASKED: tl.constexpr):
    """`sums` with the probabilities that each key receives from one tile of queries."""
    begin = tile * shape.STREAMED  # a product, so that the compiler knows the alignment and loads vectors
    lane = tl.arange(0, shape.STREAMED)
    shift = tl.load(negative_lse + begin + lane)[None, :]  # -inf past the end: there the probability is 0
    received = probabilities(product, shift, scoring.factors)
    if MASKED:
        query = begin + lane
        visible = key[:, None] < query[None, :]
        if shape.WINDOW:
            visible &= query[None, :] - key[:, None] < scoring.window
        received = tl.where(visible, received, 0.0)
    if weights is not None:
        received *= tl.load(weights + begin + lane)[None, :]
    return sums + tl.sum(received, axis=1)


@triton.jit
def _scan_queries(
    sums, loaded, keys, queries, negative_lse, weights, key, first, stop, scoring, shape, MASKED: tl.constexpr
):  # fmt: skip
    """Adds the probabilities that each key receives from the tiles first ... stop - 1 of queries of one head."""
    for tile in range(first, stop):
        product = _query_products(loaded, keys, queries, tile, shape)
        sums = _add_received(sums, product, negative_lse, weights, key, tile, scoring, shape, MASKED)
    return sums


@triton.jit
def _scan_queries_ahead(sums, loaded, keys, queries, negative_lse, weights, key, first, stop, scoring, shape):
    """The same without a mask; the product of the next tile is under way while the exponentials of this one are taken."""
    if first < stop:
        product = _query_products(loaded, keys, queries, first, shape)
        for tile in range(first, stop - 1):
            following = _query_products(loaded, keys, queries, tile + 1, shape)
            sums = _add_received(sums, product, negative_lse, weights, key, tile, scoring, shape, False)
            product = following
        sums = _add_received(sums, product, negative_lse, weights, key, stop - 1, scoring, shape, False)
    return sums


@triton.jit(do_not_specialize=["slots", "kv_heads", "group", "window"])
def _column_sum_kernel(
    q, k, negative_lse, weights, partial_out, pieces, spans,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    slots, kv_heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries, [entries, Hkv, RESIDENT], or per query head, [entries, H, RESIDENT].

    A program owns one kv head's tile of keys and walks over the group's query heads and the queries of its piece.
    """
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, False)
    scoring = Scoring(score_factors, window)
    piece = read_piece(pieces, (tl.program_id(0) // kv_heads).to(tl.int64))
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    first, stop = walk(piece)
    start, tokens = read_span(spans, piece.sequence)
    start = start.to(tl.int64)
    if piece.listed == 0:
        return
    begin = (piece.listed - 1) * RESIDENT
    batch = 0 if PACKED else piece.sequence.to(tl.int64)
    k_first = k + batch * k_stride_batch + kv_head * k_stride_head + (start + begin) * k_stride
    keys = Tile(k_first, k_stride, k_stride_dim, tokens - begin)
    key = begin + tl.arange(0, RESIDENT)
    loaded = load_tile(keys, 0, shape, RESIDENT)  # [key, dim]

    # Tiles of queries on the diagonal are masked, then come those which see every key, then the window's far edge.
    diagonal_end = tl.minimum(tl.maximum(piece.listed * (RESIDENT // STREAMED), first), stop)
    full_end = stop
    if WINDOW:
        stop = tl.minimum(stop, tl.cdiv(begin + RESIDENT - 1 + window, STREAMED))
        full_end = (begin + RESIDENT + tl.maximum(window - RESIDENT, 0)) // STREAMED
        full_end = tl.maximum(tl.minimum(full_end, stop), diagonal_end)

    slot = first_slot(piece).to(tl.int64)
    if weights is not None:
        weights += slot * RESIDENT
    q_head = q + batch * q_stride_batch + kv_head * group * q_stride_head + start * q_stride
    lse = negative_lse + (kv_head * group * slots + slot) * RESIDENT
    if PER_HEAD:
        partial_out += tl.program_id(0).to(tl.int64) * group * RESIDENT
    sums = tl.zeros((RESIDENT,), tl.float32)
    for _ in tl.range(0, group, disable_licm=True):  # hoisting out of it spills
        queries = Tile(q_head, q_stride, q_stride_dim, tokens)
        sums = _scan_queries(sums, loaded, keys, queries, lse, weights, key, first, diagonal_end, scoring, shape, True)
        if AHEAD:
            sums = _scan_queries_ahead(
                sums, loaded, keys, queries, lse, weights, key, diagonal_end, full_end, scoring, shape
            )  # fmt: skip
        else:
            sums = _scan_queries(
                sums, loaded, keys, queries, lse, weights, key, diagonal_end, full_end, scoring, shape, False
            )  # fmt: skip
        if WINDOW:
            sums = _scan_queries(sums, loaded, keys, queries, lse, weights, key, full_end, stop, scoring, shape, True)
        if PER_HEAD:
            tl.store(partial_out + tl.arange(0, RESIDENT), sums)
            partial_out += RESIDENT
            sums = tl.zeros((RESIDENT,), tl.float32)
        q_head += q_stride_head
        lse += slots * RESIDENT
    if not PER_HEAD:
        # Not computed before the loops, which would hold it in registers.
        tl.store(partial_out + tl.program_id(0).to(tl.int64) * RESIDENT + tl.arange(0, RESIDENT), sums)


@triton.jit(do_not_specialize=["slots", "lines"])
def _lay_out_kernel(
    values, out, tiles, spans, stride_batch, stride_line, stride, slots, lines, factor, outside,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """values [B, lines, N] times `factor`, in float32, as [lines, slots, RESIDENT]: each sequence begins at its first tile and
    fills its last one up with `outside`. So the column pass reads whole aligned vectors, without masks or strides. A line is
    one head's values, or those of all heads."""
    entry = read_tile(tiles, tl.program_id(0) // lines)
    line = (tl.program_id(0) % lines).to(tl.int64)
    start, tokens = read_span(spans, entry.sequence)
    start = start.to(tl.int64)
    if entry.listed == 0:
        return
    token = (entry.listed - 1) * RESIDENT + tl.arange(0, RESIDENT)
    inside = token < tokens
    batch = 0 if PACKED else entry.sequence.to(tl.int64)
    address = values + batch * stride_batch + line * stride_line + (start + token) * stride
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + (line * slots + first_slot(entry)) * RESIDENT + token, tl.where(inside, value, outside))


@triton.jit(do_not_specialize=["padded_tokens", "kv_heads", "heads", "lines", "window"])
def _add_kernel(
    partial, out, tiles, of_slot, spans, padded_tokens, kv_heads, heads, lines, window,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """out [B, lines, N]: a tile's pieces, and kv heads unless PER_HEAD, added in ascending order and divided."""
    entry = read_tile(tiles, tl.program_id(0) // lines)
    line = (tl.program_id(0) % lines).to(tl.int64)
    slot = of_slot + 2 * (first_slot(entry) + entry.listed - 1)
    start, tokens = read_span(spans, entry.sequence)
    start = start.to(tl.int64)
    if entry.listed == 0:
        return
    first = tl.load(slot).to(tl.int64)
    pieces = tl.load(slot + 1)
    lane = tl.arange(0, RESIDENT)
    total = tl.zeros((RESIDENT,), tl.float32)
    if PER_HEAD:
        for piece in range(pieces):
            total += tl.load(partial + ((first + piece) * heads + line) * RESIDENT + lane)
    else:
        for kv_head in range(kv_heads):
            for piece in range(pieces):
                total += tl.load(partial + ((first + piece) * kv_heads + kv_head) * RESIDENT + lane)

    key = (entry.listed - 1) * RESIDENT + lane
    divisor = tl.full((RESIDENT,), 1.0, tl.float32)
    if NORMALIZE:
        future = tokens - 1 - key
        if WINDOW:
            future = tl.minimum(future, window - 1)
        divisor = tl.maximum(future, 1).to(tl.float32)
    if not PER_HEAD:
        divisor *= heads
    batch = 0 if PACKED else entry.sequence.to(tl.int64)
    tl.store(out + (batch * lines + line) * padded_tokens + start + key, total / divisor, mask=key < tokens)


def incoming_attention(q: Tensor, k: Tensor, spans: Spans, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """See `entra_kernels.incoming_attention`; spans as in `entra_kernels/_spans.py`. q and k are read where they are.

    Besides the result it takes 4 bytes per token for each query head (the log-sum-exp) and for each kv head (the sums; with
    `per_head` for each query head). Each sequence is rounded up to whole tiles. The sums of further pieces take
    `plan._most_cuts` tiles: for one sequence at most 528 KiB, times G with `per_head`.
    """
    check_products(q)
    if spans.queries is not None or not options.usual:
        raise RuntimeError("backend='triton' takes a query for every key, causal, without the diagonal; use backend='torch'")
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    by_head = options.heads == "query"
    out = torch.zeros(batch, heads if by_head else 1, tokens, dtype=torch.float32, device=q.device)
    if spans.count and out.numel():
        cut_or_weighed = options.sliding_window is not None or options.row_weights is not None
        more = cut_or_weighed or not Factors.of(options).plain
        size = attention_launch(head_dim, group, q.element_size(), chip_of(q.device), options=more)
        with torch.cuda.device_of(q):
            _launch(q, k, spans, out, size, options)
    return (out if by_head else out[:, 0]), None


def _launch(q: Tensor, k: Tensor, spans: Spans, out: Tensor, size: AttentionLaunch, options: AttentionOptions) -> None:
    """Fills `out` [B, H, N] or [B, 1, N], which is 0 outside the spans."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    packed = batch == 1
    tables = plan(spans, size=size, kv_heads=kv_heads, window=options.sliding_window, device=q.device)
    strides = (*q.stride(), *k.stride())
    score_factors = Factors.of(options)
    of_absolute = score_factors._replace(scale=abs(score_factors.scale))
    window, sinks = options.sliding_window or 0, options.sinks
    constexprs = {
        "HEAD_DIM": head_dim,
        "DEPTH": size.depth,
        "RESIDENT": size.resident,
        "STREAMED": size.streamed,
        "WIDE": wide_tiles(q, size) or wide_tiles(k, size),
        "PACKED": packed,
        "WINDOW": options.sliding_window is not None,
        **size.options,
    }

    def lay_out(values: Tensor, factor: float, outside: float) -> Tensor:
        lines = values.shape[1]
        laid_out = torch.empty(lines, tables.slots, size.resident, dtype=torch.float32, device=q.device)
        _lay_out_kernel[(tables.slots * lines,)](
            values, laid_out, tables.tiles, tables.spans, *values.stride(), tables.slots, lines, factor, outside,
            RESIDENT=size.resident, PACKED=packed, **FUSED,
        )  # fmt: skip
        return laid_out

    views = None
    if size.ring is not None and q.is_cuda and gluon_is_known() and not triton.knobs.runtime.interpret:
        from . import hopper  # Gluon is loaded where it runs only

        views = hopper.Views.of(q, k, options.scale)

    if options.lse is not None:
        negative_lse = lay_out(options.lse, -LOG2_E.value, -math.inf)
    else:
        negative_lse = torch.empty(heads, tables.slots, size.resident, dtype=torch.float32, device=q.device)
        if size.ring is not None and views is not None:
            hopper.row_lse(views, size.ring, size.streamed, options, negative_lse, tables)
        else:
            _row_lse_kernel[(tables.slots * heads,)](
                q, k, sinks, negative_lse, tables.tiles, tables.spans, *strides, 0 if sinks is None else sinks.stride(0),
                tables.slots, heads, group, window, of_absolute, FLIPPED=options.scale < 0, **constexprs,
            )  # fmt: skip
    weights = None if options.row_weights is None else lay_out(options.row_weights.unsqueeze(1), 1.0, 0.0)
    by_head = options.heads == "query"
    sums = heads if by_head else kv_heads
    partial = torch.empty(tables.entries, sums, size.resident, dtype=torch.float32, device=q.device)
    if size.ring is not None and views is not None:
        hopper.column_sum(views, size.ring, size.streamed, options, negative_lse, partial, tables)
    else:
        _column_sum_kernel[(tables.entries * kv_heads,)](
            q, k, negative_lse, weights, partial, tables.pieces, tables.spans, *strides,
            tables.slots, kv_heads, group, window, score_factors, PER_HEAD=by_head, AHEAD=size.ahead, **constexprs,
        )  # fmt: skip
    lines = out.shape[1]
    _add_kernel[(tables.slots * lines,)](
        partial, out, tables.tiles, tables.of_slot, tables.spans, tokens, kv_heads, heads, lines, window,
        RESIDENT=size.resident, PACKED=packed, WINDOW=options.sliding_window is not None, PER_HEAD=by_head,
        NORMALIZE=options.reduction == "mean", **FUSED,
    )  # fmt: skip


def wide_tiles(tensor: Tensor, size: AttentionLaunch) -> bool:
    """Whether an offset within a tile of `tensor` [B, H, N, D] needs more than 32 bits."""
    last = size.resident * tensor.stride(-2) + max(size.depth, tensor.shape[-1]) * tensor.stride(-1)
    return last >= 2**31
