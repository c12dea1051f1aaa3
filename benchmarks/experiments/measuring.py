"""The traces that experiments look at, and their tokens' signals: loaded and measured here, once, for all of them.

Decisions taken here:

- Completions of equal prompt belong to one problem; statistics are paired and resampled by problem.
- One forward per completion gives its log-probs, mean attention and lift: a capture of lift around the scoring forward, which
  captures the mean. Every other number (any lambda, any tau) follows from these without a model: `scored`.
- What cannot be read, encoded or scored is left out and counted; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra.encode import Encoder
from entra.forward import token_signals, unwrapped
from entra.policy import Policy, load_policy
from entra.progress import progress_bar
from entra.score import CompletionScores, Scores, score_batch
from entra.traces import Problem, load_traces
from entra.view.trace import pieces_of

OTHER_KIND = "trace"
"""The kind of a completion from a file that names none."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion that is to be scored."""

    problem: str
    """Of its problem: the same for all completions of one prompt."""
    kind: str
    """`concise`, `sample`, `overthinking` or `control` for the shipped ones."""
    prompt: Any
    """Chat messages, text or token ids, as `score_batch` takes them."""
    completion: Any
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A sample's n completion tokens and what a model says of each; signals are float32 [n] on the CPU."""

    sample: Sample
    prompt_ids: list[int]
    pieces: list[str]
    """The text of each token; joined they are the completion."""
    scores: CompletionScores
    """With mu, the mean attention from future tokens, and the default lambda and tau."""
    lift: Tensor
    """The same as mu with each query's attention as a multiple of its uniform share."""

    @cached_property
    def token_ids(self) -> list[int]:
        """The scores' ids, as Python's numbers."""
        return list(self.scores.token_ids.tolist())

    @property
    def logprobs(self) -> Tensor:
        """log P(x_i given x_<i), natural log."""
        return self.scores.logprobs

    @property
    def mean(self) -> Tensor:
        """mu: mean attention from future tokens."""
        return self.scores.incoming

    def with_logprobs(self, logprobs: Tensor) -> Measured:
        """The same completion, scored with other log-probs."""
        return replace(self, scores=_scores(self.prompt_ids, self.token_ids, logprobs, self.mean))

    def incoming(self, statistic: str) -> Tensor:
        """`mean` or `lift` by the name that `ScoreConfig.attention_statistic` has for it."""
        return {"mean": self.mean, "lift": self.lift}[statistic]


class LeftOut(NamedTuple):
    """Rows that are not among the results."""

    faults: tuple[str, ...] = ()
    """What is wrong with each."""

    def plus(self, faults: Iterable[str]) -> LeftOut:
        """These and more."""
        return LeftOut((*self.faults, *faults))

    def summary(self) -> dict[str, Any]:
        """For a result: a sentence for captions, empty when nothing is left out, and what is wrong with each row."""
        count = len(self.faults)
        sentence = f" Left out: {count} rows that cannot be scored, the first: {self.faults[0]}." if count else ""
        return {"left_out": sentence, "left_out_rows": list(self.faults)}


@dataclass(frozen=True)
class Samples:
    """What is to be measured."""

    samples: list[Sample]
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Measurement:
    """What was measured, in the samples' order."""

    traces: list[Measured]
    left_out: LeftOut = field(default_factory=LeftOut)

    def kinds(self) -> list[str]:
        """The kinds that there are, in order of appearance."""
        return list(dict.fromkeys(trace.sample.kind for trace in self.traces))

    def by_problem(self) -> dict[str, list[int]]:
        """Indices of each problem's traces."""
        groups: dict[str, list[int]] = {}
        for i, trace in enumerate(self.traces):
            groups.setdefault(trace.sample.problem, []).append(i)
        return groups

    def pairs(self, kind: str, other: str) -> list[tuple[int, int]]:
        """Indices of each problem's first traces of two kinds, for the problems that have both."""
        first: dict[tuple[str, str], int] = {}
        for i, trace in enumerate(self.traces):
            first.setdefault((trace.sample.problem, trace.sample.kind), i)
        return [
            (first[problem, kind], first[problem, other]) for problem, of in first if of == kind and (problem, other) in first
        ]

    def fewest_unprotected(self, protect_fraction: float) -> int:
        """The smallest number of unprotected positions of any trace, at least 2: all can be rarefied to it."""
        lengths = [len(trace.token_ids) for trace in self.traces]
        return max(2, min(n - int(protect_fraction * n + 1e-9) for n in lengths))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all experiments on traces share: --model, --traces, --limit, --seed."""
    parser.add_argument("--model", default="smollm2", help='a folder, a hub name, or "smollm2" (default: %(default)s)')
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="FILE",
        help="JSON Lines or Parquet with prompt, completion and perhaps kind and id; rows of equal prompt are one problem "
        "(default: the shipped traces)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a result records of these flags."""
    traces = "shipped" if options.traces is None else options.traces.name
    return {"model": options.model, "traces": traces, "limit": options.limit, "seed": options.seed}


def load(options: argparse.Namespace) -> Samples:
    """The samples that the flags name.

    Args:
        options: of `add_arguments`. With `traces` they have `rows` as well: its rows as `entra.source.Source` reads them. Each
            comes with its columns (prompt and completion among them) and what is wrong with it, None when nothing is.

    Raises:
        ValueError: a limit below 1, or no row that can be used; the message names the first fault.
    """
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit} must be at least 1 problem")
    found = shipped(load_traces()) if options.traces is None else from_rows(options.rows)
    kept = set(list(dict.fromkeys(sample.problem for sample in found.samples))[: options.limit])
    if not kept:
        raise ValueError(
            f"--traces {options.traces} has no row with a prompt and a completion; {next(iter(found.left_out.faults), '')}"
        )
    return replace(found, samples=[sample for sample in found.samples if sample.problem in kept])


