"""The most of a GPU machine that is there for a quarter of an hour: `make gpu`, `make gpu-again`, `make gpu-train`.

Parts run one after the other, what matters most first. Each has a limit, and one that fails or hangs stops no other. Whatever
a part has found out is in the folder of results at once, in few files: log.txt, summary.txt, the records of the benchmarks, the
lines of the training. Tables come last, since the end of the output is what one sees.

The machine is taken as it is. Packages that it lacks come as wheels in a folder, and are unpacked into another.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import train
from benchmarks.speed.targets import verdicts

ROOT = Path(__file__).parents[2]
GRACE = 5.0
"""Seconds that an interrupted part has to write its report before it is killed."""

PATIENCE = 10
"""How many times longer a rehearsal may take: a few busy cores, and the interpreter."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command with a limit. Of its words "@results" stands for the folder of results, "@records" for a folder that a
    benchmark writes its records into, and "@scratch" for one that all parts share and that is gone afterwards."""

    name: str
    seconds: float
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to its environment."""


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def benchmark(name: str, seconds: float, select: str) -> Part:
    """The speed tests that `select` matches, as pytest's -k does. They start none in their last quarter."""
    minutes = str(0.75 * seconds / 60)
    pytest = python("-m", "pytest", "benchmarks", "--benchmark-only", "--timeout", "0", "-q", "-s", "-p", "no:cacheprovider")
    command = (*pytest, "-k", select, "--max-minutes", minutes, "--results", "@records")
    return Part(name=name, seconds=seconds, command=command)


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


CALLS: dict[str, tuple[float, tuple[str, ...]]] = {
    "first": (7, ("machine", "smoke", "lengths", "logprobs", "rest", "tests", "sizes", "ncu")),
    "again": (3, ("smoke", "tests", "memcheck")),
    "train": (8, ("machine", "sft", "start", *train.ARMS, "training")),
}
"""Minutes and parts of each call. The first asks whether it is right, then for what was never measured, then for the rest. Each
part has its own limit; what ends early leaves its time to those after it. `make gpu-again` begins with `unfinished`."""


def unfinished(results: Path) -> list[str]:
    """The parts of the first call that did not pass or were never reached, as its folder tells; none without its summary."""
    summary = results / "summary.txt"
    if not summary.exists():
        return []
    became = dict(line.partition(": ")[::2] for line in summary.read_text().splitlines())  # the last line about a part counts
    return [name for name in CALLS["first"][1] if not became.get(name, "").startswith("passed")]


