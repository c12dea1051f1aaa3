"""How well attention, log P and the importance order tokens by what they do to the rest of the text.

Decisions taken here:

- Influence is measured twice (`benchmarks.experiments.influence`): by leaving a token out, and by Bayes' rule. The method takes
  `log P(x_i | x_<i) + lambda * mu_i` for the log-probability of a token given both sides. The Bayes target is that
  log-probability. What it adds to log P is the *Bayes gain*, which lambda * mu stands for.
- Leave-one-out is a sum over the later tokens: what the text loses, in the unit of the Bayes gain. Its mean per later token is
  shown, too, because mu is a mean. The tables also have the sum of absolute changes.
- Of each completion the last `--max-tokens` tokens are ranked, with all before them as context. So every number is about the
  whole text, and a CPU can pay for it. The last two have no later token that leave-one-out counts, so they stay out.
- Orders are compared within a completion. An interval is over problems, each the mean of its completions.
- Later tokens have less text left to influence, and fewer queries left to attend to them. So a token's place is itself a proxy,
  and partial correlations say what the others add to it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from benchmarks.experiments import measuring
from benchmarks.experiments.influence import (
    Replay,
    bidirectional,
    bidirectional_plan,
    cost,
    layer_attention,
    leave_one_out,
    leave_one_out_plan,
    likely_alternatives,
)
from benchmarks.experiments.proxy_report import FEWEST_TOKENS, Row, compared, figures, tables
from benchmarks.experiments.ranks import spearman, top_overlap
from benchmarks.experiments.results import Result
from entra.metrics import mean_interval
from entra.progress import progress_bar

__all__ = ["PROXIES", "TARGETS", "add_arguments", "figures", "run", "summarise", "tables"]


TARGETS: dict[str, Callable[[Row], float]] = {
    "loo": lambda row: row["loo"],
    "loo_mean": lambda row: row["loo"] / row["later"],
    "loo_absolute": lambda row: row["loo_absolute"],
    "bayes": lambda row: row["bayes"],
    "bayes_lower": lambda row: row["bayes_lower"],
    "gain": lambda row: row["gain"],
}
"""What a proxy stands for, by name, of a token's row."""

PROXIES: dict[str, Callable[[Row], float]] = {
    "mu": lambda row: row["mu"],
    "lift": lambda row: row["lift"],
    "logprob": lambda row: row["logprob"],
    "importance_2": lambda row: row["logprob"] + 2 * row["mu"],
    "importance_1e-4": lambda row: row["logprob"] + 1e-4 * row["mu"],
    "importance_lift": lambda row: row["logprob"] + 2 * row["lift"],
    "early": lambda row: -row["position"],
    "late": lambda row: row["position"],
    "random": lambda row: row["random"],
    "mu_middle": lambda row: row["mu_middle"],
    "lift_middle": lambda row: row["lift_middle"],
    "mu_all": lambda row: row["mu_all"],
    "lift_all": lambda row: row["lift_all"],
}
"""What stands for it, likewise."""

