"""`Trace`: one completion as it is looked at: its tokens' text and scores, its prompt, what else its row says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from entra.score import CompletionScores
from entra.view.marked import Mark

NO_SCORES = CompletionScores(
    reward=None,
    token_ids=torch.empty(0, dtype=torch.int64),
    logprobs=torch.empty(0),
    incoming=torch.empty(0),
    importance=torch.empty(0),
    protected=torch.empty(0, dtype=torch.bool),
)
"""Of a completion that could not be scored."""


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
    scores: CompletionScores = field(default_factory=lambda: NO_SCORES)
    """Of the n tokens."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, in its order."""
    error: str | None = None
    """What is wrong with the row, as `entra score` says it; such a trace has no tokens."""

    marked: Sequence[Mark] = ()
    """What the row says of stretches and places of the completion, in the order of their starts (see `marks_of`)."""
    left_out: Sequence[str] = ()
    """Why some marks of the row are not among them."""

    @property
    def reward(self) -> float | None:
        """r in [0, 1], high when the unprotected tokens do not repeat."""
        return self.scores.reward

    @property
    def token_ids(self) -> Sequence[int]:
        """The scores' ids, as Python's numbers; so are the next four."""
        return _numbers(self.scores.token_ids)

    @property
    def logprobs(self) -> Sequence[float]:
        """log P(x_i given x_<i), natural log."""
        return _numbers(self.scores.logprobs)

    @property
    def incoming(self) -> Sequence[float]:
        """mu: mean attention from future tokens (or lift)."""
        return _numbers(self.scores.incoming)

    @property
    def importance(self) -> Sequence[float]:
        """logprob_weight * log P + lambda * mu."""
        return _numbers(self.scores.importance)

    @property
    def protected(self) -> Sequence[bool]:
        """The top share by importance, which the reward does not look at."""
        return _numbers(self.scores.protected)

    def most_repeated(self, length: int = 1, limit: int = 10) -> list[Repeated]:
        """The runs of `length` neighbouring tokens that come most often, more than once; the first to appear wins a tie.

        Single tokens are counted among the unprotected ones, as the reward does; longer runs in the whole text.
        """
        ids = list(self.token_ids)
        runs = list(zip(*(ids[shift:] for shift in range(length)), strict=False))
        protected = self.protected
        counted = [i for i in range(len(runs)) if length > 1 or not protected[i]]
        counts = Counter(runs[i] for i in counted)
        first = {runs[i]: i for i in reversed(counted)}
        return [
            Repeated("".join(self.pieces[first[run] : first[run] + length]), times, first[run])
            for run, times in counts.most_common(limit)
            if times > 1
        ]


def _numbers(values: Tensor) -> Sequence[Any]:
    """A tensor's elements as Python's numbers, without a copy: a report holds millions of tokens."""
    return values.numpy().data


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
