"""`redundancy`: the public operation. It checks, chooses a backend and calls it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entra_kernels import _ops
from entra_kernels._checks import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_same_device,
    check_scoring_only,
    check_shape,
    choose_backend,
)


class Redundancy(NamedTuple):
    """What `redundancy` returns; shapes as in its docstring."""

    reward: Tensor
    importance: Tensor
    protected: Tensor


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    attention_weight: float = 2.0,
    protect_fraction: float = 0.2,
    degenerate_reward: float = 0.0,
    backend: str = "auto",
) -> Redundancy:
    """`entropy(bincount(token_ids[~protected])) / log(M)` with `protected = topk(logprobs + attention_weight * incoming)`.

    Per sequence of n tokens: I = log-prob + lambda * incoming attention; the k = floor(tau * n + 1e-9) tokens of highest I are
    protected, ties going to the lower index; the reward is the entropy (nats) of the token-id frequencies among the M = n - k
    others over log M, in [0, 1]: 1 when no token repeats, 0 when all are the same. One fused operation, without a sort of the
    vocabulary and without a host synchronisation.

    Args:
        logprobs: float [T], log P of each token (packed; only the tokens that are ranked).
        incoming: float [T], mean incoming attention of each token.
        token_ids: int [T], any ids >= 0.
        cu_seqlens: int [S + 1]: 0, then the running sums of the sequence lengths.
        attention_weight: lambda, finite.
        protect_fraction: tau, in [0, 1].
        degenerate_reward: the reward when M <= 1, where entropy over log M is undefined.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        Redundancy(reward float32 [S], importance float32 [T], protected bool [T]) (float64 for float64 inputs). A sequence in
        which a log-prob or incoming attention is not finite gets reward NaN and protects nothing; the others are untouched.

    Raises:
        ValueError: shapes that do not agree, fractions outside [0, 1], a cu_seqlens that descends or leaves the tokens (the
            last on a CPU only). Tokens that it leaves out belong to no sequence and are not protected.
        TypeError: a dtype that cannot be.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend named cannot run here.

    Source: arXiv 2601.07123; docs/method.md.
    """
    check_dtype(FLOATS, logprobs=logprobs, incoming=incoming)
    check_dtype(INTEGERS, token_ids=token_ids, cu_seqlens=cu_seqlens)
    check_same_device(logprobs=logprobs, incoming=incoming, token_ids=token_ids, cu_seqlens=cu_seqlens)
    check_scoring_only(logprobs=logprobs, incoming=incoming)
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}; it must be packed, [T]")
    check_shape("incoming", incoming, tuple(logprobs.shape), "[T]")
    check_shape("token_ids", token_ids, tuple(logprobs.shape), "[T]")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1]")
    if not 0.0 <= protect_fraction <= 1.0:
        raise ValueError(f"protect_fraction={protect_fraction} must be in [0, 1]; 0.2 protects the top 20 %")
    if not torch.finfo(torch.float32).min <= attention_weight <= torch.finfo(torch.float32).max:
        raise ValueError(f"attention_weight={attention_weight} must be a finite float32 number")
    return Redundancy(
        *_ops.redundancy(
            logprobs,
            incoming,
            token_ids,
            cu_seqlens,
            float(attention_weight),
            float(protect_fraction),
            float(degenerate_reward),
            # Either input in float64 makes the result float64, which Triton does not have.
            choose_backend(backend, incoming if incoming.dtype == torch.float64 else logprobs),
        )
    )
