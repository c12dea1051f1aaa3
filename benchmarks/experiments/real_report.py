"""Tables and figures of the experiment `real`, from its numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.drawing import COLOURS, REFERENCE, dots
from benchmarks.experiments.real_measures import NO_COPIES_SHOWN, PAPER, REWARDS, SURPRISAL, R
from benchmarks.experiments.results import Figure, Result, Table, with_interval

VIEWS = {
    "whole": "whole completions",
    "head": "the longer one's head",
    "tail": "the longer one's tail",
    "matched": "other problems, equal length",
}
CATEGORIES = {
    "problem_setup": "setup",
    "plan_generation": "plan",
    "fact_retrieval": "facts",
    "active_computation": "computation",
    "uncertainty_management": "uncertainty",
    "result_consolidation": "consolidation",
    "self_checking": "self-check",
    "final_answer_emission": "answer",
}
CONTROLS = {
    "alone": "alone",
    "place": "given position and length",
    "place and log P": "given position, length and log P",
}
_SEEN = {
    "after settling": "tokens after settling",
    "attempts again": "computations made again",
    "checks": "tokens in doubt and self-checks",
}
_OF_ATTEMPTS = (*CONTROLS, "beyond_shuffled")
_TARGET = "counterfactual_importance_kl"
_SHOWN_REWARDS = (
    R,
    "r of 100 positions",
    "D = M (1 - r)",
    "length",
    "gzip ratio",
    "TRL's repetition penalty (n = 3)",
    "entropy of 4-grams",
    "copied share, by address",
)
_SHOWN_IMPORTANCES = (PAPER, SURPRISAL, *NO_COPIES_SHOWN)


def _cell(interval: Sequence[float] | None, scale: float = 1, digits: int = 2) -> str:
    return "" if interval is None else with_interval(interval, scale, digits)


def tables(result: Result) -> list[Table]:
    """Pairs, length, tasks, settling, sentences, categories, the scale, attempts again, both judges and what they choose."""
    settings, summary = result.settings, result.summary
    of = f"{settings['completions']} completions of real models, {settings['tokens']:,} tokens, read by {settings['model']}"
    pairs = {name: views for name, views in summary["pairs"].items() if name != "by_task"}
    left_out = len(summary["left_out_rows"])
    names = [view for view in VIEWS if any(views[view]["problems"] for views in pairs.values())]
    result_tables = [
        Table(
            caption=f"**{pair}: how often the first one is called the more redundant, %.** Both are right and complete. 50 is "
            f"chance. Shares over problems with Wilson's intervals. {of}; {left_out} rows are left out.",
            header=["", *(f"{VIEWS[view]} ({views[view]['problems']} problems)" for view in names), "area under the curve"],
            rows=[
                [
                    name,
                    *(_cell(views[view]["ordered"][name], 100, 0) for view in names),
                    _cell(views["whole"]["auc"][name]),
                ]
                for name in REWARDS
            ],
        )
        for pair, views in pairs.items()
    ]
    groups = summary["with_length"]
    result_tables.append(
        Table(
            caption="**Rank correlation with the length** (Spearman), among right and complete completions of "
            "one model and kind. "
            "Each reward is turned so that higher means more redundant.",
            header=["", *(f"{name} ({group['completions']})" for name, group in groups.items())],
            rows=[[name, *(f"{group[name]:.2f}" for group in groups.values())] for name in REWARDS],
        )
    )
    tasks = summary["pairs"]["by_task"]
    result_tables.append(
        Table(
            caption="**By task: how often the first one of a pair is called the more redundant, %**, whole and "
            "cut to the shorter "
            "one's length from the head. All pairs together. Empty: fewer than two problems.",
            header=["", *(f"{task}, {view}" for task in tasks for view in ("whole", "head"))],
            rows=[
                [name, *(_cell(tasks[task][view][name], 100, 0) for task in tasks for view in ("whole", "head"))]
                for name in _SHOWN_REWARDS
            ],
        )
    )
    settled = summary["settled"]
    result_tables.append(
        Table(
            caption="**Before and after the answer has settled.** Shares are of the tokens on that side; `added "
            "per token` is what "
            "each token adds to a reward. Beyond shuffled: the same rise, less that of the trace with its sentences shuffled. "
            f"{max((row['traces'] for row in settled.values()), default=0)} traces; intervals over "
            f"{max((row['problems'] for row in settled.values()), default=0)} problems.",
            header=["", "before", "after", "rise", "rise beyond shuffled"],
            rows=[
                [
                    name,
                    f"{row['before']:.3g}",
                    f"{row['after']:.3g}",
                    _cell(row["rise"], digits=3),
                    _cell(row["beyond_shuffled"], digits=3),
                ]
                for name, row in settled.items()
                if row["before"] is not None
            ],
        )
    )
    for how, shown in (
        ("mean", "the mean of its tokens"),
        ("maximum", "the largest of its tokens"),
        ("protected share", "the protected share of its tokens"),
    ):
        of_how = summary["sentences"][_TARGET][how]
        result_tables.append(
            Table(
                caption=f"**A sentence's importance ({shown}) and its counterfactual importance (KL).** Rank "
                "correlation within a "
                "trace; partial ones given position and length, and given mean log P too. Gain: the difference from the "
                "paper's importance given position and length. Means over problems with 95 % intervals.",
                header=["", *CONTROLS.values(), "gain"],
                rows=[
                    [name, *(_cell(row[control]["value"]) for control in CONTROLS), _cell(row["place"]["gain"])]
                    for name, row in of_how.items()
                ],
            )
        )
    targets = summary["sentences"]
    result_tables.append(
        Table(
            caption="**The same for every measured importance**: protected share of a sentence's tokens, rank "
            "correlation given "
            "position and length.",
            header=["", *(target.replace("_", " ") for target in targets)],
            rows=[
                [name, *(_cell(targets[target]["protected share"][name]["place"]["value"]) for target in targets)]
                for name in targets[_TARGET]["protected share"]
            ],
        )
    )
    categories = summary["categories"]
    labels = [label for label in CATEGORIES if any(label in row for row in categories.values())]
    result_tables.append(
        Table(
            caption="**What is protected, by category of sentence, %.** 20 by chance. Means over problems with 95 % intervals. "
            f"Of the long traces {settings['with_far_8']} have mu without the nearest 8 and 128, and "
            f"{settings['with_gradient']} the gradient.",
            header=["", *(CATEGORIES[label] for label in labels)],
            rows=[[name, *(_cell(row.get(label), 100, 0) for label in labels)] for name, row in categories.items()],
        )
    )
    scale = summary["scale"]
    steps = len(next(iter(scale.values()))["means"]) if scale else 0
    result_tables.append(
        Table(
            caption="**One step verified again k times, at equal length.** The mean of each reward, and how often one more "
            "verification raises it, % (over problems, with 95 % intervals).",
            header=["", *(f"k = {k}" for k in range(steps)), "raised"],
            rows=[
                [name, *(f"{mean:.3f}" for mean in row["means"]), _cell(row["raised"], 100, 0)] for name, row in scale.items()
            ],
        )
    )
    made = summary["attempts"]
    counts = next(iter(made.values()), dict.fromkeys(("computations", "repeated", "traces", "problems"), 0))
    result_tables.append(
        Table(
            caption=f"**Computations that are made again.** Of {counts['computations']:,} computations {counts['repeated']} "
            "are attempts again: same result, half of the numbers, and doubt in between. First: what is made again later. "
            "Rank correlation within a trace with being an attempt again, among all computations; partial ones given position "
            "and length, and given mean log P too. Beyond shuffled: given position and length, less that of the trace with its "
            f"sentences shuffled. {counts['traces']} traces; intervals over {counts['problems']} problems.",
            header=["", "first", "again", *CONTROLS.values(), "beyond shuffled"],
            rows=[
                [name, *(f"{row[side]:.3g}" for side in ("first", "again")), *(_cell(row[of]) for of in _OF_ATTEMPTS)]
                for name, row in made.items()
            ],
        )
    )
    beyond = summary["beyond_length"]
    result_tables.append(
        Table(
            caption="**What a reward knows beyond length.** Partial rank correlation, given length, among completions of one "
            "sort, with what a reward ought to see: the share of tokens after the answer has settled, of computations that "
            "are attempts again, of tokens in doubt and self-checks; and being wrong. 95 % intervals, problems drawn again.",
            header=["", *(f"{name} ({of['completions']} of {of['problems']} problems)" for name, of in beyond.items())],
            rows=[[name, *(_cell(of.get(name)) for of in beyond.values())] for name in REWARDS if name != "length"],
        )
    )
    judged = summary["leave_one_out"]
    result_tables.append(
        Table(
            caption="**A second judge: leave-one-out of single tokens**, on the shipped traces, as the experiment `proxy` "
            "measured it. Rank correlation within a completion with what the later tokens lose, in sum and per later token: "
            "alone, given position, and the difference from the paper's importance given position.",
            header=["", *(f"{target}, {how}" for target in ("sum", "mean") for how in ("alone", "given position", "gain"))],
            rows=[
                [name, *(_cell(row[target][how]) for target in ("sum", "mean") for how in ("alone", "place", "gain"))]
                for name, row in judged.items()
            ],
        )
    )
    result_tables.append(
        Table(
            caption="**Chosen on the other problems.** Each judge chooses one of a family by its mean on all problems but one, "
            "and judges it on that one. Gain: beyond the paper's importance, or beyond r, with 95 % intervals over problems. "
            "Fewer problems: only the traces for which all of the family were measured.",
            header=["judge", "family", "chosen", "problems", "gain"],
            rows=[
                [
                    judge,
                    family,
                    ", ".join(f"{name} ({count})" for name, count in Counter(of["picks"]).items()),
                    str(of["problems"]),
                    _cell(of["gain"], digits=3),
                ]
                for judge, families in summary["chosen"].items()
                for family, of in families.items()
                if of["picks"]
            ],
        )
    )
    return result_tables


def figures(result: Result) -> list[Figure]:
    """Pairs, settling, categories, sentences, and what a reward sees beyond length."""
    summary = result.summary
    of = f"{result.settings['completions']} completions of real models, read by {result.settings['model']}"
    intervals = "Bars are 95 % intervals over problems."
    categories = summary["categories"]
    sentences = summary["sentences"][_TARGET]["protected share"]
    return [
        Figure(
            name="real-pairs",
            title="How often the longer-winded one of two right answers is called the more redundant",
            caption="One dot for each pair of kinds. Left: whole completions. Then the longer one is cut to the length of the "
            "shorter one, from its head and from its tail. Right: completions of other problems whose length differs by at "
            f"most 10 %. The dashed line is chance. {intervals} {of}.",
            draw=lambda canvas: _draw_pairs(canvas, result),
            size=(13.0, 6.0),
        ),
        Figure(
            name="real-settled",
            title="What is protected before and after the answer has settled",
            caption="Share of the tokens that each importance protects, before (open) and after (filled) the place from which "
            f"the model's answer no longer changes. The dashed line is chance. Means over problems. {of}.",
            draw=lambda canvas: _draw_settled(canvas, result),
            size=(8.5, 7.5),
        ),
        Figure(
            name="real-categories",
            title="Which sentences are protected",
            caption="Share of the tokens of each category of sentence that is protected, for four importances. The dashed line "
            f"is chance. {intervals} {of}.",
            draw=lambda canvas: _draw_dots(
                canvas,
                list(CATEGORIES.values()),
                {
                    name: [categories[name].get(label) for label in CATEGORIES]
                    for name in _SHOWN_IMPORTANCES
                    if name in categories
                },
                chance=0.2,
                xlabel="share of tokens that is protected",
            ),
            size=(8.5, 6.5),
        ),
        Figure(
            name="real-sentences",
            title="Sentences that are protected against sentences that change the answer",
            caption="Rank correlation, within a trace, of the protected share of a sentence with its counterfactual importance "
            "(KL): alone, given position and length, and given mean log P too. The dashed line is no relation. "
            f"{intervals} {of}.",
            draw=lambda canvas: _draw_dots(
                canvas,
                list(sentences),
                {shown: [row[control]["value"] for row in sentences.values()] for control, shown in CONTROLS.items()},
                chance=0.0,
                xlabel="rank correlation with counterfactual importance",
            ),
            size=(9.0, 10.0),
        ),
        Figure(
            name="real-beyond",
            title="What a reward sees beyond length",
            caption="Left: how often it rises when one step of a real trace is verified once more and as many tokens are "
            "dropped at the end. Right: partial rank correlation, given length, with three things that a reward ought to see "
            f"in a long trace. The dashed lines are chance. {intervals} {of}.",
            draw=lambda canvas: _draw_beyond(canvas, result),
            size=(11.0, 7.0),
        ),
    ]


def _draw_pairs(canvas: Any, result: Result) -> None:
    panels = canvas.subplots(1, len(VIEWS), sharey=True)
    pairs = {name: views for name, views in result.summary["pairs"].items() if name != "by_task"}
    for axes, (view, shown) in zip(panels, VIEWS.items(), strict=True):
        dots(
            axes,
            _SHOWN_REWARDS,
            {pair: [views[view]["ordered"][name] for name in _SHOWN_REWARDS] for pair, views in pairs.items()},
        )
        axes.axvline(0.5, **REFERENCE)
        axes.set(title=shown, xlabel="share ordered as hoped", xlim=(-0.05, 1.05))
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=2)


def _draw_beyond(canvas: Any, result: Result) -> None:
    scale, beyond = result.summary["scale"], result.summary["beyond_length"]
    left, right = canvas.subplots(1, 2, sharey=True)
    dots(left, list(scale), {"one more verification": [row["raised"] for row in scale.values()]}, ["#444444"])
    left.axvline(0.5, **REFERENCE)
    left.set(title="one step verified once more, equal length", xlabel="share of steps at which the reward sees it")
    dots(right, list(scale), {shown: [beyond[of].get(name) for name in scale] for of, shown in _SEEN.items() if of in beyond})
    right.axvline(0.0, **REFERENCE)
    right.set(title="in a long trace, given its length", xlabel="partial rank correlation with the share of")
    canvas.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3)


def _draw_settled(canvas: Any, result: Result) -> None:
    axes = canvas.subplots()
    prefix = "protected: "
    found = {of.removeprefix(prefix): row for of, row in result.summary["settled"].items() if of.startswith(prefix)}
    for y, row in enumerate(found.values()):
        axes.plot([row["before"], row["after"]], [y, y], color="#999999", zorder=1)
        axes.scatter(row["before"], y, facecolors="white", edgecolors=COLOURS[0], zorder=2, label="before" if not y else None)
        axes.scatter(row["after"], y, color=COLOURS[1], zorder=2, label="after" if not y else None)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.axvline(0.2, **REFERENCE)
    axes.set_xlabel("share of tokens that is protected")
    axes.legend(loc="best")


def _draw_dots(canvas: Any, labels: Sequence[str], series: Mapping[str, Sequence[Any]], *, chance: float, xlabel: str) -> None:
    axes = canvas.subplots()
    dots(axes, labels, series)
    axes.axvline(chance, **REFERENCE)
    axes.set_xlabel(xlabel)
    axes.legend(loc="best")
