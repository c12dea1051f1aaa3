"""Both passes of `incoming_attention` in Gluon for sm_90: exponentials run under products by design.

In plain Triton all warps of a program multiply, then all take exponentials: the matrix unit idles during the exponentials
unless a second program happens to be out of step. Here one warp copies tiles by TMA into a ring. Two warp groups own half
of the 256 resident tokens each, as an upper and a lower part of 64. A group starts the product of one part before it takes the
exponentials of the other, so that neither unit waits:

    start lower product of tile i      | exponentials of the upper scores of tile i
    start upper product of tile i + 1  | exponentials of the lower scores of tile i

The order must survive two compilers. Each wait on a barrier that has long completed ends a basic block, and ptxas does not
move exponentials across it. The shuffles of a sum, or the maximum, keep them from sinking behind the wait for the product.

An H100 was measured at N = 32,768 with 32 query and 8 kv heads, in one run (benchmarks/README.md). The two passes took 0.78
(D = 128), 0.83 (D = 64) and 0.63 (D = 256) of the time of those in `attention.py`. Tiles, pieces, and what goes in and out are
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

from ..reference import AttentionOptions
from .launch import FUSED, Ring
from .plan import Plan
from .primitives import LOWEST, Factors, first_slot, negative_log_sum, read_piece, read_span, read_tile, walk

RESIDENT = 256
PART = gl.constexpr(64)
"""Resident tokens of one product: the height of a warp group's matrix instruction."""

GROUPS = {"num_warps": 4, "maxnreg": 168, "REGISTERS": 232, **FUSED}
"""Warps of the first group. Registers of a thread when the program starts, which three groups of 4 warps can have. Registers of
a thread that takes exponentials, once the copying warp has given up its registers."""

TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
LSE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


class Shape(NamedTuple):
    """What is known of a pass when it is compiled."""

    STREAMED: gl.constexpr
    STAGES: gl.constexpr
    IN_REGISTERS: gl.constexpr
    mma: gl.constexpr
    """Layout of a product, [64, STREAMED], over the threads of a warp group."""


class Stream(NamedTuple):
    """The ring of streamed tiles in shared memory, and the log-sum-exp of their tokens. Each place of the ring has two
    barriers: one says that it is filled, one that it is free."""

    tiles: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    filled: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Place(NamedTuple):
    """A place of the ring, and the parity of its barriers."""

    slot: gl.tensor
    phase: gl.tensor


class Parts(NamedTuple):
    """What belongs to the upper and to the lower 64 resident tokens of a warp group."""

    upper: gl.tensor
    lower: gl.tensor


class Path(NamedTuple):
    """Where the copying warp finds the streamed tiles and their log-sum-exp, and how much further those of the next head."""

    row: gl.tensor
    row_step: gl.tensor
    column: gl.tensor
    column_step: gl.tensor
    lse_row: gl.tensor
    lse_step: gl.tensor


class Walk(NamedTuple):
    """Tiles of queries: first ... diagonal_end - 1 are on the diagonal, and those up to full_end see every key. Where the
    sequence ends in front of `stop`, the last one is cut short."""

    first: gl.tensor
    diagonal_end: gl.tensor
    full_end: gl.tensor
    stop: gl.tensor


class Sinks(NamedTuple):
    """Logits of all heads, or None."""

    logits: gl.tensor
    stride: gl.tensor


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
def _copy_tiles(desc, lse_desc, stream, path, heads, first, stop, shape: gl.constexpr, LSE: gl.constexpr):
    """The copying warp: tiles first ... stop - 1 of every head in turn, with their log-sum-exp, then one more, because a group
    starts a product more than there are tiles."""
    size: gl.constexpr = desc.block_type.nbytes + (lse_desc.block_type.nbytes if LSE else 0)
    filled = stream.filled
    row = path.row
    column = path.column
    lse_row = path.lse_row
    slot = 0
    phase = 0
    for _ in range(heads):
        for tile in range(first, stop):
            mbarrier.wait(stream.free.index(slot), phase ^ 1)
            mbarrier.expect(filled.index(slot), size)
            at = row + tile * shape.STREAMED
            tma.async_copy_global_to_shared(desc, [at, column], filled.index(slot), stream.tiles.index(slot))
            if LSE:
                tma.async_copy_global_to_shared(lse_desc, [lse_row + tile, 0], filled.index(slot), stream.lse.index(slot))
            slot, phase = _next(slot, phase, shape.STAGES)
        row += path.row_step
        column += path.column_step
        if LSE:
            lse_row += path.lse_step
    mbarrier.wait(stream.free.index(slot), phase ^ 1)
    mbarrier.expect(filled.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [0, 0], filled.index(slot), stream.tiles.index(slot))


