"""How everything here is measured: side by side in one run, with peak memory, and compared with what the machine can do.

Time: every function is called once, on CUDA twice (compiles, fills caches). Then rounds follow, and each runs all functions, so
that a busy machine slows all alike. The median counts. On CUDA the clock is a pair of device events. Before each call 1 GiB is
written. That empties the L2 cache and gives the host a head start of some 0.3 ms, so that launches are not timed as work.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = os.environ.get("BENCH_SIZES", "full" if DEVICE == "cuda" else "small")
"""full: for a datacenter GPU; small: for a few CPU cores; tiny: seconds, to see that everything runs. Numbers of tiny mean
nothing, so nothing is asserted of them."""


def by_size(*, tiny: Any, small: Any, full: Any) -> Any:
    """The value for the sizes of this run."""
    return {"tiny": tiny, "small": small, "full": full}[SIZES]


FLUSHED = by_size(tiny=2**20, small=2**30, full=2**30)


class Timing(NamedTuple):
    """Seconds."""

    median: float
    low: float
    high: float
    rounds: int


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE)


def _seconds(function: Callable[[], Any]) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def side_by_side(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float = 8.0,
    failed: dict[str, Exception] | None = None,
) -> dict[str, Timing]:
    """How long each function takes after its first call. One that would need more than `seconds` for all rounds gets fewer, but
    at least one. One that raises is left out and goes into `failed`, where that is given."""
    wanted: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-1, rounds):
        for name, function in functions.items():
            if name not in times or turn >= wanted.get(name, rounds):
                continue
            try:
                elapsed = _seconds(function)
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = error
                del times[name]
                continue
            if turn < 0:
                wanted[name] = min(rounds, max(1, int(seconds / max(elapsed, 1e-6)))) - (DEVICE == "cpu")
            if turn >= 0 or DEVICE == "cpu":
                times[name].append(elapsed)
    return {name: Timing(statistics.median(values), min(values), max(values), len(values)) for name, values in times.items()}


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that `function` needs beyond what was there before: the allocator's peak on CUDA, else the peak resident set.

    Linux resets the peak when 5 is written to /proc/self/clear_refs (proc(5)). Before that, malloc_trim gives back what earlier
    calls left behind.
    """
    gc.collect()
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux only")
    return int(match.group(1)) * 1024


class Bounds(NamedTuple):
    """What this machine does at best, measured once per run."""

    matmul_flops: float
    """FLOP/s of one large square torch.matmul in `DTYPE`."""
    exps: float
    """Exponentials per second in float32: exp2 in registers on CUDA, torch.exp within the L2 cache on a CPU."""
    copied_bytes: float
    """Bytes read plus bytes written per second by a large copy."""


@functools.cache
def bounds() -> Bounds:
    side = by_size(tiny=256, small=2048, full=8192)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source = torch.zeros(by_size(tiny=2**20, small=2**28, full=2**31), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    if DEVICE == "cuda":
        from benchmarks.speed.exp_rate import exp2_launch

        exponentials, count = exp2_launch()
    else:
        # 512 KiB in and 512 KiB out per core.
        x = torch.rand(2**17 * torch.get_num_threads())
        out, repeats = torch.empty_like(x), 20
        count = repeats * x.numel()

        def exponentials() -> None:
            for _ in range(repeats):
                torch.exp(x, out=out)

    functions = {"matmul": lambda: a @ b, "exp": exponentials, "copy": lambda: target.copy_(source)}
    for function in functions.values():
        function()
    times = side_by_side(functions, rounds=15, seconds=2)
    return Bounds(
        matmul_flops=2 * side**3 / times["matmul"].median,
        exps=count / times["exp"].median,
        copied_bytes=2 * source.numel() / times["copy"].median,
    )
