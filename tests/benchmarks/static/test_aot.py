"""Every Triton kernel compiles without a GPU: a sample here, a subset with `make compile`, all with `make compile-all`."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from benchmarks.static import aot, disassembly
from benchmarks.static.aot import BUDGETS, PINNED, QUERIES, Compiled, may_spill

ROOT = Path(__file__).parents[3]
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def test_representative_kernels_compile_for_every_chip(python):
    """Their shared memory, spills, and on sm_90 the budgets of the attention passes: what breaks one fails the command."""
    done = python("-m", "benchmarks.static.aot", "--sample")
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
    plain = {f"sm_90 {kernel} d={head_dim}" for kernel in kernels for head_dim in (64, 128, 256)}
    chips = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert set(BUDGETS) == plain | {f"{chip} {label}" for chip in chips for label in QUERIES}
    if triton.__version__.partition("+")[0] != PINNED:
        chips = chips[:3]  # AMD's loops are found in what the pinned Triton makes of them
    for name in (*plain, f"sm_90 {QUERIES[0]}", *(f"{chip} {QUERIES[-1]}" for chip in chips)):
        chip, _, label = name.partition(" ")
        assert re.search(rf"\n{chip} bf16 \w+ {label} +\d+ registers .* instructions a score\n", done.stdout), name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("d=999", "matches no kernel; names look like"), ("(", "is no regular expression")],
    ids=["no match", "invalid"],
)
def test_only_says_what_is_wrong(monkeypatch, capsys, pattern, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "cases", lambda selection, pool: [])
    monkeypatch.setattr(sys, "argv", ["aot", "--only", pattern])
    with pytest.raises(SystemExit) as stopped:
        aot.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "chips"),
    [
        ("bf16 attention column_sum d=128", {"sm_120"}),
        ("bf16 attention column_sum d=64", {"sm_120"}),
        ("bf16 attention column_sum d=16 window", {"sm_80", "sm_86", "sm_89", "sm_120"}),
        ("fp32 attention row_lse d=128 window softcap", {"sm_86", "sm_89", "sm_100"}),
        ("bf16 logprobs head", set()),
        ("bf16 logprobs head rows", {"sm_100"}),
        ("bf16 sampled sampled_lse d=128", set()),
        ("fp32 redundancy select", set()),
        ("bf16 attention column_sum d=256", {*CHIPS}),
    ],
)
def test_each_chip_has_its_own_kernels_that_may_spill(kernel, chips):
    """All kernels of all chips but sm_90 might: a new spill there was not seen."""
    assert {chip for chip in CHIPS if may_spill(f"{chip} {kernel}")} == chips


def test_spills_and_budgets_fail_the_command_with_the_pinned_triton_only(monkeypatch):
    """Triton 3.9 spills twice where the pinned one does not."""
    pins = (ROOT / "constraints.txt").read_text()
    assert f"\ntriton=={PINNED}\n" in pins
    spilled = Compiled(name="column_sum", registers=128, shared_memory=1024, spills=2, excess="2 spills on sm_90")
    does_not_run = Compiled(name="column_sum", registers=128, shared_memory=1024, spills=0, problem="1025 B of shared memory")
    for version, fails in ((PINNED, True), (f"{PINNED}+git0123", True), ("3.9.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert spilled.fails is fails
        assert "OVER BUDGET: 2 spills" in str(spilled)
        assert does_not_run.fails


@pytest.mark.parametrize(
    ("left", "message"), [(1, ""), (0, "each trip waits for the copy that was issued last"), (None, "no wait for a copy")]
)
def test_a_wait_for_the_last_copy_is_an_excess(left, message):
    counts = disassembly.Counts(
        instructions=1, exponentials=1, shuffles=0, matrix=1, matrix_name="HMMA", matrix_in_kernel=1, overlapped=None,
        copies_left=left,
    )  # fmt: skip
    assert aot.late(counts).startswith(message)
    assert bool(aot.late(counts)) == bool(message)


def test_more_shared_memory_than_the_launcher_reckons_with_is_an_excess():
    tile = {"RESIDENT": 256, "STREAMED": 32, "DEPTH": 256}
    case = SimpleNamespace(chip=aot.CHIPS[0], constexprs=tile, num_warps=8, options={"num_stages": 3})
    assert aot.unreckoned(case, 165_888) == ""
    assert aot.unreckoned(case, 165_889) == "165889 B of shared memory, the launcher reckons with 165888"


def descendants(process):
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def is_alive(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


# The command, with one case, whose assembler does not end.
SLOW = """
import subprocess, sys
from benchmarks.static import aot

aot.cases = lambda selection, pool: [["sh", "-c", "echo an assembler is at work; exec sleep 250"]]
aot.inspect = subprocess.run
sys.argv = ["aot", "--processes", "1"]
aot.main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_compile_leaves_no_orphans():
    """A time limit kills the command alone, and the workers of a pool wait for a parent for ever."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-c", SLOW], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    below = []
    try:
        assert running.stdout.readline() == "an assembler is at work\n"
        below = descendants(running.pid)
        assert len(below) >= 2  # a worker and its assembler
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    deadline = time.monotonic() + 60
    while (left := [process for process in below if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["aot"])
    with pytest.raises(SystemExit) as stopped:
        aot.main()
    assert stopped.value.code == 2
    assert "unset it" in capsys.readouterr().err
