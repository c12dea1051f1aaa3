"""`Trace`: one completion, its tokens and their scores, with the numbers that every view shows computed in one place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple


class Repeated(NamedTuple):
    """A token, or a run of tokens, that comes more than once."""

    text: str
    times: int


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
        ids, pieces = list(self.token_ids), list(self.pieces)
        starts = [i for i in range(len(ids) - length + 1) if length > 1 or not self.protected[i]]
        counts = Counter(tuple(ids[i : i + length]) for i in starts)
        texts: dict[tuple[int, ...], str] = {}
        for i in starts:
            texts.setdefault(tuple(ids[i : i + length]), "".join(pieces[i : i + length]))
        return [Repeated(texts[run], count) for run, count in counts.most_common(limit) if count > 1]


def pieces_of(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds: joined they are `tokenizer.decode(token_ids)`, special tokens included.

    A character that several tokens make together stands with the last of them; what never becomes a character stands as
    U+FFFD, as decoding shows it.

    Args:
        tokenizer: of transformers; None: each token is shown as its id.
    """
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    pieces: list[str] = []
    first = 0  # of the tokens that are decoded together: back to where a character was last complete
    shown = ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[first:end]), clean_up_tokenization_spaces=False)
        complete = not text.endswith("�") or end == len(token_ids)
        if not complete and end - first < 8:
            pieces.append("")
            continue
        pieces.append(text[len(shown) :] if text.startswith(shown) else text)
        # One complete token stays in front: some tokenizers drop the space before the first token that they decode.
        first = end - 1
        shown = tokenizer.decode(list(token_ids[first:end]), clean_up_tokenization_spaces=False)
    return pieces
