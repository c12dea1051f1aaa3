"""Scores as views get them, from plain lists."""

import torch

from entra.score import CompletionScores


def scores_of(token_ids, *, protected=None, reward=0.5, **columns):
    """Scores of these tokens; columns that are not given are zeros, and no token is protected unless it is told."""
    zeros = [0.0] * len(token_ids)
    return CompletionScores(
        reward=reward,
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        protected=torch.tensor([False] * len(token_ids) if protected is None else protected, dtype=torch.bool),
        **{
            name: torch.tensor(columns.get(name, zeros), dtype=torch.float64) for name in ("logprobs", "incoming", "importance")
        },
    )
