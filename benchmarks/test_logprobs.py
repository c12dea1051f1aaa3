"""Log-probs from hidden states beside the plain way, at SmolLM2's head: C = 576, V = 49,152."""

import torch
from measure import DEVICE, peak_memory, side_by_side

from entra_kernels import linear_token_logprobs, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 1024, 576, 49_152


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    weight = torch.randn(VOCABULARY, HIDDEN, device=DEVICE) * HIDDEN**-0.5
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)


def plain(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None]).squeeze(1)


def test_linear_token_logprobs(benchmark):
    hidden, weight, targets = inputs()
    torch.testing.assert_close(
        linear_token_logprobs(hidden, weight, targets), plain(hidden, weight, targets), rtol=1e-5, atol=1e-5
    )
    functions = {
        "ours": lambda: linear_token_logprobs(hidden, weight, targets),
        "plain": lambda: plain(hidden, weight, targets),
        "matmul": lambda: hidden @ weight.T,
    }
    times = side_by_side(functions, rounds=5)
    memory = {name: peak_memory(function) for name, function in functions.items()}
    benchmark.extra_info.update(
        times_of_plain=times["ours"] / times["plain"],
        times_of_matmul=times["ours"] / times["matmul"],
        memory_of_plain=memory["ours"] / memory["plain"],
    )
    benchmark.pedantic(linear_token_logprobs, args=(hidden, weight, targets), rounds=3)
    assert memory["ours"] < memory["matmul"]
    assert times["ours"] <= times["plain"]


def test_token_logprobs(benchmark):
    hidden, weight, targets = inputs()
    logits = hidden @ weight.T

    def plain_from_logits():
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)

    torch.testing.assert_close(token_logprobs(logits, targets), plain_from_logits(), rtol=1e-5, atol=1e-5)
    times = side_by_side({"ours": lambda: token_logprobs(logits, targets), "plain": plain_from_logits}, rounds=5)
    benchmark.extra_info.update(times_of_plain=times["ours"] / times["plain"])
    benchmark.pedantic(token_logprobs, args=(logits, targets), rounds=3)
    assert times["ours"] <= times["plain"]
