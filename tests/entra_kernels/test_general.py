"""`incoming_attention` beyond every token being a query: fewer queries than keys, other reductions, other masks.

The oracle is written out here, one query and one key at a time in float64, and shares no code with the package.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from attention_problems import DEVICES, SLACK, random

from entra_kernels import incoming_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
GROUP = HEADS // KV_HEADS


def oracle(q, k, sequences, *, lse=None, row_weights=None, sinks=None, **options):
    """`q` [B, H, Nq, D], `k` [B, Hkv, N, D], and of each sequence: batch element, first key, keys, first row, rows, place.

    Returns the result, with heads as asked, and the log-sum-exp."""
    causal, diagonal = options.get("causal", True), options.get("include_diagonal", False)
    window, softcap = options.get("sliding_window"), options.get("softcap")
    reduction, heads = options.get("reduction", "mean"), options.get("heads", "mean")
    scale = options.get("scale") or HEAD_DIM**-0.5
    result = torch.zeros(q.shape[0], HEADS, k.shape[2], dtype=torch.float64)
    sums = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for element, first, count, row, rows, place in sequences:
        # [rows, keys] of what each key gets, and whether it counts; rows that stand outside do not.
        inside = [t for t in range(rows) if 0 <= place + t < count]
        inside = inside[-options["last"] :] if "last" in options else inside
        for head in range(HEADS):
            received = [[] for _ in range(count)]
            for t in inside:
                at = place + t
                seen = [i for i in range(count) if not causal or (i <= at and (window is None or i > at - window))]
                score = scale * (k[element, head // GROUP, first : first + count].double() @ q[element, head, row + t].double())
                score = softcap * (score / softcap).tanh() if softcap else score
                total = [float(score[i]) for i in seen] + ([float(sinks[head])] if sinks is not None else [])
                denominator = torch.logsumexp(torch.tensor(total, dtype=torch.float64), 0)
                sums[element, head, row + t] = denominator
                denominator = denominator if lse is None else lse[element, head, row + t].double()
                weight = 1.0 if row_weights is None else float(row_weights[element, row + t])
                for i in seen:
                    if not causal or i < at or (i == at and diagonal):
                        received[i].append(weight * float((score[i] - denominator).exp()))
            reduce = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max}[reduction]
            result[element, head, first : first + count] = torch.tensor(
                [reduce(v) if v else 0.0 for v in received], dtype=torch.float64
            )
    if heads == "kv":
        result = result.unflatten(1, (KV_HEADS, GROUP)).mean(dim=2)
    return (result.mean(dim=1) if heads == "mean" else result), sums


def padded(*, keys=(30, 21), rows=9, layout="left", query_start=None, **options):
    """q, k, arguments and the oracle's sequences; NaN outside, in the queries that do not count as well."""
    tokens = max(keys) + 2
    starts = [{"left": tokens - n, "right": 0, "both": 1}[layout] for n in keys]
    q, k = random(len(keys), HEADS, rows, HEAD_DIM, seed=1), random(len(keys), KV_HEADS, tokens, HEAD_DIM, seed=2)
    places = [tokens - rows] * len(keys) if query_start is None else query_start
    arguments = {"start": torch.tensor(starts), "length": torch.tensor(keys), **_made(q, options)}
    for b, (first, count, place) in enumerate(zip(starts, keys, places, strict=True)):
        k[b, :, :first] = k[b, :, first + count :] = math.nan
        for t in range(rows):
            if not first <= place + t < first + count:
                q[b, :, t] = math.nan
    if query_start is not None:
        arguments["query_start"] = torch.tensor(query_start)
    sequences = [
        (b, first, count, 0, rows, place - first)
        for b, (first, count, place) in enumerate(zip(starts, keys, places, strict=True))
    ]
    return q.float(), k.float(), arguments, sequences


def packed(*, keys=(30, 1, 21, 0, 9), rows=(7, 1, 21, 0, 0), query_start=None, **options):
    """As `padded`, but q and k still [1, ., T, D], for the oracle."""
    q, k = random(1, HEADS, sum(rows) + 2, HEAD_DIM, seed=1), random(1, KV_HEADS, sum(keys) + 3, HEAD_DIM, seed=2)
    q[:, :, sum(rows) :], k[:, :, sum(keys) :] = math.nan, math.nan
    arguments = {name: value[0] if name in ("lse", "row_weights") else value for name, value in _made(q, options).items()}
    bounds = [list(itertools.accumulate(counts, initial=0)) for counts in (keys, rows)]
    arguments |= {"cu_seqlens": torch.tensor(bounds[0]), "cu_seqlens_q": torch.tensor(bounds[1])}
    places = [n - m for n, m in zip(keys, rows, strict=True)] if query_start is None else query_start
    if query_start is not None:
        arguments["query_start"] = torch.tensor(query_start)
    sequences = [
        (0, first, count, row, number, place)
        for first, count, row, number, place in zip(bounds[0], keys, bounds[1], rows, places, strict=False)
    ]
    return q.float(), k.float(), arguments, sequences


