"""The command line. For files of traces: `entra score`, `entra inspect` to look at them, `entra eval` to compare two, and
`entra select` for what to train on. For a model: `entra train`, and `entra doctor` before that. `entra serve` scores over HTTP.
`entra demo` is a first look.

Exit codes: 0 finished, 1 stopped by something that the message names, 2 bad usage, 130 interrupted with Ctrl-C. Bad rows do not
stop a command: they are in the output, with an `error`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import entra
from entra.commands import CommandError, Parser, ending_at_once, exit_code, one_line, refuse, say
from entra.name_clash import REMEDY, name_clash

__all__ = ["CommandError", "Parser", "main", "one_line", "refuse", "say"]

COMMANDS = {
    "score": ("entra.cli.score", "score a file of traces"),
    "inspect": ("entra.cli.inspect", "look at traces in the browser or the terminal"),
    "eval": ("entra.cli.evaluate.command", "accuracy and length of completions, alone or against others"),
    "select": ("entra.cli.select.command", "of several completions keep the right and least redundant, or write pairs"),
    "train": ("entra.cli.train.command", "train a model with ENTRA rewards"),
    "doctor": ("entra.cli.doctor", "check a model, the versions and a training's arguments"),
    "experiment": ("entra.cli.experiment", None),
    "serve": ("entra.cli.serve", "score over HTTP, for any engine that can POST"),
    "demo": ("entra.cli.demo", "score the shipped traces with SmolLM2-135M-Instruct and look at them"),
}
"""By name: the module, which is imported when the command is called and not before, and its line in `entra --help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (None: those of the process) and return the exit code.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` and options that it cannot parse (exit code 2).
    """
    with ending_at_once():
        if "score_batch" not in getattr(entra, "__all__", ()):  # another project's package, or what is left after that is gone
            say(f"entra: {name_clash() or f'files of entra-reward are missing; {REMEDY}'}")
            return 1
        words = sys.argv[1:] if arguments is None else list(arguments)
        description = "Score how redundant reasoning traces are, and train on it."
        parser = Parser(prog="entra", description=description, allow_abbrev=False)
        parser.add_argument("--version", action="version", version=f"%(prog)s {entra.__version__}")
        complete = words[:1] == ["--print-completion"]
        if complete:
            from entra.cli.completion import FLAG, SHELLS, PrintCompletion

            parser.add_argument(FLAG, choices=SHELLS, action=PrintCompletion)
        else:
            parser.add_argument("--print-completion", metavar="SHELL", help="print a script that completes commands, and end")
        commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        parsers = {}
        for name, (module, line) in COMMANDS.items():
            if words[:1] == [name] or (complete and line is not None):
                listed = SimpleNamespace(add_parser=partial(commands.add_parser, help=line))
                parsers[name] = importlib.import_module(module).add_parser(commands if line is None else listed)
            elif line is not None:
                parsers[name] = commands.add_parser(name, help=line)
        try:
            options, unknown = parser.parse_known_args(words)
        except CommandError as error:
            say(f"entra: {error}")
            return error.exit_code
        if options.command in ("train", "doctor"):
            options.rest = unknown  # for TRL's parser, which takes seconds to load
        elif unknown and options.command != "experiment":  # which says where it went, whatever comes after it
            refuse(unknown, parsers[options.command])
    return exit_code(f"entra {options.command}", options.run, options)
