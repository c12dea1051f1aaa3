"""What a text repeats of what it said before: pure functions of token ids.

Sources: suffix matches and their addresses are LZ77's (Ziv and Lempel 1977), on tokens instead of bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import entra_kernels

SHORTEST = 3
"""Tokens of the shortest copy that `copied` finds: an address is worth two tokens, so a copy of two saves nothing."""
ADDRESS = 2
"""Tokens that the address of a copy counts for: where it starts and how long it is."""
_LATEST = 64  # earlier places of one 3-gram that are tried


def continues(prompt_ids: Sequence[int], token_ids: Sequence[int], n: int) -> NDArray[np.bool_]:
    """Which of the completion's tokens are `entra_kernels.copies` of prompt or completion; bool [len(token_ids)]."""
    ids = torch.tensor([*prompt_ids, *token_ids])
    copied: NDArray[np.bool_] = entra_kernels.copies(ids, torch.tensor([0, len(ids)]), ngram=n).numpy()
    return copied[len(prompt_ids) :]


def entropy(token_ids: Sequence[int], counted: NDArray[np.bool_], n: int) -> float:
    """Entropy of the n-grams that end at counted positions, over log M: 1 when none repeats, 0 when all are the same.

    M is their number. The first n - 1 tokens end none. Below 2 of them it is 0, as `ScoreConfig.degenerate_reward`.
    """
    grams = Counter(tuple(token_ids[i + 1 - n : i + 1]) for i in range(n - 1, len(token_ids)) if counted[i])
    total = grams.total()
    if total < 2:
        return 0.0
    return 1 - sum(count * math.log(count) for count in grams.values()) / total / math.log(total)


def copied(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> NDArray[np.float64]:
    """How much of each of the completion's tokens an earlier passage explains, in [0, 1]; float64 [n].

    From left to right, the longest passage that prompt or completion had before is one copy. A copy of L tokens costs `ADDRESS`
    tokens, so each of its tokens is explained to `1 - ADDRESS / L`. The mean of all is the share that a compressor saves.
    """
    ids = [*prompt_ids, *token_ids]
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    result = np.zeros(len(ids))

    def remember(start: int, end: int) -> None:
        for i in range(start, end):
            if i + SHORTEST <= len(ids):
                places[tuple(ids[i : i + SHORTEST])].append(i)

    remember(0, len(prompt_ids))
    i = len(prompt_ids)
    while i < len(ids):
        longest = 0
        for place in places.get(tuple(ids[i : i + SHORTEST]), [])[-_LATEST:] if i + SHORTEST <= len(ids) else []:
            length = SHORTEST
            while i + length < len(ids) and ids[place + length] == ids[i + length]:
                length += 1
            longest = max(longest, length)
        if longest > ADDRESS:
            result[i : i + longest] = 1 - ADDRESS / longest
        remember(i, i + max(longest, 1))
        i += max(longest, 1)
    return result[len(prompt_ids) :]