def shipped(problems: Iterable[Problem]) -> Samples:
    """All completions of these problems, in order."""
    return Samples(
        [
            Sample(
                problem=problem.id,
                kind=completion.kind,
                prompt=[{"role": "user", "content": problem.prompt}],
                completion=completion.text,
            )
            for problem in problems
            for completion in problem.completions
        ]
    )


def from_rows(rows: Iterable[tuple[Mapping[str, Any], str | None]]) -> Samples:
    """Samples from rows of a file: its columns, and what is wrong with its line (None: nothing).

    Columns: `prompt`, `completion`, perhaps `kind` and `id`. A problem is called by the `id` of its first row, else by number.
    """
    samples: list[Sample] = []
    faults: list[str] = []
    names: dict[str, str] = {}
    for number, (columns, malformed) in enumerate(rows, start=1):
        missing = [name for name in ("prompt", "completion") if columns.get(name) is None]
        if malformed is not None or missing:
            faults.append(malformed or f"row {number} has no {missing[0]}")
            continue
        prompt = columns["prompt"]
        key = json.dumps(prompt, sort_keys=True, default=str)
        if key not in names:
            name = str(columns.get("id") or f"problem {len(names) + 1}")
            names[key] = name if name not in names.values() else f"{name} ({len(names) + 1})"
        samples.append(
            Sample(
                problem=names[key],
                kind=str(columns.get("kind") or OTHER_KIND),
                prompt=prompt,
                completion=columns["completion"],
            )
        )
    return Samples(samples, LeftOut().plus(faults))


def measure(policy: Policy, found: Samples, config: ScoreConfig | None = None, label: str = "completions") -> Measurement:
    """Every sample's signals under a model, with a progress bar on stderr.

    Args:
        policy: model and tokenizer, `entra.policy.load_policy(name)` for one by name.
        found: what `load` returned.
        config: `head_reduction`, `backend` and `chat_template_kwargs` are used.
        label: what the bar counts.

    Raises:
        ValueError: the model cannot be scored, or no sample can be; the message names the first fault.
    """
    config = ScoreConfig() if config is None else config
    encoder = Encoder(policy.tokenizer, unwrapped(policy.model), config.chat_template_kwargs)
    traces: list[Measured] = []
    faults: list[str] = []
    with progress_bar(len(found.samples), 0, label) as bar:
        for sample in found.samples:
            try:
                row = encoder.encode(sample.prompt, sample.completion)
                if not row.completion:
                    raise ValueError("the completion has no tokens but EOS and pads")
            except (TypeError, ValueError) as error:
                faults.append(f"{sample.problem}, {sample.kind}: {error}")
            else:
                trace = _measured(policy, sample, row.prompt, row.completion, config)
                if trace is not None:
                    traces.append(trace)
                else:
                    faults.append(f"{sample.problem}, {sample.kind}: a log-prob or attention is not finite under this model")
            bar.update()
    if not traces:
        raise ValueError(f"none of {len(found.samples)} completions can be scored; the first: {faults[0]}")
    return Measurement(traces, found.left_out.plus(faults))


def _measured(
    policy: Policy, sample: Sample, prompt_ids: list[int], token_ids: list[int], config: ScoreConfig
) -> Measured | None:
    """One forward; None where a signal is not finite."""
    count = len(token_ids)
    model = unwrapped(policy.model)
    reduction, backend = config.head_reduction, config.backend
    with capture_incoming_attention(model, statistic="lift", head_reduction=reduction, backend=backend) as captured:
        (signals,) = token_signals(model, [prompt_ids + token_ids], [count], replace(config, attention_statistic="mean"))
    logprobs, mean, lift = signals.logprobs.cpu(), signals.incoming.cpu(), captured.incoming[0, -count:].cpu()
    if not all(bool(values.isfinite().all()) for values in (logprobs, mean, lift)):
        return None
    return Measured(
        sample=sample,
        prompt_ids=prompt_ids,
        pieces=pieces_of(policy.tokenizer, token_ids),
        scores=_scores(prompt_ids, token_ids, logprobs, mean),
        lift=lift,
    )


def _scores(prompt_ids: list[int], token_ids: list[int], logprobs: Tensor, mean: Tensor) -> CompletionScores:
    """With the default lambda and tau; no forward runs."""
    return score_batch([prompt_ids], None, [token_ids], logprobs=[logprobs], incoming=[mean], details=True)[0]


def scored(traces: Sequence[Measured], config: ScoreConfig) -> Scores:
    """`score_batch` of these traces with any lambda, tau or statistic; no forward runs."""
    return score_batch(
        [trace.prompt_ids for trace in traces],
        None,
        [trace.token_ids for trace in traces],
        logprobs=[trace.logprobs for trace in traces],
        incoming=[trace.incoming(config.attention_statistic) for trace in traces],
        config=config,
        details=True,
    )


def overlap(protected: Tensor, other: Tensor) -> dict[str, float]:
    """Of two choices of tokens, bool [n]: `kept`, the share of the first that is in the other too, and their `jaccard` overlap.

    Both are 1 where nothing is chosen.
    """
    both, either = int((protected & other).sum()), int((protected | other).sum())
    if not either:
        return {"kept": 1.0, "jaccard": 1.0}
    return {"kept": both / max(int(protected.sum()), 1), "jaccard": both / either}


def load_model(options: argparse.Namespace) -> Policy:
    """The policy that --model names.

    Raises:
        ValueError: there is none, or packages are missing; the message says what to do.
    """
    try:
        return load_policy(options.model)
    except (OSError, RuntimeError) as error:
        raise ValueError(f'cannot load --model {options.model}: {error}; give a folder, a hub name, or "smollm2"') from error
