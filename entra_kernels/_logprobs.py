"""`token_logprobs` and `linear_token_logprobs`: the public operations. They check, choose a backend and call it."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

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
    check_softcap,
    check_temperature,
    under_autocast,
)


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str = "auto") -> Tensor:
    """`log_softmax(logits.float() / temperature, -1).gather(-1, targets)`, without the log-softmax.

    Natural log, at most 0. Computed in float32 as gather minus log-sum-exp, because a bfloat16 log-softmax rounds the log-probs
    of confident tokens to exactly 0.

    Args:
        logits: [..., V]; bfloat16, float16, float32 or (not with Triton) float64; any strides.
        targets: int [...], ids in 0 ... V - 1.
        temperature: > 0, divides the logits.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        float32 (float64 for float64 inputs), [...]. Logits that are not finite give NaN at their own position only, or -inf
        for a target whose logit is -inf.

    Raises:
        ValueError: shapes that do not agree, a temperature that is not positive and finite, a target outside the vocabulary.
            (On a GPU a look at the targets would wait for the device, so that position is NaN instead.)
        TypeError: a dtype that is not supported, a temperature that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend that you named cannot run here.

    Source: docs/method.md.
    """
    check_dtype(FLOATS, logits=logits)
    check_dtype(INTEGERS, targets=targets)
    check_same_device(logits=logits, targets=targets)
    check_scoring_only(logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [..., V] with V at least 1")
    check_shape("targets", targets, tuple(logits.shape[:-1]), "logits.shape[:-1]")
    return _custom_ops.token_logprobs(logits, targets, check_temperature(temperature), check_backend(backend, logits))


class LogprobsAndEntropy(NamedTuple):
    """What `linear_token_logprobs` returns with return_entropy=True; shapes as in its docstring."""

    logprobs: Tensor
    """log P of each target, natural log, at most 0."""
    entropy: Tensor
    """Of the distribution that the target's log P is of, in nats: 0 to log V, up to rounding."""


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    return_entropy: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    return_entropy: Literal[True],
    backend: str = "auto",
) -> LogprobsAndEntropy: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    rows: Tensor | None = None,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | LogprobsAndEntropy:
    """`token_logprobs(hidden @ weight.T + bias, targets)`, without ever holding [T, V] logits.

    The logits are `z = logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(z / softcap)`, then divided by the
    temperature. This is the order of Cohere 2 (logit_scale = 0.0625) and Gemma 2 (softcap = 30). Products add up in float32.

    Args:
        hidden: [..., C], the head's input at the positions that predict `targets`; bfloat16, float16, float32 or (not with
            Triton) float64.
        weight: [V, C], the language-model head, same dtype. Under autocast two dtypes become autocast's.
        targets: int [...], ids in 0 ... V - 1.
        bias: [V] of the head, or None.
        logit_scale: factor on the logits.
        softcap: c > 0 (1e-30 to 1e30) turns each logit z into c * tanh(z / c). None or 0: no softcap.
        temperature: > 0, divides the logits.
        rows: the positions that you want. They are taken out first, so only they cost time and memory. Either bool [...] of
            targets' shape, such as a completion mask, or int [M], indices into the flattened positions, in any order and also
            repeated. A mask decides the result's shape, so a GPU waits for it and torch.compile breaks its graph. Indices wait
            for nothing. None: all.
        return_entropy: also return the entropy of the distribution that the log-probs are of.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        float32 (float64 for float64 inputs), [...], or [M] in the order of `rows`: natural log, at most 0. With
        return_entropy=True `LogprobsAndEntropy(logprobs, entropy)`, both of that shape. The entropy is in nats, from 0 (all
        mass on one token) to log V (uniform), up to rounding. A hidden state that is not finite gives NaN at its own position
        only.

        The same call gives the same bits. Triton has two ways, and takes the one that should be faster
        (`entra_kernels/_triton/logprobs.py`). One is a fused kernel (float32, few rows or few channels): there a position's
        result does not depend on the other positions, bit for bit. The other multiplies with cuBLAS, chunk by chunk. There, and
        in the other backends, the last digits of the product may depend on the number of positions.

    Raises:
        ValueError: shapes do not agree, or the temperature is not positive and finite. Or a softcap or logit_scale is out of
            its range. Or a target is outside the vocabulary, or an index in `rows` outside the positions. (On a GPU the result
            of these two is NaN instead.)
        TypeError: a dtype that is not supported, an option that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend that you named cannot run here.

    Source: docs/method.md. The idea comes from the chunked head of Cut Your Losses (arXiv 2411.09009).
    """
    check_dtype(FLOATS, hidden=hidden, weight=weight, bias=bias)
    check_dtype(INTEGERS, targets=targets)
    check_dtype((torch.bool, *INTEGERS), rows=rows)
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias, rows=rows)
    check_scoring_only(hidden=hidden, weight=weight, bias=bias)
    hidden, weight = under_autocast(hidden, weight)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}; use hidden.to(weight.dtype)")
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [V, C] with V at least 1")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; its last size must be C={weight.shape[1]} of weight [V, C]")
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    check_shape("bias", bias, (weight.shape[0],), "[V]")
    shape = targets.shape
    if rows is not None:
        rows = _indices(rows, targets)
        shape = rows.shape
    results = _custom_ops.linear_token_logprobs(
        hidden,
        weight,
        targets,
        rows,
        bias,
        check_number("logit_scale", logit_scale, "finite; 1.0 leaves the logits as they are"),
        check_softcap(softcap),
        check_temperature(temperature),
        return_entropy,
        check_backend(backend, hidden),
    )
    results = [result.reshape(shape) for result in results]
    return LogprobsAndEntropy(*results) if return_entropy else results[0]


def _indices(rows: Tensor, targets: Tensor) -> Tensor:
    """`rows` as indices [M] into the flattened positions."""
    if rows.dtype == torch.bool:
        if rows.shape != targets.shape:
            raise ValueError(
                f"rows is a mask of shape {list(rows.shape)}; a mask must have targets' shape {list(targets.shape)}; "
                "for indices pass integers [M]"
            )
        return rows.reshape(-1).nonzero()[:, 0]
    if rows.ndim != 1:
        raise ValueError(f"rows has shape {list(rows.shape)}; indices must be [M], into targets.reshape(-1)")
    if rows.shape[0] and not targets.numel():
        raise ValueError(f"rows holds {rows.shape[0]} indices, but there are no positions; pass rows=None")
    return rows
