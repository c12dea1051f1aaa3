"""Training with other protected shares tau: what GRPO makes of each on the small model of the evidence runs.

The experiment `threshold` looks at the scores of finished traces; here the policy answers to them. Each value is one GRPO run
of 70 steps, 4 to 5 minutes with one thread; two run at a time.
"""

from __future__ import annotations

import argparse

from benchmarks.experiments import train_options, trained
from benchmarks.experiments.results import Result
from benchmarks.experiments.train_options import figures, tables

__all__ = ["add_arguments", "figures", "run", "tables"]


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
