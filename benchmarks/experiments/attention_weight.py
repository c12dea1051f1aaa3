"""What lambda does to the importance, the protected tokens and the reward, with mean attention and with lift.

Decisions taken here:

- Position is relative to the completion, from 0 to 1, in bins. Each trace counts once in a bin, whatever its length.
- A protected token is near the question in two senses. It stands in the first fifth of the completion, or its text is also a
  token of the user's messages (words and numbers, ignoring case). The second is compared with the share among all tokens.
- What lambda means depends on how mu's spread compares with that of log P. Near the threshold that is the spread among the
  probable tokens, so it is given for all tokens and for the upper half by log P.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments import measuring
from benchmarks.experiments.drawing import COLOURS, REFERENCE
from benchmarks.experiments.results import Figure, Result, Table, with_interval
from benchmarks.experiments.twins import compare, over_problems, rewards_of
from entra.config import ScoreConfig, Statistic
from entra.view.trace import pieces_of

STATISTICS: tuple[Statistic, ...] = ("mean", "lift")
_FIRST = 0.2
_BINS = 10
_TITLES = {"mean": "mean attention", "lift": "lift"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `lambda`."""
    measuring.add_arguments(parser)
    parser.add_argument(
        "--attention-weight",
        type=float,
        nargs="+",
        default=[0.0, 1e-4, 0.5, 2.0, 5.0, 10.0, 100.0],
        metavar="LAMBDA",
        help="the lambdas; 0 is always among them (default: 0 1e-4 0.5 2 5 10 100)",
    )
    parser.add_argument("--protect-fraction", type=float, default=0.2, help="tau (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: flags outside their range, no traces, no model.
    """
    weights = sorted({0.0, *options.attention_weight})
    configs = {
        (statistic, weight): ScoreConfig(
            attention_weight=weight, protect_fraction=options.protect_fraction, attention_statistic=statistic
        )
        for statistic in STATISTICS
        for weight in weights
    }
    found = measuring.load(options)
    policy = measuring.load_model(options)
    measured = measuring.measure(policy, found)
    in_prompt = [_in_prompt(policy.tokenizer, trace) for trace in measured.traces]
    unweighted = measuring.scored(measured.traces, configs["mean", 0.0])
    first_rewards = rewards_of(measured, configs["mean", 0.0])[0]
    rows: list[dict[str, Any]] = []
    positions: list[dict[str, Any]] = []
    twins: list[dict[str, Any]] = []
    for (statistic, weight), config in configs.items():
        scores = measuring.scored(measured.traces, config)
        plain, adjusted = rewards_of(measured, config)
        names = {"attention_statistic": statistic, "attention_weight": weight}
        for i, trace in enumerate(measured.traces):
            row = {"problem": trace.sample.problem, "trace_kind": trace.sample.kind, "trace": i, **names}
            row |= measuring.overlap(unweighted.protected[i], scores.protected[i])
            row |= _nearness(scores.protected[i], in_prompt[i])
            row |= {"reward": plain[i], "length_adjusted": adjusted[i], "reward_change": plain[i] - first_rewards[i]}
            rows.append(row)
        by_token = {"importance": scores.importance, "protected": scores.protected}
        everything = range(len(measured.traces))
        positions += [{**names, **values} for values in _over_position(measured, by_token, everything, options.seed)]
        twins += [{**names, **values} for values in compare(measured, {"r": plain, "length-adjusted": adjusted})]
    summary = {
        "completions": len(measured.traces),
        "problems": len(measured.by_problem()),
        **measured.left_out.summary(),
        "by_weight": _by_weight(rows, options.seed),
        "in_prompt": over_problems(
            [
                {"problem": trace.sample.problem, "share": float(near.double().mean())}
                for trace, near in zip(measured.traces, in_prompt, strict=True)
            ],
            "share",
            options.seed,
        ),
        "twins": twins,
        "spread": _spread(measured, options.seed),
        "positions": positions,
        "terms": [
            {"kind": kind, **values}
            for kind in measured.kinds()
            for values in _over_position(
                measured,
                {
                    "logprob": [trace.logprobs for trace in measured.traces],
                    **{statistic: [trace.incoming(statistic) for trace in measured.traces] for statistic in STATISTICS},
                },
                [i for i, trace in enumerate(measured.traces) if trace.sample.kind == kind],
                options.seed,
            )
        ],
    }
    settings = {**measuring.settings(options), "attention_weight": weights, "protect_fraction": options.protect_fraction}
    return Result(name="lambda", settings=settings, rows=rows, summary=summary)


def _in_prompt(tokenizer: Any, trace: measuring.Measured) -> Tensor:
    """bool [n]: tokens that are a word or a number, and whose text is also a token of the user's messages."""
    prompt, ids = trace.sample.prompt, trace.prompt_ids
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt[0], Mapping):
        asked = "\n".join(message["content"] for message in prompt if message["role"] == "user")
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    texts = set(map(_bare, pieces_of(tokenizer, ids)))
    return torch.tensor([any(map(str.isalnum, piece)) and _bare(piece) in texts for piece in trace.pieces])


