"""What the attention kernels share: constants, tiles in memory, entries of the plan's tables, scores and their log-sum-exp.

Helpers take named tuples, which a kernel builds from its own arguments. Launch signatures stay flat: Triton compiles another
kernel for a 1 or a multiple of 16 among the integers of a tuple, whatever `do_not_specialize` says. `Factors` is the one tuple
that a launch takes: it holds no integers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..reference import AttentionOptions
from .plan import PIECE_FIELDS, TILE_FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite: two of them subtracted give 0, not NaN
HIGHEST = tl.constexpr(3.0e38)


class Shape(NamedTuple):
    """What is known of a pass when it is compiled. Annotate the variable: `shape: tl.constexpr = Shape(...)`."""

    RESIDENT: tl.constexpr
    """Tokens of the tile that stays in place."""
    STREAMED: tl.constexpr
    """Tokens of a tile that passes by."""
    HEAD_DIM: tl.constexpr
    DEPTH: tl.constexpr
    """How much of the head dim one dot takes."""
    WIDE: tl.constexpr
    """Whether offsets within a tile need 64 bits."""
    WINDOW: tl.constexpr
    FLIPPED: tl.constexpr
    """Whether the log-sum-exp takes negative products, for a scale that is negative; `Factors.scale` then is its absolute
    value."""
    MAX: tl.constexpr = False
    """Whether a key keeps the highest probability that it receives instead of their sum."""


class Tile(NamedTuple):
    """Neighbouring tokens of one head in memory."""

    first: tl.tensor
    """Address of the first token."""
    stride: tl.tensor
    stride_dim: tl.tensor
    count: tl.tensor
    """Tokens from the first one on that exist."""


class Factors(NamedTuple):
    """The numbers that make a score of a product q * k: floats, or None for an option that is not there. A launch takes it
    whole. Scores are in log2 units, because the hardware has exp2."""

    scale: tl.tensor
    softcap: tl.tensor

    @classmethod
    def of(cls, options: AttentionOptions) -> Factors:
        """For log2(e) * s, or log2(e) * softcap * tanh(s / softcap)."""
        if options.softcap is not None:
            return cls(options.scale / options.softcap, options.softcap * LOG2_E.value)
        return cls(options.scale * LOG2_E.value, None)

    @property
    def plain(self) -> bool:
        """Whether a score is a multiple of the product."""
        return all(factor is None for factor in self[1:])


class Scoring(NamedTuple):
    """How a product q * k becomes a score, and which scores count."""

    factors: Factors
    window: tl.tensor


class Entry(NamedTuple):
    """An entry of the table of tiles or of pieces (`plan.py`)."""

    address: tl.tensor
    listed: tl.tensor
    """Tile + 1, or 0 for a surplus entry."""
    sequence: tl.tensor


@triton.jit
def read_tile(tiles, index):
    """Entry `index` of the table of tiles."""
    address = tiles + TILE_FIELDS * index
    return Entry(address, tl.load(address), tl.load(address + 1))


@triton.jit
def read_piece(pieces, index):
    """Entry `index` of the table of pieces."""
    address = pieces + PIECE_FIELDS * index
    return Entry(address, tl.load(address), tl.load(address + 1))


@triton.jit
def first_slot(entry):
    """Slot of the sequence's first tile. Read where it is needed: over a scan it would take a register."""
    return tl.load(entry.address + 2)


@triton.jit
def walk(piece):
    """First and end of a piece's streamed tiles of queries."""
    return tl.load(piece.address + 3), tl.load(piece.address + 4)


@triton.jit
def read_span(spans, sequence):
    """First token of a sequence, and its number of tokens."""
    return tl.load(spans + 2 * sequence), tl.load(spans + 2 * sequence + 1)


@triton.jit
def larger(x, y):
    """The maximum, or NaN where one of them is NaN; `tl.max` would drop it."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """To float32 precision and without libdevice, which the interpreter lacks. The quotient cancels near 0: a series there."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))  # at most 1: cannot overflow
    quotient = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def tile_from(tile, token):
    """`tile` from a later token on."""
    return Tile(tile.first + tl.cast(token, tl.int64) * tile.stride, tile.stride, tile.stride_dim, tile.count - token)


