"""Log-probs from hidden states, against the bare matrix product that they need, and against other ways to them.

On a GPU at the heads of Llama 3 (C = 4,096, 131,072 of its vocabulary) and Qwen3 (151,936), on a CPU at SmolLM2's.
"""

import pytest
import torch

from benchmarks.speed.compare import compare
from benchmarks.speed.measure import DEVICE, DTYPE, bounds, by_size
from benchmarks.speed.peers import logprob_peers
from entra_kernels import linear_token_logprobs, token_logprobs

SHAPES = by_size(tiny=[(64, 32, 500)], small=[(1024, 576, 49_152)], full=[(8192, 4096, 131_072), (32_768, 4096, 151_936)])
CHECKED = 256
"""Rows that are compared with float64."""


def inputs(tokens, hidden_size, vocabulary):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=DEVICE, dtype=DTYPE)
    weight = (torch.randn(vocabulary, hidden_size, device=DEVICE) * hidden_size**-0.5).to(DTYPE)
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=DEVICE)


def ways(hidden, weight, targets):
    """Both implementations for a GPU, whichever of them ours chooses."""
    if DEVICE != "cuda":
        return {}
    from entra_kernels._triton.logprobs import linear_token_logprobs as triton_logprobs

    def run(way):
        return lambda: triton_logprobs(
            hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, way=way
        )[0]

    return {f"ours, {way}": run(way) for way in ("fused", "chunked")}


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocabulary"),
    [pytest.param(*shape, marks=pytest.mark.priority(2 if shape is SHAPES[0] else 30)) for shape in SHAPES],
)
def test_linear_token_logprobs(results, once, tokens, hidden_size, vocabulary):
    hidden, weight, targets = inputs(tokens, hidden_size, vocabulary)
    exact = linear_token_logprobs(hidden[:CHECKED].double(), weight.double(), targets[:CHECKED], backend="reference")
    # What a peer with logits in the inputs' dtype may lose: a logit of 4 to 8 is rounded by up to 4 roundings, and so is the
    # log-sum-exp. In float32 the order of additions is more.
    allowed = 2**-14 if hidden.dtype == torch.float32 else 4 * torch.finfo(DTYPE).eps

    def check(name, result):
        if name == "matmul":
            return None
        return (result[:CHECKED].double() - exact).abs().max().item() / allowed

    flops = 2.0 * tokens * hidden_size * vocabulary
    work = {"flops": flops, "matmul_s": flops / bounds().matmul_flops}
    runs = {
        "ours": lambda: linear_token_logprobs(hidden, weight, targets),
        "matmul": lambda: hidden @ weight.T,
        **ways(hidden, weight, targets),
        **logprob_peers(hidden, weight, targets),
    }
    records = compare(
        results,
        "linear_token_logprobs",
        f"{tokens} x {hidden_size} x {vocabulary}",
        runs,
        check=check,
        facts=dict.fromkeys(runs, work),
        rounds=by_size(tiny=2, small=5, full=15),
        seconds=by_size(tiny=1, small=4, full=2),
        tokens=tokens,
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        logits_bytes=tokens * vocabulary * hidden.element_size(),
    )
    once(lambda: linear_token_logprobs(hidden, weight, targets))
    if results.asserts():
        assert records["ours"]["ms"] <= records["plain"]["ms"]
        assert records["ours"]["peak_bytes"] <= records["plain"]["peak_bytes"] / 20


@pytest.mark.priority(31)
def test_token_logprobs(results, once):
    hidden, weight, targets = inputs(*by_size(tiny=(64, 32, 500), small=(1024, 576, 49_152), full=(8192, 512, 151_936)))
    logits = hidden @ weight.T

    def plain():
        return torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)

    expected = plain()
    records = compare(
        results,
        "token_logprobs",
        f"{logits.shape[0]} x {logits.shape[1]}",
        {"ours": lambda: token_logprobs(logits, targets), "plain": plain},
        check=lambda name, result: (result - expected).abs().max().item() / 1e-4,
        rounds=by_size(tiny=2, small=7, full=15),
        bytes=logits.numel() * logits.element_size(),
    )
    once(lambda: token_logprobs(logits, targets))
    if results.asserts():
        assert records["ours"]["ms"] <= records["plain"]["ms"]
