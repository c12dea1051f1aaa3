"""Tables and plots of the experiment `proxy`, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from benchmarks.experiments.drawing import REFERENCE, dots
from benchmarks.experiments.ranks import ranks, top
from benchmarks.experiments.results import Figure, Result, Table, with_interval

_TARGETS = {
    "loo": "leave-one-out",
    "loo_mean": "leave-one-out per later token",
    "loo_absolute": "leave-one-out, absolute",
    "bayes": "log P given both sides",
    "bayes_lower": "the same, lower bound",
    "gain": "Bayes gain",
}
_DRAWN = ("loo", "loo_mean", "gain", "bayes")
_PROXIES = {
    "mu": "μ, last layer",
    "lift": "lift, last layer",
    "logprob": "log P",
    "importance_2": "I = log P + 2 μ",
    "importance_1e-4": "I = log P + 0.0001 μ",
    "importance_lift": "log P + 2 lift",
    "early": "earlier first",
    "late": "later first",
    "random": "random order",
    "mu_middle": "μ, middle layer",
    "lift_middle": "lift, middle layer",
    "mu_all": "μ, mean of all layers",
    "lift_all": "lift, mean of all layers",
}
_MAIN = (
    *("mu", "lift", "mu_all", "lift_all", "logprob", "importance_2", "importance_1e-4", "importance_lift"),
    *("early", "late", "random"),
)
_LAYERS = {"last layer": "", "middle layer": "_middle", "mean of all layers": "_all"}
FEWEST_TOKENS = 10
"""Of a completion that is compared: with fewer, the top fifth is one token."""

Interval = Sequence[float]
Row = Mapping[str, Any]


def compared(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The tokens of each completion that has enough of them, by problem and trace."""
    completions: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        completions.setdefault((row["problem"], row["trace"]), []).append(row)
    return {key: tokens for key, tokens in completions.items() if len(tokens) >= FEWEST_TOKENS}


def tables(result: Result) -> list[Table]:
    """What is read: agreement of every proxy with every target, what it adds to position, and how sure the targets are."""
    summary = result.summary
    of = _of(result)
    share = f"{result.settings['top']:.0%}"
    return [
        _grid(
            f"Spearman's rank correlation of each proxy with each target, within a completion: mean over problems and its 95 % "
            f"interval. {of} Leave-one-out: log-probability (nats) that the text loses, from the token after next on, when no "
            "query may attend to the token. Absolute: the sum of the changes' sizes. log P given both sides: by Bayes' rule. "
            "Bayes gain: what it adds to log P, the part that λμ stands for in the method." + summary["left_out"],
            summary["spearman"],
        ),
        _grid(
            f"Share of a target's top {share} of tokens that is in the proxy's top {share}: mean over problems and its 95 % "
            f"interval. {of} Chance gives {_chance(result):.2f}.",
            summary["overlap"],
        ),
        *(
            _grid(
                f"Partial rank correlation given {name}: what a proxy says about a target that the ranks of {name} do not. "
                f"Mean over problems and its 95 % interval. {of}",
                partial,
            )
            for name, partial in summary["partial"].items()
        ),
        *(
            _grid(
                f"Spearman's rank correlation in the {kind} completions alone: mean over problems and its 95 % interval.",
                {target: {proxy: table[target][proxy] for proxy in _MAIN} for target in table},
            )
            for kind, table in summary["spearman_by_kind"].items()
            if len(summary["spearman_by_kind"]) > 1
        ),
        Table(
            caption=f"Spearman's rank correlation of the targets with each other, within a completion: mean over problems and "
            f"its 95 % interval. {of}",
            header=["target", *_TARGETS.values()],
            rows=[[_TARGETS[a], *(_cell(summary["targets"][b][a]) for b in _TARGETS)] for a in _TARGETS],
        ),
        _certainty(result),
    ]


def figures(result: Result) -> list[Figure]:
    """The same as plots, and the tokens themselves."""
    summary = result.summary
    of = _of(result)
    share = result.settings["top"]

    def agreement(statistic: str, proxies: Sequence[str], label: str, chance: float) -> Callable[[Any], None]:
        def draw(canvas: Any) -> None:
            axes = canvas.subplots()
            axes.axvline(chance, **REFERENCE)
            dots(
                axes,
                [_PROXIES[proxy] for proxy in proxies],
                {_TARGETS[target]: [summary[statistic][target][proxy] for proxy in proxies] for target in _DRAWN},
            )
            axes.set_xlabel(label)
            canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)

        return draw

    explained = (
        "Leave-one-out: log-probability that the later text loses when no query may attend to the token, in sum and per later "
        "token. Bayes gain: how much the text after a token raises its log-probability. log P given both sides: what it is "
        "then."
    )
    return [
        Figure(
            name="proxy-spearman",
            title="How well a proxy orders tokens by their influence",
            caption=f"Spearman's rank correlation within a completion, mean over problems with 95 % intervals. Dashed: no "
            f"relation. {of} {explained}",
            draw=agreement("spearman", _MAIN, "Spearman's rank correlation with the target (1: same order, 0: none)", 0),
            size=(8.0, 6.0),
        ),
        Figure(
            name="proxy-overlap",
            title=f"How many of the {share:.0%} most influential tokens a proxy finds",
            caption=f"Share of a target's top {share:.0%} of tokens that is in the proxy's top {share:.0%}, mean over problems "
            f"with 95 % intervals. Dashed: what chance finds. {of} {explained}",
            draw=agreement("overlap", _MAIN, f"share of the target's top {share:.0%} that the proxy finds", _chance(result)),
            size=(8.0, 6.0),
        ),
        Figure(
            name="proxy-tokens",
            title="Attention against influence, token by token",
            caption=f"Each token's place in its completion's order by attention (across) and by leave-one-out per later token "
            f"(up), from 0, the lowest, to 1. A good proxy would fill the diagonal. {of}",
            draw=lambda canvas: _draw_tokens(canvas, result.rows),
            size=(9.0, 4.4),
        ),
        Figure(
            name="proxy-layers",
            title="Which layer's attention says most",
            caption=f"Spearman's rank correlation of incoming attention with four targets, for the last layer (the method's), "
            f"the middle one and the mean of all. Mean over problems with 95 % intervals. Dashed: no relation. {of} μ: mean "
            "attention from later tokens. Lift: the same as a multiple of each query's uniform share.",
            draw=lambda canvas: _draw_layers(canvas, summary["spearman"]),
            size=(11.0, 4.0),
        ),
    ]


