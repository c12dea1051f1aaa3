"""`python -m benchmarks.experiments NAME`: a question about the method, answered with numbers, tables and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import EXPERIMENTS, results
from entra.commands import CommandError, Parser, exit_code, one_line, refuse, say
from entra.source import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment with `arguments` (None: those of the process) and return the exit code: 0 finished, 1 stopped by
    something that the message names, 2 bad usage.

    Raises:
        SystemExit: from argparse, for `--help` and options that it cannot parse (exit code 2).
    """
    parser = Parser(
        prog="python -m benchmarks.experiments",
        description="Run one experiment. Its numbers (JSON, CSV), plots (SVG, PNG) and a section of Markdown go into --output.",
        allow_abbrev=False,
    )
    names = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, experiment in EXPERIMENTS.items():
        module = experiment.module()
        added = names.add_parser(name, help=experiment.question, description=module.__doc__, allow_abbrev=False)
        added.add_argument(
            "--output", type=Path, default=Path("build/experiments"), help="folder for the results (default: %(default)s)"
        )
        added.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: tables and plots of an earlier result")
        module.add_arguments(added)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        refuse(unknown, names.choices[options.experiment])
    return exit_code(options.experiment, run, options)


def run(options: argparse.Namespace) -> None:
    """One experiment with parsed options.

    Raises:
        CommandError: what stops it.
    """
    module = EXPERIMENTS[options.experiment].module()
    if getattr(options, "traces", None) is not None and not options.redraw:
        options.rows = (
            (
                {**row.columns, "prompt": row.prompt, "completion": row.completion},
                row.malformed or (row.fault and f"row {number}: {row.fault}"),
            )
            for number, row in enumerate(Source([options.traces]).read(), start=1)
        )
    try:
        results.check_folder(options.output, options.experiment)
        result = results.read(options.redraw) if options.redraw else module.run(options)
        markdown = results.write(result, options.output, module.tables(result), module.figures(result))
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise CommandError(one_line(error), 1) from error
    say(*markdown.removesuffix("\n").split("\n"), file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
