"""The length-adjusted reward: what r would be at a fixed number of positions.

r = H / log M falls with M by itself, because a vocabulary is used up. Rarefaction, the way ecologists compare the diversity
of samples of unequal size (Hurlbert 1971), answers with the expectation over all ways to draw m of the M positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rarefied_redundancy(token_ids: Tensor, positions: int) -> float:
    """E[H_m] / log m: expected normalised entropy of m = min(positions, M) of the M given tokens, drawn without replacement.

    How often a token that occurs c times is drawn, X, is hypergeometric, so E[H_m] = log m - (1/m) sum_tokens E[X log X]:
    exact, no sampling. Equals the plain reward when m = M.

    Args:
        token_ids: int [M], the unprotected tokens or what is counted in their place, at least 2.
        positions: m, at least 2.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: fewer than 2 tokens or positions.
    """
    total = token_ids.numel()
    if total < 2 or positions < 2:
        raise ValueError(f"token_ids holds {total} tokens and positions={positions}; both must be at least 2")
    m = min(positions, total)
    counts = token_ids.unique(return_counts=True)[1]
    repeated = 0.0
    for count, how_many in zip(*(t.tolist() for t in counts.unique(return_counts=True)), strict=True):
        drawn = torch.arange(max(0, m - (total - count)), min(count, m) + 1, dtype=torch.float64)
        log_probability = (
            _log_choose(count, drawn) + _log_choose(total - count, m - drawn) - _log_choose(total, torch.tensor(m))
        )
        repeated += how_many * float((log_probability.exp() * torch.xlogy(drawn, drawn)).sum())
    return min(max(1.0 - repeated / (m * math.log(m)), 0.0), 1.0)


def _log_choose(n: int, k: Tensor) -> Tensor:
    k = k.double()
    return torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