def _made(q, options):
    made = dict(options)
    for name, make in {
        "row_weights": lambda: random(q.shape[0], q.shape[2], seed=4),
        "lse": lambda: 4 + random(*q.shape[:3], seed=5),
        "sinks": lambda: random(HEADS, seed=3),
    }.items():
        if made.pop(name, False):
            made[name] = make().float()
    return made


def check(case, backend, device="cpu", dtype=torch.float32):
    q, k, arguments, sequences = case
    options = {
        name: value
        for name, value in arguments.items()
        if name not in ("start", "length", "cu_seqlens", "cu_seqlens_q", "query_start")
    }
    is_packed = "cu_seqlens" in arguments
    given = {name: options[name][None] for name in ("lse", "row_weights") if is_packed and name in options}
    expected, sums = oracle(q, k, sequences, **options | given)
    tensors = (q[0].transpose(0, 1), k[0].transpose(0, 1)) if is_packed else (q, k)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    asked = {} if "lse" in options else {"return_lse": True}
    ours = incoming_attention(*(t.to(device, dtype) for t in tensors), backend=backend, **moved, **asked)
    ours, lse = ours if asked else (ours, sums[0] if is_packed else sums)
    ours, lse = (ours[None], lse[None]) if is_packed else (ours, lse)
    assert ours.shape == expected.shape
    assert ours.isfinite().all()
    assert (ours.cpu() - expected).abs().max() <= SLACK * max(1.0, float(expected.abs().max()))
    assert torch.equal(lse.cpu() == -math.inf, sums == -math.inf)
    assert ((lse.cpu() - sums).nan_to_num().abs() <= SLACK * 10).all()
    return ours


