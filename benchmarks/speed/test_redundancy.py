"""The epilogue against what one would write with topk and unique, on skewed token ids as text has them."""

import time

import pytest
import torch

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DEVICE, by_size, synchronize
from benchmarks.speed.peers import with_unique
from entra_kernels import copies, redundancy

SEQUENCES, TOKENS = by_size(tiny=(4, 64), small=(16, 2048), full=(64, 16_384))
NGRAM = 4


@pytest.mark.priority(3)
def test_redundancy(results, once):
    torch.manual_seed(0)
    total = SEQUENCES * TOKENS
    token_ids = (torch.rand(total, device=DEVICE).pow(-0.8) * 3).long() % 49_152
    arguments = (
        -torch.rand(total, device=DEVICE).log().abs(),
        torch.rand(total, device=DEVICE) / TOKENS,
        token_ids,
        torch.arange(0, total + 1, TOKENS, device=DEVICE),
    )
    expected = with_unique(*arguments)
    compare(
        results,
        "redundancy",
        f"{SEQUENCES} sequences of {TOKENS} tokens",
        {"ours": lambda: redundancy(*arguments).reward, "topk and unique": lambda: with_unique(*arguments)},
        check=lambda name, result: ((result - expected).abs() / (1e-5 + 1e-4 * expected.abs())).max().item(),
        rounds=by_size(tiny=2, small=9, full=30),
        sequences=SEQUENCES,
        tokens=TOKENS,
    )
    once(lambda: redundancy(*arguments), rounds=3)
    # By the host's clock too, launches included: what a caller waits who has nothing else queued.
    waits = []
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        redundancy(*arguments)
        synchronize()
        waits.append(time.perf_counter() - start)
    results.add("redundancy, host clock", f"{SEQUENCES} sequences of {TOKENS} tokens", "ours", ms=sorted(waits)[10] * 1e3)


def _in_a_set(token_ids: list[int]) -> list[bool]:
    """As one would write it for one sequence."""
    copied, seen = [False] * (NGRAM - 1), set()
    for gram in zip(*(token_ids[i:] for i in range(NGRAM)), strict=False):
        copied.append(gram in seen)
        seen.add(gram)
    return copied


@pytest.mark.priority(3)
def test_copies(results, once):
    """Half of every sequence is skewed random ids, and the other half repeats them."""
    torch.manual_seed(0)
    said = (torch.rand(SEQUENCES, TOKENS // 2, device=DEVICE).pow(-0.8) * 3).long() % 49_152
    token_ids = torch.cat([said, said], dim=1).flatten()
    cu_seqlens = torch.arange(0, SEQUENCES * TOKENS + 1, TOKENS, device=DEVICE)

    def with_sets():
        rows = token_ids.view(SEQUENCES, TOKENS).tolist()
        return torch.tensor([_in_a_set(row) for row in rows], device=DEVICE).flatten()

    expected = with_sets()
    compare(
        results,
        "copies",
        f"{SEQUENCES} sequences of {TOKENS} tokens, {NGRAM}-grams",
        {"ours": lambda: copies(token_ids, cu_seqlens, ngram=NGRAM), "sets of tuples": with_sets},
        check=lambda name, result: float((result != expected).sum()),
        rounds=by_size(tiny=2, small=5, full=30),
        sequences=SEQUENCES,
        tokens=TOKENS,
    )
    once(lambda: copies(token_ids, cu_seqlens, ngram=NGRAM), rounds=3)
    logprobs, incoming = -torch.rand(token_ids.numel(), device=DEVICE), torch.rand(token_ids.numel(), device=DEVICE)
    compare(
        results,
        "redundancy",
        f"{SEQUENCES} sequences of {TOKENS} tokens, copies last",
        {"ours": lambda: redundancy(logprobs, incoming, token_ids, cu_seqlens, protect_last=expected).reward},
        rounds=by_size(tiny=2, small=9, full=30),
        sequences=SEQUENCES,
        tokens=TOKENS,
    )
