"""Log-probabilities in Triton: gather minus log-sum-exp over logits, and the head's product fused with the same.

The fused kernel gives each program one tile of rows and one stretch of the vocabulary. It leaves the highest logit, the sum of
exponentials and the target's logit of its stretch; a second kernel adds the stretches up in ascending order. Stretches depend
on the vocabulary alone, so a row's result depends neither on the batch nor on the run. No atomics, no locks.

Inside, a logit x counts as (x - highest) / temperature: the difference is exact where it matters, so an offset common to all
logits costs no digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from entra_kernels._triton.attention import _tanh
from entra_kernels._triton.launch import KernelCase, shared_memory

LOG2_E = tl.constexpr(1.4426950408889634)

ROW_BLOCK = 4096
"""Logits of one row that a program of `_row_kernel` reads at a time."""

STRETCH = 2048
"""Vocabulary entries per program of `_head_kernel`: fixed, so that results do not depend on the number of rows."""

REDUCED_ROWS = 128
"""Rows per program of `_reduce_kernel`."""


class Tiling(NamedTuple):
    """Launch size of the fused head: `rows` x `columns` logits at a time, `depth` entries of C per dot. `band` tiles of rows
    share a stretch of the vocabulary before the next one starts, so that both stay in the L2 cache."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    band: int = 16


def tiling(element_size: int, shared_memory: int) -> Tiling:
    """The launch size for bytes per element and bytes of shared memory per program."""
    if element_size == 4:
        # No matrix unit multiplies float32 exactly: this runs on the FMA units.
        return Tiling(rows=64, columns=64, depth=32, num_warps=4, num_stages=2)
    if shared_memory >= 200 * 1024:
        # 3 stages of (128 + 256) x 64 two-byte entries: 144 KiB. It would fit an A100 too, but spills registers there.
        return Tiling(rows=128, columns=256, depth=64, num_warps=8, num_stages=3)
    return Tiling(rows=128, columns=128, depth=64, num_warps=8, num_stages=3 if shared_memory >= 96 * 1024 else 2)


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
    logits,
    targets,
    out,
    stride_outer,
    stride_inner,
    stride_vocabulary,
    inner,
    vocabulary,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
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


