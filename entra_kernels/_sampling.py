"""Which query rows stand for all of them: a stratified sample, drawn without looking at a length on the host.

The last rows are taken as they are, because a key near the end is seen by few queries. The rows before them are cut into
strata of neighbouring rows, and each stratum gives two, drawn without replacement: the fewest that tell the variance within
it. The estimate of a sum over rows is Horvitz and Thompson's: each row counts by the inverse of its inclusion probability. Two
rows y, y' of a stratum of s rows add s (s - 2) / 4 (y - y')^2 to its estimated variance (Cochran, Sampling Techniques, ch. 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._spans import Spans

EXACT_SHARE = 4
"""One row in this many is spent on the last rows of the sequence."""


class SampledRows(NamedTuple):
    """m rows of each of S sequences, ascending; rows 2h and 2h + 1 share a stratum."""

    rows: Tensor
    """int64 [S, m], counted from the sequence's start; -1 past the end of a sequence shorter than m, which has all its rows."""
    weights: Tensor
    """float64 [S, m]: 1 / inclusion probability, 0 where there is no row."""
    spread: Tensor
    """float64 [S, m // 2]: what the squared difference of rows 2h and 2h + 1 adds to the variance."""


def draw(spans: Spans, sample_rows: int, seed: int, device: torch.device) -> SampledRows:
    """`sample_rows` rows of each sequence, at most as many as the longest has; more would be memory for nothing. A GPU is not
    asked for the lengths: there the limit is what a batch element has. The draw depends on seed and length of the sequence
    alone."""
    sample_rows = min(sample_rows, max(spans.longest(device), 4))
    strata = (sample_rows - sample_rows // EXACT_SHARE) // 2
    exact = sample_rows - 2 * strata
    tokens = spans.token_counts(device)[:, None]  # [S, 1]
    uniform = torch.rand(2, strata, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if device.type == "cuda":
        uniform = uniform.pin_memory()  # a copy from other memory waits for the device
    uniform = uniform.to(device, non_blocking=True)

    before = (tokens - exact).clamp(min=2 * strata)  # rows in strata; no sequence shorter than that uses them
    stratum = torch.arange(strata + 1, device=device)
    borders = before * stratum // strata  # [S, strata + 1]
    first, size = borders[:, :-1], borders.diff(dim=1)
    share = size.double()
    one = (uniform[0] * size).long().clamp(max=size - 1)
    other = (uniform[1] * (size - 1)).long().clamp(max=size - 2)
    other = other + (other >= one)  # any but the first one, all equally likely
    pairs = torch.stack((first + torch.minimum(one, other), first + torch.maximum(one, other)), dim=2).flatten(1)
    last = tokens - exact + torch.arange(exact, device=device)
    rows = torch.cat((pairs, last), dim=1)
    weights = torch.cat((share.repeat_interleave(2, dim=1) / 2, torch.ones_like(last, dtype=share.dtype)), dim=1)
    spread = torch.cat((share * (share - 2) / 4, share.new_zeros(share.shape[0], exact // 2)), dim=1)

    every = torch.arange(sample_rows, device=device)
    few = tokens <= sample_rows
    return SampledRows(
        torch.where(few, torch.where(every < tokens, every, -1), rows),
        torch.where(few, (every < tokens).double(), weights),
        spread.masked_fill(few, 0.0),
    )
