"""Both passes of `incoming_attention` in Gluon for sm_90: exponentials run under products by design.

In plain Triton all warps of a program multiply, then all take exponentials: the matrix unit idles during the exponentials
unless a second program happens to be out of step. Here one warp copies tiles by TMA into a ring, and two warp groups own half
of the 256 resident tokens each, as an upper and a lower part of 64. A group starts the product of one part before it takes the
exponentials of the other, so that neither unit waits:

    start lower product of tile i      | exponentials of the upper scores of tile i
    start upper product of tile i + 1  | exponentials of the lower scores of tile i

The order must survive two compilers. Each wait on a barrier that has long completed ends a basic block, which ptxas does not
move exponentials across; the shuffles of a sum, or the maximum, keep them from sinking behind the wait for the product.

On an H100 at N = 32,768 with 32 query and 8 kv heads the two passes take 0.78 (D = 128), 0.83 (D = 64) and 0.63 (D = 256) of
the time of those in `attention.py` (measured in one run, benchmarks/README.md). Tiles, pieces, and what goes in and out are
those of `attention.py`, and so is the order of the sums: the results are the same bit for bit. `Views.of` says which tensors
these kernels take; others, and calls with options, run there.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from entra_kernels._triton.attention import HIGHEST, LOG2_E, LOWEST
from entra_kernels._triton.launch import FUSED, Ring
from entra_kernels._triton.plan import PIECE_FIELDS, TILE_FIELDS, Plan

RESIDENT = 256
PART = gl.constexpr(64)
"""Resident tokens of one product: the rows of a warp group's matrix instruction."""

GROUPS = {"num_warps": 4, "maxnreg": 168, "REGISTERS": 232, **FUSED}
"""Warps of the first group; registers of a thread when the program starts, which three groups of 4 warps can have; and of a
thread that takes exponentials, once the copying warp has given up its own."""

TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
LSE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    """The next place of the ring, and the parity of its barriers."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _set_up(resident_desc, streamed_desc, row, column, HEAD_DIM: gl.constexpr, STREAMED: gl.constexpr, STAGES: gl.constexpr):
    """The resident tile [4, 64, D], copied; the ring of streamed tiles; and barriers for its places, filled and free."""
    resident = gl.allocate_shared_memory(resident_desc.dtype, [4, PART, HEAD_DIM], resident_desc.layout)
    ring = gl.allocate_shared_memory(streamed_desc.dtype, [STAGES, STREAMED, HEAD_DIM], streamed_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(filled.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)  # both warp groups
    mbarrier.init(arrived, count=1)
    mbarrier.expect(arrived, 4 * resident_desc.block_type.nbytes)
    for part in gl.static_range(4):
        tma.async_copy_global_to_shared(resident_desc, [row + PART * part, column], arrived, resident.index(part))
    mbarrier.wait(arrived, 0)
    return resident, ring, filled, free


@gluon.jit
def _copy_tiles(
    desc, ring, lse_desc, lse_ring, filled, free, row, row_step, column, column_step, lse_row, lse_step, heads, first, stop,
    STREAMED: gl.constexpr, STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """The copying warp: tiles first ... stop - 1 of every head in turn, with their log-sum-exp, then one more, because a group
    starts a product more than there are tiles."""
    size: gl.constexpr = desc.block_type.nbytes + (lse_desc.block_type.nbytes if LSE else 0)
    slot = 0
    phase = 0
    for _ in range(heads):
        for tile in range(first, stop):
            mbarrier.wait(free.index(slot), phase ^ 1)
            mbarrier.expect(filled.index(slot), size)
            tma.async_copy_global_to_shared(desc, [row + tile * STREAMED, column], filled.index(slot), ring.index(slot))
            if LSE:
                tma.async_copy_global_to_shared(lse_desc, [lse_row + tile, 0], filled.index(slot), lse_ring.index(slot))
            slot, phase = _next(slot, phase, STAGES)
        row += row_step
        column += column_step
        if LSE:
            lse_row += lse_step
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(filled.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [0, 0], filled.index(slot), ring.index(slot))


@gluon.jit
def _start_product(part, ring, slot, STREAMED: gl.constexpr, mma: gl.constexpr):
    """Products of 64 resident tokens with the tile in `slot`, [64, STREAMED], under way."""
    nothing = gl.zeros([PART, STREAMED], gl.float32, layout=mma)
    return warpgroup_mma(part, ring.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _first_scores(upper, ring, filled, STREAMED: gl.constexpr, mma: gl.constexpr):
    """The upper scores of the first tile in the ring."""
    mbarrier.wait(filled.index(0), 0)
    return warpgroup_mma_wait(num_outstanding=0, deps=[_start_product(upper, ring, 0, STREAMED, mma)])


@gluon.jit
def _add_received(
    sums, scores, lse_ring, slot, key, tile, tokens, scale, STREAMED: gl.constexpr, MASKED: gl.constexpr, mma: gl.constexpr
):
    """`sums` with the probabilities that each key receives from one tile of queries.

    The negative log-sum-exp is loaded here and not before: behind the barrier it keeps the exponentials behind it, too."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    shift = lse_ring.index(slot)._reinterpret(gl.float32, [STREAMED], flat).load(gl.SliceLayout(0, mma))
    received = gl.exp2(gl.fma(scores, scale, gl.expand_dims(shift, 0)))
    if MASKED:
        query = tile * STREAMED + gl.arange(0, STREAMED, layout=gl.SliceLayout(0, mma))
        # What lies behind the sequence was copied, too, and may be NaN.
        visible = (gl.expand_dims(key, 1) < gl.expand_dims(query, 0)) & gl.expand_dims(query < tokens, 0)
        received = gl.where(visible, received, 0.0)
    return sums + gl.sum(received, axis=1)


