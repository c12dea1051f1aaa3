"""What every benchmark records and prints; how it measures is in `measure.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from measure import DEVICE

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MEASURED = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


@pytest.fixture(autouse=True)
def _measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every result says where it was measured, and what a test put into `extra_info` is printed at the end."""
    if "benchmark" not in request.fixturenames:
        yield
        return
    benchmark = request.getfixturevalue("benchmark")
    yield
    request.config.stash.setdefault(MEASURED, []).append((request.node.name, dict(benchmark.extra_info)))
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The ratios, which pytest-benchmark's table of absolute times does not show."""
    measured = config.stash.get(MEASURED, [])
    if measured:
        terminalreporter.section(f"side by side ({DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__})")
    for name, info in measured:
        values = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in info.items()
        )
        terminalreporter.write_line(f"{name}: {values}")
