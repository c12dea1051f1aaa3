"""`entra doctor`: whether a model, these versions and the arguments of a training work together, before a run."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from entra.cli import CommandError
from entra.cli.scoring import load

_USAGE = "entra doctor --model MODEL [any option of entra train]"
_DESCRIPTION = """\
Look at a model before a run: can it be scored with these versions, which layer and which backend, do scores ride on TRL's
log-prob pass or cost a forward, how long it takes. Scores a short text and compares it with eager attention and with the
reference. Give the options of the training too, as for entra train (also --config FILE). Exit code 0 only if all is right."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra doctor` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check a model, the versions and a training's arguments",
        description=_DESCRIPTION,
        usage=_USAGE,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help='a folder, a hub name, or "smollm2"')
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra doctor` with parsed options; `options.rest` holds those of `entra train`.

    Raises:
        CommandError: something is wrong, or an option is.
    """
    from entra.doctor import doctor

    arguments = config = None
    if options.rest:
        from entra.cli.train import _parse

        with tempfile.TemporaryDirectory() as folder:  # nothing is written, but TRL wants one
            given = _parse([*options.rest, "--model_name_or_path", options.model, "--output_dir", folder])
        arguments, config = given.arguments, given.config
    policy = load(options.model)
    diagnosis = doctor(policy.model, policy.tokenizer, args=arguments, config=config)
    print(diagnosis)
    if not diagnosis.ok:
        raise CommandError(f"{', '.join(finding.name for finding in diagnosis.wrong)}: wrong, see above", 1)
