"""Backends, and launch sizes at which a few dozen tokens have more than one tile."""

from __future__ import annotations

import importlib
import os

import pytest
from attention_problems import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def runnable(request, quick_interpreter):
    """Skips what cannot run: Triton on CPU tensors where a GPU turned the interpreter off."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    device = parameters.get("device") or parameters.get("target", ("cpu",))[0]
    if parameters.get("backend") == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")


@pytest.fixture
def small_tiles(monkeypatch):
    launch = importlib.import_module("entra_kernels._triton.launch")

    def attention_launch(head_dim, group, element_size, chip, *, options):
        depth = 16 if element_size == 4 and head_dim > 64 else max(16, 1 << (head_dim - 1).bit_length())
        return launch.AttentionLaunch(32, 16, depth, num_warps=4, num_stages=1, max_registers=None, least_piece=3)

    for module in ("attention", "sampled"):
        monkeypatch.setattr(f"entra_kernels._triton.{module}.attention_launch", attention_launch)