@gluon.jit
def _scan_queries(
    upper_sums, lower_sums, scores, slot, phase, upper, lower, ring, lse_ring, filled, free, key, begin, end, tokens, scale,
    STREAMED: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Adds what the tiles begin ... end - 1 of queries give. `scores` are the upper ones of the tile in `slot`, before and
    after."""
    for tile in range(begin, end):
        product = _start_product(lower, ring, slot, STREAMED, mma)
        mbarrier.wait(filled.index(slot), phase)  # completed: see the module's docstring
        upper_sums = _add_received(upper_sums, scores, lse_ring, slot, key, tile, tokens, scale, STREAMED, MASKED, mma)
        mbarrier.wait(filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
        following, next_phase = _next(slot, phase, STAGES)
        mbarrier.wait(filled.index(following), next_phase)
        product = _start_product(upper, ring, following, STREAMED, mma)
        mbarrier.wait(filled.index(slot), phase)
        lower_sums = _add_received(lower_sums, scores, lse_ring, slot, key + PART, tile, tokens, scale, STREAMED, MASKED, mma)
        mbarrier.arrive(free.index(slot), count=1)
        slot = following
        phase = next_phase
        mbarrier.wait(filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
    return upper_sums, lower_sums, scores, slot, phase


@gluon.jit
def _sum_columns(
    upper, lower, ring, lse_ring, filled, free, out, begin, first, diagonal_end, full_end, stop, tokens, scale, group,
    STREAMED: gl.constexpr, STAGES: gl.constexpr, PER_HEAD: gl.constexpr, IN_REGISTERS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """One warp group: the sums of 128 keys over the group's query heads and the queries of the piece."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STREAMED, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    row = WHICH * 2 * PART + gl.arange(0, PART, layout=rows)
    key = begin + row
    if IN_REGISTERS:
        upper = upper.load(gl.DotOperandLayout(0, mma, 2))
        lower = lower.load(gl.DotOperandLayout(0, mma, 2))
    upper_sums = gl.zeros([PART], gl.float32, layout=rows)
    lower_sums = gl.zeros([PART], gl.float32, layout=rows)
    scores = _first_scores(upper, ring, filled, STREAMED, mma)
    slot = 0
    phase = 0
    for _ in range(group):
        # Tiles of queries on the diagonal are masked, then come those which see every key, then the one that ends the sequence.
        upper_sums, lower_sums, scores, slot, phase = _scan_queries(
            upper_sums, lower_sums, scores, slot, phase, upper, lower, ring, lse_ring, filled, free, key,
            first, diagonal_end, tokens, scale, STREAMED, STAGES, True, mma,
        )  # fmt: skip
        upper_sums, lower_sums, scores, slot, phase = _scan_queries(
            upper_sums, lower_sums, scores, slot, phase, upper, lower, ring, lse_ring, filled, free, key,
            diagonal_end, full_end, tokens, scale, STREAMED, STAGES, False, mma,
        )  # fmt: skip
        upper_sums, lower_sums, scores, slot, phase = _scan_queries(
            upper_sums, lower_sums, scores, slot, phase, upper, lower, ring, lse_ring, filled, free, key,
            full_end, stop, tokens, scale, STREAMED, STAGES, True, mma,
        )  # fmt: skip
        if PER_HEAD:
            gl.store(out + row, upper_sums)
            gl.store(out + row + PART, lower_sums)
            out += 4 * PART
            upper_sums = gl.zeros([PART], gl.float32, layout=rows)
            lower_sums = gl.zeros([PART], gl.float32, layout=rows)
    if not PER_HEAD:
        gl.store(out + row, upper_sums)
        gl.store(out + row + PART, lower_sums)


@gluon.jit(do_not_specialize=["slots", "kv_heads", "group"])
def _column_sum_kernel(
    q_desc, k_desc, lse_desc, partial_out, pieces, spans,
    q_row_batch, q_row_head, q_column_head, k_row_batch, k_row_head, k_column_head, slots, kv_heads, group, scale,
    HEAD_DIM: gl.constexpr, STREAMED: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, PER_HEAD: gl.constexpr,
    IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries, [entries, Hkv, 256], or per query head, [entries, H, 256]."""
    piece = pieces + PIECE_FIELDS * (gl.program_id(0) // kv_heads).to(gl.int64)
    kv_head = gl.program_id(0) % kv_heads
    begin = gl.maximum(gl.load(piece) - 1, 0) * 256  # a surplus entry is all zeros: then first = stop = 0
    sequence = gl.load(piece + 1)
    first_slot = gl.load(piece + 2)
    first = gl.load(piece + 3)
    stop = gl.load(piece + 4)
    start = gl.load(spans + 2 * sequence)
    tokens = gl.load(spans + 2 * sequence + 1)
    batch = sequence
    if PACKED:
        batch = 0
    k_row = batch * k_row_batch + kv_head * k_row_head + start + begin
    keys, ring, filled, free = _set_up(k_desc, q_desc, k_row, kv_head * k_column_head, HEAD_DIM, STREAMED, STAGES)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, STREAMED], lse_desc.layout)

    diagonal_end = gl.minimum(gl.maximum((begin + 256) // STREAMED, first), stop)
    full_end = gl.maximum(gl.minimum(tokens // STREAMED, stop), diagonal_end)
    head = kv_head * group
    q_row = batch * q_row_batch + head * q_row_head + start
    lse_row = (head * slots + first_slot) * (256 // STREAMED)
    out = partial_out + gl.program_id(0).to(gl.int64) * 256 * (group if PER_HEAD else 1)
    gl.warp_specialize(
        [
            (_sum_columns, (keys.index(0), keys.index(1), ring, lse_ring, filled, free, out, begin, first, diagonal_end,
                            full_end, stop, tokens, scale, group, STREAMED, STAGES, PER_HEAD, IN_REGISTERS, 0)),
            (_sum_columns, (keys.index(2), keys.index(3), ring, lse_ring, filled, free, out, begin, first, diagonal_end,
                            full_end, stop, tokens, scale, group, STREAMED, STAGES, PER_HEAD, IN_REGISTERS, 1)),
            (_copy_tiles, (q_desc, ring, lse_desc, lse_ring, filled, free, q_row, q_row_head, head * q_column_head,
                           q_column_head, lse_row, slots * (256 // STREAMED), group, first, stop, STREAMED, STAGES, True)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _add_summands(highest, total, scores, query, tile, scale, STREAMED: gl.constexpr, MASKED: gl.constexpr, mma: gl.constexpr):
    """The online log-sum-exp with one tile of keys: the highest score so far, in log2 units, and the sum of
    exp2(score - highest)."""
    if MASKED:
        key = tile * STREAMED + gl.arange(0, STREAMED, layout=gl.SliceLayout(0, mma))
        visible = gl.expand_dims(key, 0) <= gl.expand_dims(query, 1)
        scores = gl.where(visible, scores * scale, float("-inf"))
        higher = gl.maximum(highest, gl.max(scores, axis=1))
        summands = gl.exp2(scores - gl.expand_dims(higher, 1))
    else:
        higher = gl.maximum(highest, gl.max(scores, axis=1) * scale)
        summands = gl.exp2(gl.fma(scores, scale, gl.expand_dims(-higher, 1)))
    total = total * gl.exp2(highest - higher) + gl.sum(summands, axis=1)
    return higher, total


@gluon.jit
def _scan_keys(
    upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase, upper, lower, ring, filled, free, query,
    begin, end, scale,
    STREAMED: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The tiles begin ... end - 1 of keys; `scores` as in `_scan_queries`."""
    for tile in range(begin, end):
        product = _start_product(lower, ring, slot, STREAMED, mma)
        mbarrier.wait(filled.index(slot), phase)  # completed: see the module's docstring
        upper_highest, upper_total = _add_summands(
            upper_highest, upper_total, scores, query, tile, scale, STREAMED, MASKED, mma
        )
        mbarrier.wait(filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
        mbarrier.arrive(free.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
        mbarrier.wait(filled.index(slot), phase)
        product = _start_product(upper, ring, slot, STREAMED, mma)
        mbarrier.wait(filled.index(slot), phase)
        lower_highest, lower_total = _add_summands(
            lower_highest, lower_total, scores, query + PART, tile, scale, STREAMED, MASKED, mma
        )
        mbarrier.wait(filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
    return upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase


@gluon.jit
def _negative_lse(highest, total, sinks, sinks_stride, head, inside):
    """-log2 of the softmax denominator, with the sink in it; -inf outside, where the probability then is 0."""
    if sinks is not None:
        sink = gl.load(sinks + head * sinks_stride).to(gl.float32) * LOG2_E
        sink = gl.where(sink > HIGHEST, HIGHEST, sink)  # not a minimum, which would drop NaN
        higher = gl.maximum(highest, sink)
        total = total * gl.exp2(highest - higher) + gl.exp2(sink - higher)
        highest = higher
    return gl.where(inside, -(highest + gl.log2(gl.where(inside, total, 1.0))), float("-inf"))


@gluon.jit
def _sum_rows(
    upper, lower, ring, filled, free, out, sinks, sinks_stride, head, begin, diagonal, stop, tokens, scale,
    STREAMED: gl.constexpr, STAGES: gl.constexpr, IN_REGISTERS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """One warp group: the log-sum-exp of 128 queries."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STREAMED, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    query = begin + WHICH * 2 * PART + gl.arange(0, PART, layout=rows)
    if IN_REGISTERS:
        upper = upper.load(gl.DotOperandLayout(0, mma, 2))
        lower = lower.load(gl.DotOperandLayout(0, mma, 2))
    upper_highest = gl.full([PART], LOWEST, gl.float32, layout=rows)
    lower_highest = gl.full([PART], LOWEST, gl.float32, layout=rows)
    upper_total = gl.zeros([PART], gl.float32, layout=rows)
    lower_total = gl.zeros([PART], gl.float32, layout=rows)
    scores = _first_scores(upper, ring, filled, STREAMED, mma)
    slot = 0
    phase = 0
    # Tiles of keys that every query sees, then the diagonal.
    upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase = _scan_keys(
        upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase, upper, lower, ring, filled, free, query,
        0, diagonal, scale, STREAMED, STAGES, False, mma,
    )  # fmt: skip
    upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase = _scan_keys(
        upper_highest, upper_total, lower_highest, lower_total, scores, slot, phase, upper, lower, ring, filled, free, query,
        diagonal, stop, scale, STREAMED, STAGES, True, mma,
    )  # fmt: skip
    upper_out = _negative_lse(upper_highest, upper_total, sinks, sinks_stride, head, query < tokens)
    lower_out = _negative_lse(lower_highest, lower_total, sinks, sinks_stride, head, query + PART < tokens)
    gl.store(out + query, upper_out, mask=(query >= 0) & (stop > 0))  # nothing where the entry is a surplus one
    gl.store(out + query + PART, lower_out, mask=(query >= 0) & (stop > 0))


@gluon.jit(do_not_specialize=["slots", "heads", "group"])
def _row_lse_kernel(
    q_desc, k_desc, sinks, negative_lse, tiles, spans,
    q_row_batch, q_row_head, q_column_head, k_row_batch, k_row_head, k_column_head, sinks_stride, slots, heads, group, scale,
    HEAD_DIM: gl.constexpr, STREAMED: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The log-sum-exp of every row, negative and in log2 units, laid out by tiles, [H, slots, 256]."""
    entry = tiles + TILE_FIELDS * (gl.program_id(0) // heads)
    head = gl.program_id(0) % heads
    listed = gl.load(entry)  # tile of keys + 1, or 0
    sequence = gl.load(entry + 1)
    first_slot = gl.load(entry + 2)
    start = gl.load(spans + 2 * sequence)
    tokens = gl.load(spans + 2 * sequence + 1)
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    begin = ((tokens + 255) // 256 - listed) * 256
    stop = (gl.minimum(begin + 256, tokens) + STREAMED - 1) // STREAMED
    if listed == 0:
        begin = 0
        stop = 0
    batch = sequence
    if PACKED:
        batch = 0
    kv_head = head // group
    q_row = batch * q_row_batch + head * q_row_head + start + begin
    queries, ring, filled, free = _set_up(q_desc, k_desc, q_row, head * q_column_head, HEAD_DIM, STREAMED, STAGES)

    diagonal = gl.minimum(begin // STREAMED, stop)
    k_row = batch * k_row_batch + kv_head * k_row_head + start
    out = negative_lse + (head.to(gl.int64) * slots + first_slot) * 256
    gl.warp_specialize(
        [
            (_sum_rows, (queries.index(0), queries.index(1), ring, filled, free, out, sinks, sinks_stride, head, begin,
                         diagonal, stop, tokens, scale, STREAMED, STAGES, IN_REGISTERS, 0)),
            (_sum_rows, (queries.index(2), queries.index(3), ring, filled, free, out, sinks, sinks_stride, head, begin,
                         diagonal, stop, tokens, scale, STREAMED, STAGES, IN_REGISTERS, 1)),
            (_copy_tiles, (k_desc, ring, k_desc, ring, filled, free, k_row, 0, kv_head * k_column_head, 0, 0, 0, 1, 0, stop,
                           STREAMED, STAGES, False)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


class Rows(NamedTuple):
    """A tensor [B, H, N, D] as the matrix that a TMA descriptor describes: token (b, h, n) is in row
    `b * row_batch + h * row_head + n`, from column `h * column_head` on."""

    row_batch: int
    row_head: int
    column_head: int
    rows: int
    columns: int

    @classmethod
    def of(cls, tensor: Tensor) -> Rows | None:
        """None where `tensor` is no such matrix, or not aligned to 16 bytes as TMA wants it."""
        batch, heads, tokens, head_dim = tensor.shape
        of_batch, of_head, pitch, of_dim = tensor.stride()
        of_batch, of_head = of_batch if batch > 1 else 0, of_head if heads > 1 else 0
        size = tensor.element_size()
        if of_dim != 1 or pitch < head_dim or of_batch % pitch or pitch * size % 16 or tensor.data_ptr() % 16:
            return None
        if of_head % pitch == 0:  # [B, H, N, D] in memory
            row_head, column_head = of_head // pitch, 0
        elif of_head * (heads - 1) + head_dim <= pitch and of_head * size % 16 == 0:  # [B, N, H, D]
            row_head, column_head = 0, of_head
        else:
            return None
        rows = (batch - 1) * (of_batch // pitch) + (heads - 1) * row_head + tokens
        if rows >= 2**31 - 2**16:  # rows are counted in 32 bits, up to a tile behind the last one
            return None
        return cls(of_batch // pitch, row_head, column_head, rows, (heads - 1) * column_head + head_dim)

    def descriptor(self, tensor: Tensor, tokens: int) -> TensorDescriptor:
        """Of tiles of `tokens` rows."""
        strides, block = [tensor.stride(2), 1], [tokens, tensor.shape[3]]
        return TensorDescriptor(tensor, [self.rows, self.columns], strides, block, TILE_LAYOUT)


class Views(NamedTuple):
    """q and k as these kernels read them."""

    q: Tensor
    k: Tensor
    q_rows: Rows
    k_rows: Rows

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scale: float) -> Views | None:
        """None for what only `attention.py` takes: a negative scale, and a q or k without `Rows`."""
        q_rows, k_rows = Rows.of(q), Rows.of(k)
        return None if scale < 0 or q_rows is None or k_rows is None else cls(q, k, q_rows, k_rows)

    @property
    def steps(self) -> tuple[int, ...]:
        """As arguments of a launch."""
        return (*self.q_rows[:3], *self.k_rows[:3])


def row_lse(
    views: Views,
    ring: Ring,
    streamed: int,
    sinks: Tensor | None,
    negative_lse: Tensor,
    tables: Plan,
    *,
    packed: bool,
    scale: float,
) -> None:
    """Fills `negative_lse` [H, slots, 256]; `scale` in log2 units."""
    heads, head_dim = views.q.shape[1], views.q.shape[3]
    _row_lse_kernel[(tables.slots * heads,)](
        views.q_rows.descriptor(views.q, PART.value), views.k_rows.descriptor(views.k, streamed),
        sinks, negative_lse, tables.tiles, tables.spans, *views.steps, 0 if sinks is None else sinks.stride(0),
        tables.slots, heads, heads // views.k.shape[1], scale,
        HEAD_DIM=head_dim, STREAMED=streamed, STAGES=ring.stages, PACKED=packed, IN_REGISTERS=ring.in_registers, **GROUPS,
    )  # fmt: skip


def column_sum(
    views: Views, ring: Ring, streamed: int, negative_lse: Tensor, partial: Tensor, tables: Plan,
    *, packed: bool, per_head: bool, scale: float,
) -> None:  # fmt: skip
    """Fills `partial` [entries, Hkv or H, 256]; `scale` in log2 units."""
    heads, kv_heads, head_dim = views.q.shape[1], views.k.shape[1], views.q.shape[3]
    shape = [negative_lse.numel() // streamed, streamed]
    lse = TensorDescriptor(negative_lse, shape, [streamed, 1], [1, streamed], LSE_LAYOUT)
    _column_sum_kernel[(tables.entries * kv_heads,)](
        views.q_rows.descriptor(views.q, streamed), views.k_rows.descriptor(views.k, PART.value),
        lse, partial, tables.pieces, tables.spans, *views.steps, tables.slots, kv_heads, heads // kv_heads, scale,
        HEAD_DIM=head_dim, STREAMED=streamed, STAGES=ring.stages, PACKED=packed, PER_HEAD=per_head,
        IN_REGISTERS=ring.in_registers, **GROUPS,
    )  # fmt: skip
