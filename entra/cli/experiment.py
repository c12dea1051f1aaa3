"""`entra experiment`: no command any more; it says what to call instead."""

from __future__ import annotations

import argparse
from typing import Any

from entra.cli import CommandError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra experiment` to the subparsers of the command line, but not to the list of its help."""
    parser: argparse.ArgumentParser = commands.add_parser("experiment", add_help=False)
    parser.add_argument("words", nargs="*")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra experiment`, whatever comes after it.

    Raises:
        CommandError: always.
    """
    name = options.words[0] if options.words else "NAME"
    raise CommandError(
        "experiments are in the repository and not in the package; "
        f"in a clone of it call python -m benchmarks.experiments {name} with the same flags"
    )
