"""Other ways to the same numbers, each as one would write it today, and what each of them must give.

A peer is a function without arguments, or a string that says why it cannot run here. Attention peers return [N], the sums over
queries, mean over heads, as `incoming_attention(..., normalize=False)` does. Most of them cannot leave the diagonal out.
`WITH_DIAGONAL` names those, and they are compared with sums that have it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.measure import DEVICE

Peer = Callable[[], Tensor] | str

WITH_DIAGONAL = {"flash-colreduce", "flash backward", "flash backward alone, given forward", "cudnn backward"}
CUDA_ONLY = "needs CUDA"
SLICE = 2**26 if DEVICE == "cuda" else 2**22  # scores that chunked eager holds at a time


def _missing(module: str) -> str | None:
    if importlib.util.find_spec(module) is not None:
        return None
    return f"{module.replace('_', '-')} is not installed: pip install 'entra-reward[bench]'"


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One plain attention forward; grouped heads where q has more of them."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def repeated(k: Tensor, heads: int) -> Tensor:
    return k.repeat_interleave(heads // k.shape[1], dim=1)


def row_lse(q: Tensor, k: Tensor) -> Tensor:
    """[1, H, N] float32, the log-sum-exp of each row that a flash forward leaves behind for its backward."""
    k = repeated(k, q.shape[1])
    if DEVICE == "cuda":
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, 0.0, True, False)[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, True)[1]


def diagonal(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """[N], the probability of each token to attend to itself, mean over heads."""
    scores = (q.float() * repeated(k, q.shape[1]).float()).sum(-1) * q.shape[-1] ** -0.5
    return (scores - lse).exp().mean(1).squeeze(0)


def error_of_allowed(result: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest error of sums, divided by what a peer may have: 8 roundings of the inputs' dtype of a sum, and of 1 / N.

    A score of 5 rounded once moves its probability by 5 roundings. The probability and the sum are rounded once each. A
    diagonal entry is of the size of 1 / N. Leaving it in or out, or a wrong mask, scale or head, is 10 times as much or more.
    """
    if result.shape != expected.shape:
        raise ValueError(f"shape {list(result.shape)} instead of {list(expected.shape)}")
    # float32: the order of additions counts too, over up to 2**17 queries.
    rounding = 2**-18 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    error = (result.double() - expected.double()).abs()
    return (error / (8 * rounding * (expected.double() + 1 / expected.numel()))).max().item()


def eager(q: Tensor, k: Tensor) -> Tensor:
    """The attention of transformers' eager path, softmax in float32, then column sums as kvpress takes them."""
    tokens = q.shape[2]
    mask = torch.full((tokens, tokens), -math.inf, device=q.device, dtype=q.dtype).triu(1)
    scores = q @ repeated(k, q.shape[1]).transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    attention = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return attention.tril(-1).sum(2, dtype=torch.float32).mean(1).squeeze(0)


