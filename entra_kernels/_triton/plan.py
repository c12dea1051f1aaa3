"""Who works on what: sequences cut into tiles, tiles into pieces, longest first, without waiting for the device.

A *tile* is `resident` tokens of one sequence, counted from the sequence's own start. In the column pass a tile of keys walks
over the queries from its first token to the end of the sequence. A walk is cut into *pieces* of about equal length. Each piece
is one program, so that one short sequence fills the chip as well. How long a piece is depends on the sequence's
length (and on the model's heads), never on what else is in the batch. So results stay the same bit for bit.

Lengths live on the device, so all of this runs there, in two launches. `_count_tiles_kernel` counts tiles and pieces by the
length of their walk. `_place_tiles_kernel` puts each in its place. A sequence of t tiles has exactly one walk of each length
1 ... t: that makes the order a counting sort.

Where the queries are not simply the keys' own tokens, a sequence has tiles of queries besides, counted from its first query.
Walks then have any length, and `_place_queries_kernel` needs no order: sequence after sequence, longest walk first in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._spans import Spans
from .launch import FUSED, AttentionLaunch

PROGRAMS = 528
"""Pieces times kv heads that a sequence is cut into, where it is long enough. They make two rounds of two programs for each of
the 132 SMs of an H100 or H200, and two programs run side by side there (see `launch.py`). With one round, a few programs more
than fit would double the time: 4,096 tokens with 8 kv heads made 272 programs for 264 places."""

SEQUENCES = 128
"""Sequences that a program of the planning kernels looks at together."""

TILE_FIELDS = tl.constexpr(3)
PIECE_FIELDS = tl.constexpr(5)


class Plan(NamedTuple):
    """The tables, all int32, and their sizes, which are bounds that shapes alone give. Surplus entries are zeros."""

    spans: Tensor
    """[S, 2]: first token within the row, and number of tokens; 0 tokens where the span is empty or cannot be."""
    tiles: Tensor
    """[slots, 3], longest walk first: tile + 1, sequence, and slot of the sequence's first tile."""
    pieces: Tensor
    """[entries, 5], longest walk first: tile + 1, sequence, slot of the sequence's first tile, and first and end of the
    streamed tiles of queries, counted from the sequence's start."""
    of_slot: Tensor
    """[slots, 2]: where the pieces of the tile in this slot are, first entry and count. Slots are in order of the tokens."""
    slots: int
    entries: int
    query_spans: Tensor
    """[S, 2]: first row of q that counts, and number of rows. It is `spans` where the queries are the keys' own tokens."""
    query_tiles: Tensor
    """[query_slots, 3]: as `tiles`, of queries; it is `tiles` there. `pieces` have the slot of the first of these."""
    query_slots: int
    places: Tensor | None = None
    """[S]: the last key that the first row sees, counted from the sequence's first one. None: 0."""
    counted: Tensor | None = None
    """[S]: the first key that this row does not count for."""


@triton.jit
def _spans(starts, ends, sequence, exists, row_tokens):
    """First token and number of tokens of sequences, cut to the row."""
    first = tl.zeros_like(sequence)
    if starts is not None:
        first = tl.load(starts + sequence, mask=exists, other=0)
        first = tl.minimum(tl.maximum(first, 0), row_tokens).to(tl.int32)
    end = tl.zeros_like(sequence) + row_tokens
    if ends is not None:
        end = tl.load(ends + sequence, mask=exists, other=0)
        end = tl.minimum(tl.maximum(end, 0), row_tokens).to(tl.int32)
    tokens = tl.maximum(end - first, 0)
    return first, tl.where(exists, tokens, 0)


