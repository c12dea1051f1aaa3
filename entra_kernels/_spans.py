"""Where each sequence lies, in either layout, without an operation on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """`count` sequences (starts[s], ends[s]). Sequence s lies in batch element s; where there is one element, all lie in it
    (packed)."""

    starts: Tensor | None
    """int [S], first tokens; None: 0."""
    ends: Tensor | None
    """int [S], one past the last tokens; None: the element's end."""
    count: int
    tokens: int
    """Tokens of a batch element, pads included."""
    batch: int
    """Batch elements."""

    def check(self, device: torch.device) -> None:
        """Raises a ValueError for a sequence that leaves its batch element. On a CPU only: elsewhere looking would wait."""
        if device.type != "cpu":
            return
        for sequence, (first, end) in enumerate(self._bounds()):
            if not 0 <= first <= end <= self.tokens:
                raise ValueError(
                    f"sequence {sequence} spans tokens {first} to {end}, outside 0 to {self.tokens}; "
                    "check start and length, or cu_seqlens (0, then running sums of the lengths)"
                )

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(batch element, first token, number of tokens) of each sequence, cut to its element. Waits for the device."""
        for sequence, (first, end) in enumerate(self._bounds()):
            first = min(max(first, 0), self.tokens)
            yield (sequence if self.batch > 1 else 0), first, max(min(end, self.tokens) - first, 0)

    def token_counts(self, device: torch.device) -> Tensor:
        """int64 [S] on `device`, cut to the elements; without waiting."""
        first = torch.zeros(self.count, dtype=torch.int64, device=device) if self.starts is None else self.starts.long()
        end = torch.full_like(first, self.tokens) if self.ends is None else self.ends.long()
        return (end.clamp(0, self.tokens) - first.clamp(0, self.tokens)).clamp(min=0)

    def longest(self, device: torch.device) -> int:
        """No sequence has more tokens: on a CPU the longest's number, elsewhere, where looking would wait, the element's."""
        if device.type != "cpu":
            return self.tokens
        return max((count for _, _, count in self), default=0)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        starts = [0] * self.count if self.starts is None else self.starts.tolist()
        ends = [self.tokens] * self.count if self.ends is None else self.ends.tolist()
        return zip(starts, ends, strict=True)


def packed_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of each sequence, int32 [S], cut to `tokens`; without waiting for the device."""
    bounds = cu_seqlens.clamp(0, tokens).int()
    return bounds[:-1], (bounds[1:] - bounds[:-1]).clamp(min=0)
