"""`redundancy`: the public operation. It checks, chooses a backend and calls it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _custom_ops
from ._checks import (
    FLOATS,
    INTEGERS,
    check_backend,
    check_dtype,
    check_number,
    check_same_device,
    check_scoring_only,
    check_shape,
)


class Redundancy(NamedTuple):
    """What `redundancy` returns; shapes as in its docstring."""

    reward: Tensor
    """r of each sequence, in [0, 1]: 1 when no unprotected token repeats, 0 when all are the same."""
    importance: Tensor
    """log P + lambda * incoming attention, of each token."""
    protected: Tensor
    """Whether the token is among the most important, at which the reward does not look."""


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    attention_weight: float = 2.0,
    protect_fraction: float = 0.2,
    degenerate_reward: float = 0.0,
    protect_last: Tensor | None = None,
    backend: str = "auto",
) -> Redundancy:
    """`entropy(bincount(token_ids[~protected])) / log(M)` with `protected = topk(logprobs + attention_weight * incoming)`.

    For a sequence of n tokens:

    - the importance is I = log-prob + lambda * incoming attention;
    - the k = floor(tau * n + 1e-9) tokens of highest I are protected, and ties go to the lower index;
    - the reward is the entropy (nats) of the token-id frequencies among the M = n - k others, over log M. It lies in [0, 1]: 1
      when no token repeats, 0 when all are the same.

    It is one fused operation, without a sort of the vocabulary and without a host synchronisation.

    Args:
        logprobs: float [T], log P of each token (packed; only the tokens that are ranked).
        incoming: float [T], mean incoming attention of each token.
        token_ids: int [T], any ids >= 0.
        cu_seqlens: int [S + 1]: 0, then the running sums of the sequence lengths.
        attention_weight: lambda, finite.
        protect_fraction: tau, in [0, 1].
        degenerate_reward: finite, the reward when M <= 1, where entropy over log M is undefined.
        protect_last: bool [T], tokens that are protected only after all others of their sequence, by importance as these are:
            for example `copies(...)`. k and the importance stay as they are. None: importance alone decides.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        Redundancy(reward float32 [S], importance float32 [T], protected bool [T]) (float64 for float64 inputs). A sequence in
        which a log-prob or incoming attention is not finite gets reward NaN and protects nothing; the others are untouched.
        Tokens that cu_seqlens leaves out belong to no sequence and are not protected.

    Raises:
        ValueError: shapes that do not agree, an option out of its range, or (on a CPU only) a negative token id, or a
            cu_seqlens that falls or leaves the tokens. On a GPU a look would wait for the device. So a negative id counts as an
            id there, sequences are clamped to the tokens, and the results of sequences that overlap mean nothing.
        TypeError: a dtype that is not supported, an option that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend that you named cannot run here.

    Source: arXiv 2601.07123; docs/method.md.
    """
    check_dtype(FLOATS, logprobs=logprobs, incoming=incoming)
    check_dtype(INTEGERS, token_ids=token_ids, cu_seqlens=cu_seqlens)
    check_dtype((torch.bool,), protect_last=protect_last)
    check_same_device(
        logprobs=logprobs, incoming=incoming, token_ids=token_ids, cu_seqlens=cu_seqlens, protect_last=protect_last
    )
    check_scoring_only(logprobs=logprobs, incoming=incoming)
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}; it must be packed, [T]")
    check_shape("incoming", incoming, tuple(logprobs.shape), "[T]")
    check_shape("token_ids", token_ids, tuple(logprobs.shape), "[T]")
    check_shape("protect_last", protect_last, tuple(logprobs.shape), "[T]")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}; it must be [S + 1]")
    return Redundancy(
        *_custom_ops.redundancy(
            logprobs,
            incoming,
            token_ids,
            cu_seqlens,
            protect_last,
            check_number("attention_weight", attention_weight, "finite; 2.0 is the default"),
            check_number("protect_fraction", protect_fraction, "in [0, 1]; 0.2 protects the top 20 %", low=0.0, high=1.0),
            check_number("degenerate_reward", degenerate_reward, "finite; 0.0 is the default"),
            # Either input in float64 makes the result float64, which Triton does not have.
            check_backend(backend, incoming if incoming.dtype == torch.float64 else logprobs),
        )
    )
