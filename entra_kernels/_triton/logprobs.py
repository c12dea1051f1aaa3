"""Log-probabilities in Triton: gather minus log-sum-exp over logits, and the head's product with the same.

The vocabulary is cut into stretches. Of each row and stretch remain the highest logit, the sum of exponentials, the target's
logit and, for the entropy, the sum of exponentials times exponents. `_reduce_kernel` adds the stretches up. They come from
`_head_kernel`, which multiplies itself, or from products by cuBLAS, a chunk at a time, and `_stretch_kernel`, which reads each
logit once: `fused_is_faster` chooses. No atomics, no locks, and stretches depend on the vocabulary alone, so with the fused
kernel a row's result depends neither on the batch nor on the run.

Compiled for sm_90 in bfloat16, the fused kernel's inner loop has 101 instructions for 4 asynchronous HGMMA 64x256x16, no mask
and no spill. A tile of 128 x 256 logits takes about 1,000 more for its loads' start and its sums. That is 3 % of the issue
slots of its products at C = 4,096. One flat loop over tiles and channels would hide these, but Triton then waits after each
HGMMA.

Inside, a logit x counts as (x - highest) / temperature: the difference is exact where it matters, so an offset common to all
logits costs no digits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch.logprobs import factor, product
from .launch import FUSED, HOPPER, Chip, check_products, chip_of, entries
from .primitives import LOG2_E, tanh

ROW_BLOCK = 4096
"""Logits of one row that a program of `_row_kernel` reads at a time."""

STRETCH = 1024
"""Vocabulary entries per program of `_head_kernel`, and per sum that `_reduce_kernel` adds up: fixed, so that results do not
depend on the number of rows. A vocabulary of 131,072 makes 128 of them: one row tile alone nearly fills an H200's 132 SMs."""

STRETCH_ROWS = 4
"""Rows per program of `_stretch_kernel`: 16 KiB of logits."""

REDUCED = (32, 32)
"""Stretches and rows that `_reduce_kernel` takes at a time. With 64 rows and the entropy it spilled registers on sm_90."""

WORKSPACE = 64 << 20
"""Bytes of float32 logits that the chunked way holds at a time. They are 3 % of the bfloat16 logits of 8,192 rows at V =
131,072, in 64 chunks. The product of a chunk (137 GFLOP, 0.17 ms) is long compared with a launch. Not bfloat16: that would
round each logit by up to 2**-9 of itself."""


class Tiling(NamedTuple):
    """Launch size of the fused head: `rows` x `columns` logits at a time, `depth` entries of C per dot.

    `band` tiles of rows take a stretch of the vocabulary before the next one starts. With 16 of 128 rows at C = 4,096 the
    band's hidden states, 16 MiB, stay in an H200's L2 cache (50 MB). 132 programs walk over 8 stretches at once. The weight
    comes from memory once per 2,048 rows.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    band: int = 16


@functools.lru_cache
def tiling(element_size: int, chip: Chip) -> Tiling:
    """The launch size for bytes per element and a chip, from the table of `launch.py`."""
    sizes = (Tiling(**entry["size"]) for entry in entries("head", chip, element_size=element_size))
    return next(s for s in sizes if s.num_stages * (s.rows + s.columns) * s.depth * element_size <= chip.shared_memory)


@triton.jit
def _finite_shift(highest):
    """What to subtract before exp: the highest logit, or 0 while all are -inf, because -inf - -inf is NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _log_probability(picked, highest, total, inverse_temperature, inside):
    """Target's logit minus log-sum-exp; NaN for a target outside the vocabulary."""
    value = (picked - highest) * inverse_temperature - tl.log(total)
    return tl.where(inside, value, float("nan"))


