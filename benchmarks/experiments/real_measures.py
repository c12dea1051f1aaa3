"""What is judged on real traces: orders of a completion's tokens (importances), and numbers of a whole completion (rewards).

An importance is float64 [n], higher is protected first. A reward is one number of a passage, here always turned so that higher
means *more redundant*; each is what a training run could subtract.

Decisions taken here:

- The paper's importance has lambda = 2, and the share tau = 0.2 is protected, ties to the lower index: `entra.ScoreConfig()`.
- A passage is ranked by itself: it protects a fifth of its own tokens. Its log P and mu are those of the whole completion.
- A copy is a token that ends an n-gram which prompt or completion had before. "Of the completion" counts the completion alone.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.experiments import copies
from benchmarks.experiments.real_signals import Signals
from benchmarks.experiments.real_traces import RealTrace
from entra.config import ScoreConfig
from entra.rarefaction import rarefied_redundancy
from entra_kernels import redundancy

Array = NDArray[np.float64]

PAPER = "log P + 2 mu"
SURPRISAL = "surprisal: -log P + 2 mu"
NO_COPIES_SHOWN = ("no copies, n = 2", "no copies, n = 4")
SHARED = "shared by a sentence"
NGRAMS = (2, 3, 4, 5, 6)
POSITIONS = 100
"""Unprotected positions of the rarefied r."""
_CONFIG = ScoreConfig()
SHRINK = (16, 64, 256)
"""Later queries at which a shrunk mean counts half."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A trace and what the scorer says of its n tokens."""

    trace: RealTrace
    signals: Signals

    @cached_property
    def copies(self) -> dict[int, NDArray[np.bool_]]:
        """By n, which tokens continue an n-gram of prompt or completion; bool [n]."""
        return {n: copies.continues(self.trace.prompt_ids, self.trace.token_ids, n) for n in NGRAMS}

    @cached_property
    def copies_inside(self) -> dict[int, NDArray[np.bool_]]:
        """By n, which tokens continue an n-gram of the completion alone; bool [n]."""
        return {n: copies.continues([], self.trace.token_ids, n) for n in (2, 4)}

    @cached_property
    def explained(self) -> Array:
        """`copies.copied` of the completion, in [0, 1]."""
        return copies.copied(self.trace.prompt_ids, self.trace.token_ids)

    @cached_property
    def paper(self) -> Array:
        """log P + 2 mu, as `score_batch` adds them."""
        return self.signals.logprobs + _CONFIG.attention_weight * self.signals.mean

    @property
    def later(self) -> Array:
        """How many later tokens each has."""
        return np.arange(len(self.trace.token_ids) - 1, -1, -1, dtype=np.float64)


def _last(importance: Array, copy: NDArray[np.bool_]) -> Array:
    """Copies come after everything else, in the order that they had."""
    return np.where(copy, importance - 1e6, importance)


def _no_copies(n: int) -> Callable[[Measured], Array]:
    return lambda measured: _last(measured.paper, measured.copies[n])


def _shrunk(half: int) -> Callable[[Measured], Array]:
    return lambda measured: measured.signals.mean * measured.later / (measured.later + half)


def _shared(measured: Measured) -> Array:
    """Each sentence's tokens get the mean of its importance; what is in no sentence keeps its own."""
    result = measured.paper.copy()
    for sentence in measured.trace.sentences:
        part = slice(sentence.first, sentence.last + 1)
        result[part] = measured.paper[part].mean()
    return result


def _runs(measured: Measured) -> Array:
    """The largest n of `NGRAMS` at which a token is a copy, 0 where it is none."""
    return np.max([n * measured.copies[n] for n in NGRAMS], axis=0).astype(np.float64)


def _scaled(values: Array) -> Array:
    return values / max(float(np.abs(values).mean()), 1e-30)


IMPORTANCES: dict[str, Callable[[Measured], Array]] = {
    PAPER: lambda m: m.paper,
    "log P": lambda m: m.signals.logprobs,
    "mu": lambda m: m.signals.mean,
    "lift": lambda m: m.signals.lift,
    "mu of all layers": lambda m: m.signals.mean_all,
    SURPRISAL: lambda m: -m.signals.logprobs + 2 * m.signals.mean,
    **{f"no copies, n = {n}": _no_copies(n) for n in NGRAMS},
    "no copies of the completion, n = 2": lambda m: _last(m.paper, m.copies_inside[2]),
    "no copies of the completion, n = 4": lambda m: _last(m.paper, m.copies_inside[4]),
    "surprisal, no copies, n = 4": lambda m: _last(-m.signals.logprobs + 2 * m.signals.mean, m.copies[4]),
    "discounted: log P - log(1 + n) + 2 mu": lambda m: m.paper - np.log1p(_runs(m)),
    **{f"mu shrunk by {half} queries": _shrunk(half) for half in SHRINK},
    "mu without the nearest 8": lambda m: m.signals.far_8,
    "mu without the nearest 32": lambda m: m.signals.far,
    "mu without the nearest 128": lambda m: m.signals.far_128,
    "value-weighted": lambda m: m.signals.value,
    "log P + value-weighted": lambda m: m.signals.logprobs + _scaled(m.signals.value),
    SHARED: _shared,
    "gradient": lambda m: m.signals.gradient,
    "position (early first)": lambda m: m.later,
}
"""Orders of a completion's tokens, by name."""
ANY = "any importance"
FAMILIES = {
    "copies last": tuple(name for name in IMPORTANCES if name.startswith("no copies")),
    "mu without the nearest": tuple(name for name in IMPORTANCES if name.startswith("mu without")),
    "mu shrunk": tuple(name for name in IMPORTANCES if name.startswith("mu shrunk")),
    ANY: tuple(name for name in IMPORTANCES if not name.startswith("position")),
}
"""Importances of which one is chosen, by the name of the choice. Position is no candidate: it looks at no token."""


