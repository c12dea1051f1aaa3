"""Computations that a real trace makes again, and what rewards and importances say of them.

Decisions taken here:

- A computation is a sentence of that category in which at least two different numbers stand. It is an *attempt again* if an
  earlier computation has the same last number and at least half of their numbers in common, and doubt came between the two: a
  plan, an uncertainty or a self-check. All others are new.
- The numbers decide, not the words and not the scorer's tokens. The annotated dependencies are too few for it: 14 of the 2,104
  computations depend on the same sentences as an earlier one before the last doubt.
- A sentence is judged by itself, and by what it adds to the text before it. One sentence moves a mean over positions less, the
  longer the text is. So the change of r is per token of the sentence, times the tokens so far.
- The marks of a shuffled trace are those of its new order. So the same pairs are attempts again there, in either order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from numpy.typing import NDArray

from benchmarks.experiments.ranks import spearman
from benchmarks.experiments.real_measures import (
    IMPORTANCES,
    NO_COPIES_SHOWN,
    PAPER,
    REWARDS,
    SURPRISAL,
    Measured,
    Passage,
    R,
    protected,
)
from benchmarks.experiments.real_traces import Sentence

COMPUTATION = "active_computation"
_DOUBT = ("plan_generation", "uncertainty_management", "self_checking")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_FEWEST = 3  # of both kinds, or the trace says nothing about their difference


def attempts(sentences: Sequence[Sentence]) -> list[tuple[Sentence, Sentence | None]]:
    """The computations in the order of the text, each with the earlier one that it attempts again; None: it is new."""
    doubts = 0
    found: list[tuple[Sentence, Sentence | None]] = []
    earlier: list[tuple[int, list[str], Sentence]] = []
    for sentence in sentences:
        doubts += sentence.label in _DOUBT
        numbers = [number.replace(",", "") for number in _NUMBER.findall(sentence.text.replace("{,}", ""))]
        if sentence.label != COMPUTATION or len(set(numbers)) < 2:
            continue
        found.append((sentence, next((other for then, said, other in earlier if then < doubts and _same(said, numbers)), None)))
        earlier.append((doubts, numbers, sentence))
    return found


def _same(numbers: list[str], others: list[str]) -> bool:
    mine, theirs = set(numbers), set(others)
    return numbers[-1] == others[-1] and 2 * len(mine & theirs) >= len(mine | theirs)


def judged(one: Measured) -> dict[str, Callable[[slice], float]]:
    """By name, what is judged of a sentence's tokens."""
    head = cache(lambda end: Passage(measured=one, first=0, end=end))

    def by_itself(name: str) -> Callable[[slice], float]:
        return lambda part: REWARDS[name](Passage(measured=one, first=part.start, end=part.stop))

    def added(name: str, *, mean: bool) -> Callable[[slice], float]:
        """Per token; `mean`: of a reward that is a mean over positions."""
        of = cache(lambda end: REWARDS[name](head(end)))
        return lambda part: (of(part.stop) - of(part.start)) / (part.stop - part.start) * (part.stop if mean else 1)

    def average(values: NDArray[Any]) -> Callable[[slice], float]:
        return lambda part: float(values[part].mean())

    copied = [name for name in REWARDS if name.startswith("copied share")]
    return {
        "r, by itself": by_itself(R),
        **{f"added: {name}": added(name, mean=True) for name in (R, "entropy of 4-grams")},
        **{f"added: {name}": added(name, mean=False) for name in ("D = M (1 - r)", "D of 4-grams")},
        **{name: by_itself(name) for name in (*copied, "mean log P")},
        **{name: average(IMPORTANCES[name](one)) for name in ("mu", "mu without the nearest 32")},
        **{f"protected: {name}": average(protected(IMPORTANCES[name](one))) for name in (PAPER, SURPRISAL, *NO_COPIES_SHOWN)},
    }


def attempt_rows(one: Measured, text: str) -> Iterable[dict[str, Any]]:
    """For each thing that is judged: its mean over first attempts and attempts again, and how it goes with being again."""
    trace = one.trace
    found = [(sentence, first) for sentence, first in attempts(trace.sentences) if sentence.first > 0]
    again = [float(first is not None) for _, first in found]
    if min(sum(again), len(again) - sum(again)) < _FEWEST:
        return
    parts = [slice(sentence.first, sentence.last + 1) for sentence, _ in found]
    repeated = {id(first) for _, first in found}
    is_first = [id(sentence) in repeated and first is None for sentence, first in found]
    place = [[float(part.start) for part in parts], [float(part.stop - part.start) for part in parts]]
    logprobs = [float(one.signals.logprobs[part].mean()) for part in parts]
    given = {"alone": [], "place": place, "place and log P": [*place, logprobs]}
    for name, of in judged(one).items():
        values = [of(part) for part in parts]
        yield {
            "part": "attempts",
            "text": text,
            "problem": trace.problem,
            "model": trace.model,
            "kind": trace.kind,
            "of": name,
            "computations": len(again),
            "repeated": int(sum(again)),
            "first": fmean(value for value, wanted in zip(values, is_first, strict=True) if wanted),
            "again": fmean(value for value, wanted in zip(values, again, strict=True) if wanted),
            **{control: spearman(values, again, columns) for control, columns in given.items()},
        }
