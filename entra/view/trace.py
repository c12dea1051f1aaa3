"""`Trace`: one completion, its tokens and their scores, with the numbers that every view shows computed in one place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary


class Repeated(NamedTuple):
    """A token, or a run of tokens, that comes more than once."""

    text: str
    times: int
    first: int
    """Where it comes first, from 0."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A completion of n tokens as it is looked at; of a row that could not be scored only name, prompt, columns and error."""

    name: str
    """What a list calls it: unique within a report."""
    prompt: str
    """As text; two traces of equal prompt can be laid side by side."""
    pieces: Sequence[str] = ()
    """The text of each of the n tokens (see `pieces_of`); joined they are the completion."""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """log P(x_i given x_<i), natural log."""
    incoming: Sequence[float] = ()
    """mu: mean attention from future tokens (or lift)."""
    importance: Sequence[float] = ()
    """log P + lambda * mu."""
    protected: Sequence[bool] = ()
    """The top share by importance, which the reward does not look at."""
    reward: float | None = None
    """r in [0, 1], high when the unprotected tokens do not repeat."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, in its order."""
    error: str | None = None
    """What is wrong with the row, as `entra score` says it; such a trace has no tokens."""

    @cached_property
    def counts(self) -> Counter[int]:
        """How often each token id occurs among the unprotected tokens."""
        return Counter(token for token, protected in zip(self.token_ids, self.protected, strict=True) if not protected)

    @property
    def unprotected(self) -> int:
        """M, the number of unprotected tokens."""
        return self.counts.total()

    @property
    def entropy(self) -> float:
        """Of the unprotected tokens' frequencies, in nats: from 0, all the same, to log M, all different."""
        total = self.unprotected
        return math.log(total) - sum(c * math.log(c) for c in self.counts.values()) / total if total else 0.0

    @property
    def repeated_share(self) -> float:
        """Share of the unprotected tokens that occurred before among them, (M - different ones) / M, in [0, 1)."""
        return 1 - len(self.counts) / self.unprotected if self.unprotected else 0.0

    def most_repeated(self, length: int = 1, limit: int = 10) -> list[Repeated]:
        """The runs of `length` neighbouring tokens that come most often, more than once; the first to appear wins a tie.

        Single tokens are counted among the unprotected ones, as the reward does; longer runs in the whole text.
        """
        ids = list(self.token_ids)
        runs = list(zip(*(ids[shift:] for shift in range(length)), strict=False))
        starts = [i for i in range(len(runs)) if length > 1 or not self.protected[i]]
        counts = Counter(runs[i] for i in starts)
        first = {runs[i]: i for i in reversed(starts)}
        return [
            Repeated("".join(self.pieces[first[run] : first[run] + length]), times, first[run])
            for run, times in counts.most_common(limit)
            if times > 1
        ]


# A character is at most four bytes, so four tokens; one that never becomes whole must not hold up the rest.
_PATIENCE = 8
# What a token adds to the text after a whole character, by tokenizer and id: reports hold millions of tokens but few ids.
_KNOWN: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


def pieces_of(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds: joined they are `tokenizer.decode(token_ids)`, special tokens included.

    A character that several tokens make together stands with the last of them; what never becomes a character stands as
    U+FFFD, as decoding shows it. One decode per different id, and one of the whole.

    Args:
        tokenizer: of transformers; None: each token is shown as its id.
    """
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    ids = list(token_ids)
    known = _KNOWN.setdefault(tokenizer, {})

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    before: list[int] = []  # stands in front of what is decoded: some tokenizers drop the space before the first token
    open_ids: list[int] = []  # the tokens after it, of which the last does not end a character
    for position, token in enumerate(ids, start=1):
        if before and not open_ids and token in known:
            pieces.append(known[token])
            before = [token]
            continue
        open_ids.append(token)
        text = decode([*before, *open_ids])
        if text.endswith("\ufffd") and len(open_ids) < _PATIENCE and position < len(ids):
            pieces.append("")
            continue
        added = text.removeprefix(decode(before)) if before else text
        if before and len(open_ids) == 1 and "\ufffd" not in text:
            known[token] = added
        pieces.append(added)
        before, open_ids = open_ids, []
    return _fitted(pieces, decode(ids))


def _fitted(pieces: list[str], text: str) -> list[str]:
    """The pieces, joined to exactly `text`: where they differ from it, what is between goes to the last piece there.

    Byte-fallback tokenizers show a whole run of byte tokens as U+FFFD when one of them is wrong, wherever it stands.
    """
    first, last = 0, len(pieces)  # the pieces that do not fit
    start, end = 0, len(text)  # the text that is theirs
    while first < last and text.startswith(pieces[first], start):
        start += len(pieces[first])
        first += 1
    while last > first and text.endswith(pieces[last - 1], start, end):
        end -= len(pieces[last - 1])
        last -= 1
    if first == last:  # all fit; what is left belongs to the last of them
        return pieces if start == end else [*pieces[:-1], pieces[-1] + text[start:]]
    return [*pieces[:first], *[""] * (last - first - 1), text[start:end], *pieces[last:]]
