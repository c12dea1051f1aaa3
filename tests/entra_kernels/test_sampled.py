"""`incoming_attention(sample_rows=m)`: the backends against the specification, and the statistics of the draw.

The statistics are held to what chance allows. With R draws, the mean of an unbiased estimate lies within 5 standard errors of
the exact value for every token. 1 in 1.7 million per token falls outside, and the seeds are fixed.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from attention_problems import DEVICES, SLACK, TARGETS, in_dtype, problem, random
from torch.utils._python_dispatch import TorchDispatchMode

from entra_kernels import SampledAttention, incoming_attention
from entra_kernels._sampling import draw
from entra_kernels._spans import Spans
from entra_kernels.reference import AttentionOptions

CASES = {
    "right padded": {},
    "left padded": {"layout": "left"},
    "packed": {"layout": "packed", "lengths": (33, 1, 64, 0, 16)},
    "every second element": {"strides": "every second"},
    "group of 3": {"heads": 9, "kv_heads": 3, "lengths": (77,)},
    "odd number of rows": {"sample_rows": 17},
    "fewest rows": {"sample_rows": 4},
    "as many rows as tokens": {"sample_rows": 67},
    "more rows than a tile": {"sample_rows": 50},
    "d=24": {"head_dim": 24},
    "d=128": {"head_dim": 128, "lengths": (70,), "heads": 2, "kv_heads": 1},
    "window 1": {"sliding_window": 1},
    "window": {"sliding_window": 20, "layout": "packed"},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "given lse": {"given_lse": True},
    "given lse, packed": {"given_lse": True, "layout": "packed"},
    "row weights": {"row_weights": True},
    "not normalized": {"normalize": False},
    "negative scale": {"scale": -0.7},
    "everything": {
        "sliding_window": 20,
        "softcap": 2.0,
        "sinks": True,
        "row_weights": True,
        "layout": "packed",
        "head_dim": 24,
    },
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_against_the_reference(case, target, backend, small_tiles):
    """Budget: 16 roundings of the inputs' products, whose sum over strata is weighted by up to N / m."""
    q, k, arguments = problem(*target, **({"sample_rows": 24} | case))
    exact = incoming_attention(q.double(), k.double(), backend="reference", **in_dtype(arguments, torch.float64))
    single = incoming_attention(q.float(), k.float(), backend="reference", **in_dtype(arguments, torch.float32))
    ours = incoming_attention(q, k, backend=backend, **arguments)
    assert isinstance(ours, SampledAttention)
    for name in SampledAttention._fields:
        value, right, plain = getattr(ours, name), getattr(exact, name), getattr(single, name)
        assert value.dtype == torch.float32
        assert value.shape == right.shape
        assert value.isfinite().all()
        budget = 2 * (plain - right).abs().max() + SLACK * exact.estimate.abs().max()
        assert (value - right).abs().max() <= budget, name


@pytest.mark.parametrize("device", DEVICES)
def test_all_rows_are_exact(device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(67, 40, 3))
    sampled = incoming_attention(q, k, sample_rows=67, backend=backend, **arguments)
    assert (sampled.estimate - incoming_attention(q, k, backend="reference", **arguments)).abs().max() <= SLACK
    assert (sampled.standard_error == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_packed_equals_separate(device, backend, small_tiles):
    """The draw and the sums depend on the sequence alone, bit for bit."""
    q, k, arguments = problem(device, torch.float32, lengths=(45, 7, 0, 64, 1), layout="packed", sample_rows=16)
    packed = incoming_attention(q, k, backend=backend, **arguments)
    again = incoming_attention(q, k, backend=backend, **arguments)
    other = incoming_attention(q, k, backend=backend, **arguments, seed=1)
    assert torch.equal(packed.estimate, again.estimate)
    assert torch.equal(packed.standard_error, again.standard_error)
    assert not torch.equal(packed.estimate, other.estimate)
    for first, end in itertools.pairwise(arguments["cu_seqlens"].tolist()):
        alone = incoming_attention(
            q[None, first:end].transpose(1, 2), k[None, first:end].transpose(1, 2), sample_rows=16, backend=backend
        )
        assert torch.equal(packed.estimate[first:end], alone.estimate[0])
        assert torch.equal(packed.standard_error[first:end], alone.standard_error[0])


DRAWS = 300
INPUTS = {
    "dense": {},
    "nearly uniform": {"scale": 0.01},
    "peaked": {"scale": 3.0},
    "window": {"sliding_window": 40},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.0, "scale": 2.0},
    "row weights": {"row_weights": True},
}


