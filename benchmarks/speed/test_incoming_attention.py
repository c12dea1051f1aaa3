"""incoming_attention against everything else that yields column sums, and against one attention forward.

On a GPU this runs in bfloat16 at the shape of Qwen3-8B (32 query and 8 kv heads, D = 128). On a CPU it runs in float32 at that
of SmolLM2 (9 and 3 heads, D = 64).
"""

import pytest
import torch

from benchmarks.speed.compare import NO_TIME, compare
from benchmarks.speed.measure import DEVICE, DTYPE, bounds, by_size, peak_memory
from benchmarks.speed.peers import (
    WITH_DIAGONAL,
    attention_forwards,
    attention_peers,
    colreduce,
    diagonal,
    eager,
    error_of_allowed,
    last_rows,
    repeated,
    row_lse,
)
from entra_kernels import incoming_attention

HEADS, KV_HEADS, HEAD_DIM = by_size(tiny=(4, 2, 32), small=(9, 3, 64), full=(32, 8, 128))
TARGET = by_size(tiny=256, small=4096, full=32_768)


def queries_and_keys(tokens, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM):
    """q and k as transformers hands them over: [1, H, N, D] views of [1, N, H, D]."""
    torch.manual_seed(0)
    q = torch.randn(1, tokens, heads, head_dim, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    k = torch.randn(1, tokens, kv_heads, head_dim, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    return q, k


def work(scores, head_dim, products=1, exponentials=1):
    """What `compare` asks about this many scores: FLOP of the matrix products, and the least time of both kinds."""
    flops = products * 2.0 * head_dim * scores
    return {"flops": flops, "matmul_s": flops / bounds().matmul_flops, "exp_s": exponentials * scores / bounds().exps}


def causal_scores(tokens, heads):
    return heads * tokens * (tokens - 1) / 2


def compare_attention(results, case, q, k, peers=True, **parameters):
    heads, tokens, head_dim = q.shape[1:]
    lse = row_lse(q, k)
    runs = {
        "ours": lambda: incoming_attention(q, k, normalize=False).squeeze(0),
        "ours, given LSE": lambda: incoming_attention(q, k, lse=lse, normalize=False).squeeze(0),
        **attention_forwards(q, k),
        **(attention_peers(q, k, lse) if peers else {}),
    }
    expected = {}

    def check(name, result):
        if name == "ours":  # comes first; held to float64 in test_accuracy.py and in tests/
            expected.update({False: result, True: result + diagonal(q, k, lse)})
        if name == "ours" or name.startswith("SDPA"):
            return None
        return error_of_allowed(result, expected[name in WITH_DIAGONAL], q.dtype)

    scores = causal_scores(tokens, heads)
    passes = 2 if DEVICE == "cuda" else 1  # the torch backend takes the softmax of whole rows
    facts = {name: work(scores, head_dim, 2) for name in runs if name.startswith("SDPA")}
    facts["ours"] = work(scores, head_dim, passes, passes)
    facts["ours, given LSE"] = work(scores, head_dim)
    return compare(
        results,
        "incoming_attention",
        case,
        runs,
        check=check,
        facts=facts,
        rounds=by_size(tiny=2, small=5 if tokens >= 4096 else 9, full=15),
        seconds=by_size(tiny=1, small=2, full=1.5),
        tokens=tokens,
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=head_dim,
        **parameters,
    )


def lengths():
    every = by_size(tiny=[128, 256], small=[1024, 2048, 4096], full=[2**i for i in range(10, 18)])
    for tokens in every:
        # The target's length first, then the longest ones: what is cut off when time is over is then what matters least.
        yield pytest.param(tokens, marks=pytest.mark.priority(1 if tokens == TARGET else 45 - tokens.bit_length()))


@pytest.mark.parametrize("tokens", lengths())
def test_against_peers(results, once, tokens):
    q, k = queries_and_keys(tokens)
    records = compare_attention(results, f"N = {tokens}", q, k, sweep="tokens")
    once(lambda: incoming_attention(q, k))
    if results.asserts():
        # The quickest round of each: a busy machine disturbs some rounds, and not those of all alike.
        quickest = {name: record["ms_low"] for name, record in records.items() if "ms_low" in record}
        ours, given_lse, forward = (quickest[name] for name in ("ours", "ours, given LSE", "SDPA forward"))
        # At 1,024 tokens eager took 20 to 55 ms on one machine, by how warm its 120 MiB were: 2.4 to 6.4 times ours.
        assert quickest["eager"] / ours >= (3.5 if tokens > 1024 else 1.5)
        assert ours / forward <= 1.5
        assert tokens < 4096 or given_lse / forward <= 1.0


@pytest.mark.priority(40)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shapes(results, once, head_dim, group):
    heads = by_size(tiny=8, small=8, full=32)
    q, k = queries_and_keys(by_size(tiny=128, small=1024, full=16_384), heads, heads // group, head_dim)
    compare_attention(results, f"D = {head_dim}, G = {group}", q, k, peers=False, sweep="shape", group=group)
    once(lambda: incoming_attention(q, k))


@pytest.mark.priority(20)
def test_skewed_lengths(results, once):
    """Packed sequences from a few long ones to many short ones, beside one call per sequence."""
    longest = by_size(tiny=128, small=2048, full=32_768)
    counts = [longest, longest // 2, *[longest // 8] * 4, *[longest // 64] * 32]
    q, k = (x.squeeze(0).transpose(0, 1) for x in queries_and_keys(sum(counts)))
    bounds_of = torch.tensor([0, *counts], device=DEVICE).cumsum(0)

    def packed():
        return incoming_attention(q, k, cu_seqlens=bounds_of)

    def one_by_one():
        q_parts, k_parts = q.split(counts), k.split(counts)
        return torch.cat(
            [
                incoming_attention(q_part.transpose(0, 1)[None], k_part.transpose(0, 1)[None])[0]
                for q_part, k_part in zip(q_parts, k_parts, strict=True)
            ]
        )

    expected = packed()
    scores = sum(causal_scores(tokens, HEADS) for tokens in counts)
    passes = 2 if DEVICE == "cuda" else 1
    compare(
        results,
        "incoming_attention",
        f"packed, {len(counts)} sequences of {min(counts)} to {longest} tokens",
        {"ours": packed, "ours, one call per sequence": one_by_one},
        check=lambda name, result: error_of_allowed(result, expected, DTYPE),
        facts={"ours": work(scores, HEAD_DIM, passes, passes)},
        rounds=by_size(tiny=2, small=7, full=15),
        sweep="skewed",
        tokens=sum(counts),
    )
    once(packed)


@pytest.mark.priority(15)
def test_observation_window(results, once):
    """The last 64 queries of every key, as SnapKV asks for them, beside these rows of attention themselves."""
    tokens, window = by_size(tiny=256, small=32_768, full=32_768), 64
    q, k = queries_and_keys(tokens)
    last, every_key = q[:, :, -window:], repeated(k, HEADS)
    options = {"last": window, "include_diagonal": True}
    records = compare(
        results,
        "incoming_attention",
        f"last {window} queries of N = {tokens}",
        {
            "ours": lambda: incoming_attention(q, k, **options).squeeze(0),
            "the rows of attention": lambda: last_rows(last, every_key).mean(2).mean(1).squeeze(0),
            "their scores alone": lambda: last @ every_key.transpose(2, 3),
        },
        check=lambda name, result: window_error(q, k, options, result) if name == "the rows of attention" else None,
        rounds=by_size(tiny=2, small=9, full=15),
        sweep="window",
        tokens=tokens,
    )
    once(lambda: incoming_attention(q, k, **options))
    if results.asserts():
        assert records["ours"]["ms"] <= 1.2 * records["the rows of attention"]["ms"]


def reduced(attention, reduction):
    return attention.amax(2) if reduction == "max" else attention.sum(2)


def window_error(q, k, options, result):
    """The rows' mean against ours. The last keys are seen by fewer queries than the window has: there the sums are compared."""
    sums = incoming_attention(q, k, reduction="sum", **options).squeeze(0)
    return error_of_allowed(result * options["last"], sums, q.dtype)


@pytest.mark.priority(16)
def test_fewer_queries_than_keys(results, once):
    """Sums and maxima over 1,024 queries of all keys, with the diagonal, for each query head: flash-colreduce's own terms."""
    tokens, rows = by_size(tiny=256, small=4096, full=32_768), by_size(tiny=64, small=256, full=1024)
    q, k = queries_and_keys(tokens)
    q = q[:, :, -rows:]
    for reduction in ("sum", "max"):
        options = {"reduction": reduction, "heads": "query", "include_diagonal": True}
        ours = incoming_attention(q, k, **options)
        every_key = repeated(k, HEADS)
        compare(
            results,
            "incoming_attention",
            f"{reduction} over {rows} queries of N = {tokens}",
            {
                "ours": lambda options=options: incoming_attention(q, k, **options),
                "flash-colreduce": colreduce(q, k, reduction),
                "eager": lambda reduction=reduction, keys=every_key: reduced(last_rows(q, keys), reduction),
            },
            check=lambda name, result, ours=ours: None if name == "ours" else error_of_allowed(result[0], ours[0], DTYPE),
            rounds=by_size(tiny=2, small=9, full=15),
            sweep="fewer queries",
            tokens=tokens,
        )
    once(lambda: incoming_attention(q, k, **options))


@pytest.mark.priority(12)
def test_memory(results, once):
    """What a call needs on top of q and k. It is linear in the tokens; eager attention has N x N per head."""
    needed = {}
    for tokens in by_size(tiny=[128, 256], small=[8192, 32_768], full=[8192, 2**17, 2**20]):
        q, k = queries_and_keys(tokens)
        case, parameters = f"N = {tokens}", {"tokens": tokens, "heads": HEADS, "kv_heads": KV_HEADS}
        for name, run in (("ours", lambda q=q, k=k: incoming_attention(q, k)), ("eager", lambda q=q, k=k: eager(q, k))):
            if results.out_of_time():
                results.add("memory", case, name, **parameters, skipped=NO_TIME)
            elif name == "ours" or tokens <= 8192:
                needed[name, tokens] = peak_memory(run)
                allowed = {"allowed_bytes": 4 * tokens * (HEADS + 2 * KV_HEADS) + 2**24} if name == "ours" else {}
                results.add("memory", case, name, **parameters, peak_bytes=needed[name, tokens], **allowed)
    once(lambda: incoming_attention(q[:, :, :128], k[:, :, :128]))
    if results.asserts():
        assert needed["ours", 8192] < needed["eager", 8192] / 20
        # 4 x the tokens, at most 4 x the memory and what is there whatever the length.
        assert needed["ours", 32_768] < 4 * needed["ours", 8192] + 2**23
