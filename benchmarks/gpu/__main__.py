"""The most of a GPU machine that is there for a quarter of an hour: `make gpu`, then `make gpu-again`.

Parts run one after the other, what matters most first. Each has a limit, and one that fails or hangs stops no other. Whatever
a part has found out is in the folder of results at once: its log, the records of its benchmarks, a line in summary.txt.

The machine is taken as it is. Packages that it lacks come as wheels in a folder, and are unpacked into another.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE = 5.0
"""Seconds that an interrupted part has to write its report before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command with a limit. A benchmark writes its records where `--results` says."""

    name: str
    seconds: float
    command: tuple[str, ...]
    is_benchmark: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to its environment."""


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def benchmark(name: str, seconds: float, select: str) -> Part:
    """The speed tests that `select` matches, as pytest's -k does. They start none in their last quarter."""
    minutes = str(0.75 * seconds / 60)
    pytest = python("-m", "pytest", "benchmarks", "--benchmark-only", "--timeout", "0", "-q", "-s", "-p", "no:cacheprovider")
    return Part(name=name, seconds=seconds, command=(*pytest, "-k", select, "--max-minutes", minutes), is_benchmark=True)


MACHINE = """
import shutil, subprocess, sys, torch, transformers, triton
print(sys.version, torch.__version__, triton.__version__, transformers.__version__, torch.backends.cudnn.version())
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
"""

PROFILED = """
import torch
from entra_kernels import incoming_attention
q, k = (torch.randn(1, 16384, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8))
for _ in range(2):
    incoming_attention(q, k)
torch.cuda.synchronize()
"""


def first_parts(rehearse: bool) -> list[Part]:
    """9 minutes: first whether it is right, then what was never measured, then the rest."""
    lengths = "test_against_peers" if rehearse else "test_against_peers and not 65536 and not 131072"
    logprobs = "test_linear_token_logprobs" + ("" if rehearse else " and 32768")
    return [
        Part(name="machine", seconds=20, command=python("-c", MACHINE)),
        Part(name="smoke", seconds=80, command=python("-m", "benchmarks.gpu.smoke", "--seconds", "60")),
        benchmark("lengths", 150, lengths),
        benchmark("logprobs", 60, logprobs),
        benchmark("training", 110, "test_training_step"),
        benchmark("rest", 150, "redundancy or score_batch or memory or 65536 or 131072 or (linear and 8192)"),
    ]


def further_parts(rehearse: bool) -> list[Part]:
    """For the rest of the quarter of an hour, once the faults that the first call found are mended."""
    # Every worker compiles for itself: 14 of them took longer than a few.
    workers = ("-n", "4", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    small = "--tokens 70 --heads 2 --kv-heads 1 --head-dim 16 --dtype fp16 --rounds 1 --most 2"
    tune = small if rehearse else "--head-dim 128 --rounds 7 --most 8"
    ncu = "ncu --clock-control none -k regex:_column_sum_kernel|_row_lse_kernel --launch-skip 2 --launch-count 2"
    sections = "SpeedOfLight WarpStateStats InstructionStats Occupancy MemoryWorkloadAnalysis"
    asked = [word for section in sections.split() for word in ("--section", section)]
    smoke = python("-m", "benchmarks.gpu.smoke")

    def sanitized(tool: str) -> Part:
        command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *smoke, "--small")
        # With the caching allocator every access within a block of 2 MiB looks fine.
        return Part(name=tool, seconds=60, command=command, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    # Files without such a test take longer to import than the others to run. Without a GPU there is none to be run.
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "gpu" in file.read_text()]
    which = ["tests/entra_kernels/test_launches.py"] if rehearse else [*files, "-m", "gpu"]
    tests = python("-m", "pytest", *which, "-q", "--timeout", "60", *workers)
    return [
        Part(name="smoke", seconds=70, command=(*smoke, "--seconds", "50")),
        Part(name="tests", seconds=110, command=tests),
        sanitized("memcheck"),
        Part(name="workspace", seconds=25, command=python("-m", "benchmarks.gpu.workspace")),
        Part(name="sizes", seconds=45, command=python("-m", "benchmarks.static.tune", *tune.split())),
        Part(name="ncu", seconds=30, command=(*ncu.split(), *asked, *python("-c", PROFILED))),
        sanitized("racecheck"),
    ]


