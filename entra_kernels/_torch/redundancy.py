"""Redundancy of every sequence at once: sorts for who is protected and how often a token occurs, and no host sync.

Counts and logarithms are float64 on the inputs' device, which CPU and CUDA have and MPS does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._spans import packed_bounds
from ..reference import RedundancyOptions

# Logarithms of counts are summed as integers in units of 2**-26, so the sum is exact. Neither the order of the additions
# (atomics on a GPU) nor the rest of the batch can change it. M * log(M) * 2**26 stays below 2**62 for every M < 2**31. An error
# of 2**-27 in each of the two logarithms moves the reward by at most 2**-26 / log 3 = 1.4e-8, less than a float32 near 1 can
# show. (M = 2 gives exactly 0 or 1.)
LOG_UNITS = float(1 << 26)


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    protect_last: Tensor | None,
    options: RedundancyOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """I = l + lambda * mu, the top k protected, r = H / log M over the rest.

    H = log M - sum(log c) / M with c the count of each remaining position's token, so r = 1 - sum(log c) / (M log M).
    Needs a cu_seqlens that does not descend.
    """
    dtype = accumulation_dtype(torch.promote_types(logprobs.dtype, incoming.dtype))
    importance = logprobs.to(dtype) + options.attention_weight * incoming.to(dtype)
    starts, lengths = packed_bounds(cu_seqlens, importance.shape[0])
    sequences = starts.shape[0]
    position = torch.arange(importance.shape[0], device=importance.device)
    owner = owner_of(position, starts, lengths)

    # One group more than there are sequences: the tokens outside all spans, which are never protected.
    broken = importance.new_zeros(sequences + 1, dtype=torch.int64)
    broken = broken.index_add_(0, owner, (~importance.isfinite()).long())[:-1] > 0
    k = protected_counts(lengths, options.protect_fraction).masked_fill_(broken, 0)

    order = importance.sort(descending=True, stable=True).indices
    if protect_last is not None:
        order = grouped(order, protect_last.int())
    order = grouped(order, owner)
    before = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))
    group = owner[order]
    rank = position - before[group]
    protected = torch.empty_like(importance, dtype=torch.bool)
    protected[order] = rank < torch.nn.functional.pad(k, (0, 1))[group]

    group = owner.masked_fill(protected, sequences)
    repeated = token_ids.new_zeros(sequences + 1, dtype=torch.int64)
    repeated = repeated.index_add_(0, group, log_units(_counts(token_ids, group)))[:-1]
    m = lengths - k
    at_least_2 = m.clamp(min=2)
    reward = 1.0 - repeated.double() / (at_least_2 * log_units(at_least_2)).double()
    reward = reward.masked_fill(m <= 1, options.degenerate_reward).masked_fill(broken, math.nan)
    return reward.to(dtype), importance, protected


def protected_counts(lengths: Tensor, protect_fraction: float) -> Tensor:
    """k = floor(tau * n + 1e-9) of each sequence, int64, computed in float64 where the lengths are."""
    return (protect_fraction * lengths.double() + 1e-9).floor().long()


def log_units(count: Tensor) -> Tensor:
    """log(count) in units of 2**-26, int64."""
    return (count.double().log() * LOG_UNITS).round().long()


def owner_of(position: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """[T] int64: the sequence that each position belongs to; S, one past the last, where it is none."""
    if starts.shape[0] == 0:
        return torch.zeros_like(position)
    starts = starts.long()
    owner = torch.searchsorted(starts + lengths, position, right=True)
    return torch.where(position >= torch.nn.functional.pad(starts, (0, 1))[owner], owner, starts.shape[0])


def grouped(order: Tensor, group: Tensor) -> Tensor:
    """The permutation `order`, brought to ascending groups without changing the order inside a group."""
    return order[group[order].sort(stable=True).indices]


def _counts(token_ids: Tensor, group: Tensor) -> Tensor:
    """[T] int64: how often each position's token occurs in its group."""
    order = grouped(token_ids.sort(stable=True).indices, group)
    token, group = token_ids[order], group[order]
    first = torch.ones_like(token, dtype=torch.bool)
    first[1:] = (token[1:] != token[:-1]) | (group[1:] != group[:-1])
    run = first.cumsum(0) - 1
    size = torch.zeros_like(run).index_add_(0, run, torch.ones_like(run))
    return torch.empty_like(run).index_copy_(0, order, size[run])
