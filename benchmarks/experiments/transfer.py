"""Is a model that GRPO taught to be concise on some kinds of problems concise, and right, on kinds that it was not trained on?

GRPO sees only `--trained-kinds` of the problems of the evidence runs; the SFT model before it saw all kinds. Held out are
problems of all kinds. The experiment compares the SFT model, accuracy alone, and the recommended gated ENTRA reward
(`entra-banded`). It also shows the runs of the two rewards that were trained on all kinds. The default leaves out `guess`, the
kind in which a check is needed: a policy that has only learnt to stop early would skip it. It also leaves out `reverse`, the
kind without numbers.

With half of the kinds and as many steps, each trained kind is seen twice as often as in the evidence runs.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.evidence.problems import KINDS
from benchmarks.experiments import trained
from benchmarks.experiments.drawing import COLOURS
from benchmarks.experiments.results import Figure, Result, Table
from benchmarks.experiments.trained import SFT, Variant, compare, signed

_NAMES = {"accuracy": "accuracy only", "entra-banded": "gated ENTRA"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the training, and its kinds."""
    trained.add_arguments(parser)
    parser.add_argument(
        "--trained-kinds", nargs="+", choices=KINDS, default=["sum", "sort"], help="of the problems (default: sum sort)"
    )


def run(options: argparse.Namespace) -> Result:
    """Trains what is missing and compares.

    Raises:
        ValueError: no kind is left that is not trained on.
    """
    kinds = [kind for kind in KINDS if kind in options.trained_kinds]
    rest = [kind for kind in KINDS if kind not in kinds]
    if not rest:
        raise ValueError(f"trained_kinds={' '.join(kinds)} leaves no kind to transfer to; name fewer of {', '.join(KINDS)}")
    some = [Variant(f"{name}, trained on {' and '.join(kinds)}", arm, kinds=kinds) for arm, name in _NAMES.items()]
    all_of_them = [Variant(f"{name}, trained on all kinds", arm) for arm, name in _NAMES.items()]
    result = trained.trained("transfer", [*some, *all_of_them], options)
    result.settings.update(
        trained_kinds=kinds,
        untrained_kinds=rest,
        labels=[variant.label for variant in (*some, *all_of_them)],
        trained_on_all={part.label: whole.label for part, whole in zip(some, all_of_them, strict=True)},
    )
    return result


def tables(result: Result) -> list[Table]:
    """Accuracy and tokens against the SFT model: on trained kinds, on others, and on each."""
    settings = result.settings
    trained_on, rest = settings["trained_kinds"], settings["untrained_kinds"]
    groups = {"trained: " + ", ".join(trained_on): trained_on, "not trained: " + ", ".join(rest): rest}
    both = [
        [
            name,
            label,
            f"{against.problems}",
            f"{100 * against.accuracy:.1f}",
            "" if label == SFT else signed(against.accuracy_difference, 100),
            f"{against.tokens:.1f}",
            "" if label == SFT else signed(against.change, 100),
            "" if whole is None else signed(compare(result, label, whole, kinds).accuracy_difference, 100),
            result.summary["runs"][label]["from"],
        ]
        for name, kinds in groups.items()
        for label in [SFT, *settings["labels"]]
        for against in [compare(result, label, SFT, kinds)]
        for whole in [settings["trained_on_all"].get(label)]
    ]
    each = [
        [
            label,
            *(
                f"{signed(against.change, 100)}; {signed(against.accuracy_difference, 100)}"
                for kind in [*trained_on, *rest]
                for against in [compare(result, label, SFT, [kind])]
            ),
        ]
        for label in settings["labels"]
    ]
    of = (
        f"Trained on {' and '.join(trained_on)} for {settings['steps']} GRPO steps, or on all kinds for as many. "
        f"{settings['held_out']:,} held-out problems (seed {settings['seed']}), one sample each at temperature 1, the same "
        "problems for all. One training run per row. Differences are paired by problem, with 95 % intervals."
    )
    return [
        Table(
            caption=f"**On kinds of problems that GRPO was trained on, and on those it was not.** {of}",
            header=[
                "kinds of the problems",
                "model",
                "problems",
                "accuracy, %",
                "minus SFT, points",
                "mean tokens",
                "minus SFT, %",
                "minus trained on all kinds, points",
                "training run",
            ],
            rows=both,
        ),
        Table(
            caption=f"**Kind by kind.** Against the SFT model: change of the mean tokens, %; change of accuracy, points. {of}",
            header=["model", *trained_on, *(f"{kind} (not trained)" for kind in rest)],
            rows=each,
        ),
    ]


def figures(result: Result) -> list[Figure]:
    """Change of length and accuracy by kind."""
    settings = result.settings
    return [
        Figure(
            name="transfer",
            title="What GRPO changes on trained kinds of problems and on others",
            caption=f"Change against the SFT model on {settings['held_out']:,} held-out problems, by kind: mean tokens (above) "
            f"and accuracy (below). Bars are 95 % intervals of the paired differences. Filled marks: GRPO was trained on "
            f"{' and '.join(settings['trained_kinds'])} only. Hollow marks: on all kinds. The filled runs were not trained on "
            f"the kinds of the shaded side. One training run each, seed {settings['seed']}.",
            draw=lambda canvas: _draw(canvas, result),
            size=(9.0, 6.0),
        )
    ]


def _draw(canvas: Any, result: Result) -> None:
    settings = result.settings
    kinds = [*settings["trained_kinds"], *settings["untrained_kinds"]]
    labels = settings["labels"]
    lengths, accuracies = canvas.subplots(2, 1, sharex=True)
    for index, label in enumerate(labels):
        color = COLOURS[label.startswith(_NAMES["entra-banded"])]
        place = [i + 0.16 * (index - (len(labels) - 1) / 2) for i in range(len(kinds))]
        against = [compare(result, label, SFT, [kind]) for kind in kinds]
        for axes, intervals in (
            (lengths, [one.change for one in against]),
            (accuracies, [one.accuracy_difference for one in against]),
        ):
            means = [100 * interval.mean for interval in intervals]
            halves = [100 * (interval.high - interval.mean) for interval in intervals]
            filled = color if index < len(labels) / 2 else "white"
            axes.errorbar(place, means, yerr=halves, fmt="o", color=color, markerfacecolor=filled, capsize=3, label=label)
    for axes in (lengths, accuracies):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvspan(len(settings["trained_kinds"]) - 0.5, len(kinds) - 0.5, color="gray", alpha=0.15)
        axes.grid(axis="x", visible=False)
    lengths.set(ylabel="change of mean tokens, %", xlim=(-0.5, len(kinds) - 0.5))
    accuracies.set(ylabel="change of accuracy, points", xlabel="kind of problem (shaded: not trained on)")
    accuracies.set_xticks(range(len(kinds)), kinds)
    canvas.legend(*lengths.get_legend_handles_labels(), loc="outside lower center", ncols=2)
