"""Launches recorded without a GPU: the launchers run on tensors without memory, and Triton specialises each launch as it would
on the chip. What it would compile is kept as a `Case` instead.

PyTorch's FakeTensorMode stands for the memory, a stand-in for Triton's driver for the device. A launch that no GPU would take
raises here: tensors of another device than the current one, a grid out of range.

For a process of its own: a kernel of Triton's interpreter is never specialised.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from entra_kernels._triton.launch import Chip, chip_of, gluon_is_known

DEVICE = torch.device("cuda", 1)
"""Not the current device, so that a launch which forgets to make it so is seen."""

STREAM = 1000
"""Device 0's current stream, which is not the default one; another device's has another number."""

ADDRESS = 1 << 40
"""Of the first byte of every tensor's memory: no kernel compares addresses of two."""


class Call(NamedTuple):
    """A call of a public function, to record the launches of."""

    label: str
    dtype: str
    """Of its inputs, in Triton's names: "bf16", "fp16", "fp32"."""
    run: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as a launch specialises it: all that Triton's compiler needs, and what another process can be given."""

    chip: Chip
    dtype: str
    """Of the inputs of the call that launched it."""
    module: str
    """Where the kernel is, below `entra_kernels._triton`."""
    function: str
    """The kernel's name there."""
    label: str
    """The kernel's name in short, and the call's label."""
    signature: dict[str, str]
    """Triton type of each argument: "*bf16", "i32", "constexpr", "tensordesc<...>"."""
    constexprs: dict[str | tuple[int, ...], Any]
    """Values of the compile-time arguments, of integers that are 1, and None for each pointer that the launch leaves out. An
    element of a tuple is named by its path, the place of the tuple first."""
    attributes: dict[tuple[int, ...], Any]
    """What Triton found out about an argument, by its place: above all that it is a multiple of 16."""
    options: dict[str, Any]
    """Warps, stages and all else that the compiler is told."""

    @property
    def name(self) -> str:
        return f"{self.chip.arch} {self.dtype} {self.module} {self.label}"

    @property
    def kernel(self) -> Any:
        return getattr(importlib.import_module(f"entra_kernels._triton.{self.module}"), self.function)

    @property
    def is_gluon(self) -> bool:
        return bool(self.kernel.is_gluon())

    @property
    def num_warps(self) -> int:
        return int(self.options["num_warps"])

    @property
    def scores(self) -> float:
        """Scores of a thread in one trip of an attention pass, which is one tile; 0 for a kernel without a tile of scores. In
        the ring each warp group of 128 threads makes parts of 64 resident tokens, two of them in a trip."""
        if self.is_gluon:
            return float(self.constexprs["STREAMED"])
        tile = self.constexprs.get("RESIDENT", 0) * self.constexprs.get("STREAMED", 0)
        return float(tile / (self.num_warps * self.chip.lanes))

    @property
    def key(self) -> str:
        """The same for two launches that run the same machine code."""
        parts = (self.module, self.function, self.signature, self.constexprs, self.attributes, self.options)
        return repr((self.chip, *parts))


def target_of(chip: Chip) -> GPUTarget:
    """As Triton names it."""
    if chip.is_nvidia:
        return GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), chip.lanes)
    return GPUTarget("hip", chip.arch, chip.lanes)


def record(chip: Chip, calls: Iterable[Call]) -> list[Case]:
    """The distinct cases that `calls` launch on `chip`, each with the label of the first call that launches it.

    Where a chip has passes in Gluon, they are recorded first, then the plain passes that run in their place with a Triton whose
    Gluon is not known.
    """
    cases: dict[str, Case] = {}
    names: dict[str, int] = {}

    def keep(case: Case) -> None:
        if case.key in cases:
            return
        count = names[case.name] = names.get(case.name, 0) + 1
        # One call can launch a kernel in several ways.
        cases[case.key] = case if count == 1 else replace(case, label=f"{case.label} #{count}")

    with _standing_in_for(chip):
        for call in calls:
            for passes in (_nothing, _plain_passes) if chip.arch == "sm_90" and gluon_is_known() else (_nothing,):
                with _recorder(chip, call, keep), passes():
                    call.run()
    return list(cases.values())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _plain_passes() -> Iterator[None]:
    """The passes of `attention.py` for what those of `hopper.py` take."""
    from entra_kernels._triton import hopper

    with mock.patch.object(hopper.Views, "of", return_value=None):
        yield


