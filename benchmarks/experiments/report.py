"""A page of docs/ from the results of its experiments: `python -m benchmarks.experiments.report RESULTS DOCUMENT`.

Tables and plots are drawn from the JSON files alone. The Markdown beside an experiment says in words what its numbers say, and
`introduction.md` opens the document; links in them start at the document's folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.experiments import EXPERIMENTS
from benchmarks.experiments.results import Result, read, section


def report(results: Path, document: Path) -> str:
    """The document's text; `document` is where it will stand, for the links to the plots.

    Raises:
        FileNotFoundError: no results in that folder.
    """
    shown = [name for name, experiment in EXPERIMENTS.items() if experiment.page == document.name]
    found = {name: results / f"{name}.json" for name in shown if (results / f"{name}.json").is_file()}
    if not found:
        raise FileNotFoundError(f"{results} holds no results; make experiments")
    images = os.path.relpath(results, document.parent)
    if document.name != "experiments.md":
        return "\n".join(_section(name, read(path), images, level=1) for name, path in found.items())
    introduction = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")
    return "\n".join([introduction, *(_section(name, read(path), images) for name, path in found.items())])


def _section(name: str, result: Result, images: str, level: int = 2) -> str:
    experiment = EXPERIMENTS[name]
    module = experiment.module()
    environment = result.environment
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    made = f"`{environment['command']}`, {environment['date']}, {environment['machine']}; {versions}."
    body = section(module.tables(result), module.figures(result), images)
    return f"{'#' * level} {name}: {experiment.question}\n\n{experiment.reading}\n\n{made}\n\n{body}"


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    target.write_text(report(folder, target))
