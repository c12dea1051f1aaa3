"""`entra --print-completion SHELL`: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entra.cli import CommandError, say

FLAG = "--print-completion"
SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Print the script and end; the parser has all commands with all their options."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse.

        Raises:
            CommandError: the package that makes the script is missing.
            SystemExit: 0, when it was printed.
        """
        try:
            import shtab
        except ImportError:
            raise CommandError(f"{FLAG} needs shtab; get it with: pip install 'entra-reward[completion]'") from None
        _complete_files(parser, shtab.FILE)
        say(*str(shtab.complete(parser, str(values))).splitlines(), file=sys.stdout)
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.type is Path or action.dest == "model":
            action.complete = files  # type: ignore[attr-defined] # which is shtab's own
