"""Redundancy in Triton: a radix select per sequence, counts in a hash table, and one sum of logarithms.

Three launches, so that what one phase wrote is visible to the next without a barrier between programs:

1. `_select_kernel` finds each sequence's k-th highest importance with four passes over 8 bits of an order-preserving integer,
   then marks the tokens above it and, of those equal to it, the first ones.
2. `_count_kernel` counts the tokens that are left in an open-addressing hash table, twice as large as the sequence.
3. `_reward_kernel` sums log(count) over the table.

Where a token lands in the table depends on which thread came first. The counts do not, and the logarithms are summed as
integers, in units of 2**-26 (see `entra_kernels/_torch/redundancy.py`): no order of additions can change the result. The
vocabulary's size is never needed; memory is 25 bytes per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from entra_kernels._torch.redundancy import LOG_UNITS as _LOG_UNITS
from entra_kernels._torch.redundancy import protected_counts
from entra_kernels._triton.launch import FUSED, Chip, KernelCase

LOG_UNITS = tl.constexpr(_LOG_UNITS)

FREE = tl.constexpr(-(2**63))
"""Key of an unused place in the hash table: the one int64 that cannot be a token id."""

BLOCK, WARPS = 4096, 16
"""Tokens that the one program of a sequence takes at a time, 8 to a thread. A batch of 64 sequences leaves half the SMs of an
H200 idle, so what counts is how often a program goes round: a sequence of 16,384 tokens in 20 rounds (4 digits, then the
marks), where 1,024 tokens at a time take 80, and a round waits for memory and for several barriers."""

COUNTED = 256
"""Tokens that a program of `_count_kernel` takes at a time: with 8 warps at most one per thread, because Triton 3.6 for ROCm
does not compile a compare-and-swap of several."""

COUNTERS = 16
"""Programs of `_count_kernel` per sequence. Any number gives the same counts."""


@triton.jit
def _sort_key(value):
    """A uint32 that sorts like the float32, with -0.0 equal to 0.0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _select_kernel(importance, starts, lengths, counts, protected_out, broken_out, BLOCK: tl.constexpr):
    """Protected tokens of one sequence; `counts` holds k. A sequence with NaN or inf protects nothing."""
    sequence = tl.program_id(0)
    first = tl.load(starts + sequence).to(tl.int64)
    length = tl.load(lengths + sequence)
    wanted = tl.load(counts + sequence)
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 256)

    # After the pass for bits shift ... shift + 7, `threshold` holds the upper bits of the k-th highest key, and `wanted` how
    # many of the keys that share them are protected.
    threshold = tl.full([], 0, tl.uint32)
    left = wanted
    broken = tl.full([], 0, tl.int32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, length, BLOCK):
            inside = start + lane < length
            value = tl.load(importance + first + start + lane, mask=inside, other=0.0)
            key = _sort_key(value)
            if step == 0:
                candidate = inside
                # inf - inf and NaN - NaN are not 0; padding lanes hold 0.
                broken += tl.sum((value - value != 0.0).to(tl.int32), axis=0)
            else:
                candidate = inside & (key >> (shift + 8) == threshold >> (shift + 8))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=candidate)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys with a higher digit
        chosen = (above < left) & (above + histogram >= left)  # one digit, or none when k is 0
        threshold |= tl.sum(tl.where(chosen, digit, 0), axis=0).to(tl.uint32) << shift
        left -= tl.sum(tl.where(chosen, above, 0), axis=0)

    select = (broken == 0) & (wanted > 0)
    ties = tl.full([], 0, tl.int32)  # seen so far
    for start in range(0, length, BLOCK):
        inside = start + lane < length
        token = first + start + lane
        key = _sort_key(tl.load(importance + token, mask=inside, other=0.0))
        tie = (inside & (key == threshold)).to(tl.int32)
        rank = ties + tl.cumsum(tie, axis=0)  # counted from 1
        ties += tl.sum(tie, axis=0)
        protected = select & ((key > threshold) | ((tie == 1) & (rank <= left)))
        tl.store(protected_out + token, protected, mask=inside)
    tl.store(broken_out + sequence, broken)


