"""The epilogue against what one would write with topk and unique, on skewed token ids as text has them."""

import time

import pytest
import torch

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DEVICE, by_size, synchronize
from benchmarks.speed.peers import with_unique
from entra_kernels import redundancy

SEQUENCES, TOKENS = by_size(tiny=(4, 64), small=(16, 2048), full=(64, 16_384))


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