def run_part(part: Part, results: Path, seconds: float, environment: dict[str, str]) -> str:
    """Runs it for at most `seconds`, and says in a line what became of it. None of its processes is left behind."""
    began = time.monotonic()
    command = list(part.command)
    if part.is_benchmark:
        command += ["--results", str(results / part.name)]
    with (results / f"{part.name}.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except FileNotFoundError:
            return f"{part.name}: not run: {command[0]} is not on the PATH"
        late = False
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGINT)  # pytest then still writes its report
            try:
                code = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):  # what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    became = f"OUT OF TIME after {seconds:.0f} s" if late else "passed" if code == 0 else f"FAILED with exit code {code}"
    return f"{part.name}: {became}, {time.monotonic() - began:.0f} s"


def merge(results: Path, parts: Sequence[Part]) -> None:
    """Writes the records of all benchmarks so far into one file per device, for the tables."""
    merged: dict[str, dict[str, object]] = {}
    for part in parts:
        for file in sorted((results / part.name).glob("*.json")):
            content = json.loads(file.read_text())
            if file.name in merged:
                merged[file.name]["records"] = [*merged[file.name]["records"], *content["records"]]  # type: ignore[misc]
            else:
                merged[file.name] = {**content, "command": "make gpu"}
    for name, content in merged.items():
        (results / name).write_text(json.dumps(content, indent=1) + "\n")


def use_wheels(wheels: Path, folder: Path) -> None:
    """Unpacks all wheels of a folder into another. Nothing else is installed with them, torch least of all."""
    found = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels {wheels} holds no *.whl; fill it by: pip download --no-deps -d {wheels} trl datasets ...")
    pip = python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder))
    subprocess.run([*pip, *found], check=True)


def main(words: Sequence[str] | None = None) -> int:
    """1 when a part failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for logs, records and summary.txt")
    parser.add_argument("--again", action="store_true", help="the parts for a second call instead")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these only, of either call")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what the machine lacks: trl, datasets, peers")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at toy size; the numbers mean nothing")
    arguments = parser.parse_args(words)

    end = time.monotonic() + 60 * arguments.minutes
    first, further = first_parts(arguments.rehearse), further_parts(arguments.rehearse)
    parts = further if arguments.again else first
    if arguments.parts:
        by_name = {part.name: part for part in (*further, *first)}
        unknown = [name for name in arguments.parts if name not in by_name]
        if unknown:
            parser.error(f"--parts {unknown[0]!r} is no part; there are {', '.join(sorted(by_name))}")
        parts = [by_name[name] for name in arguments.parts]

    results = arguments.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as packages, (results / "summary.txt").open("a") as summary:
        if arguments.wheels:
            use_wheels(arguments.wheels, Path(packages))
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of them once stood still, and with it the run
            **({"BENCH_SIZES": "tiny", "TRITON_INTERPRET": "1"} if arguments.rehearse else {}),
        }
        for part in parts:
            seconds = min(part.seconds, end - time.monotonic())
            if seconds <= 0:
                line = f"{part.name}: not run: the {arguments.minutes:g} minutes are over"
            else:
                line = run_part(part, results, seconds, {**environment, **part.variables})
            failed += "passed" not in line
            print(line, file=summary, flush=True)
            print(line, flush=True)
            if part.is_benchmark:
                merge(results, parts)
        if any(part.is_benchmark for part in parts) and list(results.glob("*.json")):
            render = python("-m", "benchmarks.speed.render", str(results), "--readme", str(results / "README.md"))
            subprocess.run(render, cwd=ROOT, env=environment)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