def chunked_eager(q: Tensor, k: Tensor) -> Tensor:
    """The same for a few rows at a time."""
    heads, tokens = q.shape[1:3]
    k = repeated(k, heads)
    sums = torch.zeros(tokens, device=q.device)
    rows = max(16, SLICE // (heads * tokens))
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        scores = q[:, :, first:last] @ k[:, :, :last].transpose(2, 3) * q.shape[-1] ** -0.5
        hidden = torch.ones(last - first, last, dtype=torch.bool, device=q.device).triu(first + 1)
        attention = torch.softmax(scores.masked_fill_(hidden, -math.inf), dim=-1, dtype=torch.float32).to(q.dtype)
        sums[:last] += attention.tril_(first - 1).sum(2, dtype=torch.float32).mean(1).squeeze(0)
    return sums


def backward(q: Tensor, k: Tensor, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """Output of an attention forward with v = 1, and v. With dO = 1 each column of dV is the column sum."""
    k = repeated(k, q.shape[1])
    v = torch.ones_like(k).requires_grad_()
    with torch.enable_grad(), sdpa_kernel(backend):
        return causal_attention(q, k, v), v


def value_gradient(out: Tensor, v: Tensor, keep: bool = False) -> Tensor:
    (gradient,) = torch.autograd.grad(out, v, torch.ones_like(out), retain_graph=keep)
    return gradient[..., 0].float().mean(1).squeeze(0)


def flex_column_sums(q: Tensor, k: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]:
    """FlexAttention with the roles swapped: the keys ask, the queries answer, and each score is reduced by its row's LSE. Then
    the returned log-sum-exp is the log of the column sum. Returns this function of an LSE, and the pass that finds the LSE."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch._dynamo.reset()  # or the eighth length falls back to flex_attention without a kernel
    tokens = q.shape[2]
    k = repeated(k, q.shape[1])
    values = q[..., :16].contiguous()  # nobody looks at the output: 16 is the least width that it takes
    compiled = torch.compile(flex_attention, dynamic=False)
    later = create_block_mask(lambda b, h, i, j: i < j, None, None, tokens, tokens, device=q.device, _compile=True)
    earlier = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=q.device, _compile=True)

    def lse() -> Tensor:
        return compiled(q, k, values, block_mask=earlier, return_aux=AuxRequest(lse=True))[1].lse

    def sums(lse: Tensor) -> Tensor:
        def minus_lse(score, batch, head, key, query):
            return score - lse[batch, head, query]

        aux = compiled(k, q, values, score_mod=minus_lse, block_mask=later, return_aux=AuxRequest(lse=True))[1]
        return aux.lse.exp().mean(1).squeeze(0)

    return sums, lse


def attention_peers(q: Tensor, k: Tensor, lse: Tensor) -> dict[str, Peer]:
    """Everything that yields column sums of causal attention."""
    compiled_eager = torch.compile(eager)
    peers: dict[str, Peer] = {
        "flash backward": lambda: value_gradient(*backward(q, k, SDPBackend.FLASH_ATTENTION)),
        "flash backward alone, given forward": CUDA_ONLY,
        "cudnn backward": CUDA_ONLY,
        "flash-colreduce": CUDA_ONLY,
        "flex attention, roles swapped": CUDA_ONLY,
        "flex attention, roles swapped, given LSE": CUDA_ONLY,
        "chunked eager": lambda: chunked_eager(q, k),
        "eager": lambda: eager(q, k),
        "torch.compile(eager)": lambda: compiled_eager(q, k),
    }
    if DEVICE == "cpu":
        return peers

    # Built at the first call, which is where a failure is recorded.
    forward = functools.cache(lambda: backward(q, k, SDPBackend.FLASH_ATTENTION))
    flex = functools.cache(lambda: flex_column_sums(q, k))

    peers["cudnn backward"] = lambda: value_gradient(*backward(q, k, SDPBackend.CUDNN_ATTENTION))
    peers["flash backward alone, given forward"] = lambda: value_gradient(*forward(), keep=True)
    peers["flex attention, roles swapped"] = lambda: flex()[0](flex()[1]())
    peers["flex attention, roles swapped, given LSE"] = lambda: flex()[0](lse)
    sums = colreduce(q, k, "sum")
    peers["flash-colreduce"] = (lambda: sums().mean(1).squeeze(0)) if callable(sums) else sums
    return peers


def colreduce(q: Tensor, k: Tensor, reduction: str) -> Peer:
    """flash-colreduce's reduction over the queries for each query head, [1, H, N], diagonal included, aligned at the end."""
    if DEVICE == "cpu":
        return CUDA_ONLY

    def run() -> Tensor:
        from flash_colreduce import flash_colreduce

        return flash_colreduce(q, repeated(k, q.shape[1]), reduction, is_causal=True).float()

    return _missing("flash_colreduce") or run


def last_rows(q: Tensor, k: Tensor) -> Tensor:
    """The attention of the last queries [1, H, Nq, D] to all keys [1, H, N, D], as an eager forward has it: [1, H, Nq, N]."""
    rows, tokens = q.shape[2], k.shape[2]
    mask = torch.full((rows, tokens), -math.inf, device=q.device, dtype=q.dtype).triu(tokens - rows + 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def attention_forwards(q: Tensor, k: Tensor) -> dict[str, Peer]:
    """The yardstick: one attention forward, by each backend that there is, grouped and with the keys repeated beforehand."""
    if DEVICE == "cpu":
        return {"SDPA forward": lambda: causal_attention(q, k, k)}
    many = repeated(k, q.shape[1])

    def forward(backend: SDPBackend, keys: Tensor) -> Peer:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return causal_attention(q, keys, keys)

        return run

    return {
        "SDPA forward, flash": forward(SDPBackend.FLASH_ATTENTION, k),
        "SDPA forward, flash, repeated": forward(SDPBackend.FLASH_ATTENTION, many),
        "SDPA forward, cudnn": forward(SDPBackend.CUDNN_ATTENTION, k),
        "SDPA forward, cudnn, repeated": forward(SDPBackend.CUDNN_ATTENTION, many),
        "SDPA forward, efficient, repeated": forward(SDPBackend.EFFICIENT_ATTENTION, many),
    }


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)


def chunked_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 1024) -> Tensor:
    """The same for 1,024 positions at a time, or an eighth where that is less."""
    rows = min(rows, max(1, hidden.shape[0] // 8))
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([plain_logprobs(some, weight, of) for some, of in parts])


def logprob_peers(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Peer]:
    """Everything that yields log-probs of targets; all but `plain` without holding all logits."""
    peers: dict[str, Peer] = {
        "plain": lambda: plain_logprobs(hidden, weight, targets),
        "chunked torch": lambda: chunked_logprobs(hidden, weight, targets),
        "liger-kernel": CUDA_ONLY,
        "cut-cross-entropy": CUDA_ONLY,
    }
    if DEVICE == "cpu":
        return peers

    def liger() -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        with torch.no_grad():  # it has a faster way then
            return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")

    def cce() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    peers["liger-kernel"] = _missing("liger_kernel") or liger
    peers["cut-cross-entropy"] = _missing("cut_cross_entropy") or cce
    return peers


def with_unique(logprobs: Tensor, incoming: Tensor, token_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The reward of each sequence with torch.topk and unique."""
    rewards = []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        importance = logprobs[first:last] + 2.0 * incoming[first:last]
        k = math.floor(0.2 * (last - first) + 1e-9)
        left = torch.ones(last - first, dtype=torch.bool, device=logprobs.device)
        left[torch.topk(importance, k).indices] = False
        counts = token_ids[first:last][left].unique(return_counts=True)[1]
        shares = counts / counts.sum()
        rewards.append(-(shares * shares.log()).sum() / math.log(last - first - k))
    return torch.stack(rewards)
