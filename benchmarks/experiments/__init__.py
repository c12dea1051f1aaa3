"""Questions about the method, answered with numbers.

An experiment is two files of one name in this folder. The module measures; `benchmarks.experiments.results` says what is in it.
The Markdown gives the experiment's name, its place in docs/experiments.md and its question. Then it says what the numbers say.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the Markdown of an experiment says."""

    name: str
    """As in `python -m benchmarks.experiments NAME`."""
    place: int
    """On its page, from 1 on."""
    page: str
    """The page of docs/ that shows it: `experiments.md` unless the Markdown names another."""
    question: str
    """One line."""
    reading: str
    """What the committed numbers say, in Markdown."""
    path: Path
    """Of the module."""

    def module(self) -> Any:
        """What measures it."""
        return importlib.import_module(f"{__name__}.{self.path.stem}")


def _read(path: Path) -> Experiment:
    _, head, reading = path.read_text(encoding="utf-8").split("---\n", 2)
    facts = dict(line.split(": ", 1) for line in head.splitlines())
    return Experiment(
        name=facts["name"],
        place=int(facts["place"]),
        page=facts.get("page", "experiments.md"),
        question=facts["question"],
        reading=reading.strip(),
        path=path.with_suffix(".py"),
    )


_FOUND = [_read(path) for path in Path(__file__).parent.glob("*.md") if path.with_suffix(".py").is_file()]
_FOUND.sort(key=lambda experiment: (experiment.page, experiment.place))
EXPERIMENTS = {experiment.name: experiment for experiment in _FOUND}
"""All of them by name, in the order of docs/experiments.md; then those that have a page to themselves."""
