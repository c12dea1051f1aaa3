"""Training with other attention weights lambda: what GRPO makes of each on the small model of the evidence runs.

The experiment `lambda` looks at the scores of finished traces; here the policy answers to them. Each value is one GRPO run
of 70 steps, 4 to 5 minutes with one thread; two run at a time.
"""

from __future__ import annotations

import argparse

from benchmarks.experiments import train_options, trained
from benchmarks.experiments.results import Result
from benchmarks.experiments.train_options import figures, tables

__all__ = ["QUESTION", "READING", "add_arguments", "figures", "run", "tables"]

QUESTION = "Does the attention weight lambda matter when the policy is trained on the reward?"
READING = """\
The default, lambda = 2, ends shortest: without attention completions stay 3.4 tokens longer, and with lambda = 100, where
attention weighs most, 2.3 tokens longer; both intervals exclude 0. Accuracy cannot be told apart.
The difference is small beside what all three save, 43 to 47 % of the tokens. The spread of the reward within a prompt is about
the same for all; it wanders from step to step by as much as the values differ at the end. Each value is one run; those marked
as such are the runs of `make evidence-full` with the same seed and settings, and [evidence.md](evidence.md) shows how far seeds
of one setting lie apart.
"""

_OPTION, _SYMBOL = "attention_weight", "lambda"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the training, and the values."""
    trained.add_arguments(parser)
    parser.add_argument(
        "--values", type=float, nargs="+", default=[0.0, 2.0, 100.0], help="attention weights (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> Result:
    """Trains what is missing and compares."""
    return train_options.run("train-lambda", _OPTION, _SYMBOL, {0.0: "lambda-0"}, options)