@triton.jit(do_not_specialize=["rows"])
def _head_kernel(
    hidden,
    weight,
    bias,
    targets,
    highest_out,
    total_out,
    picked_out,
    hidden_stride_row,
    hidden_stride,
    weight_stride_row,
    weight_stride,
    bias_stride,
    rows,
    vocabulary,
    channels,
    logit_scale,
    softcap,
    inverse_temperature,
    STRETCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Highest logit, sum of exponentials and target's logit of one tile of rows over one stretch of the vocabulary."""
    stretches = tl.cdiv(vocabulary, STRETCH)
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    band = program // (BAND * stretches)
    in_band = min(tiles - band * BAND, BAND)
    within = program % (BAND * stretches)
    stretch = within // in_band
    row = (band * BAND + within % in_band) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    hidden_rows = hidden + row.to(tl.int64) * hidden_stride_row
    target = tl.load(targets + row, mask=is_row, other=-1)
    target = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)  # compared once per logit: 32 bits

    scale = inverse_temperature * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for start in range(stretch * STRETCH, min(stretch * STRETCH + STRETCH, vocabulary), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < vocabulary
        weight_rows = weight + column.to(tl.int64) * weight_stride_row
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for cut in range(0, channels, DEPTH):
            channel = cut + tl.arange(0, DEPTH)
            is_channel = channel < channels
            offset = channel.to(tl.int64)
            hidden_tile = tl.load(
                hidden_rows[:, None] + offset[None, :] * hidden_stride, mask=is_row[:, None] & is_channel[None, :], other=0.0
            )  # [ROWS, DEPTH]
            weight_tile = tl.load(
                weight_rows[None, :] + offset[:, None] * weight_stride,
                mask=is_channel[:, None] & is_column[None, :],
                other=0.0,
            )  # [DEPTH, COLUMNS]
            logits = tl.dot(hidden_tile, weight_tile, logits, input_precision="ieee")
        if bias is not None:
            logits += tl.load(bias + column.to(tl.int64) * bias_stride, mask=is_column, other=0.0).to(tl.float32)[None, :]
        logits *= logit_scale
        if SOFTCAP:
            logits = _tanh(logits / softcap) * softcap
        picked += tl.sum(tl.where(target[:, None] == column[None, :], logits, 0.0), axis=1)
        logits = tl.where(is_column[None, :], logits, float("-inf"))  # the tail is not a token with logit 0
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        shift = _finite_shift(higher)
        total = total * tl.exp2((highest - shift) * scale) + tl.sum(tl.exp2((logits - shift[:, None]) * scale), axis=1)
        highest = higher

    address = stretch.to(tl.int64) * rows + row
    tl.store(highest_out + address, highest, mask=is_row)
    tl.store(total_out + address, total, mask=is_row)
    tl.store(picked_out + address, picked, mask=is_row)


@triton.jit(do_not_specialize=["rows"])
def _reduce_kernel(
    highest_in,
    total_in,
    picked_in,
    targets,
    out,
    rows,
    vocabulary,
    inverse_temperature,
    STRETCH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the stretches of each row in ascending order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    target = tl.load(targets + row, mask=is_row, other=-1)
    scale = inverse_temperature * LOG2_E
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    for stretch in range(tl.cdiv(vocabulary, STRETCH)):
        address = tl.cast(stretch, tl.int64) * rows + row
        part_highest = tl.load(highest_in + address, mask=is_row, other=0.0)
        part_total = tl.load(total_in + address, mask=is_row, other=1.0)
        higher = tl.maximum(highest, part_highest)
        shift = _finite_shift(higher)
        total = total * tl.exp2((highest - shift) * scale) + part_total * tl.exp2((part_highest - shift) * scale)
        highest = higher
        picked += tl.load(picked_in + address, mask=is_row, other=0.0)
    inside = (target >= 0) & (target < vocabulary)
    tl.store(out + row, _log_probability(picked, highest, total, inverse_temperature, inside), mask=is_row)


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
            planes,
            targets.contiguous(),
            out,
            *planes.stride(),
            inner,
            vocabulary,
            1.0 / temperature,
            BLOCK=ROW_BLOCK,
            num_warps=8,
        )
    return out


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, targets)` in one fused pass and a reduction.

    Beside the result it takes 12 bytes per row and 2048 vocabulary entries.
    """
    rows, channels = hidden.shape
    vocabulary = weight.shape[0]
    out = hidden.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return out
    size = tiling(hidden.element_size(), shared_memory(hidden.device))
    stretches = triton.cdiv(vocabulary, STRETCH)
    highest, total, picked = hidden.new_empty(3, stretches, rows, dtype=torch.float32)
    targets = targets.contiguous()
    with torch.cuda.device_of(hidden):
        _head_kernel[(triton.cdiv(rows, size.rows) * stretches,)](
            hidden,
            weight,
            bias,
            targets,
            highest,
            total,
            picked,
            *hidden.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            rows,
            vocabulary,
            channels,
            logit_scale,
            softcap or 0.0,
            1.0 / temperature,
            STRETCH=STRETCH,
            ROWS=size.rows,
            COLUMNS=size.columns,
            DEPTH=size.depth,
            BAND=size.band,
            SOFTCAP=softcap is not None,
            num_warps=size.num_warps,
            num_stages=size.num_stages,
        )
        _reduce_kernel[(triton.cdiv(rows, REDUCED_ROWS),)](
            highest,
            total,
            picked,
            targets,
            out,
            rows,
            vocabulary,
            1.0 / temperature,
            STRETCH=STRETCH,
            ROWS=REDUCED_ROWS,
        )
    return out


def aot_cases(dtype: str, shared_memory: int) -> Iterator[KernelCase]:
    """What this module launches for inputs of `dtype` with a stride of 1 along C and V, see `KernelCase`."""
    yield KernelCase(
        label="token_logprobs",
        kernel=_row_kernel,
        arguments={
            "logits": f"*{dtype}",
            "targets": "*i64",
            "out": "*fp32",
            **dict.fromkeys(("stride_outer", "stride_inner", "inner", "vocabulary"), "i32"),
            "inverse_temperature": "fp32",
        },
        constexprs={"stride_vocabulary": 1, "BLOCK": ROW_BLOCK},
        divisible=("logits", "targets", "out", "stride_outer", "stride_inner", "vocabulary"),
        num_warps=8,
    )
    size = tiling(4 if dtype == "fp32" else 2, shared_memory)
    partials = dict.fromkeys(("highest_out", "total_out", "picked_out"), "*fp32")
    for label, softcap in (("head", False), ("head with bias and softcap", True)):
        arguments = {
            "hidden": f"*{dtype}",
            "weight": f"*{dtype}",
            "targets": "*i64",
            **partials,
            **dict.fromkeys(("hidden_stride_row", "weight_stride_row", "rows", "vocabulary", "channels"), "i32"),
            **dict.fromkeys(("logit_scale", "softcap", "inverse_temperature"), "fp32"),
        }
        constexprs: dict[str, int | None] = {
            "hidden_stride": 1,
            "weight_stride": 1,
            "STRETCH": STRETCH,
            "ROWS": size.rows,
            "COLUMNS": size.columns,
            "DEPTH": size.depth,
            "BAND": size.band,
            "SOFTCAP": softcap,
        }
        if softcap:
            arguments["bias"] = f"*{dtype}"
            constexprs["bias_stride"] = 1
        else:
            constexprs |= {"bias": None, "bias_stride": 0}
        pointers = tuple(name for name, kind in arguments.items() if kind.startswith("*"))
        yield KernelCase(
            label=label,
            kernel=_head_kernel,
            arguments=arguments,
            constexprs=constexprs,
            divisible=(*pointers, "hidden_stride_row", "weight_stride_row", "vocabulary", "channels"),
            num_warps=size.num_warps,
            num_stages=size.num_stages,
        )
    yield KernelCase(
        label="head reduction",
        kernel=_reduce_kernel,
        arguments={
            **dict.fromkeys(("highest_in", "total_in", "picked_in", "out"), "*fp32"),
            "targets": "*i64",
            "rows": "i32",
            "vocabulary": "i32",
            "inverse_temperature": "fp32",
        },
        constexprs={"STRETCH": STRETCH, "ROWS": REDUCED_ROWS},
        divisible=("highest_in", "total_in", "picked_in", "out", "targets", "vocabulary"),
    )
