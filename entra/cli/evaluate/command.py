"""`entra eval`: how right and how long the completions of a file are, and what another file changes.

Decisions taken here:

- With two files all numbers are of the problems that both have, so that the columns can be subtracted; the others are counted.
- Every problem weighs the same, however many completions it has; in median and 95th percentile every completion does.
- Intervals hold 95 %. Shares have Wilson's, with the number of independent answers that the completions amount to. Mean tokens
  have the normal approximation over problems. Changes have a paired bootstrap over problems.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entra import __version__
from entra.cli import CommandError, say
from entra.cli.evaluate.outcomes import Outcome, Outcomes, Reading, add_reading_flags, read_outcomes
from entra.cli.output import check_destination
from entra.cli.scoring import kind_of, listed
from entra.metrics import (
    Interval,
    compression_effectiveness,
    effective_size,
    length_reduction,
    mean_interval,
    paired_bootstrap,
    quantile,
    wilson_interval,
)
from entra.view.visible import visible
from entra.whole_file import write_whole

_DESCRIPTION = """\
Compare the completions of two files, problem by problem: accuracy, tokens, length reduction, share truncated and compression
effectiveness, with 95 % intervals. With one file alone, its own numbers. Files are read as by entra score; what is in which
column is found, or named with the options, and the output says what was used. Bad rows are counted and stop nothing. A column
`entry` is scored as by reasoning-gym. Nothing in a file is run as code; rows that cannot be scored otherwise are bad rows."""

_CE = (
    "min(1, accuracy / base accuracy) - tokens / base tokens. This formula is ours: the paper's was not available to us. It is "
    "the length reduction less the share of accuracy lost. It is at most 1. It is 0 for the base itself, and for a base that "
    "leaves any share of the problems blank"
)


class _Numbers(NamedTuple):
    """One file's own numbers; None where nothing tells."""

    problems: int
    completions: int
    accuracy: Interval | None
    tokens_mean: Interval
    tokens_median: float
    tokens_p95: float
    truncated: Interval | None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra eval` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("eval", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "base", type=Path, help="completions: a file as entra score reads it, a folder, a pattern, or - for stdin"
    )
    parser.add_argument("new", type=Path, nargs="?", help="other completions of the same problems")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE, too; an earlier one is replaced")
    add_reading_flags(parser)
    parser.add_argument("--draws", type=int, default=10_000, help="how often the bootstrap draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra eval` with parsed options.

    Raises:
        CommandError: what stops it; rows that cannot be read do not.
    """
    paths = [path for path in (options.base, options.new) if path is not None]
    if options.draws < 1:
        raise CommandError(f"--draws {options.draws} must be at least 1")
    if options.seed < 0:
        raise CommandError(f"--seed {options.seed} must be at least 0")
    if options.json is not None:
        check_destination("--json", options.json, paths, _is_ours, "entra eval")
    reading = read_outcomes(options, paths)
    grouped = [_by_problem(file.outcomes) for file in reading.files]
    shared = [problem for problem in grouped[0] if all(problem in groups for groups in grouped)]
    if not shared:
        raise CommandError(_nothing_shared(reading))
    numbers = [_numbers([groups[problem] for problem in shared]) for groups in grouped]
    changes = _changes(grouped, shared, options) if len(paths) == 2 else {}
    unpaired = [len(groups) - len(shared) for groups in grouped]
    if options.json is not None:
        _write_json(options, reading, numbers, changes, unpaired)
    say(*_table(reading, numbers, changes), "", *_notes(options, reading, unpaired, changes), file=sys.stdout)


def _by_problem(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.problem].append(outcome)
    return groups


def _nothing_shared(reading: Reading) -> str:
    for file in reading.files:
        if not file.outcomes:
            return f"{file.path} has no good row ({listed(Counter(map(kind_of, file.errors.values())))}); the first: " + next(
                iter(file.errors.values())
            )
    return f"the files have no problem in common by the column {reading.pair_on}; use --pair-on"


def _numbers(problems: Sequence[Sequence[Outcome]]) -> _Numbers:
    outcomes = [outcome for problem in problems for outcome in problem]
    tokens = [float(outcome.tokens) for outcome in outcomes]
    means = [statistics.fmean(outcome.tokens for outcome in problem) for problem in problems]
    return _Numbers(
        problems=len(problems),
        completions=len(outcomes),
        accuracy=_share(problems, attrgetter("right")),
        tokens_mean=mean_interval(means) if len(means) > 1 else Interval(means[0], math.nan, math.nan),
        tokens_median=quantile(tokens, 0.5),
        tokens_p95=quantile(tokens, 0.95),
        truncated=_share(problems, attrgetter("truncated")),
    )


def _share(problems: Sequence[Sequence[Outcome]], of: Callable[[Outcome], bool | None]) -> Interval | None:
    shares = _problem_means(problems, of)
    if shares is None:
        return None
    return wilson_interval(statistics.fmean(shares), effective_size(shares, sum(map(len, problems))))


def _problem_means(problems: Sequence[Sequence[Outcome]], of: Callable[[Outcome], float | None]) -> list[float] | None:
    values = [[of(outcome) for outcome in problem] for problem in problems]
    if any(value is None for problem in values for value in problem):
        return None
    return [statistics.fmean(float(value or 0) for value in problem) for problem in values]


def _changes(
    grouped: Sequence[dict[str, list[Outcome]]], shared: Sequence[str], options: argparse.Namespace
) -> dict[str, Interval]:
    """What changes from the first file to the second, by name; without what nothing tells."""
    columns: list[list[float]] = []
    places: dict[str, int] = {}
    for name in ("tokens", "right", "truncated"):
        both = [_problem_means([groups[problem] for problem in shared], attrgetter(name)) for groups in grouped]
        if both[0] is not None and both[1] is not None:
            places[name] = len(columns)
            columns += [both[0], both[1]]
    table = np.array(columns).T

    def change(statistic: Callable[[Any], Any]) -> Interval:
        if len(table) < 2:
            return Interval(float(statistic(table.mean(0))), math.nan, math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            return paired_bootstrap(table, statistic, draws=options.draws, seed=options.seed)

    def difference(name: str) -> Interval:
        at = places[name]
        return change(lambda means: means[..., at + 1] - means[..., at])

    changes = {"tokens_mean": difference("tokens")}
    defined = table[:, 0].mean() > 0  # a base of empty completions cannot become shorter
    if defined:
        changes["length_reduction"] = change(lambda means: length_reduction(means[..., 1], means[..., 0]))
    if "right" in places:
        changes["accuracy"] = difference("right")
        at = places["right"]
        if defined:
            changes["compression_effectiveness"] = change(
                lambda m: compression_effectiveness(m[..., 1], m[..., 0], m[..., at + 1], m[..., at])
            )
    if "truncated" in places:
        changes["truncated"] = difference("truncated")
    return changes


def _table(reading: Reading, numbers: Sequence[_Numbers], changes: dict[str, Interval]) -> list[str]:
    unit = reading.unit
    names = [visible(str(file.path)) for file in reading.files]
    lines = [["", *names, *(["change"] if changes else [])]]

    def line(label: str, own: Callable[[_Numbers], str | None], change: str = "") -> None:
        cells = [own(each) for each in numbers]
        if any(cells) or change:
            lines.append([label, *(cell or "" for cell in cells), *([change] if changes else [])])

    line("problems", lambda n: f"{n.problems:,}")
    line("completions", lambda n: f"{n.completions:,}")
    line("accuracy, %", lambda n: n.accuracy and _shown(n.accuracy, 100), _shown(changes.get("accuracy"), 100, sign=True))
    line(f"{unit}, mean", lambda n: _shown(n.tokens_mean), _shown(changes.get("tokens_mean"), sign=True))
    line(f"{unit}, median", lambda n: f"{n.tokens_median:,.1f}")
    line(f"{unit}, 95th percentile", lambda n: f"{n.tokens_p95:,.1f}")
    line("truncated, %", lambda n: n.truncated and _shown(n.truncated, 100), _shown(changes.get("truncated"), 100, sign=True))
    line("length reduction, %", lambda n: None, _shown(changes.get("length_reduction"), 100, sign=True))
    line(
        "compression effectiveness",
        lambda n: None,
        _shown(changes.get("compression_effectiveness"), sign=True, digits=3),
    )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in lines
    ]


def _shown(value: Interval | None, scale: float = 1, *, sign: bool = False, digits: int = 1) -> str:
    if value is None:
        return ""
    form = f"{'+' if sign else ''},.{digits}f"
    middle, low, high = (format(scale * number, form) for number in value)
    return f"{middle} ({low} to {high})" if math.isfinite(value.low) and math.isfinite(value.high) else middle


def _notes(
    options: argparse.Namespace, reading: Reading, unpaired: Sequence[int], changes: Mapping[str, Interval]
) -> list[str]:
    notes = []
    if reading.right is not None:
        notes.append(f"Right: {reading.right}.")
    notes.append(f"{reading.unit.capitalize()}: {reading.tokens}.")
    if reading.truncated is not None:
        notes.append(f"Truncated: {reading.truncated}.")
    by = "by row number, for want of a column id or prompt" if reading.pair_on is None else f"by the column {reading.pair_on}"
    notes.append(f"Problems: {by}; each weighs the same (median and percentile: each completion).")
    if len(reading.files) == 2:
        notes.append(
            f"Change: second file less first, of shares in points; 95 % percentile interval of {options.draws:,} bootstrap "
            f"draws of problems, seed {options.seed}."
        )
        if reading.right is not None:
            notes.append(f"Compression effectiveness: {_CE}.")
    for file, alone in zip(reading.files, unpaired, strict=True):
        if alone:
            notes.append(f"{file.path}: {alone:,} problems are not in the other file and were left out, with all their rows.")
    for file in reading.files:
        if file.errors:
            kinds = listed(Counter(map(kind_of, file.errors.values())))
            number, error = next(iter(file.errors.items()))
            notes.append(
                f"{file.path}: {len(file.errors):,} bad rows were left out ({kinds}); the first is row {number}: {error}"
            )
    undefined = [name.replace("_", " ") for name, of in changes.items() if not all(map(math.isfinite, of))]
    if undefined:
        why = "one problem alone has none" if math.isnan(changes["tokens_mean"].low) else "in some draws it is a division by 0"
        notes.append(f"No interval of {', '.join(undefined)}: {why}.")
    return notes + [f"Note: {note}." for note in reading.notes]


def _write_json(
    options: argparse.Namespace,
    reading: Reading,
    numbers: Sequence[_Numbers],
    changes: dict[str, Interval],
    unpaired: Sequence[int],
) -> None:
    def own(file: Outcomes, values: _Numbers, alone: int) -> dict[str, Any]:
        return {
            "file": str(file.path),
            **{name: _json_value(value) for name, value in values._asdict().items()},
            "unpaired_problems": alone,
            "bad_rows": [{"row": number, "error": error} for number, error in file.errors.items()],
        }

    content = {
        **{
            name: own(file, values, alone)
            for name, file, values, alone in zip(("base", "new"), reading.files, numbers, unpaired, strict=False)
        },
        "change": {name: _json_value(value) for name, value in changes.items()},
        "read_as": {
            "problems": reading.pair_on,
            "right": reading.right,
            "tokens": reading.tokens,
            "truncated": reading.truncated,
            "notes": reading.notes,
        },
        "compression_effectiveness": _CE,
        "bootstrap": {"draws": options.draws, "seed": options.seed},
        "entra": __version__,
    }
    try:
        write_whole(options.json, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write --json {options.json}: {error.strerror or error}; choose another", 1) from error
    say(f"{options.json}: all numbers")


def _is_ours(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and {"entra", "bootstrap", "read_as", "base"} <= content.keys()


def _json_value(value: Any) -> Any:
    if isinstance(value, Interval):
        ends = [number if math.isfinite(number) else None for number in value]
        return dict(zip(("estimate", "low", "high"), ends, strict=True))
    return value