def draws(case, tokens=160, sample_rows=32):
    """Exact values [N], estimates and standard errors [DRAWS, N], in float64."""
    q, k, arguments = problem("cpu", torch.float64, lengths=(tokens,), heads=4, kv_heads=2, head_dim=16, **INPUTS[case])
    arguments = in_dtype(arguments, torch.float64)
    exact = incoming_attention(q, k, backend="reference", **arguments)[0]
    options = arguments | {"sample_rows": sample_rows, "backend": "torch"}
    sampled = [incoming_attention(q, k, seed=seed, **options) for seed in range(DRAWS)]
    return exact, torch.cat([s.estimate for s in sampled]), torch.cat([s.standard_error for s in sampled])


def deviation(values, right):
    """Largest distance of the mean over draws from what it should be, in its own standard errors."""
    error = values.std(dim=0) / len(values) ** 0.5
    return ((values.mean(dim=0) - right).abs() / (error + 1e-12 * (1 + right.abs()))).max()


@pytest.mark.parametrize("case", INPUTS)
def test_unbiased(case):
    """The estimate, and the square of the standard error as an estimate of the variance."""
    exact, estimate, error = draws(case)
    assert deviation(estimate, exact) < 5
    # The variance of a mean of squares is wide: the empirical variance over the draws is itself known to about 7 %.
    variance, mean_square = estimate.var(dim=0), error.square().mean(dim=0)
    inner = exact > 0
    ratio = (mean_square[inner] / variance[inner].clamp(min=1e-30))[variance[inner] > 1e-20]
    assert 0.9 < ratio.median() < 1.1
    assert 0.9 < mean_square.sum() / variance.sum() < 1.1


def test_a_biased_estimate_is_caught(monkeypatch):
    """What `test_unbiased` must see: every stratum's rows weighted by one stratum's size too few."""
    module = importlib.import_module("entra_kernels._custom_ops")

    def biased(*arguments):
        sample = draw(*arguments)
        return sample._replace(weights=torch.where(sample.weights > 1, sample.weights - 0.5, sample.weights))

    monkeypatch.setattr(module, "draw", biased)
    exact, estimate, _ = draws("dense")
    assert deviation(estimate, exact) > 5