@triton.jit
def _row_kernel(
    logits, targets, out, stride_outer, stride_inner, stride_vocabulary, inner, vocabulary, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits [outer, inner, V] per program: online log-sum-exp over blocks of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    first = logits + (row // inner) * stride_outer + (row % inner) * stride_inner
    scale = inverse_temperature * LOG2_E
    highest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        address = first + column.to(tl.int64) * stride_vocabulary
        logit = tl.load(address, mask=column < vocabulary, other=float("-inf")).to(tl.float32)  # [BLOCK]
        higher = tl.maximum(highest, tl.max(logit, axis=0))
        shift = _finite_shift(higher)
        total = total * tl.exp2((highest - shift) * scale) + tl.sum(tl.exp2((logit - shift) * scale), axis=0)
        highest = higher
    target = tl.load(targets + row).to(tl.int64)
    inside = (target >= 0) & (target < vocabulary)
    picked = tl.load(first + target * stride_vocabulary, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, _log_probability(picked, highest, total, inverse_temperature, inside))


@triton.jit
def _transformed(logits, logit_scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """What the model does to its head's output before it samples."""
    if SCALED:
        logits *= logit_scale
    if SOFTCAP:
        logits = tanh(logits * (1.0 / softcap)) * softcap  # one division for all
    return logits


@triton.jit
def _moved(weighted, total, move):
    """Sum of exp2(y) * y after every y has moved by `move` <= 0. Before, it was `weighted`, and the sum of exp2(y) was `total`.
    It is 0 where nothing is left of it, so that no 0 meets an infinity."""
    decay = tl.exp2(move)
    return tl.where(decay > 0, (weighted + total * move) * decay, 0.0)


@triton.jit
def _fold(highest, total, weighted, logits, scale, ENTROPY: tl.constexpr):
    """One more block of logits [ROWS, COLUMNS] into each row's highest logit, sum of exponentials and, for the entropy, sum of
    exponentials times exponents, both relative to the highest."""
    higher = tl.maximum(highest, tl.max(logits, axis=1))
    shift = _finite_shift(higher)
    power = (logits - shift[:, None]) * scale
    mass = tl.exp2(power)
    move = (highest - shift) * scale
    if ENTROPY:
        # Below 2**-149 the mass is 0, and 0 times the -inf of a token that cannot be would be NaN.
        weighted = _moved(weighted, total, move) + tl.sum(mass * tl.maximum(power, -200.0), axis=1)
    total = total * tl.exp2(move) + tl.sum(mass, axis=1)
    return higher, total, weighted


@triton.jit
def _store_parts(parts, stretch, rows, row, is_row, highest, total, picked, weighted, ENTROPY: tl.constexpr):
    """What one stretch of the vocabulary leaves of each row, into `parts` [stretches, 4 with the entropy, else 3, rows]."""
    address = parts + stretch.to(tl.int64) * (4 if ENTROPY else 3) * rows + row
    tl.store(address, highest, mask=is_row)
    tl.store(address + rows, total, mask=is_row)
    tl.store(address + 2 * rows, picked, mask=is_row)
    if ENTROPY:
        tl.store(address + 3 * rows, weighted, mask=is_row)


@triton.jit(do_not_specialize=["rows"])
def _head_kernel(
    hidden, weight, bias, targets, parts, hidden_stride_row, hidden_stride, weight_stride_row, weight_stride,
    bias_stride, rows, vocabulary, channels, logit_scale, softcap, inverse_temperature,
    STRETCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one stretch of the vocabulary, logits and all, into `parts`."""
    stretches = tl.cdiv(vocabulary, STRETCH)
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    band = program // (BAND * stretches)
    in_band = min(tiles - band * BAND, BAND)
    within = program % (BAND * stretches)
    stretch = within // in_band
    row = (band * BAND + within % in_band) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    target = tl.load(targets + row, mask=is_row, other=-1)
    target = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)  # compared once per logit: 32 bits

    # Past the ends the last row and the last column are read again and dropped later: no mask in the inner loop.
    channel = tl.arange(0, DEPTH)
    offset = channel.to(tl.int64)
    hidden_first = (
        hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride_row + offset[None, :] * hidden_stride
    )
    scale = inverse_temperature * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for start in range(stretch * STRETCH, min(stretch * STRETCH + STRETCH, vocabulary), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = tl.minimum(column, vocabulary - 1).to(tl.int64)
        weight_at = weight + inside[None, :] * weight_stride_row + offset[:, None] * weight_stride
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for cut in range(0, channels, DEPTH):
            hidden_cut = hidden_first + tl.cast(cut, tl.int64) * hidden_stride
            weight_cut = weight_at + tl.cast(cut, tl.int64) * weight_stride
            if EVEN_CHANNELS:
                hidden_tile = tl.load(hidden_cut)  # [ROWS, DEPTH]
                weight_tile = tl.load(weight_cut)  # [DEPTH, COLUMNS]
            else:
                is_channel = channel < channels - cut
                hidden_tile = tl.load(hidden_cut, mask=is_channel[None, :], other=0.0)
                weight_tile = tl.load(weight_cut, mask=is_channel[:, None], other=0.0)
            logits = tl.dot(hidden_tile, weight_tile, logits, input_precision="ieee")
        if bias is not None:
            logits += tl.load(bias + inside * bias_stride).to(tl.float32)[None, :]
        logits = _transformed(logits, logit_scale, softcap, SCALED, SOFTCAP)
        if start + COLUMNS > vocabulary:
            logits = tl.where((column < vocabulary)[None, :], logits, float("-inf"))  # the tail is not a token with logit 0
        # Most tiles hold no row's target: at V = 131,072 four in five of 128 x 256.
        if tl.max(((target >= start) & (target < start + COLUMNS)).to(tl.int32), axis=0) > 0:
            picked += tl.sum(tl.where(target[:, None] == column[None, :], logits, 0.0), axis=1)
        highest, total, weighted = _fold(highest, total, weighted, logits, scale, ENTROPY)

    _store_parts(parts, stretch, rows, row, is_row, highest, total, picked, weighted, ENTROPY)


@triton.jit(do_not_specialize=["rows", "count", "first_row"])
def _stretch_kernel(
    logits, bias, targets, parts, bias_stride, rows, first_row, count, first_column, width, logit_scale, softcap,
    inverse_temperature,
    STRETCH: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """What `_head_kernel` leaves in `parts`, from a chunk of the head's product: logits [count, width] of float32.

    `first_column` is a multiple of STRETCH, so that stretches are the same whatever the chunk.
    """
    # What the product wrote last is read first: that is what the L2 cache still holds.
    stretch = tl.num_programs(1) - 1 - tl.program_id(1)
    within = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    is_row = within < count
    column = stretch * STRETCH + tl.arange(0, STRETCH)
    is_column = column < width
    address = logits + within.to(tl.int64)[:, None] * width + column[None, :]
    tile = tl.load(address, mask=is_row[:, None] & is_column[None, :], other=0.0)  # [ROWS, STRETCH]
    if bias is not None:
        place = (first_column + column).to(tl.int64) * bias_stride
        tile += tl.load(bias + place, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tile = _transformed(tile, logit_scale, softcap, SCALED, SOFTCAP)
    tile = tl.where(is_column[None, :], tile, float("-inf"))  # the tail is not a token with logit 0
    target = tl.load(targets + first_row + within, mask=is_row, other=-1) - first_column
    target = tl.where((target >= 0) & (target < width), target, -1).to(tl.int32)
    picked = tl.sum(tl.where(target[:, None] == column[None, :], tile, 0.0), axis=1)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    nothing = tl.zeros([ROWS], tl.float32)
    highest, total, weighted = _fold(highest, nothing, nothing, tile, inverse_temperature * LOG2_E, ENTROPY)
    stretch += first_column // STRETCH
    _store_parts(parts, stretch, rows, first_row + within, is_row, highest, total, picked, weighted, ENTROPY)


@triton.jit(do_not_specialize=["rows"])
def _reduce_kernel(
    parts, targets, logprobs, entropy, rows, vocabulary, inverse_temperature,
    STRETCH: tl.constexpr, ROWS: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """Adds up the stretches of each row, STRETCHES at a time, in an order that depends on nothing else."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    stretches = tl.cdiv(vocabulary, STRETCH)
    scale = inverse_temperature * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for first in range(0, stretches, STRETCHES):
        stretch = first + tl.arange(0, STRETCHES)
        mask = (stretch < stretches)[:, None] & is_row[None, :]
        address = parts + stretch.to(tl.int64)[:, None] * (3 if entropy is None else 4) * rows + row[None, :]
        part_highest = tl.load(address, mask=mask, other=float("-inf"))  # [STRETCHES, ROWS]
        part_total = tl.load(address + rows, mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(part_highest, axis=0))
        shift = _finite_shift(higher)
        move = (highest - shift) * scale
        part_move = (part_highest - shift[None, :]) * scale
        if entropy is not None:
            part_weighted = tl.load(address + 3 * rows, mask=mask, other=0.0)
            weighted = _moved(weighted, total, move) + tl.sum(_moved(part_weighted, part_total, part_move), axis=0)
        total = total * tl.exp2(move) + tl.sum(part_total * tl.exp2(part_move), axis=0)
        picked += tl.sum(tl.load(address + 2 * rows, mask=mask, other=0.0), axis=0)
        highest = higher
    target = tl.load(targets + row, mask=is_row, other=-1)
    inside = (target >= 0) & (target < vocabulary)
    tl.store(logprobs + row, _log_probability(picked, highest, total, inverse_temperature, inside), mask=is_row)
    if entropy is not None:
        # Two terms that are not negative: nothing cancels. `weighted` has exponents of 2.
        tl.store(entropy + row, tl.log(total) - weighted / (total * LOG2_E), mask=is_row)


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """`log_softmax(logits.float() / temperature, -1).gather(-1, targets)`, reading the logits once.

    No copy up to three dims, whatever the strides; of more dims, only where all but the last two do not collapse into one.
    """
    out = logits.new_empty(targets.shape, dtype=torch.float32)
    if out.numel() == 0:
        return out
    vocabulary = logits.shape[-1]
    inner = logits.shape[-2] if logits.ndim > 1 else 1
    planes = logits.reshape(-1, inner, vocabulary)
    with torch.cuda.device_of(logits):
        _row_kernel[(out.numel(),)](
            planes, targets.contiguous(), out, *planes.stride(), inner, vocabulary, 1.0 / temperature,
            BLOCK=ROW_BLOCK, num_warps=8, **FUSED,
        )  # fmt: skip
    return out


def fused_is_faster(rows: int, channels: int, vocabulary: int, element_size: int, chip: Chip = HOPPER) -> bool:
    """Whether `_head_kernel` should beat cuBLAS and `_stretch_kernel` on `rows` rows.

    Both ways multiply rows x channels x vocabulary and read the weight at least once. The rates are in the table of
    `launch.py`. On an H100 cuBLAS reaches 750 TFLOP/s, the fused kernel 650. On the other side, cuBLAS writes each logit and
    `_stretch_kernel` reads it, 8 bytes at 3.0 TB/s, and each chunk costs two launches, taken as 5 us each. Medians of 9 calls
    on an H100 (2026-11-26), by this rule / measured, in ms, beside the bare product:

        8,192 rows, C = 2,048, V = 151,936:    fused  7.8 /  7.9                              product  7.1
        8,192 rows, C = 4,096, V = 131,072:    fused 13.5 / 13.2, chunked 15.2 / 14.8         product 11.5
        8,192 rows, C = 8,192, V = 128,256:    fused 26.5 / 28.2, chunked 26.4 / 26.3         product 24.0

    So chunked wins from about C = 8,000 on. With TMA descriptors the fused kernel was not faster (13.7 at C = 4,096), nor with
    bands of 8 or 32 tiles, stretches of 2,048, or 3 stages. Float32 is always fused: 87 % of the instructions in its inner loop
    are FMAs already (compiled for sm_90), and cuBLAS would round to TF32 where the process allows it.
    """
    if element_size == 4:
        return True
    work = 2 * rows * channels * vocabulary
    rates = next(entries("rates", chip))
    bandwidth = rates["copy_tb_per_s"] * 1e12
    weight = channels * vocabulary * element_size / bandwidth
    chunk_rows, chunk_columns = chunk(rows, vocabulary)
    chunks = triton.cdiv(rows, chunk_rows) * triton.cdiv(vocabulary, chunk_columns)
    fused = max(work / (rates["fused_tflops"] * 1e12), weight)
    logits = 8 * rows * vocabulary / bandwidth
    chunked = max(work / (rates["product_tflops"] * 1e12), weight) + logits + chunks * 2 * rates["launch_us"] * 1e-6
    return fused <= chunked


def chunk(rows: int, vocabulary: int) -> tuple[int, int]:
    """Rows and vocabulary entries of one chunk of float32 logits: at most WORKSPACE bytes, the entries whole stretches.

    Up to 4096 rows, in tiles of 128, so that chunks of many rows are square. Among chunks of one size these read least: each of
    `hidden` and `weight` once per 4096 of the other. A full chunk is 512 tiles of 128 x 256, 3.9 for each of 132 SMs.
    """
    chunk_rows = min(triton.cdiv(triton.cdiv(rows, triton.cdiv(rows, 4096)), 128) * 128, rows)
    columns = WORKSPACE // (4 * chunk_rows) // STRETCH * STRETCH
    return chunk_rows, min(columns, triton.cdiv(vocabulary, STRETCH) * STRETCH)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool = False,
    way: str | None = None,
) -> list[Tensor]:
    """`token_logprobs(hidden @ weight.T + bias, targets)` and, if wanted, the entropy, each [T].

    `way` is "fused" (one pass of `_head_kernel`), "chunked" (products by cuBLAS into a chunk of float32 logits, each read once
    by `_stretch_kernel`), or None for what `fused_is_faster` says. Either ends in `_reduce_kernel`. Both are repeatable bit for
    bit; only the fused way's result does not depend on the number of rows as well.

    Beside the results it takes 12 bytes (16 with the entropy) per row and 1024 vocabulary entries, and, when chunked, 64 MiB.
    """
    rows, channels = hidden.shape
    vocabulary = weight.shape[0]
    logprobs = hidden.new_empty(rows, dtype=torch.float32)
    entropies = torch.empty_like(logprobs) if entropy else None
    results = [logprobs] if entropies is None else [logprobs, entropies]
    if rows == 0:
        return results
    parts = hidden.new_empty(triton.cdiv(vocabulary, STRETCH), 4 if entropy else 3, rows, dtype=torch.float32)
    targets = targets.contiguous()
    options = {
        "logit_scale": logit_scale,
        "softcap": softcap or 0.0,
        "inverse_temperature": 1.0 / temperature,
        "STRETCH": STRETCH,
        "SCALED": logit_scale != 1.0,
        "SOFTCAP": softcap is not None,
        "ENTROPY": entropy,
        **FUSED,
    }
    if way is None:
        size = hidden.element_size()
        way = (
            "fused"
            if not _blas_takes(hidden, weight) or fused_is_faster(rows, channels, vocabulary, size, chip_of(hidden.device))
            else "chunked"
        )
    with torch.cuda.device_of(hidden):
        if way == "fused":
            _fused(hidden, weight, bias, targets, parts, options)
        else:
            _chunked(hidden, weight, bias, targets, parts, options)
        _reduce_kernel[(triton.cdiv(rows, REDUCED[1]),)](
            parts, targets, logprobs, entropies, rows, vocabulary, 1.0 / temperature,
            STRETCH=STRETCH, ROWS=REDUCED[1], STRETCHES=REDUCED[0], **FUSED,
        )  # fmt: skip
    return results


def _fused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: Tensor, options: dict[str, Any]
) -> None:
    """Fills `parts` in one launch."""
    check_products(hidden)
    rows, channels = hidden.shape
    size = tiling(hidden.element_size(), chip_of(hidden.device))
    _head_kernel[(triton.cdiv(rows, size.rows) * parts.shape[0],)](
        hidden, weight, bias, targets, parts, *hidden.stride(), *weight.stride(),
        0 if bias is None else bias.stride(0), rows, weight.shape[0], channels,
        ROWS=size.rows, COLUMNS=size.columns, DEPTH=size.depth, BAND=size.band,
        EVEN_CHANNELS=channels % size.depth == 0, num_warps=size.num_warps, num_stages=size.num_stages, **options,
    )  # fmt: skip


def _chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: Tensor, options: dict[str, Any]
) -> None:
    """Fills `parts` chunk by chunk."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    chunk_rows, chunk_columns = chunk(rows, vocabulary)
    workspace = hidden.new_empty(chunk_rows * chunk_columns, dtype=torch.float32)
    for first_column in range(0, vocabulary, chunk_columns):
        columns = factor(weight[first_column : first_column + chunk_columns])
        width = columns.shape[0]
        for first_row in range(0, rows, chunk_rows):
            states = factor(hidden[first_row : first_row + chunk_rows])
            count = states.shape[0]
            logits = workspace[: count * width].view(count, width)
            product(states, columns.t(), out=logits)
            _stretch_kernel[(triton.cdiv(count, STRETCH_ROWS), triton.cdiv(width, STRETCH))](
                logits, bias, targets, parts, 0 if bias is None else bias.stride(0), rows, first_row, count,
                first_column, width,
                ROWS=STRETCH_ROWS, **options,
            )  # fmt: skip


def _blas_takes(*matrices: Tensor) -> bool:
    """Whether a BLAS multiplies these half-precision matrices as they lie and into float32: on ROCm never."""
    return torch.version.hip is None and all(1 in matrix.stride() for matrix in matrices)
