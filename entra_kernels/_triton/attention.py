"""`incoming_attention` in Triton: a pass over rows for the log-sum-exp, a pass over columns for the sums.

The column pass has the keys on the matrix unit's M side, S^T = K Q^T, so that the sum over queries runs along the registers
of a thread: 4 shuffles per 64 scores where S = Q K^T needs 192. A program owns one tile of keys of one kv head, keeps it
resident, and walks over the group's query heads and over the query tiles from the diagonal on: the sum over the group is
free, no key is repeated, nothing is added atomically. The causal comparison is made on the diagonal's tiles only.

Compiled for sm_90 in bfloat16 with D = 128, the column pass takes 4.9 instructions per score and the row pass 5.9.

Tiles are counted from a sequence's own start and sums run in a fixed order, so the result does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from entra_kernels._triton.launch import HOPPER_SHARED_MEMORY, KernelCase, shared_memory

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: two of them subtracted give 0, not NaN
HIGHEST = tl.constexpr(3.0e38)
ADD_BLOCK = 1024  # tokens per program of the sum over kv heads


class Tiling(NamedTuple):
    """Launch size of both passes. `resident` tokens stay in place (keys in the column pass, queries in the row pass), tiles
    of `streamed` tokens pass by, `depth` is how much of the head dim one dot takes."""

    resident: int
    streamed: int
    depth: int
    num_warps: int
    num_stages: int


SIZES = (  # resident, streamed, num_warps, num_stages; the streamed divide the resident, see `_lay_out_kernel`
    (256, 128, 8, 2),
    (128, 128, 8, 2),
    (128, 64, 8, 2),
    (64, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 32, 4, 1),
    (32, 16, 4, 1),
)


def tiling(head_dim: int, element_size: int, shared_memory: int, options: bool) -> Tiling:
    """The launch size for a head dim, bytes per element, and bytes of shared memory per program: the largest that fits.

    `options` says whether there is a window, a softcap or row weights. 256 keys take 128 accumulators per thread. That is
    the best for a plain column pass on sm_90 (4.9 instructions per score, against 6.6 with 128 keys and 7.5 with 128 x 64),
    where the matrix unit reads its operands from shared memory; with a window it spilled 359 times there, and on sm_80,
    where operands take registers too, 158 times without.
    """
    if element_size == 4:
        # No matrix unit multiplies float32 exactly. On the FMA units the operands of a dot sit in registers: a shallow one.
        # These are the sizes that compiled for sm_90 without a spill.
        if head_dim <= 16:
            return Tiling(resident=64, streamed=32, depth=16, num_warps=4, num_stages=1)
        if head_dim <= 32:
            return Tiling(resident=64, streamed=64, depth=32, num_warps=8, num_stages=1)
        return Tiling(resident=64, streamed=64, depth=16, num_warps=4, num_stages=1)
    depth = max(16, triton.next_power_of_2(head_dim))
    small = options or shared_memory < HOPPER_SHARED_MEMORY
    for resident, streamed, num_warps, num_stages in SIZES[2 if small else 0 :]:
        if (resident + num_stages * streamed) * depth * element_size <= shared_memory:
            return Tiling(resident, streamed, depth, num_warps, num_stages)
    raise ValueError(f"head_dim={head_dim} does not fit into {shared_memory} bytes of shared memory; use backend='torch'")


@triton.jit
def _tanh(x):
    """To float32 precision and without libdevice, which the interpreter lacks. The quotient cancels near 0: a series there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))  # at most 1: cannot overflow
    quotient = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _load_tile(rows, stride_dim, inside, cut, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """[token, DEPTH] from dimension `cut` on, at the row addresses `rows`. 0 past the sequence's end."""
    dim = cut + tl.arange(0, DEPTH)
    mask = inside[:, None]
    if HEAD_DIM % DEPTH != 0:
        mask &= (dim < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + dim.to(tl.int64)[None, :] * stride_dim, mask=mask, other=0.0)


@triton.jit
def _products(
    a_tile, a_rows, a_stride_dim, a_inside, b_rows, b_stride_dim, b_inside, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr
):
    """Dot products [a, b] in float32. `a_tile` is resident; where the head dim is cut into pieces it is read again instead."""
    if DEPTH >= HEAD_DIM:
        b_tile = _load_tile(b_rows, b_stride_dim, b_inside, 0, HEAD_DIM, DEPTH)
        return tl.dot(a_tile, tl.trans(b_tile), input_precision="ieee")
    products = tl.zeros((a_rows.shape[0], b_rows.shape[0]), dtype=tl.float32)
    for cut in range(0, HEAD_DIM, DEPTH):
        a_tile = _load_tile(a_rows, a_stride_dim, a_inside, cut, HEAD_DIM, DEPTH)
        b_tile = _load_tile(b_rows, b_stride_dim, b_inside, cut, HEAD_DIM, DEPTH)
        products = tl.dot(a_tile, tl.trans(b_tile), products, input_precision="ieee")
    return products


@triton.jit
def _scan_keys(
    highest,
    total,
    q_tile,
    q_rows,
    q_stride_dim,
    k_head,
    k_stride,
    k_stride_dim,
    query,
    first,
    stop,
    tokens,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    STREAMED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FLIPPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online log-sum-exp over keys: the highest score so far, in log2 units, and the sum of exp2(score - highest)."""
    for start in range(first, stop, STREAMED):
        key = start + tl.arange(0, STREAMED)
        k_rows = k_head + key.to(tl.int64) * k_stride
        scores = _products(
            q_tile, q_rows, q_stride_dim, query < tokens, k_rows, k_stride_dim, key < tokens, HEAD_DIM, DEPTH
        )  # [query, key]
        if FLIPPED:
            scores = -scores
        if SOFTCAP:
            scores = _tanh(scores * scale) * softcap
        elif MASKED:
            scores = scores * scale  # now, so that the -inf of the mask never meets a scale of 0
        if MASKED:
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


@triton.jit(do_not_specialize=["slots", "heads", "group", "window"])
def _row_lse_kernel(
    q,
    k,
    sinks,
    negative_lse,
    tiles,
    starts,
    lengths,
    q_stride_batch,
    q_stride_head,
    q_stride,
    q_stride_dim,
    k_stride_batch,
    k_stride_head,
    k_stride,
    k_stride_dim,
    sinks_stride,
    slots,
    heads,
    group,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    STREAMED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """The log-sum-exp of every row, laid out as `_lay_out_kernel` does. A program owns one query head's tile of queries and
    walks over the keys that they see."""
    slot = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    sequence = tl.load(tiles + 3 * slot)
    tokens = tl.load(lengths + sequence)
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    tile = tl.cdiv(tokens, RESIDENT) - 1 - tl.load(tiles + 3 * slot + 1)
    if tile < 0:
        return
    start = tl.load(starts + sequence).to(tl.int64)
    batch = 0 if PACKED else sequence.to(tl.int64)
    q_head = q + batch * q_stride_batch + head * q_stride_head + start * q_stride
    k_head = k + batch * k_stride_batch + head // group * k_stride_head + start * k_stride

    begin = tile * RESIDENT
    query = begin + tl.arange(0, RESIDENT)
    q_rows = q_head + query.to(tl.int64) * q_stride
    q_tile = _load_tile(q_rows, q_stride_dim, query < tokens, 0, HEAD_DIM, DEPTH)  # [query, dim]
    highest = tl.full((RESIDENT,), LOWEST, tl.float32)
    total = tl.zeros((RESIDENT,), tl.float32)

    # Tiles of keys at the window's far edge are masked, then come those which every query sees, then the diagonal.
    diagonal = begin // STREAMED * STREAMED
    first = 0
    if WINDOW:
        edge = tl.maximum(begin - window + 1, 0) // STREAMED * STREAMED
        first = tl.minimum(tl.cdiv(tl.maximum(begin + RESIDENT - window, 0), STREAMED) * STREAMED, diagonal)
        highest, total = _scan_keys(
            highest, total, q_tile, q_rows, q_stride_dim, k_head, k_stride, k_stride_dim, query, edge, first, tokens,
            window, scale, softcap, HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, FLIPPED, True,
        )  # fmt: skip
    highest, total = _scan_keys(
        highest, total, q_tile, q_rows, q_stride_dim, k_head, k_stride, k_stride_dim, query, first, diagonal, tokens,
        window, scale, softcap, HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, FLIPPED, False,
    )  # fmt: skip
    highest, total = _scan_keys(
        highest, total, q_tile, q_rows, q_stride_dim, k_head, k_stride, k_stride_dim, query, diagonal,
        tl.minimum(begin + RESIDENT, tokens), tokens,
        window, scale, softcap, HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, FLIPPED, True,
    )  # fmt: skip

    if sinks is not None:
        sink = tl.load(sinks + head * sinks_stride).to(tl.float32) * LOG2_E
        sink = tl.where(sink > HIGHEST, HIGHEST, sink)  # not a minimum, which would drop NaN
        higher = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - higher) + tl.exp2(sink - higher)
        highest = higher
    out = negative_lse + (head * slots + tl.load(tiles + 3 * slot + 2)) * RESIDENT + query
    inside = query < tokens
    tl.store(out, tl.where(inside, -(highest + tl.log2(tl.where(inside, total, 1.0))), float("-inf")))


@triton.jit
def _scan_queries(
    sums,
    k_tile,
    k_rows,
    k_stride_dim,
    q_head,
    q_stride,
    q_stride_dim,
    negative_lse,
    weights,
    key,
    first,
    stop,
    tokens,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    STREAMED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the probabilities that each key receives from the queries first ... stop - 1 of one head."""
    for start in range(first, stop, STREAMED):
        query = start + tl.arange(0, STREAMED)
        q_rows = q_head + query.to(tl.int64) * q_stride
        scores = _products(
            k_tile, k_rows, k_stride_dim, key < tokens, q_rows, q_stride_dim, query < tokens, HEAD_DIM, DEPTH
        )  # [key, query]
        shift = tl.load(negative_lse + query)[None, :]  # -inf past the end: there the probability is 0
        if SOFTCAP:
            received = tl.exp2(tl.fma(_tanh(scores * scale), softcap, shift))
        else:
            received = tl.exp2(tl.fma(scores, scale, shift))
        if MASKED:
            visible = key[:, None] < query[None, :]
            if WINDOW:
                visible &= query[None, :] - key[:, None] < window
            received = tl.where(visible, received, 0.0)
        if weights is not None:
            received *= tl.load(weights + query)[None, :]
        sums += tl.sum(received, axis=1)
    return sums


@triton.jit(do_not_specialize=["slots", "row_tokens", "kv_heads", "group", "window"])
def _column_sum_kernel(
    q,
    k,
    negative_lse,
    weights,
    sums_out,
    tiles,
    starts,
    lengths,
    q_stride_batch,
    q_stride_head,
    q_stride,
    q_stride_dim,
    k_stride_batch,
    k_stride_head,
    k_stride,
    k_stride_dim,
    slots,
    row_tokens,
    kv_heads,
    group,
    window,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    STREAMED: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PER_HEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Sums over queries, [B, Hkv, N], each a kv head's share of the mean over heads, or per query head, [B, H, N].

    A program owns one kv head's tile of keys and walks over the group's query heads and the queries that see the keys.
    """
    slot = tl.program_id(0) // kv_heads
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    sequence = tl.load(tiles + 3 * slot)
    tokens = tl.load(lengths + sequence)
    begin = tl.load(tiles + 3 * slot + 1) * RESIDENT
    if begin >= tokens:
        return
    start = tl.load(starts + sequence).to(tl.int64)
    batch = 0 if PACKED else sequence.to(tl.int64)

    key = begin + tl.arange(0, RESIDENT)
    k_rows = k + batch * k_stride_batch + kv_head * k_stride_head + (start + key) * k_stride
    k_tile = _load_tile(k_rows, k_stride_dim, key < tokens, 0, HEAD_DIM, DEPTH)  # [key, dim]

    # Tiles of queries on the diagonal are masked, then come those which see every key, then the window's far edge.
    diagonal_end = begin + tl.cdiv(RESIDENT, STREAMED) * STREAMED
    stop = tokens
    full_end = tokens
    if WINDOW:
        stop = tl.minimum(tokens, begin + RESIDENT - 1 + window)
        full_end = diagonal_end + tl.maximum(begin + window - diagonal_end, 0) // STREAMED * STREAMED
        full_end = tl.minimum(full_end, stop)

    divisor = tl.full((RESIDENT,), 1.0, tl.float32)
    if NORMALIZE:
        future = tokens - 1 - key
        if WINDOW:
            future = tl.minimum(future, window - 1)
        divisor = tl.maximum(future, 1).to(tl.float32)
    if not PER_HEAD:
        divisor *= kv_heads * group

    first_slot = tl.load(tiles + 3 * slot + 2).to(tl.int64)
    if weights is not None:
        weights += first_slot * RESIDENT
    sums = tl.zeros((RESIDENT,), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_head = q + batch * q_stride_batch + head * q_stride_head + start * q_stride
        lse_head = negative_lse + (head * slots + first_slot) * RESIDENT
        sums = _scan_queries(
            sums, k_tile, k_rows, k_stride_dim, q_head, q_stride, q_stride_dim, lse_head, weights,
            key, begin, tl.minimum(diagonal_end, stop), tokens, window, scale, softcap,
            HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        sums = _scan_queries(
            sums, k_tile, k_rows, k_stride_dim, q_head, q_stride, q_stride_dim, lse_head, weights,
            key, diagonal_end, full_end, tokens, window, scale, softcap,
            HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, False,
        )  # fmt: skip
        if WINDOW:
            sums = _scan_queries(
                sums, k_tile, k_rows, k_stride_dim, q_head, q_stride, q_stride_dim, lse_head, weights,
                key, tl.maximum(full_end, diagonal_end), stop, tokens, window, scale, softcap,
                HEAD_DIM, DEPTH, STREAMED, SOFTCAP, WINDOW, True,
            )  # fmt: skip
        if PER_HEAD:
            out = sums_out + (batch * kv_heads * group + head) * row_tokens + start + key
            tl.store(out, sums / divisor, mask=key < tokens)
            sums = tl.zeros((RESIDENT,), tl.float32)
    if not PER_HEAD:
        out = sums_out + (batch * kv_heads + kv_head) * row_tokens + start + key
        tl.store(out, sums / divisor, mask=key < tokens)


@triton.jit(do_not_specialize=["slots", "rows"])
def _lay_out_kernel(
    values,
    out,
    tiles,
    starts,
    lengths,
    stride_batch,
    stride_row,
    stride,
    slots,
    rows,
    factor,
    outside,
    RESIDENT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """values [B, rows, N] times `factor`, in float32, as [rows, slots, RESIDENT]: each sequence begins at its first tile and
    fills its last one up with `outside`. So the column pass reads whole aligned vectors, without masks or strides."""
    slot = tl.program_id(0) // rows
    row = (tl.program_id(0) % rows).to(tl.int64)
    sequence = tl.load(tiles + 3 * slot)
    tokens = tl.load(lengths + sequence)
    token = tl.load(tiles + 3 * slot + 1) * RESIDENT + tl.arange(0, RESIDENT)
    first_slot = tl.load(tiles + 3 * slot + 2)
    if tl.load(tiles + 3 * slot + 1) * RESIDENT >= tokens:
        return
    inside = token < tokens
    batch = 0 if PACKED else sequence.to(tl.int64)
    address = values + batch * stride_batch + row * stride_row + (tl.load(starts + sequence) + token).to(tl.int64) * stride
    value = tl.load(address, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + (row * slots + first_slot) * RESIDENT + token, tl.where(inside, value, outside))


@triton.jit(do_not_specialize=["row_tokens", "kv_heads"])
def _add_heads_kernel(shares, out, row_tokens, kv_heads, BLOCK: tl.constexpr):
    """out [B, N]: the kv heads' shares [B, Hkv, N] added in the order of the heads."""
    blocks = tl.cdiv(row_tokens, BLOCK)  # one axis for both: CUDA allows 65,535 programs on the others
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = token < row_tokens
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(kv_heads):
        total += tl.load(shares + (batch * kv_heads + head) * row_tokens + token, mask=inside, other=0.0)
    tl.store(out + batch * row_tokens + token, total, mask=inside)


def _tile_table(lengths: Tensor, resident: int, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """int32 [slots, 3]: sequence, tile, and slot of the sequence's first tile, for every tile of every sequence; those with
    the most tokens after them first. And int32 [S], the lengths of the sequences whose tiles have slots.

    The number of slots is the bound that shapes alone give, so that nothing waits for the device. Surplus slots come last
    and hold a tile past its sequence's end, which programs leave at once. Only spans that overlap (a cu_seqlens that falls,
    which nobody can check on a GPU without waiting) need more slots than there are; those sequences count as empty.
    """
    sequences = lengths.numel()
    slots = min(sequences * triton.cdiv(tokens, resident), batch * tokens // resident + sequences)
    tiles = (lengths + resident - 1) // resident
    ends = tiles.cumsum(0)
    lengths = lengths.where(ends <= slots, 0)
    slot = torch.arange(slots, device=lengths.device)
    sequence = torch.searchsorted(ends, slot, right=True).clamp(max=sequences - 1)
    first_slot = (ends - tiles)[sequence]
    tile = slot - first_slot
    longest_first = (lengths[sequence] - tile * resident).argsort(descending=True)
    return torch.stack((sequence, tile, first_slot), dim=1)[longest_first].to(torch.int32), lengths


def incoming_attention(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    lengths: Tensor,
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
    """See `entra_kernels.incoming_attention`; spans as in `entra_kernels/_ops.py`. q and k are read where they are."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    shares = torch.zeros(batch, heads if per_head else kv_heads, tokens, dtype=torch.float32, device=q.device)
    if lengths.numel() == 0 or shares.numel() == 0:
        return shares if per_head else shares.new_zeros(batch, tokens)

    options = any(option is not None for option in (sliding_window, softcap, row_weights))
    size = tiling(head_dim, q.element_size(), shared_memory(q.device), options)
    table, lengths = _tile_table(lengths, size.resident, batch, tokens)
    slots = table.shape[0]
    # Scores in log2 units, because the hardware has exp2: log2(e) * s, or log2(e) * softcap * tanh(s / softcap).
    factor = scale / softcap if softcap else scale * LOG2_E.value
    cap = softcap * LOG2_E.value if softcap else 0.0
    window = sliding_window or 0
    launch = {
        **_constexprs(size, head_dim),
        "PACKED": batch == 1,
        "SOFTCAP": softcap is not None,
        "WINDOW": sliding_window is not None,
        "num_warps": size.num_warps,
        "num_stages": size.num_stages,
    }

    def lay_out(values: Tensor, factor: float, outside: float) -> Tensor:
        rows = values.shape[1]
        out = torch.empty(rows, slots, size.resident, dtype=torch.float32, device=q.device)
        _lay_out_kernel[(slots * rows,)](
            values, out, table, starts, lengths, *values.stride(), slots, rows, factor, outside,
            RESIDENT=size.resident, PACKED=batch == 1,
        )  # fmt: skip
        return out

    with torch.cuda.device_of(q):
        if lse is not None:
            negative_lse = lay_out(lse, -LOG2_E.value, -math.inf)
        else:
            negative_lse = torch.empty(heads, slots, size.resident, dtype=torch.float32, device=q.device)
            _row_lse_kernel[(slots * heads,)](
                q, k, sinks, negative_lse, table, starts, lengths, *q.stride(), *k.stride(),
                0 if sinks is None else sinks.stride(0), slots, heads, group, window, abs(factor), cap,
                FLIPPED=scale < 0, **launch,
            )  # fmt: skip
        weights = None if row_weights is None else lay_out(row_weights.unsqueeze(1), 1.0, 0.0)
        _column_sum_kernel[(slots * kv_heads,)](
            q, k, negative_lse, weights, shares, table, starts, lengths, *q.stride(), *k.stride(),
            slots, tokens, kv_heads, group, window, factor, cap, PER_HEAD=per_head, NORMALIZE=normalize, **launch,
        )  # fmt: skip
        if per_head:
            return shares
        out = torch.empty(batch, tokens, dtype=torch.float32, device=q.device)
        _add_heads_kernel[(batch * triton.cdiv(tokens, ADD_BLOCK),)](shares, out, tokens, kv_heads, BLOCK=ADD_BLOCK)
    return out


def _constexprs(size: Tiling, head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "DEPTH": size.depth, "RESIDENT": size.resident, "STREAMED": size.streamed}


HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128, 192, 256, 512)


def aot_cases(dtype: str, shared_memory: int) -> Iterator[KernelCase]:
    """Both passes for every head dim: plain, with a window and every option that goes with it, and with a softcap on top; and
    the small kernels. All for a stride of 1 along the head dim, see `entra_kernels/_triton/aot.py`."""
    for head_dim in HEAD_DIMS:
        for variant in ("", " window", " window softcap"):
            for kernel, name in ((_row_lse_kernel, "row_lse"), (_column_sum_kernel, "column_sum")):
                softcap, window = "softcap" in variant, "window" in variant
                size = tiling(head_dim, 4 if dtype == "fp32" else 2, shared_memory, window)
                values: dict[str, object] = {
                    **_constexprs(size, head_dim),
                    "q_stride_dim": 1,
                    "k_stride_dim": 1,
                    "PACKED": window,
                    "SOFTCAP": softcap,
                    "WINDOW": window,
                    "FLIPPED": False,
                    "PER_HEAD": window,
                    "NORMALIZE": True,
                }
                if not window:
                    values |= {"sinks": None, "weights": None}
                pointers = {"q": f"*{dtype}", "k": f"*{dtype}", "sinks": f"*{dtype}"}
                pointers |= dict.fromkeys(("negative_lse", "weights", "sums_out"), "*fp32")
                pointers |= dict.fromkeys(("tiles", "starts", "lengths"), "*i32")
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
                    head_dim=head_dim,
                )
    yield KernelCase(
        label="lay_out",
        kernel=_lay_out_kernel,
        arguments={"values": "*fp32", "out": "*fp32", "tiles": "*i32", "starts": "*i32", "lengths": "*i32"}
        | dict.fromkeys(("stride_batch", "stride_row", "slots", "rows"), "i32")
        | dict.fromkeys(("factor", "outside"), "fp32"),
        constexprs={"RESIDENT": 128, "PACKED": False, "stride": 1},
        divisible=("values", "out", "tiles"),
    )
    yield KernelCase(
        label="add_heads",
        kernel=_add_heads_kernel,
        arguments={"shares": "*fp32", "out": "*fp32", "row_tokens": "i32", "kv_heads": "i32"},
        constexprs={"BLOCK": ADD_BLOCK},
        divisible=("shares", "out"),
    )
