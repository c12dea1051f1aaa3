"""incoming_attention beside eager attention and one fused SDPA call, float32, 9 query and 3 kv heads, D = 64 (SmolLM2)."""

import math

import pytest
import torch
from measure import DEVICE, peak_memory, side_by_side

from entra_kernels import incoming_attention

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def queries_and_keys(tokens):
    """q and k as transformers hands them over: [1, H, N, D] views of [1, N, H, D]."""
    torch.manual_seed(0)
    q = torch.randn(1, tokens, HEADS, HEAD_DIM, device=DEVICE).transpose(1, 2)
    k = torch.randn(1, tokens, KV_HEADS, HEAD_DIM, device=DEVICE).transpose(1, 2)
    return q, k


def eager(q, k):
    """What users do today: the attention of transformers' eager path, then kvpress-style column means."""
    k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
    tokens = q.shape[2]
    mask = torch.full((tokens, tokens), -math.inf, device=q.device).triu(1)
    attention = torch.softmax(q @ k.transpose(2, 3) * HEAD_DIM**-0.5 + mask, dim=-1)
    return attention.tril(-1).sum(2).mean(1) / torch.arange(tokens - 1, -1, -1, device=q.device).clamp(min=1)


def sdpa(q, k):
    return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_time(benchmark, tokens):
    q, k = queries_and_keys(tokens)
    torch.testing.assert_close(incoming_attention(q, k), eager(q, k), rtol=1e-4, atol=1e-7)
    times = side_by_side(
        {"ours": lambda: incoming_attention(q, k), "eager": lambda: eager(q, k), "sdpa": lambda: sdpa(q, k)},
        rounds=15 if tokens < 4096 else 7,
    )
    benchmark.extra_info.update(
        tokens=tokens, times_faster_than_eager=times["eager"] / times["ours"], times_of_one_sdpa=times["ours"] / times["sdpa"]
    )
    benchmark.pedantic(incoming_attention, args=(q, k), rounds=5, warmup_rounds=1)
    assert times["eager"] / times["ours"] >= 3.5
    assert times["ours"] / times["sdpa"] <= 1.5


def test_memory(benchmark):
    """Linear in the tokens: eager needs N x N per head. At 8,192 tokens under a twentieth of it."""
    ours = {}
    for tokens in (8192, 16384, 32768):
        q, k = queries_and_keys(tokens)
        ours[tokens] = peak_memory(lambda q=q, k=k: incoming_attention(q, k))
    q, k = queries_and_keys(8192)
    dense = peak_memory(lambda: eager(q, k))
    benchmark.extra_info.update(
        {f"mib_at_{tokens}": value / 2**20 for tokens, value in ours.items()}, eager_mib_at_8192=dense / 2**20
    )
    benchmark.pedantic(incoming_attention, args=(q, k), rounds=1)
    assert ours[8192] < dense / 20
    # 4 x the tokens, at most 4 x the memory and what is there whatever the length.
    assert ours[32768] < 4 * ours[8192] + 2**23
