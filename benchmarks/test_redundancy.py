"""The epilogue beside what one would write with sort and unique, on skewed token ids as text has them."""

import itertools
import math

import torch
from measure import DEVICE, side_by_side

from entra_kernels import redundancy

SEQUENCES, TOKENS = 16, 2048


def with_unique(logprobs, incoming, token_ids, cu_seqlens):
    rewards = []
    bounds = cu_seqlens.tolist()
    for first, end in itertools.pairwise(bounds):
        importance = logprobs[first:end] + 2.0 * incoming[first:end]
        k = math.floor(0.2 * (end - first) + 1e-9)
        left = torch.ones(end - first, dtype=torch.bool, device=logprobs.device)
        left[torch.topk(importance, k).indices] = False
        counts = token_ids[first:end][left].unique(return_counts=True)[1]
        shares = counts / counts.sum()
        rewards.append(-(shares * shares.log()).sum() / math.log(end - first - k))
    return torch.stack(rewards)


def test_redundancy(benchmark):
    torch.manual_seed(0)
    total = SEQUENCES * TOKENS
    token_ids = (torch.rand(total, device=DEVICE).pow(-0.8) * 3).long() % 49_152
    arguments = (
        -torch.rand(total, device=DEVICE).log().abs(),
        torch.rand(total, device=DEVICE) / TOKENS,
        token_ids,
        torch.arange(0, total + 1, TOKENS, device=DEVICE),
    )
    torch.testing.assert_close(redundancy(*arguments).reward, with_unique(*arguments), rtol=1e-4, atol=1e-5)
    times = side_by_side({"ours": lambda: redundancy(*arguments), "unique": lambda: with_unique(*arguments)}, rounds=9)
    benchmark.extra_info.update(times_of_topk_and_unique=times["ours"] / times["unique"])
    benchmark.pedantic(redundancy, args=arguments, rounds=5)
