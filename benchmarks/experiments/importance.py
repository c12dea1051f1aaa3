"""Which kinds of tokens are protected, and which term of the importance decides.

Each completion is scored once. `benchmarks.experiments.token_kinds` sorts its tokens into kinds by their text. For each kind
the experiment counts how many tokens are protected. It ranks them by the importance log P + lambda * mu, by log P alone and by
mu alone. Tokens of one trace depend on each other, and so do traces of one problem, so intervals resample problems.
"""

from __future__ import annotations

import argparse
import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.comparisons import resampled_ratio
from benchmarks.experiments import measuring
from benchmarks.experiments.drawing import REFERENCE, dots
from benchmarks.experiments.results import Figure, Result, Table, with_interval
from benchmarks.experiments.token_kinds import KINDS, kinds_of
from entra.config import ScoreConfig
from entra.score import Scores
from entra.view.lines import protected_runs

FORMULA, ALL = "in a formula", "all"
_SHOWN_KINDS = (*KINDS, FORMULA, ALL)
_FEWEST = 5  # problems; of fewer, no interval over problems means anything
_RANKINGS = {"importance": "log P + λ μ", "logprob": "log P alone", "incoming": "μ alone"}
_TERMS = {"logprob": "log P", "incoming": "μ", "importance": "I"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `importance`."""
    measuring.add_arguments(parser)
    parser.add_argument("--attention-weight", type=float, default=2.0, help="lambda (default: %(default)s)")
    parser.add_argument("--protect-fraction", type=float, default=0.2, help="tau (default: %(default)s)")
    parser.add_argument(
        "--attention-statistic", choices=["mean", "lift"], default="mean", help="what mu is (default: %(default)s)"
    )
    parser.add_argument("--examples", type=int, default=1, metavar="N", help="problems shown with text (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: flags outside their range, no traces, no model.
    """
    config = ScoreConfig(
        attention_weight=options.attention_weight,
        protect_fraction=options.protect_fraction,
        attention_statistic=options.attention_statistic,
    )
    found = measuring.load(options)
    measured = measuring.measure(measuring.load_model(options), found)
    rankings = _rankings(measured.traces, config)
    rows = [row for i in range(len(measured.traces)) for row in _rows(measured.traces[i], i, rankings)]
    kinds = measured.kinds()
    settings = {
        **measuring.settings(options),
        **{name: getattr(options, name) for name in ("attention_weight", "protect_fraction", "attention_statistic")},
    }
    summary = {
        "completions": dict(Counter(row["trace_kind"] for row in rows if row["token_kind"] == ALL)),
        "problems": len(measured.by_problem()),
        **measured.left_out.summary(),
        "by_kind": {
            kind: _by_token_kind([row for row in rows if kind in (ALL, row["trace_kind"])], options.seed)
            for kind in (ALL, *kinds)
        },
        "agreement": _agreement(measured, rankings, options.seed),
        "examples": _examples(measured, rankings["importance"], options.examples),
    }
    return Result(name="importance", settings=settings, rows=rows, summary=summary)


def _rankings(measured: Sequence[measuring.Measured], config: ScoreConfig) -> dict[str, Scores]:
    """The scores when tokens are ranked by I, by log P alone, and by mu alone."""
    without = [trace.with_logprobs(torch.zeros_like(trace.logprobs)) for trace in measured]
    return {
        "importance": measuring.scored(measured, config),
        "logprob": measuring.scored(measured, replace(config, attention_weight=0.0)),
        "incoming": measuring.scored(without, replace(config, attention_weight=1.0)),
    }


def _rows(trace: measuring.Measured, i: int, rankings: dict[str, Scores]) -> list[dict[str, Any]]:
    """One record for each kind of token: how many there are, how many are protected, and the sums of what ranks them."""
    kinds = kinds_of(trace.pieces)
    scores = rankings["importance"]
    values = {"logprob": scores.logprobs[i], "incoming": scores.incoming[i], "importance": scores.importance[i]}
    share = float(scores.protected[i].double().mean())
    rows = []
    for shown in _SHOWN_KINDS:
        of_kind = torch.tensor(
            [shown == ALL or (kind.in_formula if shown == FORMULA else kind.kind == shown) for kind in kinds]
        )
        count = int(of_kind.sum())
        row = {
            "problem": trace.sample.problem,
            "trace_kind": trace.sample.kind,
            "trace": i,
            "token_kind": shown,
            "tokens": count,
        }
        row["chance"] = share * count
        row |= {f"protected_by_{name}": int(ranked.protected[i][of_kind].sum()) for name, ranked in rankings.items()}
        row |= {f"sum_{name}": float(value[of_kind].double().sum()) for name, value in values.items()}
        rows.append(row)
    return rows


def _by_token_kind(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """Tokens, chance, and the intervals of shares and means, for each kind of token that occurs."""
    result = {}
    for shown in _SHOWN_KINDS:
        groups: dict[str, Counter[str]] = {}
        for row in rows:
            if row["token_kind"] == shown:
                sums = groups.setdefault(row["problem"], Counter())
                sums.update({name: value for name, value in row.items() if isinstance(value, int | float)})
        tokens = sum(sums["tokens"] for sums in groups.values())
        if not tokens:
            continue
        wanted = [f"protected_by_{name}" for name in _RANKINGS] + [f"sum_{name}" for name in _TERMS]
        result[shown] = {
            "tokens": tokens,
            "chance": sum(sums["chance"] for sums in groups.values()) / tokens,
            **{
                name: list(resampled_ratio([(sums[name], sums["tokens"]) for sums in groups.values()], seed=seed))
                for name in wanted
            },
        }
    return result


def _agreement(measured: measuring.Measurement, rankings: dict[str, Scores], seed: int) -> dict[str, list[float]]:
    """Share of the protected tokens that one term alone would protect too, and what chance would give."""
    ranked = rankings["importance"].protected

    def shares(values: Callable[[int], float]) -> list[float]:
        groups = measured.by_problem().values()
        counted = [[i for i in group if ranked[i].any()] for group in groups]
        return list(resampled_ratio([(sum(map(values, group)), len(group)) for group in counted], seed=seed))

    def overlap(name: str) -> Callable[[int], float]:
        other = rankings[name].protected
        return lambda i: float((ranked[i] & other[i]).sum() / ranked[i].sum())

    return {
        "logprob": shares(overlap("logprob")),
        "incoming": shares(overlap("incoming")),
        "chance": shares(lambda i: float(ranked[i].double().mean())),
    }


def _examples(measured: measuring.Measurement, scores: Scores, problems: int) -> list[dict[str, str]]:
    """The completions of the first problems, but `sample`, with their protected tokens marked."""
    chosen = list(measured.by_problem().items())[: max(0, problems)]
    return [
        {
            "problem": problem,
            "kind": measured.traces[i].sample.kind,
            "text": marked(measured.traces[i].pieces, scores.protected[i].tolist()),
        }
        for problem, group in chosen
        for i in group
        if measured.traces[i].sample.kind != "sample"
    ]


def marked(pieces: Iterable[str], protected: Iterable[bool]) -> str:
    """The text for a cell of a Markdown table, protected tokens in bold. Markdown and HTML in it are escaped."""
    shown = []
    for part, bold in protected_runs(list(pieces), list(protected), around=""):
        escaped = html.escape(part)
        for character in "|*_`[]\\~":
            escaped = escaped.replace(character, f"&#{ord(character)};")
        escaped = escaped.replace("\n", "<br>")
        shown.append(f"<b>{escaped}</b>" if bold else escaped)
    return "".join(shown)


def _known(result: Result, trace_kind: str, token_kind: str) -> bool:
    """Whether enough problems have such tokens in such traces for an interval over problems."""
    problems = {
        row["problem"]
        for row in result.rows
        if row["tokens"] and row["token_kind"] == token_kind and trace_kind in (ALL, row["trace_kind"])
    }
    return len(problems) >= min(_FEWEST, result.summary["problems"])


def tables(result: Result) -> list[Table]:
    """Shares, terms, agreement, traces."""
    summary = result.summary
    about = _about(result)
    everything = summary["by_kind"][ALL]
    trace_kinds = [kind for kind in summary["by_kind"] if kind != ALL]
    shares = Table(
        caption=f"**Share of tokens that is protected, in %, by kind of token** and by what ranks the tokens. {about} "
        f"Chance would protect {100 * everything[ALL]['chance']:.1f} % of each kind. In brackets 95 % intervals over problems. "
        "Tokens in a formula are numbers, operators, brackets and spaces; the rows above count them too.",
        header=["kind", "tokens", *_RANKINGS.values()],
        rows=[
            [kind, f"{row['tokens']:,}", *(with_interval(row[f"protected_by_{name}"], 100) for name in _RANKINGS)]
            for kind, row in everything.items()
        ],
    )
    by_trace = Table(
        caption="**The same by kind of trace**, ranked by log P + λ μ: share that is protected, in %. Too few: "
        f"fewer than {_FEWEST} problems have such tokens.",
        header=["kind", *trace_kinds],
        rows=[
            [
                kind,
                *(
                    with_interval(summary["by_kind"][trace][kind]["protected_by_importance"], 100)
                    if _known(result, trace, kind)
                    else "too few"
                    for trace in trace_kinds
                ),
            ]
            for kind in everything
        ],
    )
    terms = Table(
        caption=f"**Means by kind of token**: log P and I in nats, μ as a share of a query's attention"
        f"{' (as a multiple of the uniform share)' if result.settings['attention_statistic'] == 'lift' else ''}. {about}",
        header=["kind", *_TERMS.values()],
        rows=[
            [kind, *(with_interval(row[f"sum_{name}"], 1, 4 if name == "incoming" else 2) for name in _TERMS)]
            for kind, row in everything.items()
        ],
    )
    agreement = Table(
        caption="**Which term decides**: share of the protected tokens that one term alone would also protect, in %. Mean over "
        "completions.",
        header=["ranked by", "also protected"],
        rows=[
            [_RANKINGS.get(name, "at random"), with_interval(interval, 100)] for name, interval in summary["agreement"].items()
        ],
    )
    examples = Table(
        caption="**Traces**, protected tokens in bold.",
        header=["problem", "kind", "completion"],
        rows=[[example["problem"], example["kind"], example["text"]] for example in summary["examples"]],
    )
    return [shares, by_trace, terms, agreement, *([examples] if examples.rows else [])]


def figures(result: Result) -> list[Figure]:
    """Shares by ranking, shares by kind of trace, the terms."""
    summary, about = result.summary, _about(result)
    everything = summary["by_kind"][ALL]
    trace_kinds = [kind for kind in summary["by_kind"] if kind != ALL]
    labels = list(everything)
    chance = 100 * everything[ALL]["chance"]

    def percent(row: dict[str, Any] | None, name: str) -> list[float] | None:
        return None if row is None else [100 * value for value in row[name]]

    def draw_shares(canvas: Any, series: dict[str, list[list[float] | None]], legend: str) -> None:
        axes = canvas.subplots()
        dots(axes, labels, series)
        axes.axvline(chance, label="chance", **REFERENCE)
        axes.set_xlabel("share of tokens that is protected, %")
        axes.set_ylabel("kind of token")
        axes.set_xlim(left=-1)
        axes.legend(title=legend, loc="center left", bbox_to_anchor=(1, 0.5))

    def by_ranking(canvas: Any) -> None:
        series = {
            title: [percent(everything[kind], f"protected_by_{name}") for kind in labels] for name, title in _RANKINGS.items()
        }
        draw_shares(canvas, series, "ranked by")

    def by_trace(canvas: Any) -> None:
        series = {
            trace: [
                percent(summary["by_kind"][trace][kind] if _known(result, trace, kind) else None, "protected_by_importance")
                for kind in labels
            ]
            for trace in trace_kinds
        }
        draw_shares(canvas, series, "kind of trace")

    def terms(canvas: Any) -> None:
        units = {"logprob": ("mean log P, nats", 1), "incoming": ("mean μ, % of a query's attention", 100)}
        if result.settings["attention_statistic"] == "lift":
            units["incoming"] = ("mean lift, multiple of the uniform share", 1)
        panels = canvas.subplots(1, 2, sharey=True)
        for axes, (name, (unit, scale)) in zip(panels, units.items(), strict=True):
            dots(axes, labels, {name: [[scale * value for value in everything[kind][f"sum_{name}"]] for kind in labels]})
            axes.set_xlabel(unit)
        panels[0].set_ylabel("kind of token")

    intervals = "Bars are 95 % intervals that resample problems."
    return [
        Figure(
            name="importance-kinds",
            title="Which kinds of tokens are protected, and by which term",
            caption=f"Share of the tokens of each kind that is protected, when the importance or one of its terms alone ranks "
            f"the tokens. {about} {intervals}",
            draw=by_ranking,
            size=(9.0, 5.0),
        ),
        Figure(
            name="importance-traces",
            title="Which kinds of tokens are protected, by kind of trace",
            caption=f"Share of the tokens of each kind that is protected, in each kind of trace. Tokens are ranked by "
            f"log P + λ μ. Nothing is drawn where fewer than {_FEWEST} problems have such tokens. {about} {intervals}",
            draw=by_trace,
            size=(9.0, 5.5),
        ),
        Figure(
            name="importance-terms",
            title="Log-probability and incoming attention by kind of token",
            caption=f"Mean log P (left) and mean μ (right) of the tokens of each kind. {about} {intervals}",
            draw=terms,
            size=(9.0, 4.0),
        ),
    ]


def _about(result: Result) -> str:
    summary, settings = result.summary, result.settings
    tokens = summary["by_kind"][ALL][ALL]["tokens"]
    completions = sum(summary["completions"].values())
    return (
        f"{completions} completions of {summary['problems']} problems ({settings['traces']} traces), {tokens:,} tokens, under "
        f"{settings['model']}, λ = {settings['attention_weight']:g}, τ = {100 * settings['protect_fraction']:g} %"
        f"{', μ debiased (lift)' if settings['attention_statistic'] == 'lift' else ''}.{summary['left_out']}"
    )