def protected(importance: Array, share: float = _CONFIG.protect_fraction) -> NDArray[np.bool_]:
    """The tokens that `entra_kernels.redundancy` protects of this importance, in float64; bool [n]."""
    values = torch.from_numpy(importance)
    bounds = torch.tensor([0, len(values)])
    ids = torch.zeros_like(values, dtype=torch.int64)
    kept: NDArray[np.bool_] = redundancy(
        values, torch.zeros_like(values), ids, bounds, protect_fraction=share
    ).protected.numpy()
    return kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """Tokens `first` to `end` (without it) of a completion."""

    measured: Measured
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def cut(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """These tokens' part of something that there is for each token."""
        return values[self.first : self.end]

    @cached_property
    def ids(self) -> list[int]:
        """Its tokens."""
        return self.measured.trace.token_ids[self.first : self.end]

    @cached_property
    def text(self) -> str:
        """Its characters."""
        starts = self.measured.trace.starts
        return self.measured.trace.text[starts[self.first] : starts[self.end] if self.end < len(starts) else None]

    @cached_property
    def unprotected(self) -> NDArray[np.bool_]:
        """By the paper's importance; bool [len]."""
        return ~protected(self.measured.paper[self.first : self.end])

    @cached_property
    def not_copied(self) -> NDArray[np.bool_]:
        """Unprotected where copies (n = 4) are protected last; bool [len]."""
        return ~protected(_last(self.measured.paper, self.measured.copies[4])[self.first : self.end])


def _rarefied(passage: Passage) -> float:
    ids = torch.tensor(passage.ids)[torch.from_numpy(passage.unprotected)]
    return rarefied_redundancy(ids, min(POSITIONS, len(ids))) if len(ids) > 1 else 0.0


def _repeated(ids: list[int], n: int) -> float:
    """Share of the n-grams that occurred before, as TRL's repetition penalty counts them; 0 where there is none."""
    total = len(ids) - n + 1
    return 1 - len({tuple(ids[i : i + n]) for i in range(total)}) / total if total > 0 else 0.0


def _compressed(text: str) -> float:
    data = text.encode()
    return -len(gzip.compress(data, 9, mtime=0)) / max(len(data), 1)


def _entropy(n: int) -> Callable[[Passage], float]:
    return lambda passage: -copies.entropy(passage.ids, passage.unprotected, n)


R = "r"
REWARDS: dict[str, Callable[[Passage], float]] = {
    R: lambda p: -copies.entropy(p.ids, p.unprotected, 1),
    "r of 100 positions": lambda p: -_rarefied(p),
    "r, copies protected last": lambda p: -copies.entropy(p.ids, p.not_copied, 1),
    "D = M (1 - r)": lambda p: int(p.unprotected.sum()) * (1 - copies.entropy(p.ids, p.unprotected, 1)),
    "mean log P": lambda p: float(p.cut(p.measured.signals.logprobs).mean()),
    "length": lambda p: float(len(p)),
    "gzip ratio": lambda p: _compressed(p.text),
    "distinct-2": lambda p: _repeated(p.ids, 2),
    "TRL's repetition penalty (n = 3)": lambda p: _repeated(p.ids, 3),
    **{f"entropy of {n}-grams": _entropy(n) for n in NGRAMS},
    "D of 4-grams": lambda p: int(p.unprotected.sum()) * (1 - copies.entropy(p.ids, p.unprotected, 4)),
    "copied share (n = 4)": lambda p: float(p.cut(p.measured.copies[4]).mean()),
    "copied share (n = 4) of the completion": lambda p: float(p.cut(p.measured.copies_inside[4]).mean()),
    "copied share, by address": lambda p: float(p.cut(p.measured.explained).mean()),
    "copied share, by address and probability": lambda p: float(
        (p.cut(p.measured.explained) * np.exp(p.cut(p.measured.signals.logprobs))).mean()
    ),
}
"""Numbers of a passage, by name, higher where it is more redundant."""
