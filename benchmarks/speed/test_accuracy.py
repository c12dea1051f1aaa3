"""Errors against float64, whether the protected tokens stay the same, and what sampling rows costs and gives."""

import math

import pytest
import torch

from benchmarks.speed.activations import random_activations, real_activations
from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DTYPE, by_size
from benchmarks.speed.peers import eager, error_of_allowed, row_lse
from entra_kernels import incoming_attention

HEADS, KV_HEADS, HEAD_DIM = by_size(tiny=(4, 2, 32), small=(9, 3, 64), full=(32, 8, 128))
TOKENS = by_size(tiny=128, small=4096, full=32_768)
REAL_TOKENS = by_size(tiny=128, small=4096, full=4096)


def overlap(ours, exact):
    """The share of the 20 % of highest values that both have in common; the first token, which has no log-prob, is out."""
    count = math.floor(0.2 * (exact.numel() - 1))
    top = [set(values[1:].topk(count).indices.tolist()) for values in (ours, exact)]
    return len(top[0] & top[1]) / count


def agreement(mu, exact, logprobs):
    return {
        "same_top_mu": overlap(mu, exact),
        "same_top_importance": overlap(logprobs.double() + 2 * mu.double(), logprobs.double() + 2 * exact.double()),
    }


@pytest.mark.priority(10)
@pytest.mark.parametrize("kind", ["random", "SmolLM2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_against_float64(results, once, kind, dtype):
    """Against eager attention in the same dtype, on the same q and k, which are rounded to it first."""
    tokens = by_size(tiny=128, small=1024, full=4096)
    drawn = random_activations(tokens, HEADS, KV_HEADS, HEAD_DIM) if kind == "random" else real_activations(REAL_TOKENS)
    case = f"{kind}, {str(dtype).removeprefix('torch.')}"
    if isinstance(drawn, str):
        results.add("accuracy", case, "ours", skipped=drawn)
        pytest.skip(drawn)
    q, k = (x[:, :, :tokens].to(dtype) for x in drawn[:2])
    exact = incoming_attention(q.double(), k.double(), backend="reference", normalize=False)[0]
    queries_after = torch.arange(tokens - 1, -1, -1, device=q.device).clamp(min=1)
    # Flash attention on a GPU takes half precision only; on a CPU it finds those of these inputs exactly.
    lse = row_lse(q.to(DTYPE), k.to(DTYPE))
    runs = {"ours": lambda: incoming_attention(q, k, normalize=False)[0], "eager": lambda: eager(q, k)}
    if DTYPE in (dtype, torch.float32):
        runs["ours, given LSE"] = lambda: incoming_attention(q, k, lse=lse, normalize=False)[0]
    for name, run in runs.items():
        sums = run()
        relative = (sums.double() - exact).abs() / (exact + 1 / tokens)
        results.add(
            "accuracy",
            case,
            name,
            tokens=tokens,
            error_max=relative.max().item(),
            error_mean=relative.mean().item(),
            error_of_allowed=error_of_allowed(sums, exact, dtype),
            **agreement(sums / queries_after, exact / queries_after, drawn.logprobs[:tokens]),
        )
        if name.startswith("ours"):
            assert error_of_allowed(sums, exact, dtype) <= 1
    once(runs["ours"])


def sampled_counts(tokens):
    return [m for m in (64, 256, 1024, 4096, 16_384) if m < tokens] + [tokens]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        pytest.param("SmolLM2", REAL_TOKENS, marks=pytest.mark.priority(13)),
        pytest.param("random", TOKENS, marks=pytest.mark.priority(14)),
        *by_size(tiny=[], small=[], full=[pytest.param("random", 2**17, marks=pytest.mark.priority(32))]),
    ],
)
def test_sampled_rows(results, once, kind, tokens):
    """m of N query rows: time, error, how often 1.96 standard errors cover the truth, and the protected tokens."""
    drawn = random_activations(tokens, HEADS, KV_HEADS, HEAD_DIM) if kind == "random" else real_activations(tokens)
    case = f"{kind}, N = {tokens}"
    if isinstance(drawn, str):
        results.add("sampled rows", case, "ours", skipped=drawn)
        pytest.skip(drawn)
    q, k = drawn.q, drawn.k
    exact = incoming_attention(q, k)[0]
    runs, facts = {"ours, exact": lambda: incoming_attention(q, k)[0]}, {}
    for m in sampled_counts(tokens):
        estimate, standard_error = (x[0] for x in incoming_attention(q, k, sample_rows=m, seed=0))
        error = (estimate - exact).abs()
        uncertain = standard_error > 0  # rows that are always taken are exact
        covered = (error <= 1.96 * standard_error)[uncertain].float().mean().item() if uncertain.any() else None
        name = f"ours, m = {m}"
        runs[name] = lambda m=m: incoming_attention(q, k, sample_rows=m, seed=0)
        facts[name] = {
            "m": m,
            "error_l1": (error.sum() / exact.sum()).item(),
            "covered": covered,
            "uncertain": uncertain.float().mean().item(),
            **agreement(estimate, exact, drawn.logprobs),
        }
    compare(
        results,
        "sampled rows",
        case,
        runs,
        facts=facts,
        rounds=by_size(tiny=2, small=5, full=7),
        seconds=by_size(tiny=1, small=3, full=1.5),
        tokens=tokens,
    )
    once(runs[f"ours, m = {sampled_counts(tokens)[0]}"])


@pytest.mark.priority(34)
@pytest.mark.parametrize("spread", [0.04, 1, 2, 4, 12])
def test_coverage(results, once, spread):
    """How often 1.96 standard errors cover the truth, by quarter of the tokens; scores of that standard deviation."""
    tokens, m, draws = by_size(tiny=(64, 16, 4), small=(960, 192, 100), full=(960, 192, 100))
    q, k, _ = random_activations(tokens, 4, 2, 64)
    options = {"scale": spread / 8}  # the products of two standard normal vectors of 64 entries have a deviation of 8
    exact = incoming_attention(q, k, **options)[0]
    covered, error = torch.zeros(2, tokens, device=q.device)
    for seed in range(draws):
        sampled = incoming_attention(q, k, sample_rows=m, seed=seed, **options)
        off = (sampled.estimate[0] - exact).abs()
        covered += (off <= 1.96 * sampled.standard_error[0]) / draws
        error += off / draws
    # Keys whose later rows are all taken as they are have no error.
    quarters = covered[: tokens - m // 4].chunk(4)
    results.add(
        "coverage",
        f"scores of standard deviation {spread:g}",
        "ours",
        tokens=tokens,
        m=m,
        draws=draws,
        error_l1=(error.sum() / exact.sum()).item(),
        **{f"covered_quarter_{i + 1}": quarter.mean().item() for i, quarter in enumerate(quarters)},
    )
    once(lambda: incoming_attention(q, k, sample_rows=m, **options))


@pytest.mark.priority(33)
def test_long_context(results, once):
    """A sampled run at a length where the exact one takes long: a million tokens on a GPU."""
    tokens, m = by_size(tiny=(2048, 64), small=(65_536, 512), full=(2**20, 4096))
    q, k, _ = random_activations(tokens, HEADS, KV_HEADS, HEAD_DIM)
    run, name = lambda: incoming_attention(q, k, sample_rows=m, seed=0), f"ours, m = {m}"
    allowed = {name: {"m": m, "allowed_bytes": 4 * tokens * (HEADS + 2 * KV_HEADS) + 2**24}}
    compare(results, "sampled rows", f"random, N = {tokens}", {name: run}, facts=allowed, rounds=3, seconds=5, tokens=tokens)
    once(run)