@triton.jit
def load_tile(tile, cut, shape, TOKENS: tl.constexpr):
    """[TOKENS, DEPTH] from dimension `cut` on. 0 where there is no token.

    Offsets within a tile are 32 bits unless WIDE: as 64 bits they take twice the registers, which spill."""
    token = tl.arange(0, TOKENS)
    dim = cut + tl.arange(0, shape.DEPTH)
    mask = (token < tile.count)[:, None]
    if shape.HEAD_DIM % shape.DEPTH != 0:
        mask &= (dim < shape.HEAD_DIM)[None, :]
    if shape.WIDE:
        offsets = token.to(tl.int64)[:, None] * tile.stride + dim.to(tl.int64)[None, :] * tile.stride_dim
    else:
        offsets = token[:, None] * tile.stride + dim[None, :] * tile.stride_dim
    return tl.load(tile.first + offsets, mask=mask, other=0.0)


@triton.jit
def products(loaded, resident, streamed, shape):
    """Dot products [resident, streamed] of two tiles, in float32. `loaded` is the resident one; where the head dim is cut into
    pieces it is read again instead."""
    if shape.DEPTH >= shape.HEAD_DIM:
        other = load_tile(streamed, 0, shape, shape.STREAMED)
        return tl.dot(loaded, tl.trans(other), input_precision="ieee")
    total = tl.zeros((shape.RESIDENT, shape.STREAMED), dtype=tl.float32)
    for cut in range(0, shape.HEAD_DIM, shape.DEPTH):
        loaded = load_tile(resident, cut, shape, shape.RESIDENT)
        other = load_tile(streamed, cut, shape, shape.STREAMED)
        total = tl.dot(loaded, tl.trans(other), total, input_precision="ieee")
    return total


@triton.jit
def probabilities(product, shift, factors):
    """exp2(score + shift), where `shift` is the negative log-sum-exp of the query."""
    if factors.softcap is not None:
        return tl.exp2(tl.fma(tanh(product * factors.scale), factors.softcap, shift))
    return tl.exp2(tl.fma(product, factors.scale, shift))


@triton.jit
def scan_keys(highest, total, loaded, queries, keys, query, begin, end, scoring, shape, MASKED: tl.constexpr):
    """Online log-sum-exp over the keys begin ... end - 1: the highest score so far, in log2 units, and the sum of
    exp2(score - highest)."""
    factors = scoring.factors
    for at in range(begin, end, shape.STREAMED):
        scores = products(loaded, queries, tile_from(keys, at), shape)  # [query, key]
        if shape.FLIPPED:
            scores = -scores
        if factors.softcap is not None:
            scores = tanh(scores * factors.scale) * factors.softcap
        elif MASKED:
            scores = scores * factors.scale  # now, so that the -inf of the mask never meets a scale of 0
        if MASKED:
            key = at + tl.arange(0, shape.STREAMED)
            visible = key[None, :] <= query[:, None]
            if shape.WINDOW:
                visible &= query[:, None] - key[None, :] < scoring.window
            scores = tl.where(visible, scores, float("-inf"))
        if factors.softcap is not None or MASKED:
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            summands = tl.exp2(scores - higher[:, None])
        else:
            # The maximum of the bare products spares a multiplication per score; scale is not negative, see FLIPPED.
            higher = tl.maximum(highest, tl.max(scores, axis=1) * factors.scale)
            summands = tl.exp2(tl.fma(scores, factors.scale, -higher[:, None]))
        total = total * tl.exp2(highest - higher) + tl.sum(summands, axis=1)
        highest = higher
    return highest, total


@triton.jit
def negative_log_sum(highest, total, sinks, sinks_stride, head, inside):
    """-log2 of the softmax denominator, with the sink in it; -inf outside, where the probability then is 0."""
    if sinks is not None:
        sink = tl.load(sinks + head * sinks_stride).to(tl.float32) * LOG2_E
        sink = tl.where(sink > HIGHEST, HIGHEST, sink)  # not a minimum, which would drop NaN
        higher = tl.maximum(highest, sink)
        total = total * tl.exp2(highest - higher) + tl.exp2(sink - higher)
        highest = higher
    return tl.where(inside, -(highest + tl.log2(tl.where(inside, total, 1.0))), float("-inf"))
