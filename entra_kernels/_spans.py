"""Where each sequence lies, in either layout, without an operation on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Which rows of q count, where they are not the keys' own tokens. A row that stands outside its sequence never does."""

    rows: int
    """Rows of q in a batch element."""
    bounds: Tensor | None = None
    """int [S + 1], packed: the rows of sequence s are bounds[s] ... bounds[s + 1] - 1. None: all of its batch element."""
    places: Tensor | None = None
    """int [S]: the token at which a sequence's first row stands, counted from the sequence's first token if packed, else from
    the batch element's. None: the last row stands at the last token of these."""
    last: int | None = None
    """Only so many rows of each sequence, the last ones."""


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
    queries: Queries | None = None
    """None: every token of a sequence is a query as well."""

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
        if self.queries is None or self.queries.bounds is None:
            return
        bounds = self.queries.bounds.tolist()
        for sequence, ((_, _, keys), (first, end)) in enumerate(zip(self, pairwise(bounds), strict=True)):
            if not 0 <= first <= end <= self.queries.rows:
                raise ValueError(
                    f"sequence {sequence} has the queries {first} to {end}, outside 0 to {self.queries.rows}; check "
                    "cu_seqlens_q (0, then running sums of the numbers of queries)"
                )
            if end - first > keys and self.queries.places is None:
                raise ValueError(
                    f"sequence {sequence} has {end - first} queries and {keys} keys; without query_start the last query "
                    "stands at the last key, so there cannot be more of them: check cu_seqlens and cu_seqlens_q"
                )

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(batch element, first token, number of tokens) of each sequence, cut to its element. Waits for the device."""
        for sequence, (first, end) in enumerate(self._bounds()):
            first = min(max(first, 0), self.tokens)
            yield (sequence if self.batch > 1 else 0), first, max(min(end, self.tokens) - first, 0)

    def with_queries(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """`__iter__`'s three, and those of `query_spans`. Waits for the device."""
        if self.queries is None:
            for element, first, count in self:
                yield element, first, count, first, count, 0
            return
        device = next(
            (t.device for t in (self.starts, self.ends, self.queries.bounds, self.queries.places) if t is not None), None
        )
        rows = self.query_spans(device or torch.device("cpu")).tolist()
        for (element, first, count), (row, number, place) in zip(self, rows, strict=True):
            yield element, first, count, row, number, place

    def query_spans(self, device: torch.device) -> Tensor:
        """int64 [S, 3] on `device`, without waiting: of the rows of q that count, the first one in its batch element, their
        number, and the token at which the first one stands, counted from the sequence's first."""
        assert self.queries is not None
        first = torch.zeros(self.count, dtype=torch.int64, device=device) if self.starts is None else self.starts.long()
        first = first.clamp(0, self.tokens)
        count = self.token_counts(device)
        bounds, places, last = self.queries.bounds, self.queries.places, self.queries.last
        if bounds is None:
            row, rows = torch.zeros_like(first), torch.full_like(first, self.queries.rows)
            place = (self.tokens - self.queries.rows if places is None else places.long()) - first
        else:
            bounds = bounds.long().clamp(0, self.queries.rows)
            row, rows = bounds[:-1], bounds.diff().clamp(min=0)
            place = count - rows if places is None else places.long()
        before = (-place).clamp(min=0)
        end = torch.minimum(rows, count - place)
        if last is not None:
            before = torch.maximum(before, end - last)
        return torch.stack((row + before, (end - before).clamp(min=0), place + before), dim=1)

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
