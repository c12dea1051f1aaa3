"""Incoming attention in blocks of query rows: softmax of a block, then one matrix product that sums its columns.

A block holds [G, rows, keys] scores of one kv head, all keys up to the diagonal, so a plain softmax is exact and a single
pass is enough: Q K^T is computed once, where two passes (log-sum-exp, then columns) would compute it twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entra_kernels._checks import accumulation_dtype
from entra_kernels._spans import Spans

# Scores in a block. On 2 CPU cores of 2 MiB L2 each, 2**20 float32 scores and at most 128 rows took 1.00 to 1.10 times one
# fused SDPA call at 1k to 8k tokens; 2**18 took 1.16 to 1.31 times (small products), 256 rows up to 1.37. Elsewhere a block
# only has to be large enough to hide the launches.
CPU_BLOCK = 2**20
DEVICE_BLOCK = 2**24
MIN_ROWS, MAX_ROWS = 16, 128


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
    """See `entra_kernels.incoming_attention`; memory is [G, rows, N] scores beside the [B, N] (or [B, H, N]) result."""
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    dtype = accumulation_dtype(q.dtype)
    out = q.new_zeros(batch, kv_heads, group if per_head else 1, tokens, dtype=dtype)
    for row, first, count in spans:
        if count == 0:
            continue
        span = slice(first, first + count)
        weights = q.new_ones(count, dtype=dtype) if row_weights is None else row_weights[row, span].to(dtype)
        for kv_head in range(kv_heads):
            head = slice(kv_head * group, (kv_head + 1) * group)
            out[row, kv_head, :, span] = _column_sums(
                q[row, head, span],
                k[row, kv_head, span],
                weights,
                dtype=dtype,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=None if sinks is None else sinks[head].to(dtype).clamp(max=torch.finfo(dtype).max),  # inf - inf is NaN
                lse=None if lse is None else lse[row, head, span].to(dtype),
                per_head=per_head,
            )
        if normalize:
            future = torch.arange(count - 1, -1, -1, device=q.device).clamp(min=1)
            if sliding_window is not None:
                future = future.clamp(max=max(sliding_window - 1, 1))
            out[row, :, :, span] /= future
    if per_head:
        return out.view(batch, heads, tokens)
    # Head by head: `sum` adds in an order that depends on a token's place in the row.
    total = torch.zeros_like(out[:, 0, 0])
    for kv_head in range(kv_heads):
        total += out[:, kv_head, 0]
    return total / heads


def _column_sums(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    dtype: torch.dtype,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    per_head: bool,
) -> Tensor:
    """sum_{j>i} w_j A_ji of one sequence and kv head: q [G, n, D], k [n, D] -> [G, n] per head, [1, n] summed over G."""
    group, count, _ = q.shape
    keys = k.to(dtype).T  # [D, n]
    extra = 0 if sinks is None else 1  # a sink is one more column of the softmax, dropped afterwards
    budget = CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK
    sums = q.new_zeros(group if per_head else 1, count, dtype=dtype)
    widest = (count if sliding_window is None else min(count, sliding_window - 1 + MAX_ROWS)) + extra
    capacity = min(max(budget, group * MIN_ROWS * widest), group * min(count, MAX_ROWS) * widest)
    # Two buffers for the whole sequence: a fresh allocation per block costs more in page faults than the block's arithmetic.
    buffers = q.new_empty(2, capacity, dtype=dtype)
    itself_or_later = torch.ones(MAX_ROWS, MAX_ROWS, dtype=torch.bool, device=q.device).triu()
    later = itself_or_later.triu(1)
    end = 0
    while end < count:
        begin = end
        low = 0 if sliding_window is None else max(0, begin - sliding_window + 1)
        most = min(MAX_ROWS, count - begin)
        end = begin + min(most, max(MIN_ROWS, budget // (group * (begin + most - low + extra))))
        rows, width = end - begin, end - low
        size = group * rows * (width + extra)
        scores = buffers[0, :size].view(group * rows, width + extra)
        visible = scores[:, :width]
        torch.mm((q[:, begin:end].to(dtype) * scale).reshape(group * rows, -1), keys[:, low:end], out=visible)
        if softcap is not None:
            visible.div_(softcap).tanh_().mul_(softcap)
        _fill_hidden(visible.view(group, rows, width), -math.inf, begin - low, sliding_window, later)
        if lse is not None:
            probabilities = visible.sub_(lse[:, begin:end].reshape(-1, 1)).exp_()
        else:
            if sinks is not None:
                scores[:, width] = sinks.repeat_interleave(rows)
            probabilities = torch.softmax(scores, dim=-1, out=buffers[1, :size].view_as(scores))[:, :width]
        by_head = probabilities.view(group, rows, width)
        # Strictly future queries, j > i. All that is hidden again, because a row that is not finite is NaN there as well.
        _fill_hidden(by_head, 0.0, begin - low, sliding_window, itself_or_later)
        w = weights[begin:end]
        if per_head:
            sums[:, low:end] += torch.matmul(w, by_head)
        else:
            sums[0, low:end] += torch.mv(probabilities.T, w.repeat(group))
    return sums


def _fill_hidden(scores: Tensor, value: float, diagonal: int, sliding_window: int | None, ahead: Tensor) -> None:
    """Sets to `value` what `ahead` [MAX_ROWS, MAX_ROWS] says of the query's own and later keys, and what the window hides.

    scores [G, rows, width]; row r and column r + diagonal are the same token, the last column is the last row's token. All
    that is hidden lies in two squares: the one that ends at the diagonal, and the one at the window's far edge.
    """
    rows = scores.shape[1]
    scores[..., diagonal:].masked_fill_(ahead[:rows, :rows], value)
    if sliding_window is not None:
        square = torch.ones(rows, rows, dtype=torch.bool, device=scores.device)
        scores[..., :rows].masked_fill_(square.tril(diagonal - sliding_window), value)