def _bare(piece: str) -> str:
    return piece.strip().casefold()


def _nearness(protected: Tensor, in_prompt: Tensor) -> dict[str, float]:
    """Shares of the protected tokens; 0 where nothing is protected."""
    count = max(1, int(protected.sum()))
    first = torch.arange(len(protected)) < _FIRST * len(protected)
    return {"first_fifth": int((protected & first).sum()) / count, "in_prompt": int((protected & in_prompt).sum()) / count}


def _by_weight(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["attention_statistic"], row["attention_weight"]), []).append(row)
    names = ("kept", "jaccard", "first_fifth", "in_prompt", "reward", "reward_change")
    return [
        {
            "attention_statistic": statistic,
            "attention_weight": weight,
            **{name: over_problems(group, name, seed) for name in names},
        }
        for (statistic, weight), group in groups.items()
    ]


def _over_position(
    measured: measuring.Measurement, values: Mapping[str, Sequence[Tensor]], chosen: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """For each bin of the relative position: the mean of each of the values over the chosen traces, with interval."""
    bins: list[list[dict[str, Any]]] = [[] for _ in range(_BINS)]
    for i in chosen:
        trace = measured.traces[i]
        count = len(trace.token_ids)
        of_token = torch.arange(count) * _BINS // count
        for b in of_token.unique().tolist():
            means = {name: float(value[i][of_token == b].double().mean()) for name, value in values.items()}
            bins[b].append({"problem": trace.sample.problem, **means})
    return [
        {"position": (b + 0.5) / _BINS, **{name: over_problems(inside, name, seed) for name in values}}
        for b, inside in enumerate(bins)
        if inside
    ]


def _spread(measured: measuring.Measurement, seed: int) -> list[dict[str, Any]]:
    """For each kind of trace: tokens, and the standard deviations of log P and mu within a trace."""
    rows = []
    for trace in measured.traces:
        if len(trace.token_ids) < 4:
            continue  # half of it has no standard deviation
        top = trace.logprobs >= trace.logprobs.double().median()
        row: dict[str, Any] = {"problem": trace.sample.problem, "kind": trace.sample.kind, "tokens": len(trace.token_ids)}
        for name, values in {"logprob": trace.logprobs, "mean": trace.mean, "lift": trace.lift}.items():
            row[name] = float(values.double().std())
            row[f"{name}_top"] = float(values[top].double().std())
        rows.append(row)
    names = ("tokens", "logprob", "logprob_top", "mean", "mean_top", "lift", "lift_top")
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [
        {
            "kind": kind or "all",
            **{name: over_problems([row for row in rows if kind in (None, row["kind"])], name, seed) for name in names},
        }
        for kind in ([None, *kinds] if rows else [])
    ]


def tables(result: Result) -> list[Table]:
    """Protected sets, twins, spread."""
    summary, about = result.summary, _about(result)
    weights = Table(
        caption="**Protected tokens and reward by λ.** Three shares of the protected tokens, in %: λ = 0 protects them too, "
        "they are in the first fifth of the completion, and the question has their text. Chance: 20 % are in the first fifth. "
        f"{100 * summary['in_prompt'][0]:.1f} % of all tokens have such a text. Then the reward r and its change from λ = 0. "
        f"Means over completions, in brackets 95 % intervals over problems. {about}",
        header=[
            "μ is",
            "λ",
            "protected at λ = 0",
            "Jaccard overlap, %",
            "in the first fifth",
            "in the question",
            "r",
            "change",
        ],
        rows=[
            [
                _TITLES[row["attention_statistic"]],
                f"{row['attention_weight']:g}",
                *(with_interval(row[name], 100) for name in ("kept", "jaccard", "first_fifth", "in_prompt")),
                with_interval(row["reward"], 1, 3),
                with_interval(row["reward_change"], 1, 4),
            ]
            for row in summary["by_weight"]
        ],
    )
    cells: dict[tuple[str, float], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in summary["twins"]:
        of = cells.setdefault((row["attention_statistic"], row["attention_weight"]), {})
        of[row["reward"], row["other"]] = row
    columns = list(next(iter(cells.values()), {}))
    twins = Table(
        caption="**Is overthinking scored lower, by λ?** Pairs of one problem in which it is. In brackets the mean reward "
        f"of overthinking minus that of the other trace. {about}",
        header=["μ is", "λ", *(f"{reward}, against {other}" for reward, other in columns)],
        rows=[
            [
                _TITLES[statistic],
                f"{weight:g}",
                *(f"{of[key]['lower']} of {of[key]['pairs']} ({of[key]['difference'][0]:+.3f})" for key in columns),
            ]
            for (statistic, weight), of in cells.items()
        ],
    )
    spread = Table(
        caption="**What λ is worth.** Standard deviations within a completion of log P in nats, of μ and of lift, mean over "
        "completions. Among all tokens, and among the half of them with the highest log P, which has the protected ones. "
        f"Equal at: the λ for which the standard deviation of λ μ is that of log P. {about}",
        header=[
            "traces",
            "mean tokens",
            "tokens",
            "std of log P",
            "std of μ",
            "std of lift",
            "equal at λ (mean attention)",
            "equal at λ (lift)",
        ],
        rows=[
            [
                row["kind"],
                f"{row['tokens'][0]:.0f}",
                among,
                f"{row['logprob' + end][0]:.3f}",
                f"{row['mean' + end][0]:.4f}",
                f"{row['lift' + end][0]:.3f}",
                *(f"{row['logprob' + end][0] / max(row[name + end][0], 1e-12):.3g}" for name in STATISTICS),
            ]
            for row in summary["spread"]
            for among, end in (("all", ""), ("upper half", "_top"))
        ],
    )
    return [weights, *(table for table in (twins, spread) if table.rows)]


def figures(result: Result) -> list[Figure]:
    """Importance and protection over position; overlap and nearness by lambda; the terms over position."""
    summary, about = result.summary, _about(result)
    weights = result.settings["attention_weight"]
    x_label = "position in the completion, 0 first, 1 last token"

    def band(axes: Any, line: Sequence[dict[str, Any]], name: str, scale: float, colour: Any, label: str) -> None:
        x = [row["position"] for row in line]
        mean, low, high = ([scale * row[name][side] for row in line] for side in range(3))
        axes.plot(x, mean, color=colour, label=label, linewidth=1.5)
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)

    def positions(canvas: Any) -> None:
        import matplotlib

        panels = canvas.subplots(2, 2, sharex=True)
        for column, statistic in enumerate(STATISTICS):
            for w, weight in enumerate(weights):
                colour = matplotlib.colormaps["viridis"](0.95 * w / max(1, len(weights) - 1))
                line = [
                    row
                    for row in summary["positions"]
                    if (row["attention_statistic"], row["attention_weight"]) == (statistic, weight)
                ]
                band(panels[0][column], line, "importance", 1, colour, f"{weight:g}")
                band(panels[1][column], line, "protected", 100, colour, f"{weight:g}")
            panels[0][column].set_yscale("symlog", linthresh=1)
            panels[0][column].yaxis.set_major_formatter("{x:g}")
            panels[0][column].set_title(f"μ is {_TITLES[statistic]}")
            panels[1][column].axhline(100 * result.settings["protect_fraction"], **REFERENCE)
            panels[1][column].set_ylim(bottom=0)
            panels[1][column].set_xlim(0, 1)
            panels[1][column].set_xlabel(x_label)
        panels[0][0].set_ylabel("importance log P + λ μ, nats\n(linear within ±1, then logarithmic)")
        panels[1][0].set_ylabel("tokens that are protected, %")
        canvas.legend(*panels[0][0].get_legend_handles_labels(), title="λ", loc="outside right center")

    def overlap(canvas: Any) -> None:
        panels = canvas.subplots(1, 3)
        shown = (
            ("kept", "protected at λ = 0, too", 100 * result.settings["protect_fraction"]),
            ("first_fifth", "in the first fifth of the completion", 100 * _FIRST),
            ("in_prompt", "with a text that the question has", 100 * summary["in_prompt"][0]),
        )
        for axes, (name, title, chance) in zip(panels, shown, strict=True):
            for s, statistic in enumerate(STATISTICS):
                line = [row for row in summary["by_weight"] if row["attention_statistic"] == statistic]
                mean, low, high = ([100 * row[name][side] for row in line] for side in range(3))
                x = [i + 0.16 * (s - 0.5) for i in range(len(line))]
                below = [m - bound for m, bound in zip(mean, low, strict=True)]
                above = [bound - m for m, bound in zip(mean, high, strict=True)]
                axes.errorbar(x, mean, [below, above], fmt="-" + "os"[s], color=COLOURS[s], capsize=2, label=_TITLES[statistic])
            axes.axhline(chance, label="chance", **REFERENCE)
            axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
            axes.set_xlabel("λ")
            axes.set_title(title, fontsize="medium")
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("share of the protected tokens, %")
        canvas.legend(*panels[0].get_legend_handles_labels(), title="μ is", loc="outside lower center", ncols=3)

    def terms(canvas: Any) -> None:
        shown = (("logprob", 1, "log P, nats"), ("mean", 100, "μ, % of a query's attention"), ("lift", 1, "lift, multiple"))
        panels = canvas.subplots(1, 3, sharex=True)
        for axes, (name, scale, label) in zip(panels, shown, strict=True):
            for k, kind in enumerate(dict.fromkeys(row["kind"] for row in summary["terms"])):
                band(axes, [row for row in summary["terms"] if row["kind"] == kind], name, scale, COLOURS[k], kind)
            axes.set_ylabel(label)
            axes.set_xlim(0, 1)
            axes.set_xlabel("position, 0 first, 1 last token")
        panels[1].set_ylim(bottom=0)
        panels[2].set_ylim(bottom=0)
        panels[2].axhline(1, **REFERENCE)
        legend = panels[0].get_legend_handles_labels()
        canvas.legend(*legend, title="kind of trace", loc="outside lower center", ncols=4)

    return [
        Figure(
            name="lambda-position",
            title="Importance and protection over the position in the completion, by λ",
            caption="Top: importance. Bottom: share of tokens that are protected. Both by relative position in tenths, mean "
            "over completions. Left: with mean attention. Right: with lift, which weights each query by the number of keys "
            f"that it sees. Bands are 95 % intervals over problems. The dashed line is what chance protects. {about}",
            draw=positions,
            size=(10.0, 7.0),
        ),
        Figure(
            name="lambda-overlap",
            title="Which tokens are protected, by λ",
            caption="Of the protected tokens, the share that λ = 0 protects too, the share in the first fifth of the "
            "completion, and the share with a text that the question has. Bars are 95 % intervals over problems. Dashed: what "
            f"chance would give. {about}",
            draw=overlap,
            size=(11.0, 4.4),
        ),
        Figure(
            name="lambda-terms",
            title="Log-probability, mean attention and lift over the position in the completion",
            caption="Means over completions by relative position in tenths and kind of trace. Lift is 1 (dashed) where "
            f"attention is uniform. Bands are 95 % intervals over problems. {about}",
            draw=terms,
            size=(11.0, 4.2),
        ),
    ]


def _about(result: Result) -> str:
    summary, settings = result.summary, result.settings
    return (
        f"{summary['completions']} completions of {summary['problems']} problems ({settings['traces']} traces) under "
        f"{settings['model']}, τ = {100 * settings['protect_fraction']:g} %.{summary['left_out']}"
    )
