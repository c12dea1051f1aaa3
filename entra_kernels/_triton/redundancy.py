"""Placeholder until the kernels land."""

from torch import Tensor


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    attention_weight: float,
    protect_fraction: float,
    degenerate_reward: float,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError
