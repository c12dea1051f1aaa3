"""Placeholder until the blocked version lands."""

from entra_kernels.reference import incoming_attention

__all__ = ["incoming_attention"]
