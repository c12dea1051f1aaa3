"""What a launch depends on besides its tensors, and a launch written down so that it can be compiled without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

HOPPER_SHARED_MEMORY = 227 * 1024


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on `device`; on a CPU (Triton's interpreter) an H200's."""
    if device.type == "cpu":
        return HOPPER_SHARED_MEMORY
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel with the types and compile-time values of a launch: all that Triton's compiler needs.

    Each kernel module has `aot_cases(dtype, shared_memory)`, which yields the cases that it launches for inputs of a dtype
    ("bf16" or "fp32", in Triton's names) on a chip with that many bytes of shared memory per program. Labels are unique
    within a module. `entra_kernels/_triton/aot.py` compiles them.
    """

    label: str
    kernel: Any
    """The `triton.jit` function."""
    arguments: dict[str, str]
    """Triton type of each run-time argument: "*bf16", "*fp32", "i32", "i64", "fp32"."""
    constexprs: dict[str, Any]
    """Values of the compile-time arguments, and None for each pointer that this launch leaves out."""
    divisible: tuple[str, ...] = ()
    """Arguments that a real launch finds to be multiples of 16 (pointers, strides): without it loads are scalar."""
    num_warps: int = 4
    num_stages: int = 2
    head_dim: int | None = None
    """Head dim of an attention kernel: sets which cases the quick run takes, and where spills are an error."""
