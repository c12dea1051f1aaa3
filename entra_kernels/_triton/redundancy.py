"""Redundancy in Triton: a radix select per sequence, counts in a hash table, and one sum of logarithms.

There are four launches, so that what one phase wrote is visible to the next without a barrier between programs. There is
nothing else: at 64 sequences of 16,384 tokens, further launches of small operations took three times as long as all kernels
together.

1. `_importance_kernel` computes I and clears marks and the hash table.
2. `_select_kernel` finds each sequence's k-th highest importance with four passes over 8 bits of an order-preserving integer.
   Then it marks the tokens above it and, of those equal to it, the first ones. With `protect_last` one pass before these
   counts the other tokens: it decides whether the k-th is one of them.
3. `_count_kernel` counts the tokens that are left in an open-addressing hash table, twice as large as the sequence.
4. `_reward_kernel` sums log(count) over the table.

Where a token lands in the table depends on which thread came first. The counts do not, and the logarithms are summed as
integers, in units of 2**-26 (see `entra_kernels/_torch/redundancy.py`): no order of additions can change the result. The
vocabulary's size is never needed; memory is 25 bytes per token.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch.redundancy import LOG_UNITS as _LOG_UNITS
from ..reference import RedundancyOptions
from .launch import FUSED

LOG_UNITS = tl.constexpr(_LOG_UNITS)

FREE = tl.constexpr(-(2**63))
"""Key of an unused place in the hash table: the one int64 that cannot be a token id."""

BLOCK, WARPS = 4096, 16
"""Tokens that the one program of a sequence takes at a time, 8 to a thread. A batch of 64 sequences leaves half the SMs of an
H200 idle, so what counts is how often a program goes round. A sequence of 16,384 tokens takes 20 rounds (4 digits, then the
marks; 24 with `protect_last`); 1,024 tokens at a time would take 80. A round waits for memory and for several barriers."""

CLEARED = 1024
"""Tokens per program of `_importance_kernel`."""

COUNTED = 256
"""Tokens that a program of `_count_kernel` takes at a time: with 8 warps at most one per thread, because Triton 3.6 for ROCm
does not compile a compare-and-swap of several."""

COUNTERS = 16
"""Programs of `_count_kernel` per sequence. Any number gives the same counts."""


@triton.jit
def bounds(cu_seqlens, sequence, tokens):
    """First token, int64, and number of tokens of a sequence, cut to `tokens`."""
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), tokens)
    end = tl.minimum(tl.maximum(end, 0), tokens)
    return first, tl.maximum(end - first, 0).to(tl.int32)


@triton.jit
def _protected_count(length, fraction_bits):
    """k = floor(tau * n + 1e-9) in float64; tau comes as the bits of one, because a launch passes floats as float32."""
    fraction = fraction_bits.to(tl.int64).to(tl.float64, bitcast=True)
    return tl.floor(fraction * length.to(tl.float64) + 1e-9).to(tl.int32)


@triton.jit(do_not_specialize=["tokens"])
def _importance_kernel(
    logprobs, incoming, importance_out, protected_out, keys_out, counts_out, tokens, stride_logprobs, stride_incoming,
    attention_weight, BLOCK: tl.constexpr,
):  # fmt: skip
    """I = l + lambda * mu, rounded twice as other backends do (without fusion); nobody protected; an empty hash table."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    token = begin + tl.arange(0, BLOCK)
    inside = token < tokens
    logprob = tl.load(logprobs + token * stride_logprobs, mask=inside, other=0.0).to(tl.float32)
    mu = tl.load(incoming + token * stride_incoming, mask=inside, other=0.0).to(tl.float32)
    tl.store(importance_out + token, logprob + attention_weight * mu, mask=inside)
    tl.store(protected_out + token, tl.zeros([BLOCK], tl.int1), mask=inside)
    place = 2 * begin + tl.arange(0, 2 * BLOCK)
    tl.store(keys_out + place, tl.full([2 * BLOCK], FREE, tl.int64), mask=place < 2 * tokens)
    tl.store(counts_out + place, tl.zeros([2 * BLOCK], tl.int32), mask=place < 2 * tokens)


