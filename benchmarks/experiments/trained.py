"""What the training-time experiments share: variants of the evidence recipe, trained where they are missing, and compared.

Decisions taken here:

- A variant is one GRPO run of `benchmarks.evidence` from its SFT model. Everything but the option in question is as it is
  there. Runs are processes of one thread, two at a time. Finished ones are kept, so a stopped experiment goes on.
- A run of `make evidence-full` serves as it is when it has the same settings and started from the same SFT model (the facts of
  its making agree). `summary["runs"]` says which runs are such.
- Held-out problems, and the seed of the sampling, are the same for all variants and the SFT model, so differences are paired.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.comparisons import paired_difference
from benchmarks.evidence.problems import KINDS
from benchmarks.evidence.processes import Run, make_missing, make_sft
from benchmarks.experiments.results import Result
from entra.config import ScoreConfig
from entra.metrics import Interval, quantile

SFT = "SFT model (start)"
HERE, EVIDENCE = "this experiment", "evidence run"
_FACTS = ("parameters", "final_loss", "steps", "traces", "seed", "versions")
_IMPROBABLE = 0.01


class Variant(NamedTuple):
    """One training run."""

    label: str
    """What tables and legends call it: unique."""
    arm: str
    """Of the evidence runs: the reward."""
    score: Mapping[str, Any] = {}
    """Options of ScoreConfig that differ from the arm's own."""
    kinds: Sequence[str] = KINDS
    """Of the training problems."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every training-time experiment."""
    folders = {
        "--sft": ("build/evidence-full/sft", "the SFT model to start from; trained, in some 5 minutes, when missing"),
        "--runs": ("build/experiments/runs", "where finished runs are kept; what is there is not trained again"),
        "--evidence": ("benchmarks/results/evidence", "finished evidence runs, taken where the settings are the same"),
    }
    for name, (default, meaning) in folders.items():
        parser.add_argument(name, type=Path, default=Path(default), help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of rollouts and problems (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="GRPO steps (default: as the evidence runs)")
    parser.add_argument("--prompts-per-step", type=int, help="each with 8 completions (default: as the evidence runs)")
    parser.add_argument("--held-out", type=int, help="held-out problems (default: as the evidence runs)")
    parser.add_argument("--sft-steps", type=int, help="of an SFT model that is missing")


def trained(name: str, variants: Sequence[Variant], options: argparse.Namespace) -> Result:
    """Trains the variants that are missing and puts all of them, the SFT model first, into one result.

    Returns:
        Rows: one per variant and training step. Summary: `kinds` are those of the held-out problems. `held_out` has, by label
        and problem, `correct` and `finished` as "1" or "0", and `tokens`. `runs` says, by label, where a run is from, its
        settings, and the share of completions that the SFT model finds improbable.

    Raises:
        ValueError: a run failed, or a file in `options.runs` is of other settings.
    """
    from benchmarks.evidence.run import HELD_OUT, PROMPTS_PER_STEP, STEPS, recorded

    steps, held_out = options.steps or STEPS, options.held_out or HELD_OUT
    prompts_per_step = options.prompts_per_step or PROMPTS_PER_STEP
    sizes = {"steps": steps, "prompts_per_step": prompts_per_step, "held_out": held_out}
    runs = [Run(["base", options.seed], options.runs / f"sft-seed{options.seed}.json", {"held_out": held_out})]
    configs: list[dict[str, Any]] = [{}]
    for variant in variants:
        flags = {**variant.score, **({} if tuple(variant.kinds) == KINDS else {"kinds": variant.kinds}), **sizes}
        runs.append(Run(["one", variant.arm, options.seed], options.runs / _file(variant, options.seed), flags))
        score_config = replace(ScoreConfig(), **variant.score)
        configs.append(recorded(steps, prompts_per_step, score_config=score_config, kinds=variant.kinds))

    if make_sft(options.sft, options.sft_steps):
        raise ValueError(f"the SFT model in {options.sft} could not be trained; its messages are above")
    sft = json.loads((options.sft / "sft.json").read_text())
    found = [_evidence(options.evidence, run, sft, config, held_out) for run, config in zip(runs, configs, strict=True)]
    failed = make_missing([run for run, known in zip(runs, found, strict=True) if known is None], options.sft)
    if failed:
        raise ValueError(f"{failed} runs failed, their messages are above; the same command goes on with what is missing")
    records = [
        _own(run.into, sft, config, held_out) if known is None else known
        for run, config, known in zip(runs, configs, found, strict=True)
    ]
    labels = [SFT, *(variant.label for variant in variants)]
    threshold = quantile(records[0]["held_out"]["sft_logprob"], _IMPROBABLE)
    return Result(
        name=name,
        settings={"seed": options.seed, **sizes, "threads_per_run": 1, "sft": {fact: sft[fact] for fact in _FACTS}},
        rows=[
            {"run": label, "step": step + 1, **{name: _number(values[step]) for name, values in record["curve"].items()}}
            for label, record in zip(labels[1:], records[1:], strict=True)
            for step in range(steps)
        ],
        summary={
            "kinds": records[0]["held_out"]["kinds"],
            "runs": {
                label: {
                    "from": HERE if known is None else EVIDENCE,
                    "command": record["command"],
                    "seconds": record.get("seconds"),
                    "config": config,
                    "improbable": statistics.fmean(value < threshold for value in record["held_out"]["sft_logprob"]),
                    "examples": record["held_out"]["examples"][:4],
                }
                for label, record, known, config in zip(labels, records, found, configs, strict=True)
            },
            "held_out": {
                label: {part: record["held_out"][part] for part in ("correct", "finished", "tokens")}
                for label, record in zip(labels, records, strict=True)
            },
        },
    )


def compare(result: Result, label: str, baseline: str, kinds: Sequence[str] = KINDS) -> Comparison:
    """One run minus another on the held-out problems of some kinds."""
    chosen = [i for i, kind in enumerate(result.summary["kinds"]) if kind in kinds]

    def of(label: str, part: str) -> list[float]:
        values = result.summary["held_out"][label][part]
        return [float(values[i]) for i in chosen]

    tokens, before = of(label, "tokens"), of(baseline, "tokens")
    return Comparison(
        accuracy=statistics.fmean(of(label, "correct")),
        accuracy_difference=paired_difference(of(label, "correct"), of(baseline, "correct")),
        tokens=statistics.fmean(tokens),
        tokens_difference=paired_difference(tokens, before),
        tokens_before=statistics.fmean(before),
        median_tokens=statistics.median(tokens),
        finished=statistics.fmean(of(label, "finished")),
        problems=len(chosen),
    )


class Comparison(NamedTuple):
    """A run against a baseline, paired by problem, with 95 % intervals by the normal approximation."""

    accuracy: float
    accuracy_difference: Interval
    tokens: float
    tokens_difference: Interval
    tokens_before: float
    """The baseline's mean."""
    median_tokens: float
    finished: float
    problems: int

    @property
    def change(self) -> Interval:
        """Of the mean tokens, as a share of the baseline's."""
        return Interval(*(value / self.tokens_before for value in self.tokens_difference))


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if value != value else value


def curve(result: Result, label: str, name: str) -> list[float]:
    """One quantity of a run's training, step by step."""
    return [row[name] for row in result.rows if row["run"] == label]


def signed(interval: Interval, scale: float = 1.0) -> str:
    """`+1.2 (+0.1 to +2.3)`, after scaling."""
    return f"{scale * interval.mean:+.1f} ({scale * interval.low:+.1f} to {scale * interval.high:+.1f})"


def _file(variant: Variant, seed: int) -> str:
    options = [f"{name}-{value}" for name, value in variant.score.items()]
    kinds = [] if tuple(variant.kinds) == KINDS else variant.kinds
    return "-".join([variant.arm, *options, *kinds, f"seed{seed}"]) + ".json"


def _evidence(folder: Path, run: Run, sft: dict[str, Any], config: dict[str, Any], held_out: int) -> dict[str, Any] | None:
    """The evidence run that this one would repeat, if there is one from the same SFT model."""
    base, path = folder / f"sft-seed{run.words[-1]}.json", folder / run.into.name
    if not (base.exists() and path.exists()):
        return None
    record = {"sft": json.loads(base.read_text())["sft"], **json.loads(path.read_text())}
    return record if _is(record, sft, config, held_out) else None


def _own(path: Path, sft: dict[str, Any], config: dict[str, Any], held_out: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    if not _is(record, sft, config, held_out):
        raise ValueError(f"{path} is of another SFT model or of other settings; choose another --runs, or remove it")
    return record


def _is(record: dict[str, Any], sft: dict[str, Any], config: dict[str, Any], held_out: int) -> bool:
    """Whether a run started from this SFT model and had these settings. Older records leave out some that had the defaults."""
    defaults = {"score": {}, "kinds": list(KINDS)}
    same = {name: {**config, **defaults, **record.get("config", {})}[name] == value for name, value in config.items()}
    return (
        all(record["sft"].get(fact) == sft.get(fact) for fact in _FACTS)
        and all(same.values())
        and len(record["held_out"]["tokens"]) == held_out
    )
