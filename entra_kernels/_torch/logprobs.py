"""Log-probabilities in bounded memory: blocks of rows for logits, tiles of rows x vocabulary for the fused head."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import accumulation_dtype

# A block of logits in float32. Its upcast, its quotient by a temperature and its log-softmax make 3 of these: 24 MiB.
_BLOCK_BYTES = 8 << 20

# Rows x vocabulary entries of one tile of the head. CPU: 16 MiB in float32. One thread was measured at 2048 x 576 and a
# vocabulary of 49152. Tiles of 1024 x 1024 to 2048 x 4096 took 0.74 to 0.80 of the time of `hidden @ weight.T` and
# log_softmax. With more threads, fewer and larger products mean less waiting. Tiles 512 wide took twice as long.
# Elsewhere: 64 MiB.
_CPU_TILE = (2048, 2048)
_DEVICE_TILE = (2048, 8192)


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """`log_softmax(logits.float() / temperature, -1).gather(-1, targets)` with at most 24 MiB beside the result.

    (More only when a single row is larger than 8 MiB in float32: then 3 rows.)
    """
    dtype = accumulation_dtype(logits.dtype)
    vocabulary = logits.shape[-1]
    out = logits.new_empty(targets.shape, dtype=dtype)
    step = max(1, _BLOCK_BYTES // (vocabulary * dtype.itemsize))
    for block, ids, result in _matrices(logits, targets, out):
        for first in range(0, block.shape[0], step):
            rows = slice(first, first + step)
            scaled = block[rows].to(dtype)
            if temperature != 1.0:
                scaled = scaled / temperature
            inside, column = _columns(ids[rows], 0, vocabulary)
            picked = torch.log_softmax(scaled, dim=-1).gather(1, column[:, None])[:, 0]
            result[rows] = picked.masked_fill_(~inside, math.nan)
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
    entropy: bool,
) -> list[Tensor]:
    """`token_logprobs(hidden @ weight.T, targets)` and, if wanted, the entropy, each [T]: tile by tile, with an online
    log-sum-exp over the vocabulary.

    Accumulates in float32. Besides the result it takes one tile of logits (CPU: 16 MiB in float32), or two with the entropy,
    and a few numbers per row of the tile. For bfloat16 and float16, except on CUDA, it also takes a tile's rows of `hidden` and
    `weight` in float32.

    The product is a BLAS's, which chooses its order of additions by the shape: a row's last digits may depend on the number of
    rows.
    """
    dtype = accumulation_dtype(hidden.dtype)
    tile_rows, tile_columns = _CPU_TILE if hidden.device.type == "cpu" else _DEVICE_TILE
    out = hidden.new_empty(targets.shape, dtype=dtype)
    entropies = torch.empty_like(out) if entropy else None
    tile = hidden.new_empty(min(tile_rows, hidden.shape[0]) * min(tile_columns, weight.shape[0]), dtype=dtype)
    second_tile = torch.empty_like(tile) if entropy else None
    for first in range(0, hidden.shape[0], tile_rows):
        rows = slice(first, first + tile_rows)
        states, ids = factor(hidden[rows]), targets[rows]
        count = ids.shape[0]
        maximum = states.new_full((count, 1), -math.inf, dtype=dtype)
        total = states.new_zeros((count, 1), dtype=dtype)  # sum of exp(logit - maximum)
        weighted = torch.zeros_like(total)  # sum of exp(logit - maximum) * (logit - maximum)
        picked = states.new_full((count, 1), math.nan, dtype=dtype)
        for column in range(0, weight.shape[0], tile_columns):
            columns = slice(column, column + tile_columns)
            width = weight[columns].shape[0]
            logits = tile[: count * width].view(count, width)
            product(states, factor(weight[columns]).t(), out=logits)
            if bias is not None:
                logits += bias[columns]
            if logit_scale != 1.0:
                logits *= logit_scale
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            if temperature != 1.0:
                logits /= temperature
            inside, local = _columns(ids, column, width)
            picked = torch.where(inside[:, None], logits.gather(1, local[:, None]), picked)
            higher = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
            # Where every logit so far is -inf (a bias that masks tokens), -inf - -inf would be NaN.
            shift = higher.masked_fill(higher == -math.inf, 0.0)
            move = maximum - shift
            decay = move.exp()
            logits.sub_(shift)
            if second_tile is None:
                mass = logits.exp_()
            else:
                mass = torch.exp(logits, out=second_tile[: count * width].view(count, width))
                # From -1000 on the mass is 0, in float64 too, and 0 times the -inf of a token that cannot be would be NaN.
                weighted = (weighted + total * move.clamp_(min=-1000.0)) * decay
                weighted += logits.clamp_(min=-1000.0).mul_(mass).sum(dim=1, keepdim=True)
            total *= decay
            total += mass.sum(dim=1, keepdim=True)
            maximum = higher
        # In this order: picked - maximum is exact where it matters, maximum + log(total) would lose digits to a common offset.
        log_total = total.log()
        out[rows] = ((picked - maximum) - log_total)[:, 0]
        if entropies is not None:
            entropies[rows] = (log_total - weighted / total)[:, 0]  # two terms that are not negative: nothing cancels
    return [out] if entropies is None else [out, entropies]


def _matrices(logits: Tensor, targets: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """[rows, V] views of logits [..., V] with their targets and results, without a copy whatever the strides."""
    if logits.ndim == 1:
        yield logits[None], targets[None], out[None]
    elif logits.ndim == 2:
        yield logits, targets, out
    else:
        for part in zip(logits, targets, out, strict=True):
            yield from _matrices(*part)


def _columns(ids: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Which ids lie in columns first ... first + width - 1, and where; those that do not are sent to column 0."""
    inside = (ids >= first) & (ids < first + width)
    return inside, (ids - first).long().masked_fill_(~inside, 0)


def factor(matrix: Tensor) -> Tensor:
    """A factor as the product takes it: upcast, except on CUDA, where half-precision factors can have a float32 product."""
    if matrix.is_cuda and torch.version.hip is None:
        return matrix
    return matrix.to(accumulation_dtype(matrix.dtype))


def product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """left @ right in `out`'s dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
