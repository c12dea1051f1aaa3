"""Ours and its peers in one case: each is checked, then timed side by side, then its peak memory is taken."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from benchmarks.speed.measure import DEVICE, peak_memory, side_by_side, synchronize
from benchmarks.speed.results import Results

Run = Callable[[], Any]

OURS = "ours"
NO_TIME = "not run: the time given to this run was over"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _first_call(run: Run, check: Callable[[Any], float | None]) -> tuple[str | None, float, float | None]:
    """Why `run` cannot be timed, or None; the seconds of its first call, which compiles it; and its error / allowed error."""
    start = time.perf_counter()
    try:
        result = run()
        synchronize()
        seconds = time.perf_counter() - start
        used = check(result)
    except Exception as error:  # a peer may fail in any way; the reason is recorded
        return _reason(error), 0.0, None
    if used is not None and not used <= 1:  # NaN is wrong too
        return f"wrong result: {used:.3g} times the allowed error", seconds, used
    return None, seconds, used


def compare(
    results: Results,
    operation: str,
    case: str,
    runs: Mapping[str, Run | str],
    *,
    check: Callable[[str, Any], float | None] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    rounds: int = 15,
    seconds: float = 4.0,
    memory_of: Collection[str] | None = None,
    **parameters: Any,
) -> dict[str, dict[str, Any]]:
    """One record per name. Names that begin with "ours" must work; any other is recorded with the reason if it does not.

    Args:
        runs: what to time. A string instead is the reason why a peer cannot run here.
        check: error of a result over the allowed one, None where there is nothing to check. With it, and on a GPU, which
            compiles, the first call of each is none of the rounds.
        facts: by name, what a call amounts to. `flops` becomes `tflops`. `matmul_s` and `exp_s` are the seconds that the
            machine's bounds alone would take; they become `of_matmul_bound` and `of_exp_bound`. Other fields stay as they are.
        rounds, seconds: as in `side_by_side`.
        memory_of: the names whose peak memory is taken, by one call more; None: all.
    """
    records: dict[str, dict[str, Any]] = {}
    works: dict[str, Run] = {}
    fields: dict[str, dict[str, Any]] = {}

    def skip(name: str, reason: str) -> None:
        if name.startswith(OURS) and reason != NO_TIME:
            raise AssertionError(f"{operation}, {case}, {name}: {reason}")
        records[name] = results.add(operation, case, name, **parameters, skipped=reason)

    for name, run in runs.items():
        if isinstance(run, str):
            skip(name, run)
            continue
        if results.out_of_time():
            skip(name, NO_TIME)
            continue
        if check is None and DEVICE == "cpu":
            works[name], fields[name] = run, {}
            continue
        reason, first, used = _first_call(run, lambda result, name=name: None if check is None else check(name, result))
        if reason is None:
            works[name] = run
            fields[name] = {"first_call_s": first} | ({} if used is None else {"error_of_allowed": used})
        else:
            skip(name, reason)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    failed: dict[str, Exception] = {}
    timings = side_by_side(works, rounds, seconds, failed)
    peaks: dict[str, int] = {}
    for name in timings:
        if memory_of is not None and name not in memory_of:
            continue
        try:
            peaks[name] = peak_memory(works[name])
        except Exception as error:  # memory that was enough before
            failed[name] = error
    for name, error in failed.items():
        skip(name, _reason(error))
    for name, timing in timings.items():
        if name in failed:
            continue
        more = dict((facts or {}).get(name, {}))
        flops = more.pop("flops", None)
        if flops:
            more["tflops"] = flops / timing.median / 1e12
        for bound in ("matmul", "exp"):
            at_best = more.pop(f"{bound}_s", None)
            if at_best:
                more[f"of_{bound}_bound"] = at_best / timing.median
        records[name] = results.add(
            operation,
            case,
            name,
            **parameters,
            ms=timing.median * 1e3,
            ms_low=timing.low * 1e3,
            ms_high=timing.high * 1e3,
            rounds=timing.rounds,
            **({"peak_bytes": peaks[name]} if name in peaks else {}),
            **fields[name],
            **more,
        )
    return records
