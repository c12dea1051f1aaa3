"""The shipped reasoning traces: real completions of a small model, and written-out variants of them.

Every problem comes from reasoning-gym. `entra/data/README.md` says how the file was made and under which licences;
`benchmarks/traces` in the repository holds the script that made it. Reading it needs nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

KINDS = ("concise", "sample", "overthinking", "control")
TRACES_FILE = "traces.jsonl"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to a problem."""

    kind: str
    """One of four. `concise`: a model's own short answer. `sample`: another answer of the same model. `overthinking`: the
    concise one written out with checks, restatements and loops. `control`: about as long, but with new steps all the way."""
    text: str
    """The completion as plain text, without chat markup."""
    source: str
    """The model that generated it, or `written`."""
    tokens: int
    """Length under the SmolLM2 tokenizer, without special tokens."""
    correct: bool | None
    """What reasoning-gym's checker says about the stated answer; None where the text goes on after its answer."""
    style: str | None = None
    """How an overthinking text overthinks: reverify, restate, dead-end, second-guess or loop."""
    sampling: Mapping[str, Any] | None = None
    """Seed, temperature and the other settings of a generated completion."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with its right answer and its completions, in the order of `KINDS`."""

    id: str
    task: str
    """The reasoning-gym dataset that the question comes from."""
    prompt: str
    """The user message: instruction and question."""
    answer: str
    """The right answer."""
    completions: tuple[Completion, ...]

    def completion(self, kind: str) -> Completion:
        """The first completion of `kind`.

        Raises:
            ValueError: for an unknown kind, and when this problem has none of that kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not a kind of completion; use one of {', '.join(KINDS)}")
        for completion in self.completions:
            if completion.kind == kind:
                return completion
        raise ValueError(f"problem {self.id!r} has no completion of kind={kind!r}; it has {', '.join(self.kinds)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that this problem has, each once."""
        return tuple(dict.fromkeys(completion.kind for completion in self.completions))


def load_traces() -> list[Problem]:
    """The shipped problems, in file order.

    Every problem has a `concise`, a `sample`, an `overthinking` and a `control` completion.

    Raises:
        ValueError: when the installed file is damaged; the message names the line.
    """
    return parse_traces((files("entra") / "data" / TRACES_FILE).read_text(encoding="utf-8").split("\n"))


def parse_traces(lines: Iterable[str]) -> list[Problem]:
    """Problems from JSON Lines in the format of the shipped file; blank lines are skipped.

    Raises:
        ValueError: for a line that is not such a problem, and for an id that comes twice; the message names the line.
    """
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = Problem(**{**row, "completions": tuple(Completion(**entry) for entry in row["completions"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"line {number} of the traces is not a problem ({error}); reinstall entra-reward, or make the file again "
                "in its repository with python -m benchmarks.traces.make_traces"
            ) from error
        if problem.id in problems:
            raise ValueError(f"line {number} of the traces has id={problem.id!r} a second time; ids must be unique")
        problems[problem.id] = problem
    return list(problems.values())