@gluon.jit
def _start_product(part, stream, slot, shape: gl.constexpr):
    """Products of 64 resident tokens with the tile in `slot`, [64, STREAMED], under way."""
    nothing = gl.zeros([PART, shape.STREAMED], gl.float32, layout=shape.mma)
    return warpgroup_mma(part, stream.tiles.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _first_scores(upper, stream, shape: gl.constexpr):
    """The upper scores of the first tile in the ring."""
    mbarrier.wait(stream.filled.index(0), 0)
    return warpgroup_mma_wait(num_outstanding=0, deps=[_start_product(upper, stream, 0, shape)])


@gluon.jit
def _add_received(sums, scores, stream, slot, key, tile, tokens, scale, shape: gl.constexpr, MASKED: gl.constexpr):
    """`sums` with the probabilities that each key receives from one tile of queries.

    The negative log-sum-exp is loaded here and not before: behind the barrier it keeps the exponentials behind it, too."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    columns: gl.constexpr = gl.SliceLayout(0, shape.mma)
    shift = stream.lse.index(slot)._reinterpret(gl.float32, [shape.STREAMED], flat).load(columns)
    received = gl.exp2(gl.fma(scores, scale, gl.expand_dims(shift, 0)))
    if MASKED:
        query = tile * shape.STREAMED + gl.arange(0, shape.STREAMED, layout=columns)
        # What lies behind the sequence was copied, too, and may be NaN.
        visible = (gl.expand_dims(key, 1) < gl.expand_dims(query, 0)) & gl.expand_dims(query < tokens, 0)
        received = gl.where(visible, received, 0.0)
    return sums + gl.sum(received, axis=1)


@gluon.jit
def _scan_queries(
    sums, scores, place, parts, stream, key, begin, end, tokens, scale, shape: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Adds what the tiles begin ... end - 1 of queries give. `scores` are the upper ones of the tile in `place`, before and
    after."""
    upper_sums, lower_sums = sums
    slot, phase = place
    for tile in range(begin, end):
        product = _start_product(parts.lower, stream, slot, shape)
        mbarrier.wait(stream.filled.index(slot), phase)  # completed: see the module's docstring
        upper_sums = _add_received(upper_sums, scores, stream, slot, key, tile, tokens, scale, shape, MASKED)
        mbarrier.wait(stream.filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
        following, next_phase = _next(slot, phase, shape.STAGES)
        mbarrier.wait(stream.filled.index(following), next_phase)
        product = _start_product(parts.upper, stream, following, shape)
        mbarrier.wait(stream.filled.index(slot), phase)
        lower_sums = _add_received(lower_sums, scores, stream, slot, key + PART, tile, tokens, scale, shape, MASKED)
        mbarrier.arrive(stream.free.index(slot), count=1)
        slot = following
        phase = next_phase
        mbarrier.wait(stream.filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
    return Parts(upper_sums, lower_sums), scores, Place(slot, phase)


@gluon.jit
def _loaded(parts, shape: gl.constexpr):
    """The resident parts as the matrix unit takes them: from registers where the launch says so, else from shared memory."""
    if shape.IN_REGISTERS:
        operand: gl.constexpr = gl.DotOperandLayout(0, shape.mma, 2)
        return Parts(parts.upper.load(operand), parts.lower.load(operand))
    else:
        return parts


@gluon.jit
def _sum_columns(
    parts, stream, out, begin, walk, tokens, scale, group, shape: gl.constexpr, PER_HEAD: gl.constexpr, WHICH: gl.constexpr
):  # fmt: skip
    """One warp group: the sums of 128 keys over the group's query heads and the queries of the piece."""
    tall: gl.constexpr = gl.SliceLayout(1, shape.mma)
    token = WHICH * 2 * PART + gl.arange(0, PART, layout=tall)
    key = begin + token
    parts = _loaded(parts, shape)
    nothing = gl.zeros([PART], gl.float32, layout=tall)
    sums = Parts(nothing, nothing)
    scores = _first_scores(parts.upper, stream, shape)
    place = Place(0, 0)
    for _ in range(group):
        # Tiles of queries on the diagonal are masked, then come those which see every key, then the one that ends the sequence.
        sums, scores, place = _scan_queries(
            sums, scores, place, parts, stream, key, walk.first, walk.diagonal_end, tokens, scale, shape, True
        )  # fmt: skip
        sums, scores, place = _scan_queries(
            sums, scores, place, parts, stream, key, walk.diagonal_end, walk.full_end, tokens, scale, shape, False
        )  # fmt: skip
        sums, scores, place = _scan_queries(
            sums, scores, place, parts, stream, key, walk.full_end, walk.stop, tokens, scale, shape, True
        )  # fmt: skip
        if PER_HEAD:
            gl.store(out + token, sums.upper)
            gl.store(out + token + PART, sums.lower)
            out += 4 * PART
            sums = Parts(nothing, nothing)
    if not PER_HEAD:
        gl.store(out + token, sums.upper)
        gl.store(out + token + PART, sums.lower)


@gluon.jit(do_not_specialize=["slots", "kv_heads", "group"])
def _column_sum_kernel(
    q_desc, k_desc, lse_desc, partial_out, pieces, spans,
    q_row_batch, q_row_head, q_column_head, k_row_batch, k_row_head, k_column_head, slots, kv_heads, group, scale,
    HEAD_DIM: gl.constexpr, STREAMED: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr, PER_HEAD: gl.constexpr,
    IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries, [entries, Hkv, 256], or per query head, [entries, H, 256]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STREAMED, 16])
    shape: gl.constexpr = Shape(STREAMED, STAGES, IN_REGISTERS, mma)
    piece = read_piece(pieces, (gl.program_id(0) // kv_heads).to(gl.int64))
    kv_head = gl.program_id(0) % kv_heads
    begin = gl.maximum(piece.listed - 1, 0) * 256  # a surplus entry is all zeros: then first = stop = 0
    slot = first_slot(piece)
    first, stop = walk(piece)
    start, tokens = read_span(spans, piece.sequence)
    batch = piece.sequence
    if PACKED:
        batch = 0
    k_row = batch * k_row_batch + kv_head * k_row_head + start + begin
    keys, ring, filled, free = _set_up(k_desc, q_desc, k_row, kv_head * k_column_head, HEAD_DIM, STREAMED, STAGES)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, STREAMED], lse_desc.layout)
    stream = Stream(ring, lse_ring, filled, free)

    diagonal_end = gl.minimum(gl.maximum((begin + 256) // STREAMED, first), stop)
    full_end = gl.maximum(gl.minimum(tokens // STREAMED, stop), diagonal_end)
    tiles = Walk(first, diagonal_end, full_end, stop)
    head = kv_head * group
    q_row = batch * q_row_batch + head * q_row_head + start
    lse_row = (head * slots + slot) * (256 // STREAMED)
    path = Path(q_row, q_row_head, head * q_column_head, q_column_head, lse_row, slots * (256 // STREAMED))
    out = partial_out + gl.program_id(0).to(gl.int64) * 256 * (group if PER_HEAD else 1)
    gl.warp_specialize(
        [
            (_sum_columns, (Parts(keys.index(0), keys.index(1)), stream, out, begin, tiles, tokens, scale, group, shape,
                            PER_HEAD, 0)),
            (_sum_columns, (Parts(keys.index(2), keys.index(3)), stream, out, begin, tiles, tokens, scale, group, shape,
                            PER_HEAD, 1)),
            (_copy_tiles, (q_desc, lse_desc, stream, path, group, first, stop, shape, True)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _add_summands(highest, total, scores, query, tile, scale, shape: gl.constexpr, MASKED: gl.constexpr):
    """The online log-sum-exp with one tile of keys: the highest score so far, in log2 units, and the sum of
    exp2(score - highest)."""
    if MASKED:
        key = tile * shape.STREAMED + gl.arange(0, shape.STREAMED, layout=gl.SliceLayout(0, shape.mma))
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
    highest, total, scores, place, parts, stream, query, begin, end, scale, shape: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """The tiles begin ... end - 1 of keys; `scores` as in `_scan_queries`."""
    upper_highest, lower_highest = highest
    upper_total, lower_total = total
    slot, phase = place
    for tile in range(begin, end):
        product = _start_product(parts.lower, stream, slot, shape)
        mbarrier.wait(stream.filled.index(slot), phase)  # completed: see the module's docstring
        upper_highest, upper_total = _add_summands(upper_highest, upper_total, scores, query, tile, scale, shape, MASKED)
        mbarrier.wait(stream.filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
        mbarrier.arrive(stream.free.index(slot), count=1)
        slot, phase = _next(slot, phase, shape.STAGES)
        mbarrier.wait(stream.filled.index(slot), phase)
        product = _start_product(parts.upper, stream, slot, shape)
        mbarrier.wait(stream.filled.index(slot), phase)
        lower_highest, lower_total = _add_summands(
            lower_highest, lower_total, scores, query + PART, tile, scale, shape, MASKED
        )  # fmt: skip
        mbarrier.wait(stream.filled.index(slot), phase)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[product])
    return Parts(upper_highest, lower_highest), Parts(upper_total, lower_total), scores, Place(slot, phase)


@gluon.jit
def _sum_rows(
    parts, stream, out, sinks, head, begin, diagonal, stop, tokens, scale, shape: gl.constexpr, WHICH: gl.constexpr
):  # fmt: skip
    """One warp group: the log-sum-exp of 128 queries."""
    tall: gl.constexpr = gl.SliceLayout(1, shape.mma)
    query = begin + WHICH * 2 * PART + gl.arange(0, PART, layout=tall)
    parts = _loaded(parts, shape)
    lowest = gl.full([PART], LOWEST, gl.float32, layout=tall)
    nothing = gl.zeros([PART], gl.float32, layout=tall)
    highest = Parts(lowest, lowest)
    total = Parts(nothing, nothing)
    scores = _first_scores(parts.upper, stream, shape)
    place = Place(0, 0)
    # Tiles of keys that every query sees, then the diagonal.
    highest, total, scores, place = _scan_keys(
        highest, total, scores, place, parts, stream, query, 0, diagonal, scale, shape, False
    )  # fmt: skip
    highest, total, scores, place = _scan_keys(
        highest, total, scores, place, parts, stream, query, diagonal, stop, scale, shape, True
    )  # fmt: skip
    upper = negative_log_sum(highest.upper, total.upper, sinks.logits, sinks.stride, head, query < tokens)
    lower = negative_log_sum(highest.lower, total.lower, sinks.logits, sinks.stride, head, query + PART < tokens)
    gl.store(out + query, upper, mask=(query >= 0) & (stop > 0))  # nothing where the entry is a surplus one
    gl.store(out + query + PART, lower, mask=(query >= 0) & (stop > 0))


@gluon.jit(do_not_specialize=["slots", "heads", "group"])
def _row_lse_kernel(
    q_desc, k_desc, sinks, negative_lse, tiles, spans,
    q_row_batch, q_row_head, q_column_head, k_row_batch, k_row_head, k_column_head, sinks_stride, slots, heads, group, scale,
    HEAD_DIM: gl.constexpr, STREAMED: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The log-sum-exp of every query, negative and in log2 units, laid out by tiles, [H, slots, 256]."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STREAMED, 16])
    shape: gl.constexpr = Shape(STREAMED, STAGES, IN_REGISTERS, mma)
    entry = read_tile(tiles, gl.program_id(0) // heads)
    head = gl.program_id(0) % heads
    slot = first_slot(entry)
    start, tokens = read_span(spans, entry.sequence)
    # The table lists tiles of keys, longest walk first; the tile of queries with the same walk is its mirror image.
    begin = ((tokens + 255) // 256 - entry.listed) * 256
    stop = (gl.minimum(begin + 256, tokens) + STREAMED - 1) // STREAMED
    if entry.listed == 0:
        begin = 0
        stop = 0
    batch = entry.sequence
    if PACKED:
        batch = 0
    kv_head = head // group
    q_row = batch * q_row_batch + head * q_row_head + start + begin
    queries, ring, filled, free = _set_up(q_desc, k_desc, q_row, head * q_column_head, HEAD_DIM, STREAMED, STAGES)
    stream = Stream(ring, ring, filled, free)

    diagonal = gl.minimum(begin // STREAMED, stop)
    k_row = batch * k_row_batch + kv_head * k_row_head + start
    path = Path(k_row, 0, kv_head * k_column_head, 0, 0, 0)
    out = negative_lse + (head.to(gl.int64) * slots + slot) * 256
    given = Sinks(sinks, sinks_stride)
    gl.warp_specialize(
        [
            (_sum_rows, (Parts(queries.index(0), queries.index(1)), stream, out, given, head, begin, diagonal, stop, tokens,
                         scale, shape, 0)),
            (_sum_rows, (Parts(queries.index(2), queries.index(3)), stream, out, given, head, begin, diagonal, stop, tokens,
                         scale, shape, 1)),
            (_copy_tiles, (k_desc, k_desc, stream, path, 1, 0, stop, shape, False)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


class Rows(NamedTuple):
    """A tensor [B, H, N, D] as the matrix that a TMA descriptor describes. Token (b, h, n) is in row
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


def row_lse(views: Views, ring: Ring, streamed: int, options: AttentionOptions, negative_lse: Tensor, tables: Plan) -> None:
    """Fills `negative_lse` [H, slots, 256]."""
    batch, heads, _, head_dim = views.q.shape
    sinks = options.sinks
    _row_lse_kernel[(tables.slots * heads,)](
        views.q_rows.descriptor(views.q, PART.value), views.k_rows.descriptor(views.k, streamed),
        sinks, negative_lse, tables.tiles, tables.spans, *views.steps, 0 if sinks is None else sinks.stride(0),
        tables.slots, heads, heads // views.k.shape[1], Factors.of(options).scale,
        HEAD_DIM=head_dim, STREAMED=streamed, STAGES=ring.stages, PACKED=batch == 1, IN_REGISTERS=ring.in_registers, **GROUPS,
    )  # fmt: skip


def column_sum(
    views: Views,
    ring: Ring,
    streamed: int,
    options: AttentionOptions,
    negative_lse: Tensor,
    partial: Tensor,
    tables: Plan,
) -> None:
    """Fills `partial` [entries, Hkv or H, 256]."""
    (batch, heads, _, head_dim), kv_heads = views.q.shape, views.k.shape[1]
    shape = [negative_lse.numel() // streamed, streamed]
    lse = TensorDescriptor(negative_lse, shape, [streamed, 1], [1, streamed], LSE_LAYOUT)
    scale = Factors.of(options).scale
    _column_sum_kernel[(tables.entries * kv_heads,)](
        views.q_rows.descriptor(views.q, streamed), views.k_rows.descriptor(views.k, PART.value),
        lse, partial, tables.pieces, tables.spans, *views.steps, tables.slots, kv_heads, heads // kv_heads, scale,
        HEAD_DIM=head_dim, STREAMED=streamed, STAGES=ring.stages, PACKED=batch == 1, PER_HEAD=options.heads == "query",
        IN_REGISTERS=ring.in_registers, **GROUPS,
    )  # fmt: skip