def test_coverage():
    """+-1.96 standard errors: nominally 95 %, on dense attention nearly so, on peaked attention less (docs/method.md)."""
    tokens, sample_rows = 960, 192

    def coverage(case):
        exact, estimate, error = draws(case, tokens, sample_rows)
        # The first half: a key there has at least 36 strata behind it. Later keys have few differences to tell a spread from.
        return ((estimate - exact).abs() <= 1.96 * error).double()[:, : tokens // 2].mean()

    assert 0.90 < coverage("dense") < 0.97
    assert 0.3 < coverage("peaked") < 0.8


@pytest.mark.parametrize("sample_rows", [4, 5, 7, 8, 32, 33, 1000])
def test_the_draw(sample_rows):
    """Strata of two or more rows in one piece, two different rows of each, the last rows, nothing twice."""
    tokens = (0, 1, sample_rows - 1, sample_rows, sample_rows + 1, 3 * sample_rows, 100_003)
    spans = Spans(None, torch.tensor(tokens), len(tokens), max(tokens), len(tokens))
    sample = draw(spans, sample_rows, 7, torch.device("cpu"))
    assert sample.rows.shape == sample.weights.shape == (len(tokens), sample_rows)
    for n, rows, weights, spread in zip(tokens, sample.rows, sample.weights, sample.spread, strict=True):
        taken = rows[rows >= 0].tolist()
        assert taken == sorted(set(taken))
        assert len(taken) == min(n, sample_rows)
        assert weights.sum() == n  # each row counts for the rows of its stratum
        assert (weights[rows < 0] == 0).all()
        if n <= sample_rows:
            assert taken == list(range(n))
            assert (spread == 0).all()
            continue
        strata = (sample_rows - sample_rows // 4) // 2
        exact = sample_rows - 2 * strata
        assert taken[-exact:] == list(range(n - exact, n))
        first = 0
        for h in range(strata):
            size = round(2 * weights[2 * h].item())
            assert size >= 2
            assert first <= taken[2 * h] < taken[2 * h + 1] < first + size
            assert spread[h] == size * (size - 2) / 4
            first += size
        assert first == n - exact
        assert (spread[strata:] == 0).all()


def test_every_row_is_drawn_equally_often():
    spans = Spans(None, None, 1, 23, 1)
    seen = torch.zeros(23)
    for seed in range(3000):
        seen += torch.zeros(23).index_fill(0, draw(spans, 8, seed, torch.device("cpu")).rows[0], 1.0)
    weights = draw(spans, 8, 0, torch.device("cpu"))
    probability = torch.cat([torch.full((round(2 * w),), 1 / w) for w in weights.weights[0, 0:6:2].tolist()] + [torch.ones(2)])
    spread = (3000 * probability * (1 - probability)).sqrt()
    assert ((seen - 3000 * probability).abs() <= 5 * spread).all()


def test_a_million_tokens_in_linear_memory():
    """The largest tensor that the torch backend makes holds 8 numbers per token and head, not m or N."""
    tokens = 2**20

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.untyped_storage().nbytes() // 4)
            return out

    q = torch.randn(1, 1, 1, 8).expand(1, 2, tokens, 8)
    k = torch.randn(1, 1, 1, 8).expand(1, 1, tokens, 8)
    spans = Spans(None, None, 1, tokens, 1)
    torch_backend = importlib.import_module("entra_kernels._torch")
    with Largest() as largest:
        estimate, _ = torch_backend.sampled_incoming_attention(
            q, k, spans, draw(spans, 8, 0, q.device), AttentionOptions(scale=1.0)
        )
    assert tokens <= largest.numbers <= 2 * 8 * tokens
    # All keys are alike: A_ji = 1 / j exactly, so mu_i is (H_N - H_i) / (N - i).
    position = torch.arange(1, tokens + 1, dtype=torch.float64)
    harmonic = (1 / position).cumsum(0)
    exact = (harmonic[-1] - harmonic) / (tokens - position).clamp(min=1)
    late = slice(tokens // 2, tokens - 1)
    assert ((estimate[0, late] / exact[late]) - 1).abs().median() < 0.5
    assert estimate[0, -1] == 0


@pytest.mark.parametrize("layout", ["right", "packed"])
@pytest.mark.parametrize("sample_rows", [2**20, 2**70], ids=["a million", "more than an int64 holds"])
def test_more_rows_than_tokens_are_all_of_them(sample_rows, layout):
    q, k, arguments = problem("cpu", torch.float32, lengths=(67, 40, 3), layout=layout)
    sampled = incoming_attention(q, k, sample_rows=sample_rows, backend="torch", **arguments)
    assert (sampled.estimate - incoming_attention(q, k, backend="torch", **arguments)).abs().max() <= SLACK
    assert (sampled.standard_error == 0).all()


@pytest.mark.parametrize("batch", [3, 1], ids=["padded", "packed"])
def test_more_rows_than_tokens_cost_no_memory(batch):
    """Every sequence had `sample_rows` numbers of each kind."""
    starts = torch.tensor([0, 67, 107] if batch == 1 else [0, 0, 0])
    spans = Spans(starts, starts + torch.tensor([67, 40, 3]), 3, tokens=110, batch=batch)
    sample = draw(spans, 2**20, 0, torch.device("cpu"))
    assert sample.rows.shape == sample.weights.shape == (3, 67)
    assert sample.spread.shape == (3, 33)
    for count, rows in zip((67, 40, 3), sample.rows.tolist(), strict=True):
        assert rows == [*range(count), *[-1] * (67 - count)]


@pytest.mark.parametrize("device", DEVICES)
def test_custom_op(device, backend, small_tiles):
    q, k, arguments = problem(device, torch.float32, lengths=(40, 11), sinks=True, row_weights=True)
    spans = (arguments["start"], arguments["start"] + arguments["length"], 2)
    operation = torch.ops.entra_kernels.sampled_incoming_attention.default
    q, k, weights = q.nan_to_num(), k.nan_to_num(), arguments["row_weights"].nan_to_num()
    torch.library.opcheck(
        operation,
        (q, k, *spans, backend, 8, 0, 0.2, 9, 3.0, arguments["sinks"], None, weights, True, False, "mean", "mean", False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_rows": 3}, ValueError, "sample_rows=3 must be at least 4 rows"),
        ({"sample_rows": 8.0}, TypeError, "sample_rows=8.0 must be an int, not float"),
        ({"sample_rows": True}, TypeError, "sample_rows=True must be an int"),
        ({"sample_rows": 8, "seed": -1}, ValueError, "seed=-1 must be in 0 to"),
        ({"sample_rows": 8, "per_head": True}, ValueError, "heads='query' has no sampled form; drop sample_rows"),
    ],
    ids=["too few", "float", "bool", "seed", "per head"],
)
def test_refusals(options, error, message):
    q = random(1, 2, 9, 8)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        incoming_attention(q, q, **options)


def test_no_row_means_no_attention():
    empty = incoming_attention(torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8), sample_rows=4)
    assert empty.estimate.shape == empty.standard_error.shape == (1, 0)
    one = incoming_attention(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), sample_rows=4)
    assert one.estimate.item() == 0
    assert math.isfinite(one.standard_error.item())
