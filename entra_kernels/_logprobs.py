"""`token_logprobs` and `linear_token_logprobs`: the public operations. They check, choose a backend and call it."""

from __future__ import annotations

from torch import Tensor

from entra_kernels import _ops
from entra_kernels._checks import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_number,
    check_same_device,
    check_scoring_only,
    check_shape,
    check_softcap,
    check_temperature,
    choose_backend,
)


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, backend: str = "auto") -> Tensor:
    """`log_softmax(logits.float() / temperature, -1).gather(-1, targets)`, without the log-softmax.

    Natural log, at most 0. Computed in float32 as gather minus log-sum-exp: a bfloat16 log-softmax rounds the
    log-probs of confident tokens to exactly 0.

    Args:
        logits: [..., V]; bfloat16, float16, float32 or (not with Triton) float64; any strides.
        targets: int [...], ids in 0 ... V - 1.
        temperature: > 0, divides the logits.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        float32 (float64 for float64 inputs), [...]. Logits that are not finite give NaN (or -inf for a target whose logit
        is -inf) at their own position only.

    Raises:
        ValueError: shapes that do not agree, a target outside the vocabulary (on a GPU, where nobody waits to look at
            values, that position is NaN instead), a temperature that is not positive and finite.
        TypeError: a dtype that cannot be, a temperature that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend named cannot run here.

    Source: docs/method.md.
    """
    check_dtype(FLOATS, logits=logits)
    check_dtype(INTEGERS, targets=targets)
    check_same_device(logits=logits, targets=targets)
    check_scoring_only(logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [..., V] with V at least 1")
    check_shape("targets", targets, tuple(logits.shape[:-1]), "logits.shape[:-1]")
    return _ops.token_logprobs(logits, targets, check_temperature(temperature), choose_backend(backend, logits))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, targets)`, without ever holding [T, V] logits.

    The logits are `z = logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(z / softcap)`, then divided by the
    temperature: the order of Cohere 2 (logit_scale = 0.0625) and Gemma 2 (softcap = 30). Products accumulate in float32.

    Args:
        hidden: [..., C], the head's input at the positions that predict `targets`; bfloat16, float16, float32 or (not with
            Triton) float64. Select the rows that are needed before the call.
        weight: [V, C], the language-model head, same dtype.
        targets: int [...], ids in 0 ... V - 1.
        bias: [V] of the head, or None.
        logit_scale: factor on the logits.
        softcap: c > 0 (1e-30 to 1e30) turns each logit z into c * tanh(z / c); None or 0 for none.
        temperature: > 0, divides the logits.
        backend: "auto" (Triton on CUDA and ROCm, else torch), "reference", "torch" or "triton".

    Returns:
        float32 (float64 for float64 inputs), [...], natural log, at most 0. A hidden state that is not finite gives NaN
        at its own position only. With Triton a position's result does not depend on the other positions, bit for bit. The
        other backends leave the product to a BLAS, whose last digits may depend on the number of positions.

    Raises:
        ValueError: shapes that do not agree, a target outside the vocabulary (on a GPU that position is NaN instead), a
            temperature that is not positive and finite, a softcap or logit_scale out of its range.
        TypeError: a dtype that cannot be, an option that is no number.
        RuntimeError: an input requires grad (use torch.no_grad()), or the backend named cannot run here.

    Source: docs/method.md; the chunked head of Cut Your Losses (arXiv 2411.09009) is the idea's origin.
    """
    check_dtype(FLOATS, hidden=hidden, weight=weight, bias=bias)
    check_dtype(INTEGERS, targets=targets)
    check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    check_scoring_only(hidden=hidden, weight=weight, bias=bias)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype} but hidden has {hidden.dtype}; use hidden.to(weight.dtype)")
    if weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [V, C] with V at least 1")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; its last size must be C={weight.shape[1]} of weight [V, C]")
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    check_shape("bias", bias, (weight.shape[0],), "[V]")
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    out = _ops.linear_token_logprobs(
        rows,
        weight,
        targets.reshape(-1),
        bias,
        check_number("logit_scale", logit_scale, "finite; 1.0 leaves the logits as they are"),
        check_softcap(softcap),
        check_temperature(temperature),
        choose_backend(backend, hidden),
    )
    return out.reshape(targets.shape)
