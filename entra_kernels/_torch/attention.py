"""Incoming attention in blocks of query rows: softmax of a block, then one matrix product that sums its columns.

A block holds [K, G * rows, keys] scores of K kv heads (all of them where the sequence is short, else one) and of all keys up to
the diagonal. So a plain softmax is exact and a single pass is enough. It computes Q K^T once, where two passes (log-sum-exp,
then columns) would compute it twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._sampling import SampledRows
from .._spans import Spans
from ..reference import AttentionOptions

# Scores in a block, measured on 2 CPU cores of 2 MiB L2 each. 2**20 float32 scores and at most 128 rows took 1.00 to 1.10 times
# one fused SDPA call at 1k to 8k tokens. 2**18 scores took 1.16 to 1.31 times (small products), and 256 rows up to 1.37.
# Elsewhere a block only has to be large enough to hide the launches.
CPU_BLOCK = 2**20
DEVICE_BLOCK = 2**24
MIN_ROWS, MAX_ROWS = 16, 128
LOG2_E = 1 / math.log(2)


def incoming_attention(q: Tensor, k: Tensor, spans: Spans, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """See `entra_kernels.incoming_attention`; memory is [G, rows, N] scores beside the result."""
    batch, heads, rows, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dtype = accumulation_dtype(q.dtype)
    row_weights = options.row_weights
    # inf - inf is NaN
    sinks = None if options.sinks is None else options.sinks.to(dtype).clamp(max=torch.finfo(dtype).max).view(-1, group)
    out = q.new_zeros(batch, kv_heads, group if _by_query_head(options) else 1, tokens, dtype=dtype)
    row_lse = q.new_full((batch, heads, rows), -math.inf, dtype=dtype) if options.return_lse else None
    lse = options.lse if row_lse is None else row_lse
    for element, first, count, row, queries, place in spans.with_queries():
        if not queries or not count:
            continue
        span, asked = slice(first, first + count), slice(row, row + queries)
        weights = q.new_ones(queries, dtype=dtype) if row_weights is None else row_weights[element, asked].to(dtype)
        at_once = _heads_at_once(q, group, kv_heads, queries, count)
        for head in range(0, kv_heads, at_once):
            keys, heads_here = slice(head, head + at_once), slice(head * group, (head + at_once) * group)
            out[element, keys, :, span] = _reduced_columns(
                q[element, heads_here, asked].unflatten(0, (-1, group)),
                k[element, keys, span],
                place,
                weights,
                None if sinks is None else sinks[keys],
                None if lse is None else lse[element, heads_here, asked].to(dtype).unflatten(0, (-1, group)),
                options,
            )
        if options.reduction == "mean":
            out[element, :, :, span] /= _counting_queries(count, queries, place, options, q.device)
    if options.heads == "query":
        return out.view(batch, heads, tokens), row_lse
    if options.heads == "kv":
        return _added(out.transpose(1, 2)) / group, row_lse
    return _added(out.flatten(1, 2)) / heads, row_lse


def _by_query_head(options: AttentionOptions) -> bool:
    """Whether the query heads of a group are told apart: a mean over heads comes after the maximum over queries."""
    return options.heads == "query" or options.reduction == "max"


def _added(values: Tensor) -> Tensor:
    """The sum over dim 1, in its order: `sum` adds in one that depends on a token's place among the tokens."""
    total = torch.zeros_like(values[:, 0])
    for head in range(values.shape[1]):
        total += values[:, head]
    return total


def _counting_queries(count: int, queries: int, place: int, options: AttentionOptions, device: torch.device) -> Tensor:
    """[n]: how many of the queries from `place` on count for a key of the sequence, at least 1."""
    if not options.causal:
        return torch.full((count,), queries, device=device)
    key = torch.arange(count, device=device)
    first = key if options.include_diagonal else key + 1
    end = torch.full_like(key, place + queries)
    if options.sliding_window is not None:
        end = end.clamp(max=key + options.sliding_window)
    return (end - first.clamp(min=place)).clamp(min=1)