EVERYTHING = {"softcap": 2.0, "sinks": True, "row_weights": True, "heads": "kv"}
CASES = {
    "left padded": padded(),
    "right padded": padded(layout="right"),
    "padded on both sides": padded(layout="both"),
    "query_start": padded(query_start=[5, 17]),
    "query_start before and behind": padded(query_start=[-4, 40], layout="both"),
    "one query": padded(rows=1),
    "no query": padded(rows=0),
    "as many queries as keys": padded(rows=32, include_diagonal=True),
    "more than one tile": padded(keys=(75, 40), rows=37, query_start=[20, 11], layout="right"),
    "last 5": padded(rows=32, last=5),
    "last 5, right padded": padded(rows=32, last=5, layout="right"),
    "last 5 of the rows": padded(last=5),
    "last 1000": padded(rows=32, last=1000),
    "packed": packed(),
    "packed, query_start": packed(query_start=[10, 0, 0, 0, 3]),
    "packed, query_start outside": packed(query_start=[-3, 0, 9, 0, 3]),
    "packed, last 3": packed(last=3),
    "include_diagonal": padded(include_diagonal=True),
    "include_diagonal, packed": packed(include_diagonal=True),
    "sum": padded(reduction="sum"),
    "max": padded(reduction="max"),
    "max, heads kv": padded(reduction="max", heads="kv", include_diagonal=True),
    "max, heads query, packed": packed(reduction="max", heads="query"),
    "max, negative weights": padded(reduction="max", row_weights=True),
    "heads query": padded(heads="query"),
    "heads kv": padded(heads="kv"),
    "heads kv, packed": packed(heads="kv"),
    "not causal": padded(causal=False, include_diagonal=True),
    "not causal, packed": packed(causal=False, include_diagonal=True),
    "not causal, every query": padded(rows=32, causal=False, include_diagonal=True),
    "not causal, max": padded(causal=False, include_diagonal=True, reduction="max"),
    "not causal, everything": padded(causal=False, include_diagonal=True, **EVERYTHING),
    "window": padded(sliding_window=6),
    "window 1": padded(sliding_window=1),
    "window, packed": packed(sliding_window=6, include_diagonal=True),
    "window, query_start": padded(sliding_window=11, query_start=[5, 17]),
    "window, last": padded(rows=32, sliding_window=6, last=5),
    "window, max": padded(sliding_window=6, reduction="max", include_diagonal=True),
    "given lse": padded(lse=True),
    "given lse, packed, max": packed(lse=True, reduction="max"),
    "everything": padded(sliding_window=11, include_diagonal=True, **EVERYTHING),
    "everything, packed, last": packed(sliding_window=11, last=6, **EVERYTHING),
    "everything, max": padded(query_start=[5, 17], reduction="max", **EVERYTHING),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_against_the_oracle(case, device, backend, small_tiles):
    check(case, backend, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "max"}, {"sliding_window": 9, "heads": "kv"}], ids=["plain", "max", "window"]
)
def test_packed_equals_separate(options, device, backend, small_tiles):
    """Bit for bit: what else is in the batch changes nothing."""
    keys, rows = (40, 5, 64), (9, 5, 33)
    q, k, arguments, sequences = packed(keys=keys, rows=rows, **options)
    together = check((q, k, arguments, sequences), backend, device)[0]
    for _, first, count, row, number, _ in sequences:
        span, asked = slice(first, first + count), slice(row, row + number)
        alone = incoming_attention(q[:, :, asked].to(device), k[:, :, span].to(device), backend=backend, **options)[0]
        assert torch.equal(together[..., span], alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "max", "include_diagonal": True, "heads": "query"},
        {"reduction": "sum", "heads": "query", "sliding_window": 9},
    ],
    ids=["sum", "max", "per head, window"],
)
def test_pieces_into_one_tensor_are_one_call(options, device, backend, small_tiles):
    """Two chunks of a prompt, then one token at a time."""
    q, k = (
        random(2, HEADS, 40, HEAD_DIM, seed=1).float().to(device),
        random(2, KV_HEADS, 40, HEAD_DIM, seed=2).float().to(device),
    )
    whole = incoming_attention(q, k, backend=backend, **options)
    lines = (HEADS,) if options.get("heads") == "query" else ()
    into = torch.zeros(2, *lines, 50, device=device)
    for first, end in itertools.pairwise((0, 17, 36, 37, 38, 39, 40)):
        returned = incoming_attention(q[:, :, first:end], k[:, :, :end], into=into, backend=backend, **options)
        assert returned is into
    assert (into[..., :40] - whole).abs().max() <= SLACK * max(1.0, float(whole.max()))
    assert (into[..., 40:] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_maximum_of_negative_weights(device, backend, small_tiles):
    """Rows past the last one, which fill up its tile, gave 0: above all that counts. So did keys that a query does not see."""
    q, k, arguments, sequences = padded(keys=(75,), rows=37, layout="right", row_weights=True, reduction="max", heads="query")
    arguments["row_weights"] = -arguments["row_weights"].abs() - 0.1
    received = check((q, k, arguments, sequences), backend, device)
    assert (received[:, :, :74] < 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_last_reads_no_other_query(device, backend, small_tiles):
    q, k = (
        random(2, HEADS, 70, HEAD_DIM, seed=1).float().to(device),
        random(2, KV_HEADS, 70, HEAD_DIM, seed=2).float().to(device),
    )
    whole = incoming_attention(q[:, :, -8:], k, backend=backend)
    q[:, :, :-8] = math.nan
    assert torch.equal(incoming_attention(q, k, last=8, backend=backend), whole)


def test_the_older_names(backend, small_tiles):
    q, k, *_ = padded(rows=32)
    q, k = q.nan_to_num(), k.nan_to_num()
    by_head = incoming_attention(q, k, per_head=True, backend=backend)
    assert torch.equal(by_head, incoming_attention(q, k, heads="query", backend=backend))
    sums = incoming_attention(q, k, normalize=False, backend=backend)
    assert torch.equal(sums, incoming_attention(q, k, reduction="sum", backend=backend))
    mean = incoming_attention(q, k, heads="kv", backend=backend).mean(dim=1)
    assert (mean - incoming_attention(q, k, backend=backend)).abs().max() <= SLACK


REFUSED = {
    "more queries than keys": ({"rows": 40}, {}, "q has 40 tokens and k 32; a query stands at one of the keys"),
    "last 0": ({}, {"last": 0}, "last=0 must be at least 1 query"),
    "last 2.0": ({}, {"last": 2.0}, "last=2.0 must be an int, not float"),
    "reduction": ({}, {"reduction": "median"}, "reduction='median' must be one of 'mean', 'sum', 'max'"),
    "heads": ({}, {"heads": 2}, "heads=2 must be one of 'mean', 'query', 'kv'"),
    "not causal, window": (
        {},
        {"causal": False, "include_diagonal": True, "sliding_window": 4},
        "causal=False knows no before",
    ),
    "not causal, no diagonal": ({}, {"causal": False}, "pass include_diagonal=True with it"),
    "per_head, kv": ({}, {"per_head": True, "heads": "kv"}, "heads='kv' and per_head=True, which is heads='query'"),
    "normalize, max": ({}, {"normalize": False, "reduction": "max"}, "reduction='max' and normalize=False"),
    "lse twice": ({}, {"lse": torch.zeros(2, HEADS, 9), "return_lse": True}, "lse was given, and return_lse=True asks for it"),
    "into, mean of maxima": ({}, {"into": torch.zeros(2, 32), "reduction": "max"}, "with into and reduction='max' pass"),
    "into, mean": ({}, {"into": torch.zeros(2, 32)}, "a mean is neither; pass reduction='sum' or 'max'"),
    "into, short": ({}, {"into": torch.zeros(2, 31), "reduction": "sum"}, r"into is torch.float32 \[2, 31\]"),
    "into, integers": ({}, {"into": torch.zeros(2, 32).double(), "reduction": "sum"}, "it must be torch.float32"),
    "query_start": ({}, {"query_start": torch.zeros(3, dtype=torch.int64)}, r"query_start has shape \[3\]"),
    "cu_seqlens_q alone": ({}, {"cu_seqlens_q": torch.tensor([0, 9])}, "cu_seqlens_q belongs to the packed layout"),
    "sampled, last": ({"rows": 32}, {"sample_rows": 8, "last": 4}, "sample_rows goes with a query for every key"),
    "sampled, fewer queries": ({}, {"sample_rows": 8}, "sample_rows goes with a query for every key"),
    "sampled, max": ({"rows": 32}, {"sample_rows": 8, "reduction": "max"}, "sample_rows goes with a query for every key"),
}


@pytest.mark.parametrize(("shape", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shape, options, message):
    q, k, arguments, _ = padded(**shape) if shape.get("rows") != 40 else padded(rows=9)
    q = random(2, HEADS, 40, HEAD_DIM).float() if shape.get("rows") == 40 else q
    with pytest.raises((ValueError, TypeError), match=message):
        incoming_attention(q, k, **arguments | options)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([0, 9, 7], "sequence 1 has the queries 9 to 7"),
        ([0, 9, 40], "outside 0 to 12"),
        ([0, 12, 12], "12 queries and 10 keys"),
    ],
    ids=["falls", "leaves", "more than keys"],
)
def test_queries_of_a_packed_batch_are_checked(queries, message):
    q, k = torch.zeros(12, HEADS, 8), torch.zeros(20, KV_HEADS, 8)
    with pytest.raises(ValueError, match=message):
        incoming_attention(q, k, cu_seqlens=torch.tensor([0, 10, 20]), cu_seqlens_q=torch.tensor(queries))


# A value of each option that is not its default, for the table of pairs.
OPTIONS = {
    "fewer queries": {"fewer": True},
    "`query_start`": {"query_start": torch.tensor([1, 2])},
    "`last`": {"last": 3},
    "`include_diagonal`": {"include_diagonal": True},
    "`causal=False`": {"causal": False, "include_diagonal": True},
    '`reduction="sum"`': {"reduction": "sum"},
    '`reduction="max"`': {"reduction": "max"},
    '`heads="query"`': {"heads": "query"},
    '`heads="kv"`': {"heads": "kv"},
    "`return_lse`": {"return_lse": True},
    "`into`": {"into": torch.zeros(2, 32), "reduction": "sum"},
    "`sliding_window`": {"sliding_window": 4},
    "`softcap`": {"softcap": 2.0},
    "`sinks`": {"sinks": torch.zeros(HEADS)},
    "`lse`": {"lse": True},
    "`row_weights`": {"row_weights": True},
    "`sample_rows`": {"sample_rows": 8},
}


def _goes(one, other):
    """Whether two options go together; None where both set the same argument to different values."""
    shared = [name for name in one.keys() & other.keys() if one[name] is not other[name] and one[name] != other[name]]
    if shared and one is not other:
        return None
    options = one | other
    rows = 9 if options.pop("fewer", False) else 32
    q, k = torch.zeros(2, HEADS, rows, HEAD_DIM), torch.zeros(2, KV_HEADS, 32, HEAD_DIM)
    if "into" in options:
        lines = {"query": (HEADS,), "kv": (KV_HEADS,)}.get(options.get("heads"), ())
        options["into"] = torch.zeros(2, *lines, 32)
    for name, shape in {"lse": (2, HEADS, rows), "row_weights": (2, rows)}.items():
        if name in options:
            options[name] = torch.zeros(shape)
    try:
        incoming_attention(q, k, **options)
    except ValueError:
        return False
    return True


def table_of_pairs():
    names = list(OPTIONS)
    lines = ["| | not with |", "|---|---|"]
    for name in names:
        refused = [other for other in names if other != name and _goes(OPTIONS[name], OPTIONS[other]) is False]
        lines.append(f"| {name} | {', '.join(refused)} |")
    return "\n".join(lines)


def test_the_page_runs_as_printed():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.split("## From Hugging Face")[0], flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/kernels.md", "exec"), names)
    assert names["mu"].shape == (2, 512)
    assert names["peaks"].shape == names["lse"].shape == (2, 8, 512)
    sums = incoming_attention(names["q"], names["k"], reduction="sum")
    assert (names["received"] - sums).abs().max() <= SLACK * sums.max()


def test_the_table_of_what_goes_together_is_what_the_checks_say():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert table_of_pairs() in page, f"docs/kernels.md must hold this table:\n{table_of_pairs()}"
