"""Runs as processes with one thread each, two at a time. Each writes one JSON file; one that exists is not made again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

AT_ONCE = 2


class Run(NamedTuple):
    """One process to start, and the file that it writes."""

    words: list[Any]
    into: Path
    flags: dict[str, Any]
    """By name with underscores; a list becomes several words."""


def make_missing(runs: Sequence[Run], sft: Path, sft_steps: int | None = None) -> int:
    """Does the runs whose files are missing. Trains the SFT model first when that is missing.

    Returns:
        How many processes failed.
    """
    if make_sft(sft, sft_steps):
        return 1
    missing = [run for run in runs if not run.into.exists()]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are there, {len(missing)} to do, {AT_ONCE} at a time")
    begin = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = [pool.submit(_process, *run.words, "--sft", sft, "--into", run.into, **run.flags) for run in missing]
        for finished, _ in enumerate(as_completed(made), 1):
            say(progress_line(len(missing), finished, "runs", time.monotonic() - begin))
    return sum(bool(run.result()) for run in made)


def make_sft(sft: Path, steps: int | None = None) -> int:
    """Trains the SFT model into its folder when it is not there. Returns the exit code."""
    if (sft / "sft.json").exists():
        return 0
    return _process("sft", "--into", sft, threads=AT_ONCE, **({} if steps is None else {"sft_steps": steps}))


def say(line: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def _process(*words: Any, threads: int = 1, **flags: Any) -> int:
    """Runs `python -m benchmarks.evidence` as a process. Returns the exit code."""
    named: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else [value]
        named += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.evidence", *map(str, words), *named]
    return subprocess.run(command, env=environment, stdout=sys.__stderr__, check=False).returncode


def progress_line(total: int, finished: int, unit: str, seconds: float) -> str:
    """A progress bar as a line of its own, for where several processes write: `seconds` since the first thing was begun."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar_format = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}]"
    return str(tqdm.format_meter(finished, total, seconds, ncols=80, unit=f" {unit}", bar_format=bar_format))
