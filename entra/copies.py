"""Which of the tokens that are ranked are copies of what their row said before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entra.config import ScoreConfig
from entra.encode import EncodedRow
from entra_kernels import copies


def copied_tokens(rows: Sequence[EncodedRow], config: ScoreConfig, device: torch.device) -> list[Tensor] | None:
    """bool [ranked tokens] of each row, on `device`: whether the token ends an n-gram that prompt or completion had before.

    None where `config` does not ask for it.
    """
    if config.copy_ngram is None:
        return None
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    copied = copies(
        torch.tensor([i for row in rows for ids in row for i in ids], dtype=torch.int64).to(device),
        torch.tensor([0, *lengths]).cumsum(0).to(device),
        ngram=config.copy_ngram,
        backend=config.backend,
    )
    # The ranked tokens are the last ones of a row.
    ranked = [len(row.ranked(config.ranking_scope)) for row in rows]
    return [row[row.numel() - count :] for row, count in zip(copied.split(lengths), ranked, strict=True)]
