"""Placeholder until the blocked version lands."""

from entra_kernels.reference import redundancy

__all__ = ["redundancy"]
