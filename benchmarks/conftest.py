"""Options of the suite, the order in which it runs, and what it prints; how it measures is in `measure.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed.compare import NO_TIME
from benchmarks.speed.measure import DEVICE, SIZES, synchronize
from benchmarks.speed.results import Results

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One of torch.compile's worker processes stopped answering on an H100 machine, and with it a run, at its fourth length.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--results", type=Path, metavar="DIR", help="write <device>.json into DIR, a record at a time")
    group.addoption("--max-minutes", type=float, metavar="M", help="start no measurement later; they count as not run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "priority(n): lower runs earlier; 50 without. What matters most must be in first")
    config.stash[RESULTS] = Results(config.getoption("--results"), config.getoption("--max-minutes"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def priority(item: pytest.Item) -> int:
        marker = item.get_closest_marker("priority")
        return marker.args[0] if marker else 50

    items.sort(key=priority)


@pytest.fixture
def results(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Results]:
    """Where a test puts its records. They also go into pytest-benchmark's `extra_info`."""
    results: Results = request.config.stash[RESULTS]
    if results.out_of_time():
        results.add("test", request.node.name, "ours", skipped=NO_TIME)
        pytest.skip(NO_TIME)
    first = len(results.records)
    yield results
    benchmark.extra_info.update(
        device=results.content["device"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        bounds=results.content["bounds"],
        records=results.records[first:],
    )
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def once(benchmark: Any) -> Any:
    """Shows a function in pytest-benchmark's own table too, by the wall clock."""

    def show(function: Any, rounds: int = 1) -> None:
        def finished() -> None:
            function()
            synchronize()

        benchmark.pedantic(finished, rounds=rounds)

    return show


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line per record: pytest-benchmark's table shows only ours."""
    results = config.stash.get(RESULTS, None)
    if results is None or not results.records:
        return
    terminalreporter.section(f"side by side ({results.content['device']}, sizes: {SIZES}, torch {torch.__version__})")
    for record in results.records:
        values = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in record.items()
            if key not in ("operation", "case", "name")
        )
        terminalreporter.write_line(f"{record['operation']} | {record['case']} | {record['name']}: {values}")
