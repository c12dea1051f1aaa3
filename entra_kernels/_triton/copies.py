"""Copies and first places in Triton: the first place of every n-gram, in a hash table of positions.

There are three launches, so that what one phase wrote is visible to the next without a barrier between programs.

1. `_clear_kernel` empties the hash table; nobody is a copy, or has a place.
2. `_first_kernel` puts the position of each n-gram's last token into an open-addressing hash table, twice as large as the
   sequence. A place belongs to one n-gram, and it ends up with that n-gram's lowest position.
3. `_place_kernel` reads the position at the place of each token's n-gram. It is the first place. A token behind it is a copy.

The table holds no hashes. Who finds a place taken compares the n ids that end at its position with its own. So two n-grams with
one hash get two places, and a collision costs a step and nothing else. Where an n-gram lands depends on which thread came
first; the lowest position of its n-gram does not, so the result is the same every time. Memory is 17 bytes per token, and 24
for first places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED
from .redundancy import CLEARED, COUNTED, COUNTERS, bounds

FREE = tl.constexpr(2**31 - 1)
"""An unused place in the hash table: above every position, as a sequence has fewer than 2**31 tokens."""

MULTIPLIER = 0x9E3779B97F4A7C15
"""Of the polynomial hash modulo 2**64: 2**64 over the golden ratio. Any number gives the same copies."""


@triton.jit(do_not_specialize=["tokens"])
def _clear_kernel(results_out, firsts_out, tokens, BLOCK: tl.constexpr, NOTHING: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    token = begin + tl.arange(0, BLOCK)
    tl.store(results_out + token, tl.full([BLOCK], NOTHING, results_out.dtype.element_ty), mask=token < tokens)
    place = 2 * begin + tl.arange(0, 2 * BLOCK)
    tl.store(firsts_out + place, tl.full([2 * BLOCK], FREE, tl.int32), mask=place < 2 * tokens)


@triton.jit
def _hashes(last, stride, ngram, inside, BLOCK: tl.constexpr, MULTIPLIER: tl.constexpr):
    """uint32 [BLOCK], as uint64: of the n-grams whose last ids are at the addresses `last`."""
    hashed = tl.zeros([BLOCK], tl.uint64)
    for _ in range(ngram):
        hashed = (hashed + tl.load(last, mask=inside, other=0).to(tl.uint64)) * MULTIPLIER
        last -= stride
    return hashed >> 32


@triton.jit
def _same_ngrams(last, other, stride, ngram, compared):
    """int32 [BLOCK], 1 where a lane is `compared` and the n-grams that end at both addresses have the same ids."""
    same = compared.to(tl.int32)
    for _ in range(ngram):
        ours, theirs = tl.load(last, mask=compared, other=0), tl.load(other, mask=compared, other=0)
        same = tl.where(ours == theirs, same, 0)
        last -= stride
        other -= stride
    return same


@triton.jit(do_not_specialize=["tokens", "ngram"])
def _first_kernel(
    token_ids, stride, cu_seqlens, firsts, places_out, tokens, ngram, BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
    MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """The lowest position of each n-gram of one sequence, in its part of the table, 2 * first to 2 * (first + length)."""
    sequence = tl.program_id(0)
    first, length = bounds(cu_seqlens, sequence, tokens)
    size = 2 * length.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    table = firsts + 2 * first
    for begin in range(ngram - 1 + tl.program_id(1) * BLOCK, length, BLOCK * COUNTERS):
        position = begin + lane  # [BLOCK], of each n-gram's last token, counted within the sequence
        inside = position < length
        last = token_ids + (first + position) * stride
        hashed = _hashes(last, stride, ngram, inside, BLOCK, MULTIPLIER)
        place = ((hashed * size.to(tl.uint64)) >> 32).to(tl.int64)  # [BLOCK]
        searching = inside.to(tl.int32)
        probes = tl.full([], 0, tl.int64)
        while (tl.max(searching, axis=0) > 0) & (probes < size):
            # Exchanging a position for itself changes nothing: that is what the lanes with nothing to insert do.
            expected = tl.where(searching == 1, FREE, position)
            found = tl.atomic_cas(table + place, expected, position, sem="relaxed")
            taken = (searching == 1) & (found != FREE)
            other = token_ids + (first + tl.where(taken, found, 0)) * stride
            same = _same_ngrams(last, other, stride, ngram, taken)
            tl.atomic_min(table + place, position, mask=same == 1, sem="relaxed")
            searching = tl.where(taken & (same == 0), 1, 0)
            place = tl.where(searching == 1, place + 1, place)
            place = tl.where(place == size, 0, place)
            probes += 1
        tl.store(places_out + first + position, place, mask=inside)


@triton.jit(do_not_specialize=["tokens", "ngram"])
def _place_kernel(
    cu_seqlens, firsts, places, results_out, tokens, ngram,
    BLOCK: tl.constexpr, COUNTERS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    """The lowest position of a token's n-gram; its own for the first n - 1 tokens, which end none. COPIED: is it lower?"""
    sequence = tl.program_id(0)
    first, length = bounds(cu_seqlens, sequence, tokens)
    lane = tl.arange(0, BLOCK)
    for begin in range(tl.program_id(1) * BLOCK, length, BLOCK * COUNTERS):
        position = begin + lane
        ended = (position < length) & (position >= ngram - 1)
        place = tl.load(places + first + position, mask=ended, other=0)
        lowest = tl.load(firsts + 2 * first + place, mask=ended, other=0)
        lowest = tl.where(ended, lowest, position)
        tl.store(results_out + first + position, lowest < position if COPIED else lowest, mask=position < length)


def copies(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Whether each token ends an n-gram that its sequence had before."""
    return _launch(token_ids, cu_seqlens, ngram, torch.bool)


def first_places(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Where the n-gram that ends at each token ended first in its sequence."""
    return _launch(token_ids, cu_seqlens, ngram, torch.int64)


def _launch(token_ids: Tensor, cu_seqlens: Tensor, ngram: int, dtype: torch.dtype) -> Tensor:
    """The three launches: copies for bool, first places for int64."""
    tokens, sequences = token_ids.shape[0], cu_seqlens.shape[0] - 1
    device = token_ids.device
    copied = dtype == torch.bool
    nothing = 0 if copied else -1  # of tokens in no sequence
    results = torch.empty(tokens, dtype=dtype, device=device)
    firsts = torch.empty(2 * tokens, dtype=torch.int32, device=device)
    places = torch.empty(tokens, dtype=torch.int64, device=device)
    cu_seqlens = cu_seqlens.contiguous()
    with torch.cuda.device_of(token_ids):
        if tokens:
            _clear_kernel[(triton.cdiv(tokens, CLEARED),)](results, firsts, tokens, BLOCK=CLEARED, NOTHING=nothing, **FUSED)
        if tokens and sequences:
            _first_kernel[(sequences, COUNTERS)](
                token_ids, token_ids.stride(0), cu_seqlens, firsts, places, tokens, ngram,
                BLOCK=COUNTED, COUNTERS=COUNTERS, MULTIPLIER=MULTIPLIER, num_warps=8, **FUSED,
            )  # fmt: skip
            _place_kernel[(sequences, COUNTERS)](
                cu_seqlens, firsts, places, results, tokens, ngram,
                BLOCK=COUNTED, COUNTERS=COUNTERS, COPIED=copied, num_warps=8, **FUSED,
            )  # fmt: skip
    return results
