"""Placeholder until the blocked version lands."""

from entra_kernels.reference import linear_token_logprobs, token_logprobs

__all__ = ["linear_token_logprobs", "token_logprobs"]
