"""How everything here is measured: side by side in one run, and peak memory as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def side_by_side(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; every round runs all of them, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that `function` needs beyond what was there before: the allocator's peak on CUDA, else the peak resident set.

    Linux resets the peak when 5 is written to /proc/self/clear_refs (proc(5)); malloc_trim first gives back what earlier
    calls left behind.
    """
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _synchronize()
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
