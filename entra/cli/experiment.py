"""`entra experiment NAME`: one question about the method, answered with numbers, tables and plots in a folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from entra.cli import CommandError, one_line, say
from entra.cli.rows import read_rows, survey
from entra.experiments import EXPERIMENTS


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra experiment` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "experiment",
        allow_abbrev=False,
        description="Run one experiment. Its numbers (JSON, CSV), plots (SVG, PNG) and a section of Markdown go into --output.",
    )
    names = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, module in EXPERIMENTS.items():
        experiment = importlib.import_module(module)
        added = names.add_parser(name, help=experiment.QUESTION, description=experiment.__doc__, allow_abbrev=False)
        added.add_argument(
            "--output", type=Path, default=Path("build/experiments"), help="folder for the results (default: %(default)s)"
        )
        added.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: tables and plots of an earlier result")
        experiment.add_arguments(added)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra experiment` with parsed options.

    Raises:
        CommandError: what stops an experiment.
    """
    from entra.experiments import results

    experiment = importlib.import_module(EXPERIMENTS[options.experiment])
    if getattr(options, "traces", None) is not None and not options.redraw:
        survey(options.traces)
        options.rows = read_rows(options.traces, 0)
    try:
        results.check_folder(options.output, options.experiment)
        result = results.read(options.redraw) if options.redraw else experiment.run(options)
        markdown = results.write(result, options.output, experiment.tables(result), experiment.figures(result))
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise CommandError(one_line(error), 1) from error
    say(*markdown.removesuffix("\n").split("\n"), file=sys.stdout)
