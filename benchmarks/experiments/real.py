"""What importance and reward say about traces that real reasoning models wrote.

`real_traces` reads them, `real_signals` measures their tokens, `real_measures` holds what is judged, `real_report` draws.

Decisions taken here:

- *Pairs* are two completions of one problem, both right and complete, of at least 20 tokens: with and without thinking, or by a
  reasoning and an instruct model. The first one is hoped to be the more redundant.
- *Length is controlled twice.* Cut: the longer one is cut to the length of the shorter one, from its head and from its tail.
  Matched: the first one meets completions of the second kind, by any model, of other problems, whose length differs by at
  most 10 %.
- *Settled*: a trace's tokens before and after the place from which the answer no longer changes. The same trace with its
  sentences shuffled is cut at the same place, which says what the position alone does.
- *Sentences* are ranked within a trace, by the mean, the maximum and the protected share of their tokens. The ranks are
  compared with their measured importance: alone, given position and length, and given their mean log P too.
- *Scale*: a trace's head, in which one step is verified again k times in its own words; as many tokens are dropped at the end.
- *Beyond length*: among completions of one sort, a reward's partial rank correlation, given length, with what it ought to see.
- An interval is over problems, each the mean of its traces. A choice within a family (the n of an n-gram) is judged on the
  problem that was left out when it was made, by the same judge.
- Further windows and the gradient take long. They are judged on the long traces for which some run has measured them, against
  the paper's importance on the same traces.
- The second judge is `proxy`'s leave-one-out on the shipped traces, for the model that `proxy` measured. What `proxy` recorded
  is enough for most importances. With `--windows` or `--gradient` all others are measured, too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import measuring
from benchmarks.experiments.ranks import explained, left, ranks, spearman
from benchmarks.experiments.real_attempts import COMPUTATION, attempt_rows, attempts
from benchmarks.experiments.real_measures import (
    ANY,
    FAMILIES,
    IMPORTANCES,
    NGRAMS,
    PAPER,
    REWARDS,
    SHARED,
    Measured,
    Passage,
    R,
    protected,
)
from benchmarks.experiments.real_report import CATEGORIES, figures, tables
from benchmarks.experiments.real_signals import Signals, cached
from benchmarks.experiments.real_traces import RealTrace, read, shuffled, with_tokens
from benchmarks.experiments.results import Result
from entra.encode import Encoder
from entra.forward import unwrapped
from entra.metrics import mean_interval, wilson_interval
from entra.progress import progress_bar
from entra.traces import load_traces

__all__ = ["add_arguments", "figures", "run", "summarise", "tables"]

PAIRS = {
    "Qwen3-8B, thinking or not": ("Qwen3-8B", "thinking", "Qwen3-8B", "no-thinking"),
    "Qwen3.5-9B, thinking or not": ("Qwen3.5-9B", "thinking", "Qwen3.5-9B", "no-thinking"),
    "QwQ-32B or Qwen2.5-32B-Instruct": ("QwQ-32B", "reasoning", "Qwen2.5-32B-Instruct", "instruct"),
    "R1-Distill-32B or Qwen2.5-32B-Instruct": ("DeepSeek-R1-Distill-Qwen-32B", "reasoning", "Qwen2.5-32B-Instruct", "instruct"),
}
"""By name: model and kind of the one that is hoped to be more redundant, and of the other."""
TARGETS = (
    "counterfactual_importance_kl",
    "counterfactual_importance_accuracy",
    "resampling_importance_kl",
    "resampling_importance_accuracy",
)
_FEWEST = 20  # tokens of a completion that is compared
_NEAR = 0.1  # how far apart matched lengths may be
_STEPS = (0, 1, 2, 3, 4)
_HEAD = 600  # tokens of a trace's head in which a step is verified again
_AGAIN = "Wait, let me check that step again. "
_PROXY = Path(__file__).parents[1] / "results" / "experiments" / "proxy.json"
_REWARD_FAMILY = tuple(f"entropy of {n}-grams" for n in NGRAMS)
_CHECKS = ("uncertainty_management", "self_checking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `real`."""
    parser.add_argument("--model", default="smollm2", help='a folder, a hub name, or "smollm2" (default: %(default)s)')
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the traces are; python -m benchmarks.traces.real_traces makes them"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=40,
        metavar="N",
        help="problems with and without thinking, and half as many of GSM8K (default: 40)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("build/real"),
        metavar="DIR",
        help="a run that was stopped goes on from here (default: %(default)s)",
    )
    parser.add_argument(
        "--windows",
        action="store_true",
        help="judge mu without the nearest 8 and 128 queries on all long traces: one more forward of them",
    )
    parser.add_argument(
        "--gradient",
        action="store_true",
        help="judge the gradient of the later text, on all long traces: one backward of them; with either flag what takes a "
        "forward of the shipped traces is judged by leave-one-out, too",
    )
    parser.add_argument("--seed", type=int, default=0, help="of shuffles (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: no folder, no model, or a limit below 1.
        FileNotFoundError: a file of traces is missing.
    """
    if options.folder is None or options.limit < 1:
        raise ValueError(
            f"--folder {options.folder}, --limit {options.limit}: give the folder of the traces, and at least 1 problem"
        )
    policy = measuring.load_model(options)
    model: Any = unwrapped(policy.model)
    model.requires_grad_(False)
    encoder = Encoder(policy.tokenizer, model, {})
    limits = {"thinkonoff": options.limit, "mip_gsm8k": max(1, options.limit // 2)}
    traces, faults = read(options.folder, encoder, policy.tokenizer, limits)
    annotated = [trace for trace in traces if trace.sentences]
    generator = random.Random(options.seed)
    mixed = [shuffled(trace, generator.shuffle) for trace in annotated if trace.settled is not None]
    left_out = _left_out(encoder, options.model)
    steps = [(trace, k, ids) for trace in annotated if trace.right for k, ids in _verified_again(trace, policy.tokenizer)]

    with progress_bar(len(traces) + len(mixed) + len(steps) + len(left_out), 0, "completions") as bar:

        def measure(trace: RealTrace, **asked: bool) -> Measured:
            found = cached(options.cache, options.model, model, trace.prompt_ids, trace.token_ids, **asked)
            bar.update()
            return Measured(trace=trace, signals=found)

        more = {"all_layers": True, "windows": options.windows, "gradient": options.gradient}
        measured = [measure(trace, **(more if trace.sentences else {})) for trace in traces]
        of_mixed = [measure(trace) for trace in mixed]
        of_steps = [(k, measure(with_tokens(trace, ids))) for trace, k, ids in steps]
        again = options.windows or options.gradient
        everything = {"all_layers": True, "windows": True, "gradient": True}
        of_left_out = [(measure(trace, **everything) if again else _recorded(trace, rows), rows) for trace, rows in left_out]

    long = [one for one in measured if one.trace.sentences]
    rows = [
        *_pair_rows(measured),
        *(_whole_row(one) for one in measured),
        *(row for one in long for row in _sentence_rows(one)),
        *(_rounded(row) for one in long for row in _category_rows(one)),
        *(_rounded(row) for one in long for row in _settled_rows(one, "as written")),
        *(_rounded(row) for one in of_mixed for row in _settled_rows(one, "shuffled")),
        *(row for k, one in of_steps for row in _scale_rows(one, k)),
        *(_rounded(row) for one in long for row in attempt_rows(one, "as written")),
        *(_rounded(row) for one in of_mixed for row in attempt_rows(one, "shuffled")),
        *(row for one, judged in of_left_out for row in _loo_rows(one, judged)),
    ]
    settings = {name: getattr(options, name) for name in ("model", "limit", "seed")}
    settings |= {
        f"with_{of}": sum(not np.isnan(getattr(one.signals, of)).any() for one in long) for of in ("far_8", "gradient")
    }
    return Result(
        name="real",
        settings={**settings, "completions": len(measured), "tokens": sum(len(one.trace.token_ids) for one in measured)},
        rows=rows,
        summary={**summarise(rows), "left_out_rows": faults},
    )


def _verified_again(trace: RealTrace, tokenizer: Any) -> Iterable[tuple[int, list[int]]]:
    """For each k the head of the trace with one of its computations verified again k times, at equal length."""
    head = min(_HEAD, len(trace.token_ids))
    places = [s for s in trace.sentences if s.label == COMPUTATION and s.last < head // 2 and s.last - s.first >= 8]
    if not places:
        return
    step = places[-1]
    again = tokenizer(_AGAIN, add_special_tokens=False)["input_ids"] + trace.token_ids[step.first : step.last + 1]
    for k in _STEPS:
        ids = trace.token_ids[: step.last + 1] + again * k + trace.token_ids[step.last + 1 :]
        yield k, ids[:head]


@cache
def _rewards(passage: Passage) -> dict[str, float]:
    return {name: round(reward(passage), 6) for name, reward in REWARDS.items()}


@cache
def _whole(one: Measured) -> Passage:
    """One object for each completion, which is compared with many others."""
    return Passage(measured=one, first=0, end=len(one.trace.token_ids))


def _whole_row(one: Measured) -> dict[str, Any]:
    trace = one.trace
    return {
        "part": "whole",
        "set": trace.set,
        "problem": trace.problem,
        "model": trace.model,
        "kind": trace.kind,
        "task": trace.task,
        "right": int(trace.right),
        "tokens": len(trace.token_ids),
        **_rewards(_whole(one)),
        **(_wasted(trace) if trace.sentences else {}),
    }


def _wasted(trace: RealTrace) -> dict[str, float]:
    """What a reward ought to see: shares of tokens after settling and in checks, and of computations that are made again."""
    count, made = len(trace.token_ids), attempts(trace.sentences)
    return {
        **({"after settling": round(1 - trace.settled / count, 6)} if trace.settled is not None else {}),
        "attempts again": round(sum(first is not None for _, first in made) / max(len(made), 1), 6),
        "checks": round(sum(s.last + 1 - s.first for s in trace.sentences if s.label in _CHECKS) / count, 6),
    }


def _pair_rows(measured: Sequence[Measured]) -> Iterable[dict[str, Any]]:
    """For each pair and each way of comparing it, both ones' rewards."""
    usable = [one for one in measured if one.trace.right and len(one.trace.token_ids) >= _FEWEST]
    by_name = {(one.trace.problem, one.trace.model, one.trace.kind): one for one in usable}
    for pair, (model, kind, other_model, other_kind) in PAIRS.items():
        for one in usable:
            if (one.trace.model, one.trace.kind) != (model, kind):
                continue
            other = by_name.get((one.trace.problem, other_model, other_kind))
            if other is not None:
                yield from (_compared(pair, view, one, *passages) for view, passages in _views(one, other).items())
            count = len(one.trace.token_ids)
            for stranger in usable:
                if (
                    stranger.trace.kind == other_kind
                    and stranger.trace.problem != one.trace.problem
                    and abs(len(stranger.trace.token_ids) / count - 1) <= _NEAR
                ):
                    yield _compared(pair, "matched", one, _whole(one), _whole(stranger))


def _views(one: Measured, other: Measured) -> dict[str, tuple[Passage, Passage]]:
    counts = [len(m.trace.token_ids) for m in (one, other)]
    shorter = min(counts)

    def cut(m: Measured, count: int, from_tail: bool) -> Passage:
        first = count - shorter if from_tail else 0
        return Passage(measured=m, first=first, end=first + shorter)

    pairs = list(zip((one, other), counts, strict=True))
    head, tail = ([cut(m, count, from_tail) for m, count in pairs] for from_tail in (False, True))
    return {"whole": (_whole(one), _whole(other)), "head": (head[0], head[1]), "tail": (tail[0], tail[1])}


def _compared(pair: str, view: str, one: Measured, first: Passage, second: Passage) -> dict[str, Any]:
    """1 where the first is the more redundant, 0.5 for a tie, 0 else."""
    a, b = _rewards(first), _rewards(second)
    return {
        "part": "pair",
        "pair": pair,
        "view": view,
        "problem": one.trace.problem,
        "task": one.trace.task,
        "tokens": len(first),
        "other_tokens": len(second),
        **{name: 0.5 + 0.5 * float(np.sign(a[name] - b[name])) for name in REWARDS},
        **({"values": a, "other_values": b} if view == "whole" else {}),
    }


def _importances(one: Measured, inside: Any = slice(None)) -> Iterable[tuple[str, Any]]:
    """Those of the tokens `inside` that can be had: of what was measured, and of sentences only where these are known."""
    for name, importance in IMPORTANCES.items():
        if name != SHARED or one.trace.sentences:
            values = importance(one)[inside]
            if not np.isnan(values).any():
                yield name, values


def _sentence_rows(one: Measured) -> Iterable[dict[str, Any]]:
    """For each importance and each way to make a sentence's of its tokens': correlations with every measured importance."""
    trace, logprobs = one.trace, one.signals.logprobs
    judges = []  # of each measured importance its sentences, and what place and log P leave of it
    for target in TARGETS:
        sentences = [s for s in trace.sentences if target in s.importance]
        parts = [slice(s.first, s.last + 1) for s in sentences]
        truth = ranks([s.importance[target] for s in sentences])
        place = [ranks([float(s.first) for s in sentences]), ranks([float(s.last - s.first) for s in sentences])]
        given = {"alone": [], "place": place, "place and log P": [*place, ranks([float(logprobs[p].mean()) for p in parts])]}
        bases = {controls: explained(columns, len(parts)) for controls, columns in given.items()}
        judges.append((target, parts, {controls: (basis, left(truth, basis)) for controls, basis in bases.items()}))
    for name, values in _importances(one):
        kept = protected(values)
        ways: dict[str, Callable[[slice], float]] = {
            "mean": lambda part, values=values: float(values[part].mean()),  # type: ignore[misc]
            "maximum": lambda part, values=values: float(values[part].max()),  # type: ignore[misc]
            "protected share": lambda part, kept=kept: float(kept[part].mean()),  # type: ignore[misc]
        }
        for how, of in ways.items():
            row: dict[str, Any] = {"part": "sentences", "problem": trace.problem, "model": trace.model, "kind": trace.kind}
            row |= {"importance": name, "how": how}
            for target, parts, by_controls in judges:
                mine = ranks([of(part) for part in parts])
                for controls, (basis, truth) in by_controls.items():
                    row[f"{target}, {controls}"] = round(float(left(mine, basis) @ truth), 5)
            yield row


def _category_rows(one: Measured) -> Iterable[dict[str, Any]]:
    """For each importance, the protected share of the tokens of each category."""
    places: dict[str, list[int]] = defaultdict(list)
    for sentence in one.trace.sentences:
        places[sentence.label] += range(sentence.first, sentence.last + 1)
    about = {"part": "category", "problem": one.trace.problem, "model": one.trace.model, "kind": one.trace.kind}
    for name, values in _importances(one):
        kept = protected(values)
        yield {**about, "importance": name, **{label: float(kept[tokens].mean()) for label, tokens in places.items()}}


def _settled_rows(one: Measured, text: str) -> Iterable[dict[str, Any]]:
    """Before and after the answer has settled: protected shares, means, and what each token adds to a reward."""
    settled, count = one.trace.settled, len(one.trace.token_ids)
    if settled is None or not 0 < settled < count:
        return
    about = {"part": "settled", "text": text, "problem": one.trace.problem, "model": one.trace.model, "kind": one.trace.kind}
    for name, values in _importances(one):
        kept = protected(values)
        yield {
            **about,
            "of": f"protected: {name}",
            "before": float(kept[:settled].mean()),
            "after": float(kept[settled:].mean()),
        }
    for name in ("logprobs", "mean", "lift"):
        values = getattr(one.signals, name)
        yield {**about, "of": f"mean {name}", "before": float(values[:settled].mean()), "after": float(values[settled:].mean())}
    head = Passage(measured=one, first=0, end=settled)
    for name in ("D = M (1 - r)", "D of 4-grams"):
        before, total = REWARDS[name](head), REWARDS[name](_whole(one))
        yield {
            **about,
            "of": f"added per token: {name}",
            "before": before / settled,
            "after": (total - before) / (count - settled),
        }
    tail = Passage(measured=one, first=settled, end=count)
    for name in ("copied share (n = 4)", "copied share, by address", "copied share, by address and probability"):
        yield {**about, "of": name, "before": REWARDS[name](head), "after": REWARDS[name](tail)}


def _left_out(encoder: Encoder, model: str) -> list[tuple[RealTrace, list[dict[str, Any]]]]:
    """The shipped traces whose tokens the experiment `proxy` left out one by one, with what it measured of them."""
    found = json.loads(_PROXY.read_text()) if _PROXY.is_file() else {"settings": {}}
    if found["settings"].get("model") != model:
        return []
    judged: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        judged[row["problem"], row["kind"]].append(row)
    result = []
    for sample in measuring.shipped(load_traces()).samples:
        if tokens := judged.get((sample.problem, sample.kind)):
            encoded = encoder.encode(sample.prompt, sample.completion)
            trace = RealTrace(
                set="shipped",
                problem=sample.problem,
                model="",
                kind=sample.kind,
                task="",
                right=True,
                prompt_ids=encoded.prompt,
                token_ids=encoded.completion,
                starts=[0] * len(encoded.completion),
                text="",
            )
            result.append((trace, tokens))
    return result


def _recorded(trace: RealTrace, rows: Sequence[dict[str, Any]]) -> Measured:
    """What `proxy` recorded: log P and mu of the tokens that it left out, and NaN for all else."""
    signals = {of: np.full(len(trace.token_ids), np.nan) for of in Signals._fields}
    for of, column in {"logprobs": "logprob", "mean": "mu", "lift": "lift", "mean_all": "mu_all"}.items():
        signals[of][_inside(trace, rows)] = [row[column] for row in rows]
    return Measured(trace=trace, signals=Signals(**signals))


def _inside(trace: RealTrace, rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["position"] - len(trace.prompt_ids) for row in rows]


def _loo_rows(one: Measured, rows: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The second judge: for each importance, its rank correlations with leave-one-out of single tokens."""
    inside = _inside(one.trace, rows)
    targets = {"sum": [row["loo"] for row in rows], "mean": [row["loo"] / row["later"] for row in rows]}
    place = [float(position) for position in inside]
    for name, values in _importances(one, inside):
        for target, truth in targets.items():
            yield {
                "part": "leave-one-out",
                "problem": one.trace.problem,
                "kind": one.trace.kind,
                "importance": name,
                "target": target,
                "alone": round(spearman(values.tolist(), truth), 5),
                "place": round(spearman(values.tolist(), truth, [place]), 5),
            }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def _scale_rows(one: Measured, k: int) -> Iterable[dict[str, Any]]:
    yield {
        "part": "scale",
        "problem": one.trace.problem,
        "model": one.trace.model,
        "k": k,
        **{name: round(reward(_whole(one)), 6) for name, reward in REWARDS.items() if name not in ("length", "gzip ratio")},
    }


def _of(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _trace_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["problem"], row.get("model", ""), row["kind"]


def _problem_means(rows: Iterable[dict[str, Any]], of: str | Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """The mean of a column, or of a number made of a row, for each problem."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row[of] if isinstance(of, str) else of(row))
    return {problem: fmean(values) for problem, values in groups.items()}


def _share(values: Iterable[float]) -> list[float] | None:
    """A mean of shares with Wilson's interval for as many problems, which stays within 0 and 1."""
    numbers = list(values)
    return list(wilson_interval(fmean(numbers), len(numbers))) if len(numbers) >= 2 else None


def _interval(values: Iterable[float]) -> list[float] | None:
    numbers = list(values)
    return list(mean_interval(numbers)) if len(numbers) >= 2 else None


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is concluded from the rows: shares, correlations and differences with intervals over problems."""
    return {
        "pairs": _pairs(rows),
        "with_length": _with_length(rows),
        "sentences": _sentences(rows),
        "categories": _categories(rows),
        "settled": _settled(rows),
        "scale": _scale(rows),
        "attempts": _attempts(rows),
        "beyond_length": _beyond_length(rows),
        "chosen": _chosen(rows),
        "leave_one_out": _leave_one_out(rows),
    }


def _pairs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each pair and view, of each reward the share of problems ordered as hoped; and the same by task."""
    result: dict[str, Any] = {}
    found = _of(rows, part="pair")
    tasks = sorted({row["task"] for row in found})
    for pair in PAIRS:
        result[pair] = {}
        for view in ("whole", "head", "tail", "matched"):
            inside = _of(found, pair=pair, view=view)
            means = {name: _problem_means(inside, name) for name in REWARDS}
            result[pair][view] = {
                "problems": len({row["problem"] for row in inside}),
                "comparisons": len(inside),
                "auc": {name: _auc(inside, name) for name in REWARDS} if view == "whole" else {},
                "ordered": {name: _share(means[name].values()) for name in REWARDS},
            }
    result["by_task"] = {
        task: {
            view: {
                "problems": len({row["problem"] for row in _of(found, task=task, view=view)}),
                **{name: _share(_problem_means(_of(found, task=task, view=view), name).values()) for name in REWARDS},
            }
            for view in ("whole", "head", "tail", "matched")
        }
        for task in tasks
    }
    return result


def _auc(pairs: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """How often a first one's reward exceeds a second one's, over all of both; problems are drawn again for the interval."""
    if len(pairs) < 2:
        return None
    first, second = (np.array([row[side][name] for row in pairs]) for side in ("values", "other_values"))
    above = 0.5 + 0.5 * np.sign(first[:, None] - second[None, :])
    weights = np.random.default_rng(0).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), size=2000) / len(pairs)
    drawn = np.einsum("di,ij,dj->d", weights, above, weights, optimize=True)
    return [float(above.mean()), *(float(end) for end in np.quantile(drawn, [0.025, 0.975]))]


def _with_length(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of each reward with the length, among the completions of one model and kind."""
    result = {}
    for model, kind, _, _ in PAIRS.values():
        inside = _of(rows, part="whole", model=model, kind=kind, right=1)
        if len(inside) >= 5:
            lengths = [row["tokens"] for row in inside]
            result[f"{model}, {kind}"] = {
                "completions": len(inside),
                **{name: spearman([row[name] for row in inside], lengths) for name in REWARDS},
            }
    return result


def _sentences(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By target, how sentences are made of tokens, and importance: correlations, and the difference from the paper's."""
    result: dict[str, Any] = {}
    found = _of(rows, part="sentences")
    for target in TARGETS:
        for how in ("mean", "maximum", "protected share"):
            inside = _of(found, how=how)
            paper = _of(inside, importance=PAPER)
            result.setdefault(target, {})[how] = {
                name: {
                    controls: {
                        "value": _interval(_problem_means(mine, f"{target}, {controls}").values()),
                        "gain": _paired(mine, paper, f"{target}, {controls}"),
                    }
                    for controls in ("alone", "place", "place and log P")
                }
                for name in IMPORTANCES
                if (mine := _of(inside, importance=name))
            }
    return result


def _paired(mine: Sequence[dict[str, Any]], paper: Sequence[dict[str, Any]], column: str) -> list[float] | None:
    """The problems' differences from the paper's importance, over the traces that both have."""
    traces = {_trace_of(row) for row in mine} & {_trace_of(row) for row in paper}
    ours, theirs = (_problem_means([row for row in rows if _trace_of(row) in traces], column) for rows in (mine, paper))
    return _interval(value - theirs[problem] for problem, value in ours.items())


def _categories(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By importance and category, the protected share of tokens."""
    found = _of(rows, part="category")
    result: dict[str, Any] = {}
    for name in IMPORTANCES:
        mine = _of(found, importance=name)
        labels = [label for label in CATEGORIES if any(label in row for row in mine)]
        if labels:
            result[name] = {
                label: _interval(_problem_means([row for row in mine if label in row], label).values()) for label in labels
            }
    return result


def _settled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of everything that is measured before and after: both means, and the rise, as written and beyond the shuffled text's."""
    found = _of(rows, part="settled")
    result = {}
    for of in dict.fromkeys(row["of"] for row in found):
        written, mixed = (_of(found, of=of, text=text) for text in ("as written", "shuffled"))
        rise = _problem_means(written, lambda row: row["after"] - row["before"])
        other = _problem_means(mixed, lambda row: row["after"] - row["before"])
        result[of] = {
            "traces": len(written),
            "problems": len(rise),
            "before": fmean(_problem_means(written, "before").values()) if written else None,
            "after": fmean(_problem_means(written, "after").values()) if written else None,
            "rise": _interval(rise.values()),
            "beyond_shuffled": _interval(value - other[problem] for problem, value in rise.items() if problem in other),
        }
    return result


def _scale(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By reward, how often one more verification raises it, and the mean at each k."""
    found = _of(rows, part="scale")
    return {
        name: {
            "raised": _share(raised.values()),
            "means": [fmean(row[name] for row in _of(found, k=k)) for k in _STEPS if _of(found, k=k)],
        }
        for name, raised in _raised(rows).items()
    }


def _raised(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By reward and problem, how often one more verification raises it."""
    found = _of(rows, part="scale")
    traces: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in found:
        traces[row["problem"], row["model"]][row["k"]] = row
    result = {}
    for name in [name for name in REWARDS if found and name in found[0]]:
        rises: dict[str, list[float]] = defaultdict(list)
        for (problem, _), by_k in traces.items():
            rises[problem] += [float(by_k[k][name] > by_k[k - 1][name]) for k in by_k if k - 1 in by_k]
        result[name] = {problem: fmean(values) for problem, values in rises.items()}
    return result


def _leave_one_out(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By importance: rank correlation with leave-one-out, and the difference from the paper's."""
    result: dict[str, Any] = {}
    found = _of(rows, part="leave-one-out")
    for name in dict.fromkeys(row["importance"] for row in found):
        for target in ("sum", "mean"):
            mine, paper = (_of(found, importance=who, target=target) for who in (name, PAPER))
            result.setdefault(name, {})[target] = {
                "alone": _interval(_problem_means(mine, "alone").values()),
                "place": _interval(_problem_means(mine, "place").values()),
                "gain": _paired(mine, paper, "place"),
            }
    return result


def _attempts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of everything that is judged of sentences: first attempts and attempts again, and the correlations with being again."""
    found = _of(rows, part="attempts")
    result = {}
    for of in dict.fromkeys(row["of"] for row in found):
        written, mixed = (_of(found, of=of, text=text) for text in ("as written", "shuffled"))
        result[of] = {
            "traces": len(written),
            "computations": sum(row["computations"] for row in written),
            "repeated": sum(row["repeated"] for row in written),
            "problems": len({row["problem"] for row in written}),
            **{side: fmean(_problem_means(written, side).values()) for side in ("first", "again") if written},
            **{
                control: _interval(_problem_means(written, control).values())
                for control in ("alone", "place", "place and log P")
            },
            "beyond_shuffled": _paired(written, mixed, "place"),
        }
    return result


def _beyond_length(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By what a reward ought to see, among completions of one sort, the partial rank correlations given length.

    Problems are drawn again for the interval. The ranks stay those of all completions.
    """
    whole = _of(rows, part="whole")
    long = [row for row in whole if "checks" in row]
    sorts: dict[str, tuple[list[dict[str, Any]], Callable[[dict[str, Any]], float]]] = {
        name: ([row for row in long if name in row], lambda row, name=name: row[name])  # type: ignore[misc]
        for name in ("after settling", "attempts again", "checks")
    }
    sorts["wrong, long traces"] = (long, lambda row: 1 - row["right"])
    for model in ("Qwen3-8B", "Qwen3.5-9B"):
        sorts[f"wrong, {model} thinking"] = (_of(whole, model=model, kind="thinking"), lambda row: 1 - row["right"])
    result = {}
    for name, (inside, truth) in sorts.items():
        problems = sorted({row["problem"] for row in inside})
        if len(problems) >= 3 and len({truth(row) for row in inside}) > 1:
            columns = [[row["tokens"] for row in inside], [truth(row) for row in inside]]
            columns += [[row[reward] for row in inside] for reward in REWARDS]
            draws = np.random.default_rng(0).multinomial(len(problems), [1 / len(problems)] * len(problems), size=2000)
            weights = np.concatenate([np.ones((1, len(inside))), draws[:, [problems.index(row["problem"]) for row in inside]]])
            found = _partial(np.array([ranks(column) for column in columns]), weights)
            result[name] = {
                "completions": len(inside),
                "problems": len(problems),
                **{
                    reward: [float(of[0]), *(float(end) for end in np.nanquantile(of[1:], [0.025, 0.975]))]
                    for reward, of in zip(REWARDS, found.T, strict=True)
                    if np.isfinite(of[0])
                },
            }
    return result


def _partial(columns: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of [K, n] columns, for each row of weights [D, n], the correlation of those from 2 on with 1 given 0; [D, K - 2]."""
    weights = weights / weights.sum(1, keepdims=True)
    means = weights @ columns.T
    moments = np.einsum("dn,kn,ln->dkl", weights, columns, columns, optimize=True) - means[:, :, None] * means[:, None]
    left = moments - moments[:, :, :1] * moments[:, :1] / np.maximum(moments[:, :1, :1], 1e-12)
    spread = np.einsum("dkk->dk", left)
    spread = np.where(spread > 1e-9 * np.einsum("dkk->dk", moments), spread, np.nan)
    partial: NDArray[np.float64] = left[:, 1, 2:] / np.sqrt(spread[:, 1:2] * spread[:, 2:])
    return partial


def _chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each judge chooses of a family, judged by the same judge on the problem that was left out for the choice."""
    settled = [row for row in _of(rows, part="settled", text="as written") if row["of"].startswith("protected: ")]
    sentences = _of(rows, part="sentences", how="protected share")
    left_out = _of(rows, part="leave-one-out", target="sum")
    judges: dict[str, tuple[dict[str, list[dict[str, Any]]], Callable[[dict[str, Any]], float]]] = {
        "share protected before settling less that after": (
            {name: _of(settled, of=f"protected: {name}") for name in IMPORTANCES},
            lambda row: row["before"] - row["after"],
        ),
        "sentences, given position and length": (
            {name: _of(sentences, importance=name) for name in IMPORTANCES},
            lambda row: row[f"{TARGETS[0]}, place"],
        ),
        "leave-one-out in sum, given position": (
            {name: _of(left_out, importance=name) for name in IMPORTANCES},
            lambda row: row["place"],
        ),
    }
    result: dict[str, Any] = {}
    for judge, (found, of) in judges.items():
        result[judge] = {}
        complete = [name for name in IMPORTANCES if len(found[name]) == len(found[PAPER])]
        for family, names in FAMILIES.items():
            # Further windows and the gradient may be there for a part of the traces: a small family is judged on these.
            candidates = [name for name in names if name in complete] if family == ANY else list(names)
            traces = set.intersection(*({_trace_of(row) for row in found[name]} for name in candidates))
            common = {name: [row for row in found[name] if _trace_of(row) in traces] for name in (PAPER, *candidates)}
            means = {name: _problem_means(mine, of) for name, mine in common.items()}
            result[judge][family] = _left_one_out(means, candidates, PAPER)
    result["one more verification raises it"] = {"entropy of n-grams": _left_one_out(_raised(rows), _REWARD_FAMILY, R)}
    return result


def _left_one_out(scores: Mapping[str, dict[str, float]], names: Iterable[str], basis: str) -> dict[str, Any]:
    """For each problem the name with the highest mean on the others, and its gain over `basis` on that problem."""
    problems = list(scores.get(basis, {}))
    picks, gains = [], []
    for problem in problems if len(problems) > 1 else []:
        means = {name: fmean(scores[name][other] for other in problems if other != problem) for name in names}
        picks.append(max(means, key=lambda name: means[name]))
        gains.append(scores[picks[-1]][problem] - scores[basis][problem])
    return {"picks": picks, "problems": len(problems), "gain": _interval(gains)}