@contextmanager
def _standing_in_for(chip: Chip) -> Iterator[None]:
    """PyTorch and Triton find `chip` as their device number 1; the current device is number 0 until a launcher changes it."""
    current = 0

    def exchange(index: int) -> int:
        nonlocal current
        before = current
        current = index if index >= 0 else current
        return before

    def properties(device: object = None) -> SimpleNamespace:
        if not chip.is_nvidia:
            return SimpleNamespace(gcnArchName=f"{chip.arch}:sramecc+:xnack-")
        capability = int(chip.arch.removeprefix("sm_"))
        return SimpleNamespace(major=capability // 10, minor=capability % 10)

    found = SimpleNamespace(
        get_current_device=lambda: current,
        get_current_stream=lambda device: STREAM + device,
        get_current_target=lambda: target_of(chip),
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": chip.shared_memory}),
    )
    chip_of.cache_clear()
    with ExitStack() as stack:
        for name, replacement in (
            ("_exchange_device", exchange),
            ("_maybe_exchange_device", exchange),
            ("current_device", lambda: current),
            ("get_device_properties", properties),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch.version, "hip", None if chip.is_nvidia else "6.4"))
        stack.enter_context(mock.patch.object(driver, "_active", found))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", _address))
        # Pinned memory needs a GPU.
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: self))
        # A custom op runs its launcher: fake tensors would have it run what only tells the results' shapes.
        stack.enter_context(mock.patch.object(CustomOpDef, "__call__", lambda self, *a, **k: self._init_fn(*a, **k)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA is not available", category=UserWarning)  # autocast, turned off
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_WithoutCuda())
        try:
            yield
        finally:
            chip_of.cache_clear()


class _WithoutCuda(TorchFunctionMode):
    """What a build of PyTorch without CUDA refuses on fake tensors: these methods ask for the device before they dispatch."""

    METHODS = (Tensor.__getitem__, Tensor.contiguous, Tensor.__invert__)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in self.METHODS or not isinstance(args[0], FakeTensor):
            return function(*args, **(kwargs or {}))
        mode, device = args[0].fake_mode, args[0].fake_device
        with in_kernel_invocation_manager(mode):  # where fake tensors pass for tensors without a device
            result = function(*args)
        return result if isinstance(result, FakeTensor) else FakeTensor(mode, result, device)


def _address(tensor: Tensor) -> int:
    return ADDRESS + int(tensor.storage_offset()) * tensor.element_size()


@contextmanager
def _recorder(chip: Chip, call: Call, keep: Callable[[Case], None]) -> Iterator[None]:
    """Within it Triton hands what it would compile and launch to `keep`."""

    def instead_of_compiling(
        kernel: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attributes: Any, warmup: bool
    ) -> SimpleNamespace:
        # What Triton knows of a kernel on this device number is of this chip only.
        del kernel.device_caches[device]
        names = kernel.arg_names
        short = kernel.__name__.strip("_").removesuffix("_kernel")
        case = Case(
            chip=chip,
            dtype=call.dtype,
            module=kernel.__module__.rpartition(".")[2],
            function=kernel.__name__,
            label=f"{'ring_' if kernel.is_gluon() else ''}{short} {call.label}".strip(),
            signature=dict(signature),
            constexprs={path if len(path) > 1 else names[path[0]]: value for path, value in constexprs.items()},
            attributes=dict(attributes),
            options=dict(vars(options)),
        )

        def launch(*arguments: Any) -> None:
            grid, stream, values = arguments[:3], arguments[3], arguments[-len(names) :]
            if stream != STREAM + device:
                raise ValueError(f"{case.name}: launched into stream {stream}, which is not the current one of cuda:{device}")
            check_launch(case, grid, device, dict(zip(names, values, strict=True)))
            keep(case)

        return SimpleNamespace(
            launch_metadata=lambda *_: None, function=None, packed_metadata=None, run=launch
        )  # what JITFunction.run asks of a kernel

    with mock.patch.object(JITFunction, "_do_compile", instead_of_compiling):
        yield


def check_launch(case: Case, grid: tuple[int, ...], device: int, values: dict[str, Any]) -> None:
    """Raises a ValueError for what a GPU would refuse, or read elsewhere."""
    programs = grid[0] * grid[1] * grid[2]
    # CUDA's limits, and Triton's own: 3.6 takes the product as an int. ROCm counts threads, in 32 bits.
    most = 2**31 - 1 if case.chip.is_nvidia else 2**32 // (case.num_warps * case.chip.lanes) - 1
    if min(grid) < 1 or max(grid[1:]) > 65_535 or programs > most:
        raise ValueError(f"{case.name}: a grid of {grid} is out of range; {case.chip.arch} takes 1 to {most} programs")
    for name, value in values.items():
        if isinstance(value, TensorDescriptor):
            if max(value.shape) >= 2**31 or max(value.block_shape) > 256:
                raise ValueError(f"{case.name}: {name} describes {value.shape} in blocks of {value.block_shape}; TMA cannot")
            value = value.base
        if isinstance(value, Tensor) and (value.device.type, value.device.index) != ("cuda", device):
            raise ValueError(f"{case.name}: {name} is on {value.device}, the launch on cuda:{device}")
