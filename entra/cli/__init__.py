"""The command line: `entra score` for a file of traces, `entra inspect` to look at them, `entra eval` to compare two,
`entra train` for a model, `entra doctor` before that, `entra experiment` for a question, `entra demo` for a first look.

Exit codes: 0 finished (also when rows were bad: they are in the output, with an `error`), 1 stopped by something that the
message names, 2 bad usage, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import entra
from entra.name_clash import REMEDY, name_clash
from entra.view.visible import visible

COMMANDS = {
    "score": ("entra.cli.score", "score a file of traces"),
    "inspect": ("entra.cli.inspect", "look at traces in the browser or the terminal"),
    "eval": ("entra.cli.evaluate.command", "accuracy and length of completions, alone or against others"),
    "train": ("entra.cli.train.command", "train a model with ENTRA rewards"),
    "doctor": ("entra.cli.doctor", "check a model, the versions and a training's arguments"),
    "experiment": ("entra.cli.experiment", "answer a question about the method with numbers and plots"),
    "demo": ("entra.cli.demo", "score the shipped traces with SmolLM2-135M-Instruct and look at them"),
}
"""By name: the module, which is imported when the command is called and not before, and its line in `entra --help`."""


class CommandError(Exception):
    """What went wrong and what to do about it, for people: printed as one line, without a traceback."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """All of an error's message on one line without its full stop, or the error's type when it has none."""
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines for people, on stderr or into `file`: nothing of a name or a text in them moves the cursor or ends a line.

    All that the command line prints goes through here. What the stream's encoding lacks is escaped.
    """
    stream = sys.stderr if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        print(visible(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)


class Parser(argparse.ArgumentParser):
    """A parser whose errors can be printed, whatever was typed; its commands' parsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, exit with 2."""
        super().error(visible(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (None: those of the process) and return the exit code.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` and options that it cannot parse (exit code 2).
    """
    if "score_batch" not in getattr(entra, "__all__", ()):  # another project's package, or what is left after that is gone
        say(f"entra: {name_clash() or f'files of entra-reward are missing; {REMEDY}'}")
        return 1
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="entra", description="Score how redundant reasoning traces are, and train on it.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {entra.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (module, line) in COMMANDS.items():
        called = words[:1] == [name]
        parsers[name] = importlib.import_module(module).add_parser(commands) if called else commands.add_parser(name, help=line)
    options, unknown = parser.parse_known_args(words)
    if options.command in ("train", "doctor"):
        options.rest = unknown  # for TRL's parser, which takes seconds to load
    elif unknown:
        refuse(unknown, parsers[options.command])
    try:
        options.run(options)
    except CommandError as error:
        say(f"entra {options.command}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("", f"entra {options.command}: interrupted")
        return 130
    return 0


def refuse(unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """End with argparse's own usage error, which names the option that was probably meant."""
    wrong = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    nearest = difflib.get_close_matches(wrong, known, n=1) if wrong.startswith("-") else []
    parser.error(f"unknown argument {wrong}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))
