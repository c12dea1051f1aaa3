"""The command line: `entra score` for a file of traces, `entra inspect` to look at them, `entra eval` to compare two,
`entra train` for a model, `entra doctor` before that, `entra demo` for a first look.

Exit codes: 0 finished (also when rows were bad: they are in the output, with an `error`), 1 stopped by something that the
message names, 2 bad usage, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence

import entra
from entra.commands import CommandError, Parser, one_line, refuse, say
from entra.name_clash import REMEDY, name_clash

__all__ = ["CommandError", "Parser", "main", "one_line", "refuse", "say"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (None: those of the process) and return the exit code.

    Raises:
        SystemExit: from argparse, for `--help`, `--version` and options that it cannot parse (exit code 2).
    """
    if not hasattr(entra, "score_batch"):  # the package of another project, or what is left after that was uninstalled
        say(f"entra: {name_clash() or f'files of entra-reward are missing; {REMEDY}'}")
        return 1
    import entra.cli.demo as demo
    import entra.cli.doctor as doctor
    import entra.cli.evaluate as evaluate
    import entra.cli.experiment as experiment
    import entra.cli.inspect as inspect
    import entra.cli.score as score
    import entra.cli.train as train

    parser = Parser(prog="entra", description="Score how redundant reasoning traces are, and train on it.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {entra.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {
        "score": score,
        "inspect": inspect,
        "eval": evaluate,
        "train": train,
        "doctor": doctor,
        "experiment": experiment,
        "demo": demo,
    }
    parsers = {name: module.add_parser(commands) for name, module in modules.items()}
    options, unknown = parser.parse_known_args(arguments)
    if options.command in ("train", "doctor"):
        options.rest = unknown  # for TRL's parser, which takes seconds to load
    elif unknown and options.command != "experiment":  # which says where it went, whatever comes after it
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
