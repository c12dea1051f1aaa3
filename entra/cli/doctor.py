"""`entra doctor`: whether a model, these versions and the arguments of a training work together, before a run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch

from entra.cli import CommandError, say
from entra.cli.scoring import _loading, load
from entra.policy import Policy

_USAGE = "entra doctor --model MODEL [any option of entra train]"
_DESCRIPTION = """\
Look at a model before a run: can it be scored with these versions, by which layer and which backend? Do scores ride on TRL's
log-prob pass, or cost a forward? How long does it take? Scores a short text and compares it with eager attention and with the
reference. Give the options of the training too, as for entra train (also --config FILE). Exit code 0 only if all is right."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra doctor` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
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
    from entra.diagnosis import doctor

    if options.rest:
        from entra.cli.train.command import _parse

        with tempfile.TemporaryDirectory() as folder:  # nothing is written, but TRL wants one
            given = _parse([*options.rest, "--model_name_or_path", options.model, "--output_dir", folder])
        policy = _as_trained(options.model, given)
        diagnosis = doctor(policy.model, policy.tokenizer, args=given.arguments, config=given.config)
    else:
        policy = load(options.model)
        diagnosis = doctor(policy.model, policy.tokenizer)
    say(*str(diagnosis).splitlines(), file=sys.stdout)
    if not diagnosis.ok:
        raise CommandError(f"{', '.join(finding.name for finding in diagnosis.wrong)}: wrong, see above", 1)


def _as_trained(name: str, given: Any) -> Policy:
    """The model as `entra train` with the parsed options `given` loads it, but for PEFT and quantization."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = given.model
    if name == "smollm2":
        policy = load(name)
        if how.attn_implementation is not None:
            policy.model.set_attn_implementation(how.attn_implementation)
        dtype = None if how.dtype in (None, "auto") else getattr(torch, how.dtype)
        return Policy(policy.model.to(dtype), policy.tokenizer)
    source = {"revision": how.model_revision, "trust_remote_code": given.arguments.trust_remote_code}
    with _loading(name, "a folder with config, weights and tokenizer"):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=how.dtype, attn_implementation=how.attn_implementation, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    return Policy(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer)
