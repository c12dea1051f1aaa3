"""Training with another value of one option of the score: what `train_threshold` and `train_lambda` share.

The reward is r itself behind the gate (the arm `entra-gated`), not the recommended `halve_at` with a dead band. The two options
define r. Its runs end well above the length of a bare solution, which leaves room to differ. With `halve_at` completions come
close to that length anyway.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.drawing import COLOURS
from benchmarks.experiments.results import Figure, Result, Table
from benchmarks.experiments.trained import SFT, Variant, compare, curve, signed, trained
from entra.config import ScoreConfig
from entra.metrics import mean_interval

ARM = "entra-gated"
_ENDS = 10  # training steps that the first and the last of a curve are averaged over
_SMOOTHED = 5


def variants(option: str, values: Sequence[float], symbol: str, own_arms: Mapping[float, str]) -> list[Variant]:
    """One training run per value.

    Args:
        option: a field of ScoreConfig.
        values: at most three are trained in a quarter of an hour.
        symbol: of the option, for labels.
        own_arms: values that an arm of the evidence runs has built in, so that its finished run serves.
    """
    default = getattr(ScoreConfig(), option)
    made = []
    for value in dict.fromkeys(values):
        score: dict[str, Any] = {} if value == default or value in own_arms else {option: value}
        made.append(Variant(f"{symbol} = {value:g}", own_arms.get(value, ARM), score))
    return made


def run(name: str, option: str, symbol: str, own_arms: Mapping[float, str], options: argparse.Namespace) -> Result:
    """Trains what is missing. `settings` then hold the labels too, and which of them has the default value (or None)."""
    made = variants(option, options.values, symbol, own_arms)
    result = trained(name, made, options)
    default = f"{symbol} = {getattr(ScoreConfig(), option):g}"
    labels = [variant.label for variant in made]
    result.settings.update(
        option=option, values=options.values, arm=ARM, labels=labels, default=default if default in labels else None
    )
    return result


def tables(result: Result) -> list[Table]:
    """Held-out results, and what the reward did during training."""
    settings, labels = result.settings, result.settings["labels"]
    default = settings["default"]
    held_out = []
    for label in [SFT, *labels]:
        against = compare(result, label, SFT)
        cells = [
            label,
            f"{100 * against.accuracy:.1f}",
            "" if label == SFT else signed(against.accuracy_difference, 100),
            f"{against.tokens:.1f}",
            "" if label == SFT else signed(against.change, 100),
            "" if label == SFT or default in (None, label) else signed(compare(result, label, default).tokens_difference),
            f"{against.median_tokens:.0f}",
            f"{100 * against.finished:.1f}",
            f"{100 * result.summary['runs'][label]['improbable']:.1f}",
            result.summary["runs"][label]["from"],
        ]
        held_out.append(cells)
    training = [
        [label, *(f"{_end(curve(result, label, name), part):.3f}" for name in _SHOWN for part in ("first", "last"))]
        for label in labels
    ]
    return [
        Table(
            caption=f"**After training with other values of `{settings['option']}`.** {settings['held_out']:,} held-out "
            f"problems (seed {settings['seed']}), one sample each at temperature 1, the same problems for all. "
            f"{settings['steps']} GRPO steps from the same SFT model, one training run per value. Reward: accuracy, and r "
            "behind the gate. Differences are paired by problem. Their 95 % intervals say nothing about another training "
            "seed. Improbable: mean log-prob under the SFT model below the 1st percentile of its own completions.",
            header=[
                "value",
                "accuracy, %",
                "minus SFT, points",
                "mean tokens",
                "minus SFT, %",
                f"minus {default}, tokens" if default else "",
                "median tokens",
                "finished, %",
                "improbable, %",
                "training run",
            ],
            rows=held_out,
        ),
        Table(
            caption=f"**The reward during training**, mean of the first and of the last {_ENDS} steps. Spread: the standard "
            "deviation of the weighted reward within a prompt's 8 completions, which group-scaled advantages divide by. "
            "Correlation: of the reward and the length within a step.",
            header=[
                "value",
                *(f"{name}, {part}" for name in ("spread", "correlation", "tokens", "accuracy") for part in ("first", "last")),
            ],
            rows=training,
        ),
    ]


_SHOWN = ("within_group_std", "reward_length_correlation", "tokens", "accuracy")


def figures(result: Result) -> list[Figure]:
    """Held-out accuracy against tokens, and tokens and spread during training."""
    settings = result.settings
    return [
        Figure(
            name=result.name,
            title=f"GRPO with r behind the gate, other values of {settings['option']}",
            caption=f"Left: accuracy against mean tokens on {settings['held_out']:,} held-out problems; bars are 95 % "
            "intervals of the means. Middle: mean tokens of the rollouts of each training step. Right: the standard deviation "
            f"of their rewards within a prompt's 8 completions. Both are running means of {_SMOOTHED} steps. One "
            f"training run per value, seed {settings['seed']}.",
            draw=lambda canvas: _draw(canvas, result),
            size=(12.0, 4.6),
        )
    ]


def _draw(canvas: Any, result: Result) -> None:
    ends, lengths, spreads = canvas.subplots(1, 3)
    for index, label in enumerate([SFT, *result.settings["labels"]]):
        color, marker = ("black", "*") if label == SFT else (COLOURS[(index - 1) % 6], "osD^v"[(index - 1) % 5])
        held_out = result.summary["held_out"][label]
        tokens = mean_interval(held_out["tokens"])
        accuracy = mean_interval([100 * int(bit) for bit in held_out["correct"]])
        ends.errorbar(
            tokens.mean,
            accuracy.mean,
            xerr=tokens.mean - tokens.low,
            yerr=accuracy.mean - accuracy.low,
            fmt=marker,
            color=color,
            capsize=3,
            label=label,
        )
        for axes, name in ((lengths, "tokens"), (spreads, "within_group_std")):
            values = _running_mean(curve(result, label, name)) if label != SFT else []
            axes.plot(range(_SMOOTHED, _SMOOTHED + len(values)), values, color=color)
    ends.set(xlabel="mean tokens of a completion", ylabel="accuracy on held-out problems, %", title="held out", xlim=(0, None))
    canvas.legend(*ends.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    lengths.set(xlabel="GRPO step", ylabel="mean tokens of a completion", title="rollouts", ylim=(0, None))
    spreads.set(
        xlabel="GRPO step", ylabel="spread of the reward within a prompt", title="what advantages divide by", ylim=(0, None)
    )


def _running_mean(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[end - _SMOOTHED : end]) for end in range(_SMOOTHED, len(values) + 1)]


def _end(values: Sequence[float | None], part: str) -> float:
    """A step without a value, where nothing varied, does not count."""
    known = [value for value in (values[:_ENDS] if part == "first" else values[-_ENDS:]) if value is not None]
    return statistics.fmean(known) if known else float("nan")
