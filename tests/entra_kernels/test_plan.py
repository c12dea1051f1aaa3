"""The tables that say which program works on what: complete, without overlap, longest first, and enough of them."""

import importlib
import math
import os

import pytest
import torch

from entra_kernels._spans import Queries, Spans

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off: a GPU is there")


def planned(lengths, *, kv_heads=8, group=4, window=None, resident=256, streamed=64, packed=True, row_tokens=None):
    plan = importlib.import_module("entra_kernels._triton.plan")
    launch = importlib.import_module("entra_kernels._triton.launch")
    size = launch.AttentionLaunch(resident, streamed, 64, 8, 2, None, -(-launch.LEAST_WORK // group))
    if packed:
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        spans = Spans(bounds[:-1], bounds[1:], len(lengths), row_tokens or int(bounds[-1]), 1)
    else:
        spans = Spans(None, torch.tensor(lengths, dtype=torch.int32), len(lengths), max(lengths), len(lengths))
    tables = plan.plan(spans, size=size, kv_heads=kv_heads, window=window, device=torch.device("cpu"))
    pieces = [row for row in tables.pieces.view(-1, 5).tolist() if row[0]]
    tiles = [row for row in tables.tiles.view(-1, 3).tolist() if row[0]]
    return tables, tiles, pieces


SKEWED = [4096, 300, 1, 0, 1025, 257, 256, 64, *range(0, 1008, 18)]  # 64 sequences


@pytest.mark.parametrize("lengths", [[1000], [1], [0], [5, 0, 700, 256, 257], SKEWED], ids=["one", "1", "0", "five", "skewed"])
@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_every_tile_once_and_every_query_of_it(lengths, window, packed):
    if not packed and max(lengths) == 0:
        pytest.skip("no row has a token")
    tables, tiles, pieces = planned(lengths, window=window, packed=packed)
    first_slots = [sum(math.ceil(n / 256) for n in lengths[:s]) for s in range(len(lengths))]
    wanted = {(t + 1, s, first_slots[s]) for s, n in enumerate(lengths) for t in range(math.ceil(n / 256))}
    assert {tuple(row) for row in tiles} == wanted
    assert len(tiles) == len(wanted)
    starts = [0] * len(lengths) if not packed else [sum(lengths[:s]) for s in range(len(lengths))]
    assert tables.spans.view(-1, 2).tolist() == [list(pair) for pair in zip(starts, lengths, strict=True)]

    of_slot = tables.of_slot.view(-1, 2).tolist()
    everything = tables.pieces.view(-1, 5).tolist()
    for listed, sequence, first_slot in wanted:
        first, count = of_slot[first_slot + listed - 1]
        mine = everything[first : first + count]
        assert all(row[:3] == [listed, sequence, first_slot] for row in mine)
        # From the tile's own first query on, without a gap, to the sequence's end (the window cuts it in the kernel).
        borders = [(listed - 1) * 4, *(row[4] for row in mine)]
        assert [row[3] for row in mine] == borders[:-1]
        assert borders[-1] == math.ceil(lengths[sequence] / 64)
    assert len(pieces) == sum(count for _, count in of_slot)


@pytest.mark.parametrize("lengths", [[1024], [4096], [16_384], SKEWED, [1024] * 20], ids=["1k", "4k", "16k", "skewed", "equal"])
def test_longest_first_and_enough_programs(lengths):
    """132 SMs with two programs each: a sequence alone fills them, and none of its programs lasts longer than its share."""
    _, tiles, pieces = planned(lengths)
    least_piece = 2  # of 8 tiles of scores over a group of 4
    walks = [math.ceil(lengths[s] / 256) - listed for listed, s, _ in tiles]
    assert walks == sorted(walks, reverse=True)
    work = [8 * (stop - first) for _, _, _, first, stop in pieces for _ in range(8)]
    assert len(work) >= 132
    slowest = max(work)
    finish = [0] * 264
    for amount in work:  # in order, to whoever is free
        finish[finish.index(min(finish))] += amount
    assert max(finish) <= sum(work) / 264 + slowest
    if len(lengths) == 1:
        assert max(finish) <= max(1.6 * sum(work) / 264, 8 * least_piece)


def test_pieces_do_not_depend_on_the_batch():
    _, _, alone = planned([5000])
    _, _, among = planned([70, 5000, 16_384])
    assert sorted(row[3:] for row in alone) == sorted(row[3:] for row in among if row[1] == 1)


def test_bounds_hold_for_any_length():
    """The tables' sizes come from shapes alone; what is written must fit for every length that the shape allows."""
    for kv_heads in (1, 8, 600):
        for lengths in ([1] * 20, [255] * 5, [2048], [1500, 1, 1500]):
            tables, _, pieces = planned(lengths, kv_heads=kv_heads, group=1)
            assert len(pieces) <= tables.entries
            assert all(row[0] == 0 for row in tables.pieces.view(-1, 5).tolist()[len(pieces) :])


def test_spans_that_overlap_count_as_empty():
    """A cu_seqlens that falls cannot be refused on a GPU without waiting; it must not write past the tables."""
    plan = importlib.import_module("entra_kernels._triton.plan")
    launch = importlib.import_module("entra_kernels._triton.launch")
    size = launch.AttentionLaunch(32, 16, 64, 4, 1, None, 1)
    starts, ends = torch.tensor([0, 0, 0, 0, 10]), torch.tensor([100, 100, 100, 100, 2**40])
    tables = plan.plan(Spans(starts, ends, 5, 100, 1), size=size, kv_heads=2, window=None, device=torch.device("cpu"))
    assert tables.slots == 8
    assert tables.spans.view(-1, 2).tolist() == [[0, 100], [0, 100], [0, 0], [0, 0], [10, 0]]


def planned_queries(lengths, rows, places=None, *, last=None, window=None, kv_heads=8, causal=True, own=False, resident=256):
    plan = importlib.import_module("entra_kernels._triton.plan")
    launch = importlib.import_module("entra_kernels._triton.launch")
    size = launch.AttentionLaunch(resident, 64, 64, 8, 2, None, 2)
    keys, asked = (torch.tensor([0, *counts]).cumsum(0) for counts in (lengths, rows))
    queries = Queries(int(asked[-1]), asked, None if places is None else torch.tensor(places), last)
    spans = Spans(keys[:-1], keys[1:], len(lengths), int(keys[-1]), 1, queries)
    return plan.plan_queries(
        spans, size=size, kv_heads=kv_heads, window=window, device=torch.device("cpu"), causal=causal, include_diagonal=own
    )


@pytest.mark.parametrize(
    "asked",
    [{}, {"own": True}, {"window": 1, "own": True}, {"window": 300}, {"causal": False, "own": True}, {"last": 70}],
    ids=["strict", "own key", "window 1", "window", "not causal", "last"],
)
def test_every_tile_of_queries_that_counts_once(asked):
    """For every tile of keys: from the first tile of queries that counts for one of its keys to the last one."""
    lengths, rows, places = [1000, 5, 0, 2600, 300, 64], [400, 5, 0, 2600, 1, 64], [600, 0, 0, 0, 100, 0]
    tables = planned_queries(lengths, rows, places, **asked)
    before = [sum(rows[:s]) for s in range(len(rows))]
    if "last" in asked:
        kept = [min(n, 70) for n in rows]
        places = [place + n - k for place, n, k in zip(places, rows, kept, strict=True)]
        before = [first + n - k for first, n, k in zip(before, rows, kept, strict=True)]
        rows = kept
    assert tables.query_spans.view(-1, 2).tolist() == [list(pair) for pair in zip(before, rows, strict=True)]
    assert tables.spans.view(-1, 2).tolist() == [[sum(lengths[:s]), n] for s, n in enumerate(lengths)]
    slots = [sum(math.ceil(n / 256) for n in lengths[:s]) for s in range(len(lengths))]
    query_slots = [sum(math.ceil(n / 256) for n in rows[:s]) for s in range(len(rows))]
    for tiles, counts, first_slots in ((tables.tiles, lengths, slots), (tables.query_tiles, rows, query_slots)):
        wanted = {(t + 1, s, first_slots[s]) for s, n in enumerate(counts) for t in range(math.ceil(n / 256))}
        listed = [tuple(row) for row in tiles.view(-1, 3).tolist() if row[0]]
        assert set(listed) == wanted
        assert len(listed) == len(wanted)

    pieces, of_slot = tables.pieces.view(-1, 5).tolist(), tables.of_slot.view(-1, 2).tolist()
    found = 0
    for s, tokens in enumerate(lengths):
        query = places[s] + torch.arange(rows[s])
        for tile in range(math.ceil(tokens / 256)):
            key = torch.arange(256 * tile, 256 * tile + 256)[:, None]
            counts = key <= query if asked.get("own") else key < query
            counts |= not asked.get("causal", True)
            if "window" in asked:
                counts &= query - key < asked["window"]
            which = counts.any(dim=0).nonzero().flatten()
            first, count = of_slot[slots[s] + tile]
            mine = pieces[first : first + count]
            found += count
            assert all(row[:3] == [tile + 1, s, query_slots[s]] for row in mine)
            walked = [tile for row in mine for tile in range(*row[3:])]
            needed = list(range(int(which[0]) // 64, int(which[-1]) // 64 + 1)) if len(which) else []
            assert walked == sorted(walked)
            assert set(needed) <= set(walked)
            assert len(walked) <= len(needed) + 1  # keys past the sequence's end are in its last tile
    assert found == sum(1 for row in pieces if row[0])


def test_few_queries_make_few_tiles():
    """What `last` leaves: one tile of queries a sequence, and a program for each tile of keys and kv head."""
    tables = planned_queries([32_768, 4096], [32_768, 4096], last=64)
    assert tables.query_slots == 2
    assert tables.slots == 146
    assert sum(1 for row in tables.pieces.view(-1, 5).tolist() if row[0]) == 144
    assert tables.entries <= tables.slots
    for kv_heads in (1, 8, 600):
        for lengths, rows in (([2048], [2048]), ([1500, 1, 1500], [1400, 0, 1]), ([4096], [130])):
            tables = planned_queries(lengths, rows, kv_heads=kv_heads)
            assert all(first + count <= tables.entries for first, count in tables.of_slot.view(-1, 2).tolist())


def test_pieces_of_queries_do_not_depend_on_the_batch():
    alone = planned_queries([5000], [3000])
    among = planned_queries([70, 5000, 16_384], [70, 3000, 2])
    pieces = [sorted(row[3:] for row in tables.pieces.view(-1, 5).tolist() if row[0] and row[1] == s)
              for tables, s in ((alone, 0), (among, 1))]  # fmt: skip
    assert len(pieces[0]) > 20  # more than its tiles
    assert pieces[0] == pieces[1]


def test_queries_that_overlap_count_as_empty():
    """As in `test_spans_that_overlap_count_as_empty`: nothing is written past the tables."""
    plan = importlib.import_module("entra_kernels._triton.plan")
    launch = importlib.import_module("entra_kernels._triton.launch")
    size = launch.AttentionLaunch(32, 16, 64, 4, 1, None, 1)
    queries = Queries(100, torch.tensor([0, 100, 0, 100, 0, 100]), torch.tensor([0, 0, 0, 0, 0]))
    spans = Spans(torch.tensor([0, 0, 0, 0, 10]), torch.tensor([100, 100, 100, 100, 2**40]), 5, 100, 1, queries)
    tables = plan.plan_queries(
        spans, size=size, kv_heads=2, window=None, device=torch.device("cpu"), causal=True, include_diagonal=False
    )
    assert tables.slots == tables.query_slots == 8
    assert [row[1] for row in tables.spans.view(-1, 2).tolist()] == [100, 100, 0, 0, 0]
    assert [row[1] for row in tables.query_spans.view(-1, 2).tolist()] == [100, 0, 0, 0, 0]
    assert tables.pieces.view(-1, 5)[:, 1].max() == 0