def _heads_at_once(q: Tensor, group: int, kv_heads: int, queries: int, count: int) -> int:
    """How many kv heads go into one block: more than one only where a block then still holds MAX_ROWS rows of every key.

    Of a sequence of 160 tokens with 8 heads, the calls of one kv head after the other take twice the time of all at once.
    """
    return min(kv_heads, max(1, _budget(q) // (group * min(queries, MAX_ROWS) * (count + 1))))


def _budget(q: Tensor) -> int:
    return CPU_BLOCK if q.device.type == "cpu" else DEVICE_BLOCK


def _reduced_columns(
    q: Tensor,
    k: Tensor,
    place: int,
    weights: Tensor,
    sinks: Tensor | None,
    lse: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """The queries' sum or maximum of w_j A_ji, of one sequence and K kv heads: q [K, G, Nq, D], k [K, n, D] -> [K, G, n], or
    [K, 1, n] summed over G. The first query stands at key `place`.

    sinks [K, G] and lse [K, G, Nq] are those of these heads; with `return_lse` the latter is written."""
    heads, group, queries, _ = q.shape
    count = k.shape[1]
    dtype, softcap = weights.dtype, options.softcap
    highest = options.reduction == "max"
    keys = k.to(dtype).mT  # [K, D, n]
    extra = 0 if sinks is None else 1  # a sink is one more column of the softmax, dropped afterwards
    budget = _budget(q) // heads
    out = q.new_full((heads, group if _by_query_head(options) else 1, count), -math.inf if highest else 0.0, dtype=dtype)
    window = options.sliding_window
    widest = (count if window is None else min(count, window - 1 + MAX_ROWS)) + extra
    capacity = min(max(budget, group * MIN_ROWS * widest), group * min(queries, MAX_ROWS) * widest)
    # Two buffers for the whole sequence: a fresh allocation per block costs more in page faults than the block's arithmetic.
    buffers = q.new_empty(2, heads * capacity, dtype=dtype)
    itself_or_later = torch.ones(MAX_ROWS, MAX_ROWS, dtype=torch.bool, device=q.device).triu()
    later = itself_or_later.triu(1)
    end = 0
    while end < queries:
        begin = end
        low = 0 if window is None else max(0, place + begin - window + 1)
        most = min(MAX_ROWS, queries - begin)
        seen = place + begin + most if options.causal else count
        end = begin + min(most, max(MIN_ROWS, budget // (group * (seen - low + extra))))
        high = place + end if options.causal else count
        rows, width = end - begin, high - low
        size = heads * group * rows * (width + extra)
        scores = buffers[0, :size].view(heads, group * rows, width + extra)
        visible = scores[..., :width]
        asked = q[:, :, begin:end].to(dtype).reshape(heads, group * rows, -1)
        # The factor goes to the products: multiplied into the queries it would round every one of their entries.
        torch.baddbmm(visible, asked, keys[..., low:high], beta=0, alpha=options.scale, out=visible)
        if softcap is not None:
            visible.div_(softcap).tanh_().mul_(softcap)
        diagonal = place + begin - low
        if options.causal:
            _fill_hidden(visible.view(-1, rows, width), -math.inf, diagonal, window, later)
        row_weights = weights[begin:end].expand(heads, group, rows)
        if options.lse is not None and lse is not None:
            # ATen's exp2 takes a quarter of the time of its exp on a CPU (0.16 ms against 0.61 for 255 x 4,096 float32). Log2
            # units come after the subtraction, which is exact where it matters: before it, both sides would be rounded again.
            probabilities = visible.sub_(lse[..., begin:end].reshape(heads, -1, 1)).mul_(LOG2_E).exp2_()
        else:
            if sinks is not None:
                scores[..., width] = sinks.repeat_interleave(rows, dim=1)
            if options.return_lse and lse is not None:
                lse[..., begin:end] = torch.logsumexp(scores, dim=-1).view(heads, group, rows)
            probabilities = torch.softmax(scores, dim=-1, out=buffers[1, :size].view_as(scores))[..., :width]
        if highest:
            probabilities.mul_(row_weights.reshape(heads, -1, 1))
        if options.causal:
            # All that is hidden again, because a row that is not finite is NaN there as well; and a query's own key.
            hidden = later if options.include_diagonal else itself_or_later
            _fill_hidden(probabilities.view(-1, rows, width), -math.inf if highest else 0.0, diagonal, window, hidden)
        here = out[..., low:high]
        if highest:
            torch.maximum(here, probabilities.view(heads, group, rows, width).amax(dim=2), out=here)
        elif options.heads == "query":
            by_head = probabilities.view(heads * group, rows, width)
            here += torch.matmul(row_weights.reshape(-1, 1, rows), by_head).view(heads, group, width)
        else:
            here[:, 0] += torch.bmm(row_weights.reshape(heads, 1, -1), probabilities)[:, 0]
    return out.masked_fill_(out == -math.inf, 0.0) if highest else out


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


def sampled_incoming_attention(
    q: Tensor, k: Tensor, spans: Spans, sample: SampledRows, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """See `entra_kernels.incoming_attention` with `sample_rows`; memory is a block of [G, rows, N] scores, 2 rows or more."""
    dtype = accumulation_dtype(q.dtype)
    lse, row_weights = options.lse, options.row_weights
    sinks = None if options.sinks is None else options.sinks.to(dtype).clamp(max=torch.finfo(dtype).max)
    estimate = q.new_zeros(q.shape[0], q.shape[2], dtype=dtype)
    error = torch.zeros_like(estimate)
    for sequence, (element, first, count) in enumerate(spans):
        if count == 0:
            continue
        span = slice(first, first + count)
        position = sample.rows[sequence, : min(count, sample.rows.shape[1])]
        sums, variance = _sampled_sums(
            q[element, :, span][:, position].to(dtype) * options.scale,
            k[element, :, span],
            position,
            weights=sample.weights[sequence].to(dtype),
            spread=sample.spread[sequence].to(dtype),
            factors=None if row_weights is None else row_weights[element, span][position].to(dtype),
            sinks=sinks,
            lse=None if lse is None else lse[element, :, span][:, position].to(dtype),
            options=options,
        )
        divisor = torch.full_like(sums, q.shape[1])
        if options.reduction == "mean":
            divisor *= _counting_queries(count, count, 0, options, q.device)
        estimate[element, span] = sums / divisor
        error[element, span] = variance.sqrt() / divisor
    return estimate, error


def _sampled_sums(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    *,
    weights: Tensor,
    spread: Tensor,
    factors: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Sum over heads and rows, and its variance, [n] each: q [H, m, D] scaled, k [Hkv, n, D], rows at `position` [m]."""
    kv_heads, count, _ = k.shape
    group = q.shape[0] // kv_heads
    sampled = position.shape[0]
    sliding_window, softcap = options.sliding_window, options.softcap
    sums, variance = q.new_zeros(2, count)
    step = min(max(_budget(q) // (group * count) // 2 * 2, 2), MAX_ROWS)  # whole pairs
    key = torch.arange(count, device=q.device)
    last = position.cpu().tolist()
    for begin in range(0, sampled, step):
        end = min(begin + step, sampled)
        rows, stop = slice(begin, end), last[end - 1] + 1
        low = 0 if sliding_window is None else max(0, last[begin] - sliding_window + 1)
        seen, at = key[low:stop], position[rows, None]
        hidden = seen > at
        if sliding_window is not None:
            hidden |= seen <= at - sliding_window
        received = q.new_zeros(end - begin, stop - low)
        for kv_head in range(kv_heads):
            head = slice(kv_head * group, (kv_head + 1) * group)
            scores = torch.matmul(q[head, rows], k[kv_head, low:stop].to(q.dtype).T)  # [G, rows, keys]
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.masked_fill_(hidden, -math.inf)
            if lse is None and sinks is None:
                received += torch.softmax(scores, dim=-1).sum(dim=0)
                continue
            total = scores.logsumexp(dim=-1) if lse is None else lse[head, rows]
            if sinks is not None:
                total = torch.logaddexp(total, sinks[head, None])
            received += scores.sub_(total[..., None]).exp_().sum(dim=0)
        if factors is not None:
            received *= factors[rows, None]
        # Strictly future queries, j > i. All that is hidden again, because a row that is not finite is NaN there as well.
        received.masked_fill_(hidden | (seen == at), 0.0)
        sums[low:stop] += weights[rows] @ received
        pairs = (end - begin) // 2
        difference = received[0 : 2 * pairs : 2] - received[1 : 2 * pairs : 2]
        variance[low:stop] += spread[begin // 2 : begin // 2 + pairs] @ difference.square_()
    return sums, variance
