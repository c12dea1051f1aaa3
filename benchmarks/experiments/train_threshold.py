"""Training with other protected shares tau: what GRPO makes of each on the small model of the evidence runs.

The experiment `threshold` looks at the scores of finished traces; here the policy answers to them. Each value is one GRPO run
of 70 steps, 4 to 5 minutes with one thread; two run at a time.
"""

from __future__ import annotations

import argparse

from benchmarks.experiments import train_options, trained
from benchmarks.experiments.results import Result
from benchmarks.experiments.train_options import figures, tables

__all__ = ["QUESTION", "READING", "add_arguments", "figures", "run", "tables"]

QUESTION = "Does the protected share tau matter when the policy is trained on the reward?"
READING = """\
With every share the model ends at about half of its tokens, and no accuracy can be told from that of the SFT model. The less is
protected, the shorter: 42.3 tokens with 10 %, 45.3 with 20 %, 47.0 with 50 %, and both differences to 20 % exclude 0. With half
of the tokens protected, 5.5 % of the completions are improbable under the SFT model, against 1.9 % with 20 %. The spread of the
reward within a prompt is about the same for all; it wanders from step to step by as much as the values differ at the end. So
protection is not what keeps accuracy here, and some of what it shields is repetition; the runs without protection and with a
random protected set in [evidence.md](evidence.md) say the same. Each value is one run; those marked as such are the runs of
`make evidence-full` with the same seed and settings, and its page shows how far seeds of one setting lie apart.
"""

_OPTION, _SYMBOL = "protect_fraction", "tau"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the training, and the values."""
    trained.add_arguments(parser)
    parser.add_argument(
        "--values", type=float, nargs="+", default=[0.1, 0.2, 0.5], help="protected shares in [0, 1] (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> Result:
    """Trains what is missing and compares."""
    return train_options.run("train-threshold", _OPTION, _SYMBOL, {0.0: "all-tokens"}, options)
