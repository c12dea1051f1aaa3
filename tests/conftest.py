"""Test set-up: without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import dataclasses
import functools
import os
import signal
from collections import Counter
from pathlib import Path

import numpy
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


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's `make test &`: what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter takes half of its time for what it has done before, or throws away.

    It replaces the functions of the language at every call of a jitted helper, also where the caller has done it. It builds its
    table of NumPy dtypes at every look into it, and a type and a shape for every value. It broadcasts what is of one shape.
    It works out whether integers overflow, which without `debug` nobody looks at. And it reduces element by element what is not
    a sum or a plain maximum.
    """
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

    def type_once(method):
        made = {}  # by name: types of one name are the same

        def remembered(self, other):
            key = self.name, getattr(other, "name", None)
            if key not in made:
                made[key] = method(self, other)
            return made[key]

        return remembered

    make_tensor, of_type = language.tensor.__init__, {}

    def tensor_once(self, handle, type):
        if type.name not in of_type:
            make_tensor(self, handle, type)
            of_type[type.name] = dict(vars(self))
        vars(self).update(of_type[type.name], handle=handle)

    broadcast = interpreter.interpreter_semantic.broadcast_impl_value

    def broadcast_others(left, right):
        kinds = left.type, right.type
        if all(kind.is_block() for kind in kinds) and list(kinds[0].shape) == list(kinds[1].shape):
            return left, right
        return broadcast(left, right)

    element_by_element = interpreter.ReduceOps.generic_reduce

    def slice_by_slice(self, tensors):
        if len(tensors) > 1 or self.axis is None or self.keep_dims:
            return element_by_element(self, tensors)
        slices = numpy.moveaxis(tensors[0].handle.data, self.axis, 0)
        slices = [self.to_tensor(each, tensors[0].dtype) for each in slices]
        return [functools.reduce(self.combine_fn.fn, slices)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ReduceOps, "generic_reduce", slice_by_slice)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter, "_get_np_dtype", dtype_once)
        for method in ("with_element_ty", "to_ir"):
            patch.setattr(language.block_type, method, type_once(getattr(language.block_type, method)))
        patch.setattr(language.tensor, "__init__", tensor_once)
        patch.setattr(interpreter.interpreter_semantic, "broadcast_impl_value", broadcast_others)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield
