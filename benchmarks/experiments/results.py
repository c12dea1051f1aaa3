"""What an experiment leaves behind: numbers as JSON and CSV, plots as SVG and PNG, and a section of Markdown that shows them.

An experiment is a module with `add_arguments(parser)` and `run(options) -> Result`. Its `tables(result)` and `figures(result)`
read and draw the numbers. They need nothing but the JSON, so a report can be drawn again without measuring again.
`benchmarks.experiments` finds the module by the Markdown of the same name.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import entra

_VERSIONS = ("torch", "transformers", "trl", "reasoning-gym")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment's numbers, all of them what JSON can hold."""

    name: str
    """As in `python -m benchmarks.experiments NAME`."""
    settings: dict[str, Any]
    """Every option that the numbers depend on."""
    rows: list[dict[str, Any]]
    """The raw numbers, one record per thing measured: the CSV."""
    summary: dict[str, Any]
    """What is concluded from them: means, intervals, counts."""
    environment: dict[str, Any] = field(default_factory=lambda: environment())


@dataclass(frozen=True, kw_only=True)
class Table:
    """A Markdown table; cells are formatted text."""

    caption: str
    """Stands alone: what is shown, of what, how many, units."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot that is drawn when it is written."""

    name: str
    """Of the file, without ending."""
    title: str
    caption: str
    """Stands alone: what is shown, of what, how many, which intervals."""
    draw: Callable[[Any], None]
    """Draws into a matplotlib figure; axes need labels with units."""
    size: tuple[float, float] = (8.0, 4.5)
    """Inches."""


def environment() -> dict[str, Any]:
    """Date, machine and versions that a result is of."""
    import torch

    versions = {"entra": entra.__version__}  # on PyPI, `entra` is another project
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python -m benchmarks.experiments", *sys.argv[1:]]),
    }


def write(result: Result, folder: Path, tables: Sequence[Table], figures: Sequence[Figure]) -> str:
    """Writes NAME.json, NAME.csv, NAME.md and every figure as SVG and PNG into `folder`; returns the Markdown.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result.name}.json").write_text(_json(asdict(result)))
    write_csv(result.rows, folder / f"{result.name}.csv")
    for figure in figures:
        draw(figure, folder)
    markdown = section(tables, figures)
    (folder / f"{result.name}.md").write_text(markdown)
    return markdown


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder in which the files of experiment `name` would take the place of others.

    Raises:
        ValueError: there is such a file, and no NAME.json beside it that `write` wrote.
    """
    patterns = (f"{name}.json", f"{name}.csv", f"{name}.md", f"{name}.svg", f"{name}.png", f"{name}-*.svg", f"{name}-*.png")
    there = sorted(path for pattern in patterns for path in folder.glob(pattern))
    try:
        ours = not there or read(folder / f"{name}.json").name == name
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ValueError(f"{there[0]} exists, and no experiment wrote it; use another --output, or remove it")


def read(path: Path) -> Result:
    """The result in a file that `write` wrote."""
    return Result(**json.loads(path.read_text()))


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All columns that some row has, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def section(tables: Sequence[Table], figures: Sequence[Figure], images: str = ".") -> str:
    """Tables and figures as Markdown, each with its caption; the plots are in the folder `images`."""
    parts = []
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        parts.append(table.caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for figure in figures:
        parts.append(f"![{figure.title}]({images}/{figure.name}.svg)\n\n*{figure.caption}*")
    return "\n\n".join(parts) + "\n"


def with_interval(interval: Sequence[float], scale: float = 1, digits: int = 1) -> str:
    """(mean, low, high) for a cell, as `mean (low to high)`."""
    mean, low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"{mean} ({low} to {high})"


def draw(figure: Figure, folder: Path) -> None:
    """The figure as SVG and PNG, the same bytes for the same numbers."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'entra-reward[plot]'") from None
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.hashsalt": figure.name, "axes.grid": True, "grid.alpha": 0.3}):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        canvas.suptitle(figure.title)
        figure.draw(canvas)
        canvas.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})
        canvas.savefig(folder / f"{figure.name}.png", dpi=130, metadata={"Software": None})


def _json(content: dict[str, Any]) -> str:
    """One line per row and per top-level key, so that a diff can be read."""
    lines = []
    for key, value in content.items():
        if key == "rows":
            body = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        else:
            body = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
