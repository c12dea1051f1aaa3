"""Makes `evidence.md` and `evidence.svg` from the JSON files of the runs. Tables pool the seeds; one shows each seed.

`introduction.md` opens the page; the runs' settings replace its names in braces. `reading.md` says where others do better.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparisons import paired_difference, pareto_front
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.problems import KINDS
from entra.metrics import Interval, mean_interval, quantile

SFT = "sft"
OWN = "entra-banded"
_GATED = ("entra-gated", "entra-total", OWN)
NAMES = {SFT: "SFT model (start)", **ARMS}
FRESH = "fresh"
_IMPROBABLE = 0.01


class Pooled(NamedTuple):
    """One arm's held-out results, one seed after another, in the order of the SFT model's results."""

    arm: str
    seeds: list[int]
    correct: list[float]
    tokens: list[float]
    finished: list[float]
    sft_logprob: list[float]
    kinds: list[str]
    runs: list[dict[str, Any]]


def load(folder: Path) -> dict[str, Pooled]:
    """All results of a folder by arm, the SFT model first.

    Raises:
        FileNotFoundError: no result of the SFT model, which everything is compared with.
    """
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in NAMES}
    for path in sorted(folder.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        runs[result["arm"]].append(result)
    if not runs[SFT]:
        raise FileNotFoundError(f"{folder} holds no sft-seed*.json, which everything is compared with; make evidence-full")
    return {arm: _pooled(arm, sorted(found, key=lambda run: run["seed"])) for arm, found in runs.items() if found}


def write_report(results: Path, into: Path) -> str:
    """Writes `evidence.md` and `evidence.svg` and returns the main table.

    Args:
        results: folder of the JSON files.
        into: folder for the two files.
    """
    arms = load(results)
    into.mkdir(parents=True, exist_ok=True)
    table = main_table(arms)
    _plot(arms, into / "evidence.svg")
    (into / "evidence.md").write_text(
        "\n".join([_introduction(arms), table, "", *_sections(arms, _fresh(results / FRESH))]) + "\n"
    )
    return table


def main_table(arms: dict[str, Pooled]) -> str:
    """Accuracy and tokens of every arm with the paired differences to the SFT model, as a Markdown table."""
    rows = [
        "| reward | accuracy, % | difference to SFT, points | mean tokens | change, % | median | finished, % | improbable, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    threshold = quantile(arms[SFT].sft_logprob, _IMPROBABLE)
    for arm, pooled in arms.items():
        base = of_seeds(arms[SFT], pooled.seeds)
        difference = "" if arm == SFT else _signed(paired_difference(pooled.correct, base.correct), 100)
        change = "" if arm == SFT else _change(pooled, base)
        improbable = statistics.fmean(value < threshold for value in pooled.sft_logprob)
        rows.append(
            f"| {NAMES[arm]} | {100 * statistics.fmean(pooled.correct):.1f} | {difference} | "
            f"{statistics.fmean(pooled.tokens):.1f} | {change} | {statistics.median(pooled.tokens):.0f} | "
            f"{100 * statistics.fmean(pooled.finished):.1f} | {100 * improbable:.1f} |"
        )
    return "\n".join(rows)


def of_seeds(pooled: Pooled, seeds: Sequence[int]) -> Pooled:
    """Only the runs of these seeds, which must be there."""
    return _pooled(pooled.arm, [next(run for run in pooled.runs if run["seed"] == seed) for seed in seeds])


def _pooled(arm: str, runs: list[dict[str, Any]]) -> Pooled:
    held_out = [run["held_out"] for run in runs]

    def joined(name: str) -> list[float]:
        return [float(value) for part in held_out for value in part[name]]

    return Pooled(
        arm,
        [run["seed"] for run in runs],
        joined("correct"),
        joined("tokens"),
        joined("finished"),
        joined("sft_logprob"),
        [kind for part in held_out for kind in part["kinds"]],
        runs,
    )


def _change(pooled: Pooled, base: Pooled) -> str:
    """Change of the mean tokens in per cent of the SFT model's, with the interval of the paired difference."""
    return _signed(paired_difference(pooled.tokens, base.tokens), 100 / statistics.fmean(base.tokens))


def _signed(interval: Interval, scale: float) -> str:
    return f"{scale * interval.mean:+.1f} ({scale * interval.low:+.1f} to {scale * interval.high:+.1f})"


