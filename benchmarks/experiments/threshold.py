"""What the threshold tau does to the reward, to the order of concise and overthinking twins, and to the protected set.

Decisions taken here:

- The length-adjusted reward of one tau is that of as many positions as the shortest completion leaves unprotected. So no
  completion is compared at fewer. Values are comparable within a tau, not from one tau to the next.
- The importance's choice is compared with a random choice of as many tokens (mean of some draws) and with tau = 0. What a
  random choice separates as well is no merit of the importance.
- By construction a protected set contains those of smaller taus. So a set is stable when a change that leaves the completion as
  it is (`benchmarks.experiments.perturbations`) protects the same tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from benchmarks.experiments import measuring
from benchmarks.experiments.drawing import COLOURS, REFERENCE
from benchmarks.experiments.perturbations import CHANGES, PERTURBATIONS, measure_again, stability_of
from benchmarks.experiments.results import Figure, Result, Table, with_interval
from benchmarks.experiments.twins import PAIRS, compare, over_problems, rewards_of
from entra.config import ScoreConfig

IMPORTANCE, RANDOM = "importance", "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `threshold`."""
    measuring.add_arguments(parser)
    parser.add_argument(
        "--protect-fraction",
        type=float,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.4, 0.5],
        metavar="TAU",
        help="the taus; 0 is always among them (default: 0.1 0.2 0.3 0.4 0.5)",
    )
    parser.add_argument("--attention-weight", type=float, default=2.0, help="lambda (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=20, help="of the random choice (default: %(default)s)")
    parser.add_argument(
        "--perturbations",
        nargs="*",
        choices=list(PERTURBATIONS),
        default=list(PERTURBATIONS),
        help="under which the protected set is compared; one more forward per completion each (default: all)",
    )


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: flags outside their range, no traces, no model.
    """
    taus = sorted({0.0, *options.protect_fraction})
    for tau in taus:
        ScoreConfig(attention_weight=options.attention_weight, protect_fraction=tau)  # raises before the model is loaded
    if options.draws < 1:
        raise ValueError(f"--draws {options.draws} must be at least 1")
    found = measuring.load(options)
    policy = measuring.load_model(options)
    measured = measuring.measure(policy, found)
    again = {name: other for name in options.perturbations if (other := measure_again(policy, measured, name))}
    rows: list[dict[str, Any]] = []
    separation: list[dict[str, Any]] = []
    stability: list[dict[str, Any]] = []
    for tau in taus:
        config = ScoreConfig(attention_weight=options.attention_weight, protect_fraction=tau)
        chosen = {IMPORTANCE: rewards_of(measured, config)}
        if tau:
            chosen[RANDOM] = _random_rewards(measured, config, options.draws, options.seed)
        for selection, (plain, adjusted) in chosen.items():
            for comparison in compare(measured, {"r": plain, "length-adjusted": adjusted}):
                separation.append({"protect_fraction": tau, "selection": selection, **comparison})
            for i, trace in enumerate(measured.traces):
                row = {"problem": trace.sample.problem, "trace_kind": trace.sample.kind, "trace": i}
                row |= {"tokens": len(trace.token_ids), "protect_fraction": tau, "selection": selection}
                rows.append({**row, "reward": plain[i], "length_adjusted": adjusted[i]})
        for change, other in again.items() if tau else ():
            before, after = (
                measuring.scored([of[i] for i in other], config) for of in (dict(enumerate(measured.traces)), other)
            )
            kept = [
                {"problem": measured.traces[i].sample.problem, **values}
                for i, values in zip(other, stability_of(before, after), strict=True)
            ]
            intervals = {name: over_problems(kept, name, options.seed) for name in CHANGES}
            stability.append({"perturbation": change, "protect_fraction": tau, **intervals})
    stability.sort(key=lambda row: options.perturbations.index(row["perturbation"]))
    summary = {
        "completions": len(measured.traces),
        "problems": len(measured.by_problem()),
        "kinds": measured.kinds(),
        **measured.left_out.summary(),
        "positions": {str(tau): measured.fewest_unprotected(tau) for tau in taus},
        "rewards": {
            str(tau): {
                kind: {
                    name: over_problems(
                        [
                            row
                            for row in rows
                            if (row["protect_fraction"], row["trace_kind"], row["selection"]) == (tau, kind, IMPORTANCE)
                        ],
                        name,
                        options.seed,
                    )
                    for name in ("reward", "length_adjusted")
                }
                for kind in measured.kinds()
            }
            for tau in taus
        },
        "separation": separation,
        "stability": stability,
    }
    settings = {
        **measuring.settings(options),
        "protect_fraction": taus,
        **{name: getattr(options, name) for name in ("attention_weight", "draws", "perturbations")},
    }
    return Result(name="threshold", settings=settings, rows=rows, summary=summary)


def _random_rewards(
    measured: measuring.Measurement, config: ScoreConfig, draws: int, seed: int
) -> tuple[list[float], list[float]]:
    """The same, mean over draws of which tokens are protected."""
    generator = torch.Generator().manual_seed(seed)
    config = replace(config, attention_weight=0.0)
    results = []
    for _ in range(draws):  # of numbers below 0, as log-probs are
        noise = [torch.rand(len(trace.token_ids), generator=generator) - 1.0 for trace in measured.traces]
        drawn = [trace.with_logprobs(values) for trace, values in zip(measured.traces, noise, strict=True)]
        results.append(rewards_of(replace(measured, traces=drawn), config))
    plain, adjusted = ([fmean(values) for values in zip(*rewards, strict=True)] for rewards in zip(*results, strict=True))
    return plain, adjusted


def tables(result: Result) -> list[Table]:
    """Rewards, separation, stability."""
    summary, about = result.summary, _about(result)
    kinds = summary["kinds"]
    taus = result.settings["protect_fraction"]
    rewards = [
        Table(
            caption=f"**{title} by kind of trace.** Mean, in brackets its 95 % interval over problems. {about} "
            + ("M: the number of positions that it is adjusted to." if name == "length_adjusted" else ""),
            header=["τ, %", *(["M"] if name == "length_adjusted" else []), *kinds],
            rows=[
                [
                    f"{100 * tau:g}",
                    *([str(summary["positions"][str(tau)])] if name == "length_adjusted" else []),
                    *(with_interval(summary["rewards"][str(tau)][kind][name], 1, 3) for kind in kinds),
                ]
                for tau in taus
            ],
        )
        for name, title in (("reward", "Reward r"), ("length_adjusted", "Length-adjusted reward"))
    ]
    cells: dict[tuple[float, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in summary["separation"]:
        cells.setdefault((row["protect_fraction"], row["selection"]), {})[row["reward"], row["other"]] = row
    columns = list(next(iter(cells.values()), {}))
    header = ["τ, %", "protected by", *(f"{reward}, against {other}" for reward, other in columns)]
    first = [[f"{100 * tau:g}", selection if tau else "nothing"] for tau, selection in cells]
    order = Table(
        caption="**Is overthinking scored lower?** Pairs of one problem in which it is. In brackets the AUC: how often any "
        "overthinking trace scores lower than any other trace; 0.5 is chance. `random`: as many tokens protected, but chosen "
        f"at random; mean of {result.settings['draws']} draws. {about}",
        header=header,
        rows=[
            [*start, *(f"{of[key]['lower']} of {of[key]['pairs']} ({of[key]['auc']:.2f})" for key in columns)]
            for start, of in zip(first, cells.values(), strict=True)
        ],
    )
    differences = Table(
        caption="**By how much?** Mean reward of overthinking minus that of the other trace of the same problem. In brackets "
        f"the paired 95 % interval. Below 0 is the right order. {about}",
        header=header,
        rows=[
            [*start, *(with_interval(of[key]["difference"], 1, 3) for key in columns)]
            for start, of in zip(first, cells.values(), strict=True)
        ],
    )
    compared = {row["perturbation"] for row in summary["stability"]}
    inapplicable = [PERTURBATIONS[name] for name in result.settings["perturbations"] if name not in compared]
    stability = Table(
        caption="**Is the protected set stable?** Share of the protected tokens, in %, that stay protected after a change that "
        f"leaves the completion as it is. Chance keeps a share of τ. Change of r: mean absolute. {about}"
        + (f" Left out, because no prompt here is made of chat messages: {', '.join(inapplicable)}." if inapplicable else ""),
        header=["change", "τ, %", "stay protected", "Jaccard overlap, %", "change of r", "change of log P, nats"],
        rows=[
            [
                PERTURBATIONS[row["perturbation"]],
                f"{100 * row['protect_fraction']:g}",
                with_interval(row["kept"], 100),
                with_interval(row["jaccard"], 100),
                with_interval(row["reward_change"], 1, 4),
                with_interval(row["logprob_change"], 1, 2),
            ]
            for row in summary["stability"]
        ],
    )
    return [*rewards, *(table for table in (order, differences, stability) if table.rows)]


def figures(result: Result) -> list[Figure]:
    """Rewards, separation, stability."""
    summary, about = result.summary, _about(result)
    kinds = summary["kinds"]
    rows = [row for row in result.rows if row["selection"] == IMPORTANCE]
    taus = sorted({row["protect_fraction"] for row in rows})

    def rewards(canvas: Any) -> None:
        panels = canvas.subplots(1, 2, sharey=True)
        names = (("reward", "r"), ("length_adjusted", "length-adjusted r"))
        width = 0.8 / len(kinds)
        for axes, (name, label) in zip(panels, names, strict=True):
            for k, kind in enumerate(kinds):
                boxes = axes.boxplot(
                    [
                        [row[name] for row in rows if row["trace_kind"] == kind and row["protect_fraction"] == tau]
                        for tau in taus
                    ],
                    positions=[t + (k - (len(kinds) - 1) / 2) * width for t in range(len(taus))],
                    widths=0.8 * width,
                    whis=(5, 95),
                    sym="",
                    patch_artist=True,
                    medianprops={"color": "black"},
                    boxprops={"facecolor": COLOURS[k % len(COLOURS)], "alpha": 0.8, "linewidth": 0.6},
                    whiskerprops={"linewidth": 0.8},
                    capprops={"linewidth": 0.8},
                )
                boxes["boxes"][0].set_label(kind)
            axes.set_xticks(range(len(taus)), [f"{100 * tau:g}" for tau in taus])
            axes.set_xlabel("τ, % of tokens protected")
            axes.set_title(label)
            axes.grid(axis="x", visible=False)
        panels[0].set_ylabel("reward, 0 to 1")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds))

    def separation(canvas: Any) -> None:
        panels = canvas.subplots(2, 2, sharex=True, sharey="row")
        for column, name in enumerate(("r", "length-adjusted")):
            for o, (kind, other) in enumerate(PAIRS):
                for selection, style in ((IMPORTANCE, "-"), (RANDOM, ":")):
                    line = [
                        row
                        for row in summary["separation"]
                        if (row["reward"], row["kind"], row["other"]) == (name, kind, other)
                        and (row["selection"] == selection or not row["protect_fraction"])
                    ]
                    for axes, value, scale in ((panels[0][column], "share", 100), (panels[1][column], "difference", 1)):
                        x = [100 * row["protect_fraction"] + 0.6 * (o - 0.5) for row in line]
                        means = [scale * row[value][0] for row in line]
                        axes.plot(x, means, style, color=COLOURS[o], label=f"{other}, {selection} choice")
                        if selection == IMPORTANCE:
                            low, high = ([scale * row[value][side] for row in line] for side in (1, 2))
                            below = [mean - bound for mean, bound in zip(means, low, strict=True)]
                            above = [bound - mean for mean, bound in zip(means, high, strict=True)]
                            axes.errorbar(x, means, [below, above], fmt="o", color=COLOURS[o], markersize=4, capsize=2)
            panels[0][column].axhline(50, **REFERENCE)
            panels[1][column].axhline(0, **REFERENCE)
            panels[0][column].set_title({"r": "r", "length-adjusted": "length-adjusted r"}[name])
            panels[1][column].set_xlabel("τ, % of tokens protected")
        panels[0][0].set_ylabel("pairs in the right order, %")
        panels[1][0].set_ylabel("overthinking minus other")
        canvas.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="against")

    def stability(canvas: Any) -> None:
        axes = canvas.subplots()
        names = list(dict.fromkeys(row["perturbation"] for row in summary["stability"]))
        for p, name in enumerate(names):
            line = [row for row in summary["stability"] if row["perturbation"] == name]
            means = [100 * row["kept"][0] for row in line]
            axes.errorbar(
                [100 * row["protect_fraction"] for row in line],
                means,
                [
                    [mean - 100 * row["kept"][1] for mean, row in zip(means, line, strict=True)],
                    [100 * row["kept"][2] - mean for mean, row in zip(means, line, strict=True)],
                ],
                fmt="-" + "osD^"[p % 4],
                color=COLOURS[p],
                markersize=5,
                capsize=2,
                label=PERTURBATIONS[name],
            )
        shown = [100 * tau for tau in taus if tau]
        axes.plot(shown, shown, label="chance", **REFERENCE)
        axes.set_xlabel("τ, % of tokens protected")
        axes.set_ylabel("protected tokens that stay protected, %")
        axes.set_xticks(shown)
        axes.set_ylim(0, 102)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    drawn = [
        Figure(
            name="threshold-rewards",
            title="The reward by kind of trace and threshold",
            caption=f"Distribution of the reward over completions. Boxes go from the lower to the upper quartile with the "
            f"median, whiskers from 5 to 95 %. Right: adjusted to one number of positions within each τ. {about}",
            draw=rewards,
            size=(10.0, 4.8),
        )
    ]
    if summary["separation"]:
        drawn.append(
            Figure(
                name="threshold-separation",
                title="Does overthinking score lower than the other completion of its problem?",
                caption="Top: share of problems whose overthinking completion scores lower than its concise twin, or than the "
                "control of about its length. Bottom: mean difference of the rewards; below 0 is the right order. Dotted: as "
                "many tokens are protected at random. At τ = 0 nothing is protected. Bars are 95 % intervals over problems. "
                f"{about}",
                draw=separation,
                size=(9.0, 6.5),
            )
        )
    if summary["stability"]:
        drawn.append(
            Figure(
                name="threshold-stability",
                title="Do the same tokens stay protected when the completion stays the same?",
                caption=f"Share of the protected tokens that are also protected after a change that leaves the completion as "
                f"it is, mean over completions. {about} Bars are 95 % intervals over problems.",
                draw=stability,
                size=(9.0, 4.5),
            )
        )
    return drawn


def _about(result: Result) -> str:
    summary, settings = result.summary, result.settings
    return (
        f"{summary['completions']} completions of {summary['problems']} problems ({settings['traces']} traces) under "
        f"{settings['model']}, λ = {settings['attention_weight']:g}.{summary['left_out']}"
    )
