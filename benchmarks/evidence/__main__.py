"""`python -m benchmarks.evidence COMMAND`: what `make evidence` and `make evidence-full` call.

Each run is a process with one thread and writes one JSON file. Two run at a time. Files that exist are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.problems import KINDS
from benchmarks.evidence.processes import Run, make_missing, say
from benchmarks.evidence.report import FRESH
from entra.config import ScoreConfig
from entra.flags import add_flags

SHORT_ARMS = ("accuracy", "entra-banded")
FRESH_ARMS = ("entra-banded", "kimi")
RESULTS = Path("benchmarks/results/evidence")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    short = commands.add_parser("short", help="SFT, accuracy only and gated ENTRA with one seed, table and plot")
    full = commands.add_parser("full", help="all arms, three seeds; finished runs are skipped")
    sft = commands.add_parser("sft", help="train the SFT model")
    base = commands.add_parser("base", help="evaluate the SFT model")
    one = commands.add_parser("one", help="train and evaluate one arm")
    report = commands.add_parser("report", help="table and plot from results")
    for command, build in ((short, Path("build/evidence")), (full, Path("build/evidence-full"))):
        command.add_argument("--sft", type=Path, default=build / "sft", help="the SFT model; trained when missing")
    short.add_argument("--results", type=Path, default=Path("build/evidence/results"))
    short.add_argument("--seeds", type=int, nargs="+", default=[0])
    full.add_argument("--results", type=Path, default=RESULTS)
    full.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    full.add_argument("--fresh-seeds", type=int, nargs="*", default=[3, 4, 5], help="of the arms that are confirmed")
    full.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    for command in (short, full, one):
        command.add_argument("--steps", type=int, help="GRPO steps")
        command.add_argument("--prompts-per-step", type=int, help="prompts of one step, each with 8 completions")
    for command in (short, full, one, base):
        command.add_argument("--held-out", type=int, help="held-out problems")
    for command in (short, full, sft):
        command.add_argument("--sft-steps", type=int, help="SFT steps")
    one.add_argument("arm", choices=list(ARMS))
    one.add_argument("--kinds", nargs="+", choices=KINDS, help="train on these kinds of problems only")
    add_flags(one.add_argument_group("options of the arm's scores (entra.ScoreConfig)"), ScoreConfig)
    for command in (one, base):
        command.add_argument("seed", type=int)
        command.add_argument("--sft", type=Path, required=True)
    for command in (one, base, sft):
        command.add_argument("--into", type=Path, required=True, help="JSON file; of sft: the model's folder")
    report.add_argument("--results", type=Path, default=RESULTS)
    report.add_argument("--into", type=Path, default=Path("docs"), help="folder of evidence.md and evidence.svg")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    options.shown = " ".join(["python -m benchmarks.evidence", *words])
    actions = {"short": _many, "full": _many, "sft": _sft, "base": _base, "one": _one, "report": _report}
    return actions[options.command](options)


def _many(options: argparse.Namespace) -> int:
    """Every run that is missing, then the report."""
    arms = SHORT_ARMS if options.command == "short" else tuple(options.arms)
    started = time.monotonic()
    todo = _runs(options, options.results, options.seeds, arms)
    if options.command == "full":
        todo += _runs(options, options.results / FRESH, options.fresh_seeds, FRESH_ARMS)
    failed = make_missing(todo, options.sft, options.sft_steps)
    if failed:
        say(f"{failed} runs failed; call the command again for those")
        return 1
    options.into = options.results.parent if options.command == "short" else Path("docs")
    say(f"all runs finished after {(time.monotonic() - started) / 60:.1f} minutes")
    return _report(options)


def _runs(options: argparse.Namespace, results: Path, seeds: Sequence[int], arms: Sequence[str]) -> list[Run]:
    """The SFT model and every arm with every seed."""
    sizes = _given(options, "held_out", "steps", "prompts_per_step")
    base = [Run(["base", seed], results / f"sft-seed{seed}.json", _given(options, "held_out")) for seed in seeds]
    return base + [Run(["one", arm, seed], results / f"{arm}-seed{seed}.json", sizes) for seed in seeds for arm in arms]


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _sft(options: argparse.Namespace) -> int:
    from benchmarks.evidence.run import environment
    from benchmarks.evidence.sft import train_sft

    def progress(step: int, steps: int, loss: float) -> None:
        if step % 100 == 1 or step == steps:
            say(f"SFT: step {step}/{steps}, loss {loss:.3f}")

    steps = _given(options, "sft_steps")
    facts = train_sft(options.into, progress=progress, **({"steps": steps["sft_steps"]} if steps else {}))
    _write(options.into / "sft.json", {**facts, **environment()})
    return 0


def _base(options: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.evidence.run import environment, evaluated

    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.sft), AutoTokenizer.from_pretrained(options.sft)
    result = evaluated(model, tokenizer, options.sft, options.seed, **_given(options, "held_out"))
    known = {"arm": "sft", "seed": options.seed, "sft": _facts(options.sft), "held_out": result}
    _write(options.into, {**known, "command": options.shown, **environment()})
    return 0


def _one(options: argparse.Namespace) -> int:
    from benchmarks.evidence.run import run

    score_config = ScoreConfig(**{field.name: getattr(options, field.name) for field in fields(ScoreConfig)})
    sizes = _given(options, "steps", "prompts_per_step", "held_out", "kinds")
    result = run(options.arm, options.seed, options.sft, score_config=score_config, progress=say, **sizes)
    _write(options.into, {**result, "sft": _facts(options.sft), "command": options.shown})
    held_out = result["held_out"]
    correct, tokens = held_out["correct"], held_out["tokens"]
    say(
        f"{options.arm} seed {options.seed}: accuracy {correct.count('1') / len(correct):.3f}, "
        f"{sum(tokens) / len(tokens):.1f} tokens, {sum(result['seconds'].values()):.0f} s"
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.evidence.report import write_report

    print(write_report(options.results, options.into))
    return 0


def _facts(sft: Path) -> Any:
    return json.loads((sft / "sft.json").read_text())


def _write(path: Path, result: dict[str, Any]) -> None:
    """One line per top-level key; a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + lines + "\n}\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