def _introduction(arms: dict[str, Pooled]) -> str:
    sft = arms[SFT].runs[0]["sft"]
    config: dict[str, Any] = next((pooled.runs[0]["config"] for arm, pooled in arms.items() if arm != SFT), {})
    count = len(arms[SFT].correct) // len(arms[SFT].seeds)
    machine, versions = sft["machine"], sft["versions"]
    return _prose("introduction.md").format(
        parameters=sft["parameters"] / 1e6,
        traces=sft["traces"],
        sft_minutes=sft["seconds"] / 60,
        held_out=count,
        seeds=len(arms[SFT].seeds),
        cpu=machine["cpu"],
        torch=versions["torch"],
        trl=versions["trl"],
        gym=versions["reasoning-gym"],
        transformers=versions["transformers"],
        **config,
    )


def _prose(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _fresh(folder: Path) -> list[str]:
    """The confirmation with seeds by which nobody chose anything."""
    if not any(folder.glob(f"{SFT}-seed*.json")):
        return []
    arms = load(folder)
    seeds = ", ".join(map(str, arms[SFT].seeds))
    lines = [f"## Seeds that nothing was chosen by: {seeds}", "", main_table(arms), ""]
    if OWN in arms:
        lines += _minus_others(arms, OWN, [arm for arm in arms if arm not in (SFT, OWN)])
    return [*lines, ""]


def _sections(arms: dict[str, Pooled], fresh: list[str]) -> list[str]:
    return [
        "![Accuracy against mean tokens](evidence.svg)",
        "",
        _verdict(arms),
        "",
        *fresh,
        *([_prose("reading.md")] if set(ARMS) <= set(arms) else []),
        "## By kind of problem",
        "",
        "Accuracy in % / mean tokens. `guess` is the kind where the check is needed.",
        "",
        *_by_kind(arms),
        "",
        "## Seed by seed",
        "",
        "Accuracy in % / mean tokens. The seconds are the training and the evaluation of one run with one thread. The machine "
        "had other work at times.",
        "",
        *_by_seed(arms),
        "",
        "## The reward during training",
        "",
        "This is about the weighted sum of an arm's rewards, as means of the first and of the last ten steps. Spread: the "
        "standard deviation within a prompt's completions, which group-scaled advantages divide by. Correlation: with length.",
        "",
        *_training(arms),
        "",
        "## What the models write",
        "",
        *_examples(arms),
    ]


def _verdict(arms: dict[str, Pooled]) -> str:
    """Who met the target and who is on the Pareto front, in words made from the numbers."""
    lines = ["## Verdict", ""]
    lines += [
        "Target: at least 60 % fewer tokens, and the lower bound of the accuracy difference above -1 point.",
        "",
    ]
    for arm in _GATED:
        if arm in arms:
            own, base = arms[arm], of_seeds(arms[SFT], arms[arm].seeds)
            accuracy = paired_difference(own.correct, base.correct)
            fewer = 1 - statistics.fmean(own.tokens) / statistics.fmean(base.tokens)
            met = "met" if fewer >= 0.6 and accuracy.low > -0.01 else "missed"
            lines.append(f"- {NAMES[arm]}: {100 * fewer:.1f} % fewer, lower bound {100 * accuracy.low:+.1f} points: **{met}**")
    lines += [
        "",
        "[method.md](method.md#the-reward-as-an-objective) says how they differ, and why r leaves filler standing.",
        "",
    ]
    trained = [arm for arm in arms if arm != SFT]
    points = [(statistics.fmean(arms[arm].tokens), statistics.fmean(arms[arm].correct)) for arm in trained]
    front = [NAMES[arm] for arm, on in zip(trained, pareto_front(points), strict=True) if on]
    lines.append(f"On the Pareto front of mean tokens and accuracy (means alone, without intervals): {'; '.join(front)}.")
    if OWN in arms:
        lines += ["", *_minus_others(arms, OWN, [arm for arm in trained if arm != OWN])]
    if "entra-gated" in arms:
        lines += [
            "",
            "Does it matter which tokens are protected? This compares gated r with the same reward without importance, with a "
            "random protected set, and without attention.",
            "",
            *_minus_others(arms, "entra-gated", [arm for arm in ("all-tokens", "random-protected", "lambda-0") if arm in arms]),
        ]
    return "\n".join(lines)


def _minus_others(arms: dict[str, Pooled], own: str, others: Sequence[str]) -> list[str]:
    """One arm minus each of some others on the same problems."""
    rows = [
        f"{NAMES[own]}, minus another arm, on the same problems of the same seeds:",
        "",
        "| other arm | accuracy, points | tokens |",
        "|---|---|---|",
    ]
    for arm in others:
        shared = [seed for seed in arms[arm].seeds if seed in arms[own].seeds]
        if not shared:
            continue
        ours, theirs = of_seeds(arms[own], shared), of_seeds(arms[arm], shared)
        accuracy = paired_difference(ours.correct, theirs.correct)
        rows.append(
            f"| {NAMES[arm]} | {_signed(accuracy, 100)} | {_signed(paired_difference(ours.tokens, theirs.tokens), 1)} |"
        )
    return rows


def _by_kind(arms: dict[str, Pooled]) -> list[str]:
    rows = ["| reward | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for arm, pooled in arms.items():
        cells = []
        for kind in KINDS:
            chosen = [i for i, of in enumerate(pooled.kinds) if of == kind]
            cells.append(_cell([pooled.correct[i] for i in chosen], [pooled.tokens[i] for i in chosen]))
        rows.append(f"| {NAMES[arm]} | {' | '.join(cells)} |")
    return rows


def _by_seed(arms: dict[str, Pooled]) -> list[str]:
    seeds = arms[SFT].seeds
    rows = ["| reward | " + " | ".join(f"seed {seed}" for seed in seeds) + " | seconds |", "|---|" + "---|" * (len(seeds) + 1)]
    for arm, pooled in arms.items():
        cells = []
        for seed in seeds:
            one = of_seeds(pooled, [seed]) if seed in pooled.seeds else None
            cells.append("" if one is None else _cell(one.correct, one.tokens))
        seconds = [sum(run["seconds"].values()) for run in pooled.runs if "seconds" in run]
        rows.append(f"| {NAMES[arm]} | {' | '.join(cells)} | {', '.join(f'{value:.0f}' for value in seconds)} |")
    return rows


def _cell(correct: Sequence[float], tokens: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(correct):.1f} / {statistics.fmean(tokens):.1f}" if tokens else ""


def _training(arms: dict[str, Pooled]) -> list[str]:
    rows = ["| reward | spread, first | spread, last | correlation, first | correlation, last |", "|---|---|---|---|---|"]
    for arm, pooled in arms.items():
        if arm == SFT:
            continue
        cells = [
            _mean_of([run["curve"][name][part] for run in pooled.runs])
            for name in ("within_group_std", "reward_length_correlation")
            for part in (slice(None, 10), slice(-10, None))
        ]
        rows.append(f"| {NAMES[arm]} | {' | '.join(cells)} |")
    return rows


def _mean_of(parts: Sequence[Sequence[float]]) -> str:
    values = [value for part in parts for value in part if value == value]
    return f"{statistics.fmean(values):.3f}" if values else ""


def _examples(arms: dict[str, Pooled]) -> list[str]:
    lines = []
    for arm in (SFT, OWN):
        if arm in arms:
            lines += [f"{NAMES[arm]}:", "", "```"]
            lines += [f"{shown['prompt']}  {shown['completion']}" for shown in arms[arm].runs[0]["held_out"]["examples"][:4]]
            lines += ["```", ""]
    return lines[:-1]


def _plot(arms: dict[str, Pooled], path: Path) -> None:
    """Accuracy against mean tokens, with 95 % intervals of both. The legend names the marks."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "evidence"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    markers = "os^vDP*X<>hpd"
    colors = pyplot.get_cmap("tab20").colors
    others = iter(colors[0::2] + colors[1::2])
    for (arm, pooled), marker in zip(arms.items(), markers, strict=False):
        tokens, accuracy = mean_interval(pooled.tokens), mean_interval([100 * value for value in pooled.correct])
        color = "black" if arm == SFT else "red" if arm == OWN else next(others)
        axes.errorbar(
            tokens.mean,
            accuracy.mean,
            xerr=tokens.mean - tokens.low,
            yerr=accuracy.mean - accuracy.low,
            fmt=marker,
            color=color,
            markersize=10 if arm in (SFT, OWN) else 7,
            capsize=2,
            label=NAMES[arm].replace("`", ""),
        )
    axes.set_xlabel("mean tokens of a completion (fewer is better)")
    axes.set_ylabel("accuracy on held-out problems, % (more is better)")
    axes.set_title("Accuracy against length after GRPO with different rewards")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    seeds, count = len(arms[SFT].seeds), len(arms[SFT].correct)
    caption = f"{count:,} problems over {seeds} seed(s), one sample each at temperature 1; bars: 95 % intervals of the means."
    figure.supxlabel(caption, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