@triton.jit
def _sort_key(value):
    """A uint32 that sorts like the float32, with -0.0 equal to 0.0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _candidates(protect_last, token, inside, among):
    """The tokens that are inside, of which `protect_last`, where there is one, is `among`."""
    if protect_last is not None:
        inside &= tl.load(protect_last + token, mask=inside, other=0).to(tl.int32) == among
    return inside


@triton.jit(do_not_specialize=["tokens", "fraction_bits"])
def _select_kernel(
    importance, protect_last, cu_seqlens, protected_out, broken_out, tokens, fraction_bits, BLOCK: tl.constexpr
):  # fmt: skip
    """Protected tokens of one sequence. A sequence with NaN or inf protects nothing.

    Importance decides among the tokens that are not in `protect_last`. Where there are fewer of them than are to be protected,
    all of them are protected, and importance decides among those in `protect_last`.
    """
    sequence = tl.program_id(0)
    first, length = bounds(cu_seqlens, sequence, tokens)
    wanted = _protected_count(length, fraction_bits)
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 256)

    left = wanted
    among = tl.full([], 0, tl.int32)  # importance decides among the tokens whose `protect_last` is this
    if protect_last is not None:
        others = tl.full([], 0, tl.int32)
        for begin in range(0, length, BLOCK):
            other = _candidates(protect_last, first + begin + lane, begin + lane < length, among)
            others += tl.sum(other.to(tl.int32), axis=0)
        among = (wanted > others).to(tl.int32)
        left -= others * among

    # After the pass for bits shift ... shift + 7, `threshold` holds the upper bits of the k-th highest key, and `wanted` how
    # many of the keys that share them are protected.
    threshold = tl.full([], 0, tl.uint32)
    broken = tl.full([], 0, tl.int32)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for begin in range(0, length, BLOCK):
            inside = begin + lane < length
            value = tl.load(importance + first + begin + lane, mask=inside, other=0.0)
            key = _sort_key(value)
            candidate = _candidates(protect_last, first + begin + lane, inside, among)
            if step == 0:
                # inf - inf and NaN - NaN are not 0; padding lanes hold 0.
                broken += tl.sum((value - value != 0.0).to(tl.int32), axis=0)
            else:
                candidate &= key >> (shift + 8) == threshold >> (shift + 8)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=candidate)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys with a higher digit
        chosen = (above < left) & (above + histogram >= left)  # one digit, or none when k is 0
        threshold |= tl.sum(tl.where(chosen, digit, 0), axis=0).to(tl.uint32) << shift
        left -= tl.sum(tl.where(chosen, above, 0), axis=0)

    select = (broken == 0) & (wanted > 0)
    ties = tl.full([], 0, tl.int32)  # seen so far
    for begin in range(0, length, BLOCK):
        inside = begin + lane < length
        token = first + begin + lane
        key = _sort_key(tl.load(importance + token, mask=inside, other=0.0))
        candidate = _candidates(protect_last, token, inside, among)
        tie = (candidate & (key == threshold)).to(tl.int32)
        rank = ties + tl.cumsum(tie, axis=0)  # counted from 1
        ties += tl.sum(tie, axis=0)
        over = key > threshold
        if protect_last is not None:
            over = tl.where(candidate, over, among == 1)
        protected = select & (over | ((tie == 1) & (rank <= left)))
        tl.store(protected_out + token, protected, mask=inside)
    tl.store(broken_out + sequence, broken)


@triton.jit(do_not_specialize=["tokens"])
def _count_kernel(token_ids, stride, protected, cu_seqlens, keys, counts, tokens, BLOCK: tl.constexpr, COUNTERS: tl.constexpr):
    """Counts the unprotected tokens of one sequence in its part of the hash table, 2 * first to 2 * (first + length)."""
    sequence = tl.program_id(0)
    first, length = bounds(cu_seqlens, sequence, tokens)
    size = 2 * length.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for begin in range(tl.program_id(1) * BLOCK, length, BLOCK * COUNTERS):
        inside = begin + lane < length
        token = first + begin + lane
        counted = inside & (tl.load(protected + token, mask=inside, other=1) == 0)
        key = tl.load(token_ids + token * stride, mask=inside, other=0).to(tl.int64)
        # Multiply-shift: the upper half of id * 2**64 / golden ratio, scaled to the table.
        hashed = (key.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32
        place = ((hashed * size.to(tl.uint64)) >> 32).to(tl.int64)  # [BLOCK]
        searching = counted.to(tl.int32)
        probes = tl.full([], 0, tl.int64)
        while (tl.max(searching, axis=0) > 0) & (probes < size):
            # Exchanging the key for itself changes nothing: that is what the lanes with nothing to insert do.
            expected = tl.where(searching == 1, FREE, key)
            found = tl.atomic_cas(keys + 2 * first + place, expected, key, sem="relaxed")
            searching = tl.where((found == FREE) | (found == key), 0, searching)
            place = tl.where(searching == 1, place + 1, place)
            place = tl.where(place == size, 0, place)
            probes += 1
        tl.atomic_add(counts + 2 * first + place, 1, mask=counted & (searching == 0), sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "fraction_bits"])
def _reward_kernel(counts, cu_seqlens, broken, reward, tokens, fraction_bits, degenerate_reward, BLOCK: tl.constexpr):
    """r = 1 - sum(c * log c) / (M log M) over the counts c of one sequence's tokens."""
    sequence = tl.program_id(0)
    first, length = bounds(cu_seqlens, sequence, tokens)
    lane = tl.arange(0, BLOCK)
    repeated = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, 2 * length, BLOCK):
        place = begin + lane
        count = tl.load(counts + 2 * first + place, mask=place < 2 * length, other=0)
        repeated += count * _log_units(tl.maximum(count, 1))
    m = length - _protected_count(length, fraction_bits)
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
    cu_seqlens: Tensor,
    protect_last: Tensor | None,
    options: RedundancyOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """I = l + lambda * mu, the top k protected, r = H / log M over the rest."""
    tokens, sequences = logprobs.shape[0], cu_seqlens.shape[0] - 1
    device = logprobs.device
    importance = torch.empty(tokens, dtype=torch.float32, device=device)
    protected = torch.empty(tokens, dtype=torch.bool, device=device)
    reward = torch.empty(sequences, dtype=torch.float32, device=device)
    broken = torch.empty(sequences, dtype=torch.int32, device=device)
    keys = torch.empty(2 * tokens, dtype=torch.int64, device=device)
    counts = torch.empty(2 * tokens, dtype=torch.int32, device=device)
    cu_seqlens = cu_seqlens.contiguous()
    protect_last = None if protect_last is None else protect_last.contiguous()
    (fraction_bits,) = struct.unpack("<q", struct.pack("<d", options.protect_fraction))
    # Without fusion: the two operations of I, and of k, are rounded separately, as other backends do.
    unfused = {"enable_fp_fusion": False}
    with torch.cuda.device_of(logprobs):
        if tokens:
            _importance_kernel[(triton.cdiv(tokens, CLEARED),)](
                logprobs, incoming, importance, protected, keys, counts, tokens, logprobs.stride(0), incoming.stride(0),
                options.attention_weight, BLOCK=CLEARED, **unfused,
            )  # fmt: skip
        if sequences:
            _select_kernel[(sequences,)](
                importance, protect_last, cu_seqlens, protected, broken, tokens, fraction_bits,
                BLOCK=BLOCK, num_warps=WARPS, **unfused,
            )  # fmt: skip
            _count_kernel[(sequences, COUNTERS)](
                token_ids, token_ids.stride(0), protected, cu_seqlens, keys, counts, tokens,
                BLOCK=COUNTED, COUNTERS=COUNTERS, num_warps=8, **FUSED,
            )  # fmt: skip
            _reward_kernel[(sequences,)](
                counts, cu_seqlens, broken, reward, tokens, fraction_bits, options.degenerate_reward,
                BLOCK=BLOCK, num_warps=WARPS, **unfused,
            )  # fmt: skip
    return reward, importance, protected