@triton.jit
def _pieces(walk, tiles, longest_walk, kv_heads, least, UNITS: tl.constexpr, PROGRAMS: tl.constexpr):
    """How many pieces a walk of `walk` tiles has in a sequence of `tiles` tiles, and their length in streamed tiles."""
    # With a window, walks longer than it are cut short; without one `longest_walk` is larger than any.
    full = tl.minimum(tiles, longest_walk).to(tl.int64)
    units = UNITS * (full * (full + 1) // 2 + (tiles - full) * longest_walk)
    piece = tl.maximum(tl.cdiv(kv_heads * units, PROGRAMS), least)
    length = (tl.minimum(walk, longest_walk) * UNITS).to(tl.int64)
    count = tl.maximum(tl.cdiv(length, piece), 1)
    return count.to(tl.int32), tl.cdiv(length, count).to(tl.int32)


@triton.jit(do_not_specialize=["sequences", "row_tokens", "slots", "levels", "longest_walk", "kv_heads", "least"])
def _count_tiles_kernel(
    starts, ends, totals, sequences, row_tokens, slots, levels, longest_walk, kv_heads, least,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """totals [levels, 2]: tiles and pieces whose walk is `levels - program` tiles long."""
    UNITS: tl.constexpr = RESIDENT // STREAMED
    walk = levels - tl.program_id(0)
    tiles_here = 0
    pieces_here = 0
    slot = 0
    for begin in range(0, sequences, BLOCK):
        sequence = begin + tl.arange(0, BLOCK)
        _, tokens = _spans(starts, ends, sequence, sequence < sequences, row_tokens)
        tiles = tl.cdiv(tokens, RESIDENT)
        fits = slot + tl.cumsum(tiles, axis=0) <= slots
        slot += tl.sum(tiles, axis=0)
        takes_part = fits & (tiles >= walk)
        count, _ = _pieces(walk, tiles, longest_walk, kv_heads, least, UNITS, PROGRAMS)
        tiles_here += tl.sum(takes_part.to(tl.int32), axis=0)
        pieces_here += tl.sum(tl.where(takes_part, count, 0), axis=0)
    tl.store(totals + 2 * tl.program_id(0), tiles_here)
    tl.store(totals + 2 * tl.program_id(0) + 1, pieces_here)


@triton.jit(do_not_specialize=["sequences", "row_tokens", "slots", "levels", "longest_walk", "kv_heads", "least"])
def _place_tiles_kernel(
    starts, ends, totals, spans_out, tiles_out, pieces_out, of_slot_out,
    sequences, row_tokens, slots, levels, longest_walk, kv_heads, least,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the entries of the walks of one length, behind those of all longer walks."""
    UNITS: tl.constexpr = RESIDENT // STREAMED
    level = tl.program_id(0)
    walk = levels - level
    tile_entry = 0
    piece_entry = 0
    for begin in range(0, level, BLOCK):
        longer = begin + tl.arange(0, BLOCK)
        tile_entry += tl.sum(tl.load(totals + 2 * longer, mask=longer < level, other=0), axis=0)
        piece_entry += tl.sum(tl.load(totals + 2 * longer + 1, mask=longer < level, other=0), axis=0)

    slot = 0
    for begin in range(0, sequences, BLOCK):
        sequence = begin + tl.arange(0, BLOCK)
        exists = sequence < sequences
        first, tokens = _spans(starts, ends, sequence, exists, row_tokens)
        tiles = tl.cdiv(tokens, RESIDENT)
        ends_at = slot + tl.cumsum(tiles, axis=0)
        slot += tl.sum(tiles, axis=0)
        fits = ends_at <= slots
        if level == 0:
            tl.store(spans_out + 2 * sequence, first, mask=exists)
            tl.store(spans_out + 2 * sequence + 1, tl.where(fits, tokens, 0), mask=exists)

        takes_part = fits & (tiles >= walk)
        first_slot = ends_at - tiles
        tile = tiles - walk
        entry = TILE_FIELDS * (tile_entry + tl.cumsum(takes_part.to(tl.int32), axis=0) - 1)
        tl.store(tiles_out + entry, tile + 1, mask=takes_part)
        tl.store(tiles_out + entry + 1, sequence, mask=takes_part)
        tl.store(tiles_out + entry + 2, first_slot, mask=takes_part)
        tile_entry += tl.sum(takes_part.to(tl.int32), axis=0)

        count, length = _pieces(walk, tiles, longest_walk, kv_heads, least, UNITS, PROGRAMS)
        count = tl.where(takes_part, count, 0)
        all_queries = tl.cdiv(tokens, STREAMED)
        first_entry = piece_entry + tl.cumsum(count, axis=0) - count
        tl.store(of_slot_out + 2 * (first_slot + tile), first_entry, mask=takes_part)
        tl.store(of_slot_out + 2 * (first_slot + tile) + 1, count, mask=takes_part)
        for piece in range(tl.max(count, axis=0)):
            here = piece < count
            entry = PIECE_FIELDS * (first_entry + piece)
            tl.store(pieces_out + entry, tile + 1, mask=here)
            tl.store(pieces_out + entry + 1, sequence, mask=here)
            tl.store(pieces_out + entry + 2, first_slot, mask=here)
            first_query = tl.minimum(tile * UNITS + piece * length, all_queries)
            end = tl.where(piece + 1 == count, all_queries, tl.minimum(first_query + length, all_queries))
            tl.store(pieces_out + entry + 3, first_query, mask=here)
            tl.store(pieces_out + entry + 4, end, mask=here)
        piece_entry += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["sequences", "row_tokens", "slots", "query_slots", "window", "own", "kv_heads", "least"])
def _place_queries_kernel(
    starts, ends, queries, spans_out, tiles_out, pieces_out, of_slot_out, query_spans_out, query_tiles_out, places_out,
    counted_out, sequences, row_tokens, slots, query_slots, window, own, kv_heads, least,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RESIDENT: tl.constexpr, STREAMED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the entries of each sequence's tile number `program`, of keys and of queries, in the order of the sequences.

    queries [S, 3] are `Spans.query_spans`. `own` is 1 where a query counts for its own key. All tiles of a sequence have room
    for the same number of pieces: so the place of each is known without a look at the others."""
    tile = tl.program_id(0)
    slot = 0
    query_slot = 0
    entry = 0
    for begin in range(0, sequences, BLOCK):
        sequence = begin + tl.arange(0, BLOCK)
        exists = sequence < sequences
        first, tokens = _spans(starts, ends, sequence, exists, row_tokens)
        row = first
        rows = tokens
        place = tl.zeros_like(tokens)
        if queries is not None:
            row = tl.load(queries + 3 * sequence, mask=exists, other=0).to(tl.int32)
            rows = tl.load(queries + 3 * sequence + 1, mask=exists, other=0).to(tl.int32)
            place = tl.load(queries + 3 * sequence + 2, mask=exists, other=0).to(tl.int32)
        tiles = tl.cdiv(tokens, RESIDENT)
        query_tiles = tl.cdiv(rows, RESIDENT)
        first_slot = slot + tl.cumsum(tiles, axis=0) - tiles
        first_query_slot = query_slot + tl.cumsum(query_tiles, axis=0) - query_tiles
        slot += tl.sum(tiles, axis=0)
        query_slot += tl.sum(query_tiles, axis=0)
        fits = (first_slot + tiles <= slots) & (first_query_slot + query_tiles <= query_slots)
        tokens = tl.where(fits, tokens, 0)
        rows = tl.where(fits, rows, 0)
        tiles = tl.where(fits, tiles, 0)
        query_tiles = tl.where(fits, query_tiles, 0)
        if not CAUSAL:
            place = tokens - 1
        counted = place + own
        if tile == 0:
            tl.store(spans_out + 2 * sequence, first, mask=exists)
            tl.store(spans_out + 2 * sequence + 1, tokens, mask=exists)
            tl.store(query_spans_out + 2 * sequence, row, mask=exists)
            tl.store(query_spans_out + 2 * sequence + 1, rows, mask=exists)
            tl.store(places_out + sequence, place, mask=exists)
            tl.store(counted_out + sequence, counted, mask=exists)

        address = tiles_out + TILE_FIELDS * (first_slot + tile)
        tl.store(address, tile + 1, mask=tile < tiles)
        tl.store(address + 1, sequence, mask=tile < tiles)
        tl.store(address + 2, first_slot, mask=tile < tiles)
        address = query_tiles_out + TILE_FIELDS * (first_query_slot + tile)
        tl.store(address, tile + 1, mask=tile < query_tiles)
        tl.store(address + 1, sequence, mask=tile < query_tiles)
        tl.store(address + 2, first_query_slot, mask=tile < query_tiles)

        # The tile's keys and the end of its walk, counted in rows of q from the sequence's first one.
        first_key = tile * RESIDENT - counted
        longest = tl.cdiv(rows, STREAMED)
        end = longest
        if WINDOW:
            longest = tl.minimum(longest, tl.cdiv(RESIDENT - 1 + window, STREAMED) + 1)
            end = tl.minimum(end, tl.cdiv(tl.maximum(first_key + RESIDENT - 1 + window, 0), STREAMED))
        length = tl.maximum(tl.cdiv(kv_heads * (tiles * longest).to(tl.int64), PROGRAMS), least).to(tl.int32)
        room = tl.cdiv(longest, length)
        first_entry = entry + tl.cumsum(room * tiles, axis=0) - room * (tiles - tile)
        entry += tl.sum(room * tiles, axis=0)
        first_query = tl.maximum(first_key + 1, 0) // STREAMED
        count = tl.where(tile < tiles, tl.cdiv(tl.maximum(end - first_query, 0), length), 0)
        tl.store(of_slot_out + 2 * (first_slot + tile), first_entry, mask=tile < tiles)
        tl.store(of_slot_out + 2 * (first_slot + tile) + 1, count, mask=tile < tiles)
        for piece in range(tl.max(count, axis=0)):
            here = piece < count
            address = pieces_out + PIECE_FIELDS * (first_entry + piece)
            tl.store(address, tile + 1, mask=here)
            tl.store(address + 1, sequence, mask=here)
            tl.store(address + 2, first_query_slot, mask=here)
            tl.store(address + 3, first_query + piece * length, mask=here)
            tl.store(address + 4, tl.minimum(first_query + (piece + 1) * length, end), mask=here)


def plan(spans: Spans, *, size: AttentionLaunch, kv_heads: int, window: int | None, device: torch.device) -> Plan:
    """The tables for `spans` on `device`.

    Only spans that overlap (a cu_seqlens that falls, which nobody can check on a GPU without waiting) need more slots than
    there are; those sequences count as empty.
    """
    levels = triton.cdiv(spans.tokens, size.resident)
    slots = _slots(spans.count, spans.tokens, spans.batch * spans.tokens, size)
    units = size.resident // size.streamed
    entries = slots + _most_cuts(spans.count, slots, [units * t * (t + 1) // 2 for t in range(1, levels + 1)], size, kv_heads)
    counts = (2 * levels, 2 * spans.count, 3 * slots, 5 * entries, 2 * slots)
    totals, places, tiles, pieces, of_slot = _tables(*counts, device=device)
    longest_walk = levels if window is None else min(levels, triton.cdiv(size.resident - 1 + window, size.resident))
    shape = (spans.count, spans.tokens, slots, levels, longest_walk, kv_heads, size.least_piece)
    constexprs = {"RESIDENT": size.resident, "STREAMED": size.streamed, "PROGRAMS": PROGRAMS, "BLOCK": SEQUENCES}
    constexprs |= FUSED
    bounds = [None if bound is None else bound.contiguous() for bound in (spans.starts, spans.ends)]
    _count_tiles_kernel[(levels,)](*bounds, totals, *shape, **constexprs)
    _place_tiles_kernel[(levels,)](*bounds, totals, places, tiles, pieces, of_slot, *shape, **constexprs)
    return Plan(places, tiles, pieces, of_slot, slots, entries, places, tiles, slots)


def plan_queries(
    spans: Spans,
    *,
    size: AttentionLaunch,
    kv_heads: int,
    window: int | None,
    device: torch.device,
    causal: bool,
    include_diagonal: bool,
) -> Plan:
    """`plan` for queries that are not simply the keys' own tokens, or do not count for the keys before them only."""
    levels = triton.cdiv(spans.tokens, size.resident)
    asked = spans.queries
    rows = spans.tokens if asked is None else asked.rows
    most_rows = rows if asked is None or asked.last is None else min(rows, asked.last)
    window = None if window is None else window + include_diagonal
    slots = _slots(spans.count, spans.tokens, spans.batch * spans.tokens, size)
    query_slots = _slots(spans.count, most_rows, spans.batch * rows, size)
    units = size.resident // size.streamed
    longest = triton.cdiv(most_rows, size.streamed)
    if window is not None:
        longest = min(longest, triton.cdiv(size.resident - 1 + window, size.streamed) + 1)
    # Of t tiles of keys the first has the longest walk, and there are no more rows than keys.
    cuts = [t * (min(longest, units * t) - 1) for t in range(1, levels + 1)]
    entries = slots + _most_cuts(spans.count, slots, cuts, size, kv_heads)
    of_keys, of_queries = (2 * spans.count, 3 * slots), (2 * spans.count, 3 * query_slots, spans.count, spans.count)
    spans_out, tiles, pieces, of_slot, query_spans, query_tiles, places, counted = _tables(
        *of_keys, 5 * entries, 2 * slots, *of_queries, device=device
    )
    bounds = [None if bound is None else bound.contiguous() for bound in (spans.starts, spans.ends)]
    _place_queries_kernel[(levels,)](
        *bounds, None if asked is None else spans.query_spans(device), spans_out, tiles, pieces, of_slot, query_spans,
        query_tiles, places, counted, spans.count, spans.tokens, slots, query_slots, window or 0, int(include_diagonal),
        kv_heads, size.least_piece, CAUSAL=causal, WINDOW=window is not None,
        RESIDENT=size.resident, STREAMED=size.streamed, PROGRAMS=PROGRAMS, BLOCK=SEQUENCES, **FUSED,
    )  # fmt: skip
    return Plan(spans_out, tiles, pieces, of_slot, slots, entries, query_spans, query_tiles, query_slots, places, counted)


def _slots(sequences: int, longest: int, total: int, size: AttentionLaunch) -> int:
    """The most tiles that sequences of at most `longest` tokens have, of which there are `total`."""
    return min(sequences * triton.cdiv(longest, size.resident), total // size.resident + sequences)


def _tables(*counts: int, device: torch.device) -> list[Tensor]:
    """Zeros, int32, in one piece of memory."""
    # In multiples of 16 bytes: the compiler makes another kernel for a pointer that is not aligned to them.
    sizes = [triton.cdiv(count, 4) * 4 for count in counts]
    parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _most_cuts(sequences: int, slots: int, walks: Sequence[int], size: AttentionLaunch, kv_heads: int) -> int:
    """The most pieces that there can be beyond one for each tile. The walks of a sequence of t tiles add up to walks[t - 1].

    sum of ceil(walk / piece) <= tiles + (sum of walks) / piece, and a piece is at least `least_piece` and at least
    (sum of walks) * kv_heads / PROGRAMS. So a sequence has at most PROGRAMS / kv_heads of them. The most pieces per tile hold
    for any split of the slots into sequences.
    """
    most = PROGRAMS // kv_heads
    of_tiles = [min(most, walk // size.least_piece) for walk in walks]
    per_tile = max((cuts / t for t, cuts in enumerate(of_tiles, start=1)), default=0.0)
    return min(sequences * max(of_tiles, default=0), math.ceil(slots * per_tile))