def _of(result: Result) -> str:
    """What was looked at, for a caption."""
    summary, settings = result.summary, result.settings
    return (
        f"{summary['tokens']:,} tokens of {summary['completions']} completions ({', '.join(settings['kinds'])}) of "
        f"{summary['problems']} problems, of each the last {settings['max_tokens']} but two; model {settings['model']}."
    )


def _chance(result: Result) -> float:
    """What a random order finds of the top in expectation. This is less than `top`, because only whole tokens count."""
    counts = [len(own) for own in compared(result.rows).values()]
    return sum(len(top(range(count), result.settings["top"])) / count for count in counts) / len(counts)


def _grid(caption: str, values: Mapping[str, Mapping[str, Interval | None]]) -> Table:
    """Proxies down, targets across."""
    proxies = next(iter(values.values()))
    return Table(
        caption=caption,
        header=["proxy", *(_TARGETS[target] for target in values)],
        rows=[[_PROXIES[proxy], *(_cell(values[target][proxy]) for target in values)] for proxy in proxies],
    )


def _cell(interval: Interval | None) -> str:
    return "-" if interval is None else with_interval(interval, digits=2).replace("-0.00", "0.00")


def _certainty(result: Result) -> Table:
    summary, settings = result.summary, result.settings
    bounds = summary["bounds"]
    return Table(
        caption=f"How sure the targets are. Bayes' rule sums over the token and at most {settings['alternatives']} "
        f"alternatives. It takes fewer where the rest has at most {settings['tail']:g} of the probability. What is left out "
        "can only lower log P given both sides. The lower bound assumes that none of it makes the later text likelier than the "
        f"best alternative that was run. {_of(result)}",
        header=["quantity", "value"],
        rows=[
            ["alternatives run, mean", f"{bounds['alternatives']:.1f}"],
            ["probability left out, mean", f"{bounds['tail']:.1%}"],
            ["tokens of which more than 20% are left out", f"{bounds['tail_large']:.1%}"],
            ["probability left out, most", f"{bounds['tail_max']:.1%}"],
            ["log P given both sides, upper minus lower bound, median", f"{bounds['width_median']:.2f} nats"],
            ["the same, 90th percentile", f"{bounds['width_p90']:.2f} nats"],
            ["rank correlation of upper and lower bound", _cell(bounds["spearman"])],
            ["share of tokens without which the later text is less likely", _cell(summary["positive"]["loo"])],
            ["share of tokens that the later text makes likelier", _cell(summary["positive"]["gain"])],
            ["tokens run on top of the plain forwards", f"{summary['tokens_run']:,}"],
        ],
    )


def _draw_tokens(canvas: Any, rows: Sequence[Row]) -> None:
    left, right = canvas.subplots(1, 2, sharey=True)
    completions = compared(rows).values()

    def places(value: Callable[[Row], float]) -> list[float]:
        """In [0, 1], each token's rank within its completion."""
        return [float((r - 0.5) / len(own)) for own in completions for r in ranks([value(row) for row in own])]

    influence = places(lambda row: row["loo"] / row["later"])
    for axes, column, name in ((left, "mu", "μ, last layer"), (right, "mu_all", "μ, mean of all layers")):
        cells = axes.hexbin(places(itemgetter(column)), influence, gridsize=14, cmap="viridis", mincnt=1, linewidths=0.2)
        axes.plot([0, 1], [0, 1], **{**REFERENCE, "color": "white", "zorder": 3})
        axes.set_xlabel(f"rank by {name} (0 lowest, 1 highest)")
        axes.set_aspect("equal")
        axes.grid(visible=False)
        canvas.colorbar(cells, ax=axes, label="tokens in a cell")
    left.set_ylabel("rank by leave-one-out per later token (0 lowest, 1 highest)")


def _draw_layers(canvas: Any, spearman: Mapping[str, Mapping[str, Interval]]) -> None:
    panels = canvas.subplots(1, len(_DRAWN), sharey=True)
    for axes, target in zip(panels, _DRAWN, strict=True):
        axes.axvline(0, **REFERENCE)
        dots(
            axes,
            list(_LAYERS),
            {
                "μ": [spearman[target]["mu" + suffix] for suffix in _LAYERS.values()],
                "lift": [spearman[target]["lift" + suffix] for suffix in _LAYERS.values()],
            },
        )
        axes.set_title(_TARGETS[target], fontsize="medium")
        axes.set_xlabel("Spearman's rank correlation")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
