"""docs/experiments.md from the results of the experiments: `python -m entra.experiments.report RESULTS DOCUMENT`.

What stands in the document is drawn from the JSON files alone; each experiment's `READING` says in words what its numbers say.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from entra.experiments import EXPERIMENTS
from entra.experiments.results import Result, read, section

_INTRODUCTION = """\
# Experiments

What ENTRA's score sees, what it does not see, and what its options do. Every section was made by the command that stands in it,
from the raw numbers in `benchmarks/results/experiments` (JSON and CSV); `make experiments` runs them all again.
"""


def report(results: Path, document: Path) -> str:
    """The document's text; `document` is where it will stand, for the links to the plots.

    Raises:
        FileNotFoundError: no results in that folder.
    """
    found = {name: results / f"{name}.json" for name in EXPERIMENTS if (results / f"{name}.json").is_file()}
    if not found:
        raise FileNotFoundError(f"{results} holds no results; make experiments")
    images = os.path.relpath(results, document.parent)
    return "\n".join([_INTRODUCTION, *(_section(name, read(path), images) for name, path in found.items())])


def _section(name: str, result: Result, images: str) -> str:
    module = importlib.import_module(EXPERIMENTS[name])
    environment = result.environment
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    made = f"`{environment['command']}`, {environment['date']}, {environment['machine']}; {versions}."
    body = section(module.tables(result), module.figures(result), images)
    return f"## {name}: {module.QUESTION}\n\n{module.READING.strip()}\n\n{made}\n\n{body}"


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    target.write_text(report(folder, target))
