"""Backends, and launch sizes at which a few dozen tokens have more than one tile."""

from __future__ import annotations

import functools
import importlib
import os

import numpy
import pytest
from attention_problems import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def runnable(request):
    """Skips what cannot run: Triton on CPU tensors where a GPU turned the interpreter off."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    device = parameters.get("device") or parameters.get("target", ("cpu",))[0]
    if parameters.get("backend") == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off because a GPU is present")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter replaces the functions of the language at every call of a jitted helper, also where the caller has
    done it: a quarter of the time of these tests. It also builds its table of NumPy dtypes at every look into it: 7 us of the
    20 to 70 that an operation takes."""
    try:
        from triton.runtime import interpreter
    except ImportError:  # it is an extra
        yield
        return
    language, patch_lang = interpreter.tl, interpreter._patch_lang
    seen = {}

    def patch_once(fn):
        if fn not in seen:
            seen[fn] = [
                module for module in (language, language.core) if any(each is module for each in fn.__globals__.values())
            ]
        if any(language.core.is_builtin(module.load) for module in seen[fn]):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    dtype_of = functools.cache(interpreter._get_np_dtype)

    def dtype_once(kind):
        return numpy.dtype(numpy.uint64) if isinstance(kind.scalar, language.pointer_type) else dtype_of(kind.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_get_np_dtype", dtype_once)
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    launch = importlib.import_module("entra_kernels._triton.launch")

    def attention_launch(head_dim, group, element_size, chip, *, options):
        depth = 16 if element_size == 4 and head_dim > 64 else max(16, 1 << (head_dim - 1).bit_length())
        return launch.AttentionLaunch(32, 16, depth, num_warps=4, num_stages=1, max_registers=None, least_piece=3)

    for module in ("attention", "sampled"):
        monkeypatch.setattr(f"entra_kernels._triton.{module}.attention_launch", attention_launch)
