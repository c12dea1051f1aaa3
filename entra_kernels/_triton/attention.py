"""`incoming_attention` in Triton: a pass over rows for the log-sum-exp, a pass over columns for the sums.

The column pass has the keys on the matrix unit's M side, S^T = K Q^T. So the sum over queries runs along the registers of a
thread: 8 shuffles per 64 exponentials, where S = Q K^T needs 192. A program owns one tile of keys of one kv head and keeps it
resident. It walks over the group's query heads and over a piece of the queries from the diagonal on. The sum over the group is
free, no key is repeated, and nothing is added atomically. The causal comparison is made on the diagonal's tiles only. A last
kernel adds up pieces and kv heads in a fixed order.

Queries that are not simply the keys' own tokens have tiles and slots of their own, and a place among the keys. The column pass
counts keys from the first one that the first query does not count for. So the same code serves queries that start anywhere,
those that count for their own key, and those that see every key. They differ in two numbers per sequence, `Plan.places` and
`Plan.counted`.

Tiles are counted from a sequence's own start and sums run in a fixed order, so the result does not depend on the batch. Who
works on what is in `plan.py`, launch sizes with their reasons are in `launch.py`.
"""

from __future__ import annotations

import math
from typing import Any

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
from .plan import plan, plan_queries
from .primitives import (
    LOG2_E,
    LOWEST,
    Factors,
    Scoring,
    Shape,
    Tile,
    first_slot,
    larger,
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
    q, k, sinks, negative_lse, tiles, spans, key_spans, places,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    sinks_stride, slots, heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of every row, laid out as `_lay_out_kernel` does. A program owns one query head's tile of queries and
    walks over the keys that they see.

    `tiles` and `spans` are those of the queries. Where `key_spans` and `places` are None, they are those of the keys, too."""
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, FLIPPED)
    scoring = Scoring(score_factors, window)
    entry = read_tile(tiles, tl.program_id(0) // heads)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row_start, rows = read_span(spans, entry.sequence)
    row_start = row_start.to(tl.int64)
    if entry.listed == 0:
        return
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    begin = (tl.cdiv(rows, RESIDENT) - entry.listed) * RESIDENT
    start, tokens = row_start, rows
    if places is not None:
        start, tokens = read_span(key_spans, entry.sequence)
        start = start.to(tl.int64)
    batch = 0 if PACKED else entry.sequence.to(tl.int64)
    k_first = k + batch * k_stride_batch + head // group * k_stride_head + start * k_stride
    q_first = q + batch * q_stride_batch + head * q_stride_head + (row_start + begin) * q_stride
    keys = Tile(k_first, k_stride, k_stride_dim, tokens)
    queries = Tile(q_first, q_stride, q_stride_dim, rows - begin)

    row = begin + tl.arange(0, RESIDENT)
    at, query = begin, row
    if places is not None:
        # Without a causal mask the first row sees every key, and the others stand behind the last one.
        at = tl.minimum(begin + tl.load(places + entry.sequence), tokens - 1)
        query = tl.minimum(at + tl.arange(0, RESIDENT), tokens - 1)
    loaded = load_tile(queries, 0, shape, RESIDENT)  # [query, dim]
    highest = tl.full((RESIDENT,), LOWEST, tl.float32)
    total = tl.zeros((RESIDENT,), tl.float32)

    # Tiles of keys at the window's far edge are masked, then come those which every query sees, then the diagonal.
    diagonal = at // STREAMED * STREAMED
    first = 0
    if WINDOW:
        edge = tl.maximum(at - window + 1, 0) // STREAMED * STREAMED
        first = tl.minimum(tl.cdiv(tl.maximum(at + RESIDENT - window, 0), STREAMED) * STREAMED, diagonal)
        highest, total = scan_keys(highest, total, loaded, queries, keys, query, edge, first, scoring, shape, True)
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, first, diagonal, scoring, shape, False)
    end = tl.minimum(at + RESIDENT, tokens)
    highest, total = scan_keys(highest, total, loaded, queries, keys, query, diagonal, end, scoring, shape, True)
    out = negative_lse + (head * slots + first_slot(entry)) * RESIDENT + row
    tl.store(out, negative_log_sum(highest, total, sinks, sinks_stride, head, row < rows))


@triton.jit
def _query_products(loaded, keys, queries, tile, shape):
    """Products of the resident keys with one tile of queries of one head, [key, query]."""
    return products(loaded, keys, tile_from(queries, tile * shape.STREAMED), shape)


@triton.jit
def _add_received(sums, product, negative_lse, weights, key, tile, scoring, shape, MASKED: tl.constexpr):
    """`sums` with the probabilities that each key receives from one tile of queries, or their maximum."""
    NOTHING: tl.constexpr = float("-inf") if shape.MAX else 0.0
    begin = tile * shape.STREAMED  # a product, so that the compiler knows the alignment and loads vectors
    lane = tl.arange(0, shape.STREAMED)
    shift = tl.load(negative_lse + begin + lane)[None, :]  # -inf past the end: there the probability is 0
    received = probabilities(product, shift, scoring.factors)
    if shape.MAX and weights is not None:  # a weight may be negative: then 0 is above what counts
        received *= tl.load(weights + begin + lane)[None, :]
        received = tl.where(shift == float("-inf"), NOTHING, received)
    if MASKED:
        query = begin + lane
        visible = key[:, None] < query[None, :]
        if shape.WINDOW:
            visible &= query[None, :] - key[:, None] < scoring.window
        received = tl.where(visible, received, NOTHING)
    if shape.MAX:
        return larger(sums, tl.reduce(received, 1, larger))
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
    q, k, negative_lse, weights, partial_out, pieces, spans, query_spans, counted,
    q_stride_batch, q_stride_head, q_stride, q_stride_dim, k_stride_batch, k_stride_head, k_stride, k_stride_dim,
    slots, kv_heads, group, window, score_factors,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr, STREAMED: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr, WINDOW: tl.constexpr, PER_HEAD: tl.constexpr, AHEAD: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries, [entries, Hkv, RESIDENT], or per query head, [entries, H, RESIDENT]; with MAX, which
    needs PER_HEAD, the maximum.

    A program owns one kv head's tile of keys and walks over the group's query heads and the queries of its piece. All is
    counted in rows of q from the first one that counts: a key number 0 is the first that this row does not count for.
    """
    shape: tl.constexpr = Shape(RESIDENT, STREAMED, HEAD_DIM, DEPTH, WIDE, WINDOW, False, MAX)
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
    row_start, rows = start, tokens
    if counted is not None:
        row_start, rows = read_span(query_spans, piece.sequence)
        row_start = row_start.to(tl.int64)
        begin -= tl.load(counted + piece.sequence)
    key = begin + tl.arange(0, RESIDENT)
    loaded = load_tile(keys, 0, shape, RESIDENT)  # [key, dim]

    # Tiles of queries on the diagonal are masked, then come those which see every key, then the window's far edge.
    diagonal_end = piece.listed * (RESIDENT // STREAMED)
    if counted is not None:
        diagonal_end = tl.cdiv(begin + RESIDENT, STREAMED)
    diagonal_end = tl.minimum(tl.maximum(diagonal_end, first), stop)
    full_end = stop
    if WINDOW:
        stop = tl.minimum(stop, tl.cdiv(begin + RESIDENT - 1 + window, STREAMED))
        full_end = (begin + RESIDENT + tl.maximum(window - RESIDENT, 0)) // STREAMED
        full_end = tl.maximum(tl.minimum(full_end, stop), diagonal_end)

    slot = first_slot(piece).to(tl.int64)
    if weights is not None:
        weights += slot * RESIDENT
    q_head = q + batch * q_stride_batch + kv_head * group * q_stride_head + row_start * q_stride
    lse = negative_lse + (kv_head * group * slots + slot) * RESIDENT
    if PER_HEAD:
        partial_out += tl.program_id(0).to(tl.int64) * group * RESIDENT
    sums = tl.full((RESIDENT,), float("-inf") if MAX else 0.0, tl.float32)
    for _ in tl.range(0, group, disable_licm=True):  # hoisting out of it spills
        queries = Tile(q_head, q_stride, q_stride_dim, rows)
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
            sums = tl.full((RESIDENT,), float("-inf") if MAX else 0.0, tl.float32)
        q_head += q_stride_head
        lse += slots * RESIDENT
    if not PER_HEAD:
        # Not computed before the loops, which would hold it in registers.
        tl.store(partial_out + tl.program_id(0).to(tl.int64) * RESIDENT + tl.arange(0, RESIDENT), sums)


@triton.jit(do_not_specialize=["slots", "lines"])
def _lay_out_kernel(
    values, out, tiles, spans, stride_batch, stride_line, stride, slots, lines, factor, outside,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """values [B, lines, Nq] times `factor`, in float32, as [lines, slots, RESIDENT]: each sequence begins at its first tile and
    fills its last one up with `outside`. So the column pass reads whole aligned vectors, without masks or strides. A line is
    one head's values, or those of all heads. With BACK the other way: what lies in `out` goes into `values`."""
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
    if BACK:
        value = tl.load(out + (line * slots + first_slot(entry)) * RESIDENT + token)
        tl.store(address, value * factor, mask=inside)
    else:
        value = tl.load(address, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(out + (line * slots + first_slot(entry)) * RESIDENT + token, tl.where(inside, value, outside))


@triton.jit(do_not_specialize=["padded_tokens", "kv_heads", "heads", "lines", "window"])
def _add_kernel(
    partial, out, tiles, of_slot, spans, query_spans, counted, padded_tokens, kv_heads, heads, lines, window,
    RESIDENT: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr, NORMALIZE: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """out [B, lines, N]: a tile's pieces, and the heads of a line, added in ascending order and divided. With MAX the maximum
    of the pieces, and then the mean over the heads."""
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
    if MAX:
        for member in range(heads // lines):
            highest = tl.full((RESIDENT,), float("-inf"), tl.float32)
            for piece in range(pieces):
                address = partial + ((first + piece) * heads + line * (heads // lines) + member) * RESIDENT
                highest = larger(highest, tl.load(address + lane))
            total += tl.where(highest == float("-inf"), 0.0, highest)
    elif HEADS == "query":
        for piece in range(pieces):
            total += tl.load(partial + ((first + piece) * heads + line) * RESIDENT + lane)
    elif HEADS == "kv":
        for piece in range(pieces):
            total += tl.load(partial + ((first + piece) * kv_heads + line) * RESIDENT + lane)
    else:
        for kv_head in range(kv_heads):
            for piece in range(pieces):
                total += tl.load(partial + ((first + piece) * kv_heads + kv_head) * RESIDENT + lane)

    key = (entry.listed - 1) * RESIDENT + lane
    divisor = tl.full((RESIDENT,), 1.0, tl.float32)
    if NORMALIZE:
        if counted is None:
            future = tokens - 1 - key
            if WINDOW:
                future = tl.minimum(future, window - 1)
        else:  # in rows of q, as in the column pass
            end = tl.load(query_spans + 2 * entry.sequence + 1)
            before = key - tl.load(counted + entry.sequence)
            if WINDOW:
                end = tl.minimum(end, before + window)
            future = end - tl.maximum(before + 1, 0)
        divisor = tl.maximum(future, 1).to(tl.float32)
    if HEADS == "mean":
        divisor *= heads
    elif HEADS == "kv":
        divisor *= heads // kv_heads
    batch = 0 if PACKED else entry.sequence.to(tl.int64)
    tl.store(out + (batch * lines + line) * padded_tokens + start + key, total / divisor, mask=key < tokens)


def incoming_attention(q: Tensor, k: Tensor, spans: Spans, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """See `entra_kernels.incoming_attention`; spans as in `entra_kernels/_spans.py`. q and k are read where they are.

    Besides the result it takes 4 bytes per query for each query head (the log-sum-exp) and per key for each kv head (the sums;
    with heads="query" or the maximum, for each query head). Each sequence is rounded up to whole tiles. The sums of further
    pieces take `plan._most_cuts` tiles: for one sequence at most 528 KiB, times G with sums for each query head.
    """
    check_products(q)
    batch, heads, rows, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    lines = {"mean": 1, "query": heads, "kv": kv_heads}[options.heads]
    out = torch.zeros(batch, lines, tokens, dtype=torch.float32, device=q.device)
    lse = q.new_full((batch, heads, rows), -math.inf, dtype=torch.float32) if options.return_lse else None
    if spans.count and out.numel() and rows:
        plain = _is_plain(spans, options) and options.reduction != "max" and options.sliding_window is None
        more = not plain or options.row_weights is not None or not Factors.of(options).plain
        size = attention_launch(head_dim, heads // kv_heads, q.element_size(), chip_of(q.device), options=more)
        with torch.cuda.device_of(q):
            _launch(q, k, spans, out, size, options, lse)
    return out[:, 0] if options.heads == "mean" else out, lse


def _is_plain(spans: Spans, options: AttentionOptions) -> bool:
    """Whether every token of a sequence is a query, which counts for the keys before it."""
    return spans.queries is None and options.causal and not options.include_diagonal


def _launch(
    q: Tensor,
    k: Tensor,
    spans: Spans,
    out: Tensor,
    size: AttentionLaunch,
    options: AttentionOptions,
    lse: Tensor | None = None,
) -> None:
    """Fills `out` [B, lines, N], which is 0 outside the spans, and `lse` [B, H, Nq], which is -inf where no query counts."""
    batch, heads, _, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    group = heads // kv_heads
    packed = batch == 1
    common: dict[str, Any] = {"size": size, "kv_heads": kv_heads, "window": options.sliding_window, "device": q.device}
    if _is_plain(spans, options):
        tables = plan(spans, **common)
        query_spans = key_spans = None
    else:
        tables = plan_queries(spans, **common, causal=options.causal, include_diagonal=options.include_diagonal)
        query_spans, key_spans = tables.query_spans, tables.spans
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

    def lay_out(values: Tensor, factor: float, outside: float, back: Tensor | None = None) -> Tensor:
        lines = values.shape[1]
        laid_out = back
        if laid_out is None:
            laid_out = torch.empty(lines, tables.query_slots, size.resident, dtype=torch.float32, device=q.device)
        _lay_out_kernel[(tables.query_slots * lines,)](
            values, laid_out, tables.query_tiles, tables.query_spans, *values.stride(), tables.query_slots, lines, factor,
            outside, RESIDENT=size.resident, PACKED=packed, BACK=back is not None, **FUSED,
        )  # fmt: skip
        return laid_out

    views = None
    if size.ring is not None and q.is_cuda and gluon_is_known() and not triton.knobs.runtime.interpret:
        from . import hopper  # Gluon is loaded where it runs only

        views = hopper.Views.of(q, k, options.scale)

    if options.lse is not None:
        negative_lse = lay_out(options.lse, -LOG2_E.value, -math.inf)
    else:
        negative_lse = torch.empty(heads, tables.query_slots, size.resident, dtype=torch.float32, device=q.device)
        if size.ring is not None and views is not None:
            hopper.row_lse(views, size.ring, size.streamed, options, negative_lse, tables)
        else:
            _row_lse_kernel[(tables.query_slots * heads,)](
                q, k, sinks, negative_lse, tables.query_tiles, tables.query_spans, key_spans, tables.places, *strides,
                0 if sinks is None else sinks.stride(0), tables.query_slots, heads, group, window, of_absolute,
                FLIPPED=options.scale < 0, **constexprs,
            )  # fmt: skip
    if lse is not None:
        lay_out(lse, -1 / LOG2_E.value, 0.0, back=negative_lse)
    weights = None if options.row_weights is None else lay_out(options.row_weights.unsqueeze(1), 1.0, 0.0)
    highest = options.reduction == "max"
    by_head = highest or options.heads == "query"
    partial = torch.empty(tables.entries, heads if by_head else kv_heads, size.resident, dtype=torch.float32, device=q.device)
    counting = window + (options.sliding_window is not None and options.include_diagonal)
    if size.ring is not None and views is not None:
        hopper.column_sum(views, size.ring, size.streamed, options, negative_lse, partial, tables)
    else:
        _column_sum_kernel[(tables.entries * kv_heads,)](
            q, k, negative_lse, weights, partial, tables.pieces, tables.spans, query_spans, tables.counted, *strides,
            tables.query_slots, kv_heads, group, counting, score_factors, PER_HEAD=by_head, AHEAD=size.ahead, MAX=highest,
            **constexprs,
        )  # fmt: skip
    lines = out.shape[1]
    _add_kernel[(tables.slots * lines,)](
        partial, out, tables.tiles, tables.of_slot, tables.spans, query_spans, tables.counted, tokens, kv_heads, heads, lines,
        counting, RESIDENT=size.resident, PACKED=packed, WINDOW=options.sliding_window is not None, HEADS=options.heads,
        NORMALIZE=options.reduction == "mean", MAX=highest, **FUSED,
    )  # fmt: skip


def wide_tiles(tensor: Tensor, size: AttentionLaunch) -> bool:
    """Whether an offset within a tile of `tensor` [B, H, N, D] needs more than 32 bits."""
    last = size.resident * tensor.stride(-2) + max(size.depth, tensor.shape[-1]) * tensor.stride(-1)
    return last >= 2**31
