"""Placeholder until the kernels land."""

from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    raise NotImplementedError


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    raise NotImplementedError