_CONTROLS = {"position": ("early",), "position and log P": ("early", "logprob")}
_PARTIAL = ("mu", "lift", "mu_middle", "lift_middle", "mu_all", "lift_all", "logprob")
_LARGE_TAIL = 0.2
_SHIPPED_KINDS = ("concise", "overthinking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `proxy`."""
    measuring.add_arguments(parser)
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", help=f"of completions (default: {' '.join(_SHIPPED_KINDS)}; of a file all)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=40,
        help="of each completion, its last ones, are ranked; the cost grows with the square (default: %(default)s)",
    )
    parser.add_argument(
        "--alternatives", type=int, default=6, help="that replace a token, at most; Bayes' rule (default: %(default)s)"
    )
    parser.add_argument(
        "--tail",
        type=float,
        default=0.02,
        help="fewer alternatives when what is left has at most this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--top", type=float, default=0.2, help="share of the tokens whose overlap is counted, tau (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: flags outside their range, no traces, fewer than two problems, no model, or one whose influence cannot be
            measured (`benchmarks.experiments.influence`).
    """
    _check(options)
    found = measuring.load(options)
    kinds = options.kinds or (_SHIPPED_KINDS if options.traces is None else None)
    if kinds is not None:
        found = measuring.Samples([sample for sample in found.samples if sample.kind in kinds], found.left_out)
    if len({sample.problem for sample in found.samples}) < 2:
        raise ValueError(
            f"{len(found.samples)} completions of fewer than 2 problems are left; intervals are over problems: raise --limit, "
            "or name other --kinds"
        )
    policy = measuring.load_model(options)
    model = policy.model
    if model.dtype != torch.float32:  # models out of a GGUF file refuse to be cast, also to what they are
        model = model.float()
    measured = measuring.measure(policy, found)
    rows, plan_tokens = _measure(model, measured, options)
    settings = {
        **measuring.settings(options),
        "kinds": list(kinds or measured.kinds()),
        **{name: getattr(options, name) for name in ("max_tokens", "alternatives", "tail", "top")},
    }
    summary = {
        **summarise(rows, options.top),
        **measured.left_out.summary(),
        "tokens_run": plan_tokens,
    }
    return Result(name="proxy", settings=settings, rows=rows, summary=summary)


def summarise(rows: Sequence[Row], share: float) -> dict[str, Any]:
    """The statistics of token rows as the CSV has them.

    Completions of fewer than 10 rows are left out, and counted.

    Raises:
        ValueError: what is left is of fewer than two problems.
    """
    completions = compared(rows)
    if len({problem for problem, _ in completions}) < 2:
        raise ValueError(
            f"{len(completions)} completions of at least {FEWEST_TOKENS} ranked tokens, of fewer than 2 problems; raise "
            "--max-tokens or --limit"
        )
    targets = {key: _columns(tokens, TARGETS) for key, tokens in completions.items()}
    proxies = {key: _columns(tokens, PROXIES) for key, tokens in completions.items()}
    kinds = list(dict.fromkeys(tokens[0]["kind"] for tokens in completions.values()))

    def interval(statistic: Callable[[Any], float], keys: Sequence[Any] = tuple(completions)) -> list[float] | None:
        """Mean over problems of the mean over completions, with its interval; None with fewer than two problems."""
        by_problem: dict[str, list[float]] = {}
        for key in keys:
            by_problem.setdefault(key[0], []).append(statistic(key))
        if len(by_problem) < 2:
            return None
        return [round(value, 4) for value in mean_interval([fmean(values) for values in by_problem.values()])]

    def correlation(target: str, proxy: str, given: Sequence[str] = ()) -> Callable[[Any], float]:
        return lambda key: spearman(proxies[key][proxy], targets[key][target], [proxies[key][name] for name in given])

    def overlap(target: str, proxy: str) -> Callable[[Any], float]:
        return lambda key: top_overlap(targets[key][target], proxies[key][proxy], share)

    def between(target: str, other: str) -> Callable[[Any], float]:
        return lambda key: spearman(targets[key][target], targets[key][other])

    of_kind = {kind: [key for key, tokens in completions.items() if tokens[0]["kind"] == kind] for kind in kinds}
    flat = [row for tokens in completions.values() for row in tokens]
    widths = sorted(row["bayes"] - row["bayes_lower"] for row in flat)
    return {
        "problems": len({problem for problem, _ in completions}),
        "completions": len(completions),
        "too_short": len({(row["problem"], row["trace"]) for row in rows}) - len(completions),
        "tokens": len(flat),
        "spearman": {t: {p: interval(correlation(t, p)) for p in PROXIES} for t in TARGETS},
        "spearman_by_kind": {
            kind: {t: {p: interval(correlation(t, p), keys) for p in PROXIES} for t in TARGETS}
            for kind, keys in of_kind.items()
        },
        "overlap": {t: {p: interval(overlap(t, p)) for p in PROXIES} for t in TARGETS},
        "partial": {
            name: {t: {p: interval(correlation(t, p, given)) for p in _PARTIAL if p not in given} for t in TARGETS}
            for name, given in _CONTROLS.items()
        },
        "targets": {a: {b: interval(between(a, b)) for b in TARGETS} for a in TARGETS},
        "bounds": {
            "spearman": interval(lambda key: spearman(targets[key]["bayes"], targets[key]["bayes_lower"])),
            "width_median": round(widths[len(widths) // 2], 4),
            "width_p90": round(widths[int(0.9 * len(widths))], 4),
            "tail": round(fmean(row["tail"] for row in flat), 4),
            "tail_large": round(fmean(row["tail"] > _LARGE_TAIL for row in flat), 4),
            "tail_max": round(max(row["tail"] for row in flat), 4),
            "alternatives": round(fmean(row["alternatives"] for row in flat), 2),
        },
        "positive": {
            "loo": interval(lambda key: fmean(row["loo"] > 0 for row in completions[key])),
            "gain": interval(lambda key: fmean(value > 0 for value in targets[key]["gain"])),
        },
    }


def _columns(tokens: Sequence[Row], names: Mapping[str, Callable[[Row], float]]) -> dict[str, list[float]]:
    return {name: [value(row) for row in tokens] for name, value in names.items()}


def _check(options: argparse.Namespace) -> None:
    if options.max_tokens < FEWEST_TOKENS + 2:
        raise ValueError(f"--max-tokens {options.max_tokens} must be at least {FEWEST_TOKENS + 2}")
    if options.alternatives < 1:
        raise ValueError(f"--alternatives {options.alternatives} must be at least 1")
    if not 0 <= options.tail < 1:
        raise ValueError(f"--tail {options.tail} must be in [0, 1)")
    if not 0.1 <= options.top < 1:
        raise ValueError(f"--top {options.top} must be in [0.1, 1), so that the top of {FEWEST_TOKENS} tokens is not empty")


def _measure(model: Any, measured: measuring.Measurement, options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Rows of all ranked tokens but the last two of each completion, and how many tokens ran on top of the plain forwards."""
    plans = []
    total, plain, started = 0, 0, time.monotonic()
    with progress_bar(len(measured.traces), 0, "plans") as bar:
        for trace in measured.traces:
            ids = trace.prompt_ids + trace.token_ids
            first = max(len(trace.prompt_ids), len(ids) - options.max_tokens)
            chosen = likely_alternatives(Replay(model, ids, first), options.tail, options.alternatives)
            plans.append((ids, first, chosen))
            total += cost(leave_one_out_plan(ids, first)) + cost(bidirectional_plan(ids, first, chosen))
            plain += len(ids)
            bar.update()
    minutes = total / plain * (time.monotonic() - started) / 60
    print(f"{total:,} tokens to run, about {minutes:.0f} minutes at the speed of the plans", file=sys.stderr)

    noise = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with progress_bar(total, 0, "tokens") as bar:
        for number, (trace, (ids, first, chosen)) in enumerate(zip(measured.traces, plans, strict=True)):
            replay = Replay(model, ids, first, on_tokens=bar.update)
            left_out = leave_one_out(replay)
            both = bidirectional(replay, chosen)
            layers = layer_attention(model, ids)
            middle = len(layers.mean) // 2
            start = first - len(trace.prompt_ids)
            for i in range(len(chosen) - 2):  # the last two have nothing that leave-one-out counts
                token, position = start + i, first + i
                numbers = {
                    "logprob": trace.logprobs[token],
                    "mu": trace.mean[token],
                    "lift": trace.lift[token],
                    "mu_middle": layers.mean[middle, position],
                    "lift_middle": layers.lift[middle, position],
                    "mu_all": layers.mean[:, position].mean(),
                    "lift_all": layers.lift[:, position].mean(),
                    "random": noise.random(),
                    "loo": left_out.total[i],
                    "loo_absolute": left_out.absolute[i],
                    "bayes": both.value[i],
                    "gain": both.value[i] - replay.logprobs[i],
                    "bayes_lower": both.lower[i],
                    "tail": both.tail[i],
                }
                rows.append(
                    {
                        "problem": trace.sample.problem,
                        "kind": trace.sample.kind,
                        "trace": number,
                        "position": position,
                        "token": trace.pieces[token],
                        "later": int(left_out.counted[i]),
                        "alternatives": int(both.alternatives[i]),
                        **{name: float(f"{float(value):.5g}") for name, value in numbers.items()},
                    }
                )
    return rows, total
