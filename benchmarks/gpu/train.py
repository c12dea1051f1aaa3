"""The small model of the evidence, trained on a GPU for as long as there is time: `make gpu-train` calls this, part by part.

    python -m benchmarks.gpu.train sft --model DIR --results DIR [--seconds 60]    it is trained to overthink
    python -m benchmarks.gpu.train start --model DIR --results DIR                 how long and how right it then answers
    python -m benchmarks.gpu.train ARM --model DIR --results DIR [--seconds 60]    GRPO with an arm's rewards, then the same

Each adds a line of JSON to training.jsonl. All weights are float32, and each arm is a process of its own: what spoils one arm
spoils no other. Without a GPU it runs at toy size, where the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARMS = ("accuracy", "entra-banded", "kimi")
"""Accuracy alone first: what the others are compared with."""
SEED = 0
WARM = 3
"""Steps whose time is not counted: they compile."""


def records(results: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by arm; of an arm that ran twice the later one."""
    file = results / "training.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["arm"]: line for line in lines}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: each arm's steps and their time, and how right and how long it answers, beside the model that it began with."""
    lines = [
        "| | steps | s a step, median | of it ENTRA, ms | accuracy, held out | tokens, held out |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("start", *ARMS):
        if arm not in found:
            lines.append(f"| {arm} | not measured | | | | |")
            continue
        held_out, curve = found[arm]["held_out"], found[arm].get("curve", {})
        correct = [int(bit) for bit in held_out["correct"]]
        steps, added = (curve.get(name, [])[WARM:] or curve.get(name, []) for name in ("step_seconds", "entra_seconds"))
        cells = [
            str(len(curve.get("step_seconds", []))),
            f"{statistics.median(steps):.2f}" if steps else "",
            f"{1e3 * statistics.median(added):.1f} ({sum(added) / sum(steps):.1%})" if steps else "",
            f"{statistics.fmean(correct):.3f}",
            f"{statistics.fmean(held_out['tokens']):.1f}",
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(command: str, model: Path, seconds: float | None) -> dict[str, Any]:
    """Runs one of the three commands."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.evidence.run import environment, evaluated, run
    from benchmarks.evidence.sft import train_sft
    from benchmarks.speed.clock import clock_of_entra
    from benchmarks.speed.measure import DEVICE, by_size

    steps, prompts, held_out = by_size(tiny=(2, 2, 8), small=(2, 2, 8), full=(70, 16, 1000))
    if command == "sft":
        sft_steps, problems = by_size(tiny=(3, 200), small=(3, 200), full=(1800, 20_000))

        def progress(step: int, of: int, loss: float) -> None:
            print(f"step {step} of {of}, loss {loss:.3f}", flush=True)

        facts = train_sft(model, steps=sft_steps, problems=problems, device=DEVICE, max_seconds=seconds, progress=progress)
        return {**facts, **environment()}
    if command == "start":
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = AutoModelForCausalLM.from_pretrained(model).to(DEVICE)
        return {"held_out": evaluated(policy, tokenizer, model, SEED, held_out)}
    with clock_of_entra() as spent:
        return run(
            command,
            SEED,
            model,
            steps=steps,
            prompts_per_step=prompts,
            held_out=held_out,
            device=DEVICE,
            max_seconds=seconds,
            added=lambda: spent["override"] - spent["trl"] + spent["ours"],
            progress=lambda line: print(line, flush=True),
        )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("sft", "start", *ARMS))
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that every arm begins with")
    parser.add_argument("--results", type=Path, required=True, help="folder of training.jsonl")
    parser.add_argument("--seconds", type=float, help="of training; after them no step begins")
    arguments = parser.parse_args(words)
    result = measured(arguments.command, arguments.model, arguments.seconds)
    arguments.results.mkdir(parents=True, exist_ok=True)
    with (arguments.results / "training.jsonl").open("a") as file:
        print(json.dumps({**result, "arm": arguments.command}), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
