"""Test set-up: without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

# No test reaches for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes side by side (pytest -n) share the cores: more threads than cores only wait for each other.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

HERE = Path(__file__).parent

LONG = (
    "benchmarks/static/test_aot.py",
    "entra/test_distributed.py",
    "entra/test_cli_train.py",
    "entra/test_demo.py",
    "test_readme.py",
    "benchmarks/experiments/test_overhead.py",
    "benchmarks/evidence/test_evidence.py",
    "entra/test_import.py",
    "benchmarks/static/test_launches.py",
    "benchmarks/static/test_tune.py",
)
"""Files with much work in few tests. `make test` starts them first: one of them at the end would leave a core idle."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the cases that need one are left out, so that the skips that remain can be read; `fake_cuda.py` runs them.
    Long files come first, then those of the most tests."""
    needing = [] if torch.cuda.is_available() else [item for item in items if "gpu" in item.keywords]
    if needing:
        items[:] = [item for item in items if "gpu" not in item.keywords]
        config.hook.pytest_deselected(items=needing)
    tests, places = Counter(item.path for item in items), {HERE / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), -tests[item.path]))


@pytest.fixture(scope="module")
def one_thread():
    """Trains tiny models: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