def all_parts(rehearse: bool) -> dict[str, Part]:
    """Every part that there is."""
    lengths = "test_against_peers" if rehearse else "test_against_peers and not 65536 and not 131072"
    logprobs = "test_linear_token_logprobs" + ("" if rehearse else " and 32768")
    # Every worker compiles for itself: 14 of them took longer than a few.
    workers = ("-n", "4", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    small = "--tokens 70 --heads 2 --kv-heads 1 --head-dim 16 --dtype fp16 --rounds 1 --most 2"
    tune = small if rehearse else "--head-dim 128 --rounds 7 --most 12"
    ncu = "ncu --clock-control none -k regex:_column_sum_kernel|_row_lse_kernel --launch-skip 2 --launch-count 2"
    sections = "SpeedOfLight WarpStateStats InstructionStats Occupancy MemoryWorkloadAnalysis"
    asked = [word for section in sections.split() for word in ("--section", section)]
    smoke = python("-m", "benchmarks.gpu.smoke")

    def sanitized(tool: str) -> Part:
        command = ("compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *smoke, "--small")
        # With the caching allocator every access within a block of 2 MiB looks fine.
        return Part(name=tool, seconds=60, command=command, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def trained(command: str, seconds: float, *limit: str) -> Part:
        words = ("-m", "benchmarks.gpu.train", command, "--model", "@scratch/sft", "--results", "@results")
        return Part(name=command, seconds=seconds, command=python(*words, *limit))

    # Files without such a test take longer to import than the others to run. Without a GPU there is none to be run.
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "gpu" in file.read_text()]
    which = ["tests/entra_kernels/test_launches.py"] if rehearse else [*files, "-m", "gpu"]
    parts = [
        Part(name="machine", seconds=20, command=python("-c", MACHINE)),
        Part(name="smoke", seconds=65, command=(*smoke, "--seconds", "50")),
        benchmark("lengths", 130, lengths),
        benchmark("logprobs", 50, logprobs),
        benchmark(
            "rest", 110, "redundancy or score_batch or memory or window or fewer or 65536 or 131072 or (linear and 8192)"
        ),
        Part(name="tests", seconds=100, command=python("-m", "pytest", *which, "-q", "--timeout", "60", *workers)),
        Part(name="sizes", seconds=45, command=python("-m", "benchmarks.static.tune", *tune.split())),
        Part(name="ncu", seconds=30, command=(*ncu.split(), *asked, *python("-c", PROFILED))),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Part(name="workspace", seconds=25, command=python("-m", "benchmarks.gpu.workspace")),
        # Half a minute of each is imports and held-out problems.
        trained("sft", 110, "--seconds", "75"),
        trained("start", 45),
        *(trained(arm, 100, "--seconds", "60") for arm in train.ARMS),
        benchmark("training", 110, "test_training_step"),
    ]
    return {part.name: part for part in parts}


def run_part(part: Part, results: Path, scratch: Path, seconds: float, environment: dict[str, str]) -> str:
    """Runs it for at most `seconds`, and says in a line what became of it. None of its processes is left behind."""
    began = time.monotonic()
    places = {"@results": results, "@records": results / part.name, "@scratch": scratch}
    command = list(part.command)
    for name, place in places.items():
        command = [str(place) + word.removeprefix(name) if word.startswith(name) else word for word in command]
    with (results / "log.txt").open("ab") as log:
        log.write(f"=== {part.name}\n".encode())
        log.flush()
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


def merge(results: Path, part: Part) -> None:
    """Moves the records of a benchmark into the file of their device, which all benchmarks share."""
    for file in sorted((results / part.name).glob("*.json")):
        content = {**json.loads(file.read_text()), "command": "make gpu"}
        shared = results / file.name
        if shared.exists():
            content["records"] = [*json.loads(shared.read_text())["records"], *content["records"]]
        partial = shared.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(shared)
    shutil.rmtree(results / part.name, ignore_errors=True)


def tables(results: Path) -> Iterator[str]:
    """What was measured, in short: the targets of each device, the training."""
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text())
        yield from ("", f"{content['device']}, `{content['command']}`, {content['date']}", "")
        yield from ("| target | measured | |", "|---|---|---|")
        for verdict in verdicts(content):
            met = {True: "met", False: "missed", None: "not measured"}[verdict.met]
            yield f"| {verdict.target} | {' '.join(verdict.measured.split())[:120]} | {met} |"
    if (results / "training.jsonl").exists():
        yield from ("", train.table(train.records(results)))


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
    parser.add_argument("results", type=Path, help="folder for log.txt, summary.txt and what was measured")
    parser.add_argument("--call", choices=CALLS, default="first", help="which parts: those of make gpu, gpu-again or gpu-train")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these only, of any call")
    parser.add_argument("--minutes", type=float, help="for everything together; as a rule those of the call")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what the machine lacks: trl, datasets, peers")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, at toy size; the numbers mean nothing")
    arguments = parser.parse_args(words)

    began = time.monotonic()
    minutes, names = CALLS[arguments.call]
    minutes = minutes if arguments.minutes is None else arguments.minutes
    patience = PATIENCE if arguments.rehearse else 1
    parts = all_parts(arguments.rehearse)
    names = arguments.parts or names
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is no part; there are {', '.join(sorted(parts))}")

    results = arguments.results.resolve()
    if arguments.call == "again" and not arguments.parts:
        names = tuple(dict.fromkeys((*unfinished(results), *names)))
    results.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, (results / "summary.txt").open("a") as summary:
        packages = Path(scratch) / "packages"
        if arguments.wheels:
            use_wheels(arguments.wheels, packages)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of them once stood still, and with it the run
            **({"BENCH_SIZES": "tiny", "TRITON_INTERPRET": "1"} if arguments.rehearse else {}),
        }
        for name in names:
            part = parts[name]
            seconds = min(patience * part.seconds, patience * 60 * minutes - (time.monotonic() - began))
            if seconds <= 0:
                line = f"{name}: not run: the {minutes:g} minutes are over"
            else:
                line = run_part(part, results, Path(scratch), seconds, {**environment, **part.variables})
            failed += "passed" not in line
            print(line, file=summary, flush=True)
            print(line, flush=True)
            merge(results, part)
        if list(results.glob("*.json")):
            render = python("-m", "benchmarks.speed.render", str(results), "--readme", str(results / "README.md"))
            subprocess.run(render, cwd=ROOT, env=environment)
    print(*tables(results), sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
