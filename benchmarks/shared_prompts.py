"""Prompts that run once beside whole rows: `python -m benchmarks.shared_prompts RESULTS.json`, SmolLM2 on a CPU, 5 minutes.

Both ways take turns in one process, and whichever goes first changes from round to round. The mean counts. The demo's
completions are scored as `make demo` scores them: four problems in a call, and whole rows of two, as it did when all ran whole.
What a forward costs is measured beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import entra
from benchmarks.speed.results import device_name
from benchmarks.speed.test_training import model as small_model
from entra.forward import token_signals
from entra.policy import load_policy
from entra.traces import load_traces

CASES = {"8 completions of 128 tokens after 1,024": (8, 1024, 128), "8 completions of 512 tokens after 64": (8, 64, 512)}
ROUNDS = 2


def forward_in_tokens(model: Any) -> float:
    """How many tokens cost as much as one forward more: two rows of 128 tokens, in one forward and in two."""
    rows = torch.randint(10, 10_000, (2, 128), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: dict[int, list[float]] = {256: [], 128: []}
    for _ in range(16):
        for budget, measured in seconds.items():
            began = time.perf_counter()
            token_signals(model, rows, [127, 127], entra.ScoreConfig(token_budget=budget))
            measured.append(time.perf_counter() - began)
    together, apart = median(seconds[256]), median(seconds[128])
    return (apart - together) / (together / 256)


def measure() -> dict[str, Any]:
    """Seconds by the clock and of the processor, of each round and way, and how far results differ."""
    policy = load_policy("smollm2")
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 40_000, (count,), generator=generator).tolist()

    runs: dict[str, Callable[[entra.ScoreConfig], Any]] = {}
    for name, (group, before, after) in CASES.items():
        prompts, completions = [tokens(before)] * group, [tokens(after) for _ in range(group)]
        runs[name] = lambda config, p=prompts, c=completions: entra.score_batch(p, c, model=policy.model, config=config)
    problems = load_traces()

    def demo(config: entra.ScoreConfig) -> list[float | None]:
        rewards: list[float | None] = []
        count = 4 if config.share_prompts else 2
        for first in range(0, len(problems), count):
            call = [(problem, completion) for problem in problems[first : first + count] for completion in problem.completions]
            chats = [[{"role": "user", "content": problem.prompt}] for problem, _ in call]
            texts = [completion.text for _, completion in call]
            rewards += entra.score_batch(chats, texts, model=policy.model, tokenizer=policy.tokenizer, config=config)
        return rewards

    runs[f"the demo's {sum(len(problem.completions) for problem in problems)} completions"] = demo
    records = []
    for name, run in runs.items():
        rewards: dict[bool, list[float]] = {}
        seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(ROUNDS):
            for share in (turn % 2 == 0, turn % 2 == 1):
                began = time.perf_counter(), time.process_time()
                rewards[share] = list(run(entra.ScoreConfig(share_prompts=share)))
                seconds[share].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        once, whole = (mean(clock for clock, _ in seconds[share]) for share in (True, False))
        differ = max(abs(a - b) for a, b in zip(rewards[True], rewards[False], strict=True))
        records.append(
            {"case": name, "ratio": once / whole, "once": seconds[True], "whole": seconds[False], "rewards_differ": differ}
        )
        print(
            f"{name}: {once:.2f} s once, {whole:.2f} s whole, ratio {once / whole:.3f}, rewards differ by {differ:.1e}",
            flush=True,
        )
    costs = {
        "SmolLM2": forward_in_tokens(policy.model),
        "the model of the training benchmark": forward_in_tokens(small_model()),
    }
    print(f"a forward costs as much as so many tokens: {costs}", flush=True)
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "machine": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": packages,
        "command": "python -m benchmarks.shared_prompts",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "forward_in_tokens": costs,
        "records": records,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
