"""Every Triton kernel compiles without a GPU: a subset here, all of it with `make compile-all`.

In a process of its own, because a kernel of the interpreter, which the other tests need, cannot be compiled.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import triton

from benchmarks.static.aot import BUDGETS, PINNED, Compiled

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

TOO_LITTLE_MEMORY = """
from benchmarks.static import aot
from entra_kernels._triton import attention, launch
case = next(case for case in attention.aot_cases("bf16", launch.HOPPER) if case.head_dim == 16)
chip = launch.Chip("sm_90", 1024)
print(aot.inspect(case, chip, "row_lse").problem)
"""

SUBSET_KERNELS = """
from benchmarks.static import aot
jobs = aot.jobs(aot.SUBSET)
for module in aot.MODULES:
    for index, chip in enumerate(aot.CHIPS):
        taken = {job.case().kernel.__name__ for job in jobs if (job.module, job.chip) == (module, index)}
        print(chip.arch, module, *sorted(taken))
"""


def python(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280)


def test_representative_kernels_compile_for_every_chip():
    """Their shared memory, spills, and on sm_90 the budgets of the attention passes: what breaks one fails the command."""
    done = python("-m", "benchmarks.static.aot")
    assert done.returncode == 0, done.stdout + done.stderr
    for chip in CHIPS:
        for kernel in (
            "bf16 attention row_lse",
            "bf16 attention column_sum",
            "fp32 attention column_sum",
            "bf16 logprobs head",
        ):
            assert f"\n{chip} {kernel}" in "\n" + done.stdout
    kernels = ("row_lse", "column_sum", "ring_row_lse", "ring_column_sum")
    assert set(BUDGETS) == {f"{kernel} d={head_dim}" for kernel in kernels for head_dim in (64, 128, 256)}
    for label in BUDGETS:
        assert re.search(rf"\nsm_90 bf16 \w+ {label} +\d+ registers .* instructions a score\n", done.stdout), label


def test_the_subset_holds_every_kernel():
    done = python("-c", SUBSET_KERNELS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "sm_90 attention _add_kernel _column_sum_kernel _lay_out_kernel _row_lse_kernel" in lines
    assert "sm_90 hopper _column_sum_kernel _row_lse_kernel" in lines
    assert "sm_90 plan _count_tiles_kernel _place_tiles_kernel" in lines
    assert "sm_90 sampled _sampled_columns_kernel _sampled_lse_kernel" in lines
    assert "sm_90 logprobs _head_kernel _reduce_kernel _row_kernel _stretch_kernel" in lines
    assert "sm_90 redundancy _count_kernel _importance_kernel _reward_kernel _select_kernel" in lines
    assert "gfx942 redundancy _count_kernel _importance_kernel _reward_kernel _select_kernel" in lines


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("d=999", "matches no kernel; names look like"), ("(", "is no regular expression")],
    ids=["no match", "invalid"],
)
def test_only_says_what_is_wrong(pattern, message):
    done = python("-m", "benchmarks.static.aot", "--only", pattern)
    assert done.returncode == 2
    assert message in done.stderr


def test_too_much_shared_memory_is_a_problem():
    done = python("-c", TOO_LITTLE_MEMORY)
    assert done.returncode == 0, done.stderr
    assert "B of shared memory, sm_90 has 1024" in done.stdout


def test_spills_and_budgets_fail_the_command_with_the_pinned_triton_only(monkeypatch):
    """Triton 3.9 spills twice where the pinned one does not."""
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text()
    assert f"\ntriton=={PINNED}\n" in pins
    spilled = Compiled(name="column_sum", registers=128, shared_memory=1024, spills=2, excess="2 spills on sm_90")
    does_not_run = Compiled(name="column_sum", registers=128, shared_memory=1024, spills=0, problem="1025 B of shared memory")
    for version, fails in ((PINNED, True), (f"{PINNED}+git0123", True), ("3.9.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert spilled.fails is fails
        assert "OVER BUDGET: 2 spills" in str(spilled)
        assert does_not_run.fails


def descendants(process):
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def is_alive(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_compile_leaves_no_orphans():
    """A time limit kills the command alone, and the workers of a pool wait for a parent for ever."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.static.aot", "--all", "--processes", "1"]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        running.stdout.readline()  # a worker is there and has compiled something
        below = descendants(running.pid)
        assert below
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    deadline = time.monotonic() + 60
    while (left := [process for process in below if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def test_the_interpreter_is_refused():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.static.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unset it" in done.stderr