@triton.jit
def _count_kernel(token_ids, protected, starts, lengths, keys, counts, BLOCK: tl.constexpr, COUNTERS: tl.constexpr):
    """Counts the unprotected tokens of one sequence in its part of the hash table, 2 * start to 2 * (start + length)."""
    sequence = tl.program_id(0)
    first = tl.load(starts + sequence).to(tl.int64)
    length = tl.load(lengths + sequence)
    size = 2 * length.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for start in range(tl.program_id(1) * BLOCK, length, BLOCK * COUNTERS):
        inside = start + lane < length
        token = first + start + lane
        counted = inside & (tl.load(protected + token, mask=inside, other=1) == 0)
        key = tl.load(token_ids + token, mask=inside, other=0).to(tl.int64)
        # Multiply-shift: the upper half of id * 2**64 / golden ratio, scaled to the table.
        hashed = (key.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32
        place = ((hashed * size.to(tl.uint64)) >> 32).to(tl.int64)  # [BLOCK]
        searching = counted.to(tl.int32)
        probes = tl.full([], 0, tl.int64)
        while (tl.max(searching, axis=0) > 0) & (probes < size):
            # Exchanging the key for itself changes nothing: that is what the lanes with nothing to insert do.
            expected = tl.where(searching == 1, FREE, key)
            found = tl.atomic_cas(keys + 2 * first + place, expected, key)
            searching = tl.where((found == FREE) | (found == key), 0, searching)
            place = tl.where(searching == 1, place + 1, place)
            place = tl.where(place == size, 0, place)
            probes += 1
        tl.atomic_add(counts + 2 * first + place, 1, mask=counted & (searching == 0))


@triton.jit
def _reward_kernel(counts, starts, lengths, wanted, broken, reward, degenerate_reward, BLOCK: tl.constexpr):
    """r = 1 - sum(c * log c) / (M log M) over the counts c of one sequence's tokens."""
    sequence = tl.program_id(0)
    first = tl.load(starts + sequence).to(tl.int64)
    length = tl.load(lengths + sequence)
    lane = tl.arange(0, BLOCK)
    repeated = tl.zeros([BLOCK], tl.int64)
    for start in range(0, 2 * length, BLOCK):
        place = start + lane
        count = tl.load(counts + 2 * first + place, mask=place < 2 * length, other=0)
        repeated += count * _log_units(tl.maximum(count, 1))
    m = length - tl.load(wanted + sequence)
    most = tl.maximum(m, 2) * _log_units(tl.maximum(m, 2))
    value = (1.0 - tl.sum(repeated, axis=0).to(tl.float64) / most.to(tl.float64)).to(tl.float32)
    value = tl.where(m <= 1, degenerate_reward, value)
    tl.store(reward + sequence, tl.where(tl.load(broken + sequence) > 0, float("nan"), value))


@triton.jit
def _log_units(count):
    """log(count) in units of 2**-26, int64."""
    return tl.floor(tl.log(count.to(tl.float64)) * LOG_UNITS + 0.5).to(tl.int64)


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    attention_weight: float,
    protect_fraction: float,
    degenerate_reward: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """I = l + lambda * mu, the top k protected, r = H / log M over the rest."""
    tokens, sequences = logprobs.shape[0], starts.shape[0]
    # Not in the kernel: compiled, the two operations could become one with a single rounding and disagree with other backends.
    importance = logprobs.float() + attention_weight * incoming.float()
    protected = torch.zeros_like(importance, dtype=torch.bool)
    reward = importance.new_empty(sequences)
    if sequences == 0:
        return reward, importance, protected
    wanted = protected_counts(lengths, protect_fraction).int()
    broken = torch.empty_like(wanted)
    keys = torch.full((2 * tokens,), FREE.value, dtype=torch.int64, device=logprobs.device)
    counts = torch.zeros_like(keys, dtype=torch.int32)
    with torch.cuda.device_of(logprobs):
        _select_kernel[(sequences,)](
            importance, starts, lengths, wanted, protected, broken, BLOCK=BLOCK, num_warps=WARPS, **FUSED
        )
        _count_kernel[(sequences, COUNTERS)](
            token_ids.contiguous(),
            protected,
            starts,
            lengths,
            keys,
            counts,
            BLOCK=COUNTED,
            COUNTERS=COUNTERS,
            num_warps=8,
            **FUSED,
        )
        _reward_kernel[(sequences,)](
            counts, starts, lengths, wanted, broken, reward, degenerate_reward, BLOCK=BLOCK, num_warps=WARPS, **FUSED
        )
    return reward, importance, protected


def aot_cases(dtype: str, chip: Chip) -> Iterator[KernelCase]:
    """What this module launches, whatever the inputs' dtype; see `KernelCase`."""
    spans = {"starts": "*i32", "lengths": "*i32"}
    select = {"importance": "*fp32", "counts": "*i32", "protected_out": "*i1", "broken_out": "*i32"}
    count = {"token_ids": "*i64", "protected": "*i1", "keys": "*i64", "counts": "*i32"}
    reward = {"counts": "*i32", "wanted": "*i32", "broken": "*i32", "reward": "*fp32", "degenerate_reward": "fp32"}
    for label, kernel, arguments, constexprs, num_warps in (
        ("select", _select_kernel, select, {"BLOCK": BLOCK}, WARPS),
        ("count", _count_kernel, count, {"BLOCK": COUNTED, "COUNTERS": COUNTERS}, 8),
        ("reward", _reward_kernel, reward, {"BLOCK": BLOCK}, WARPS),
    ):
        yield KernelCase(
            label=label,
            kernel=kernel,
            arguments=arguments | spans,
            constexprs=constexprs,
            divisible=tuple(name for name, kind in (arguments | spans).items() if kind.startswith("*")),
            num_warps=num_warps,
        )
