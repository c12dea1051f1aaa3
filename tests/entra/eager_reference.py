"""Incoming attention out of the matrices that eager attention returns: the reference of what a capture yields."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build
from torch import Tensor

# Error budget: the models differ from their float64 selves by rounding alone. Over all families, rows, and layouts the largest
# difference measured is 5.0e-7 (Gemma 4, where scores are not scaled down). Ten times that leaves room for other BLAS.
TOLERANCE = 5e-6


def eager_attentions(family: str, ids: Tensor, **overrides: Any) -> dict[int, Tensor]:
    """float64 [H, N, N] of every layer that has attention, by layer index."""
    model = build(family, attn_implementation="eager", **overrides)
    with torch.no_grad():
        matrices = model(ids[None], use_cache=False, output_attentions=True).attentions
    indices = [
        index
        for index, layer_type in enumerate(getattr(model.config, "layer_types", None) or ["full"] * len(matrices))
        if layer_type != "linear_attention"
    ]
    assert len(indices) == len(matrices)
    return {index: matrix[0].double() for index, matrix in zip(indices, matrices, strict=True)}


def reduce_heads(matrix: Tensor, window: int | None, *, lift: bool = False) -> Tensor:
    """float64 [H, N]: each head's mean attention from future queries, of one unpadded sequence."""
    tokens = matrix.shape[-1]
    visible = torch.arange(1, tokens + 1).clamp(max=window or tokens)
    if lift:
        matrix = matrix * visible[:, None]
    divisor = torch.arange(tokens - 1, -1, -1).clamp(max=(window or tokens + 1) - 1)
    return matrix.tril(-1).sum(-2) / divisor.clamp(min=1)
