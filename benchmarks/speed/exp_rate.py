"""A Triton kernel that does nothing but exp2 in registers: the rate of the special-function units. CUDA and ROCm only.

Compiled for sm_90 its loop is one MUFU.EX2 and one FADD per exponential. An SM adds eight times as fast as it exponentiates, so
the exponentials decide the time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.speed.measure import by_size

BLOCK, STEPS, PROGRAMS_PER_PROCESSOR = 1024, by_size(tiny=4, small=2048, full=2048), by_size(tiny=1, small=64, full=64)


@triton.jit
def _exp2_kernel(out, steps, BLOCK: tl.constexpr):
    """x -> 2 ** -x over and over, which stays between 0 and 1: 8 independent chains per thread hide the latency."""
    lane = tl.arange(0, BLOCK)
    x = lane.to(tl.float32) / BLOCK
    for _ in range(steps):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + lane, x)


def exp2_launch() -> tuple[Callable[[], object], int]:
    """A launch that fills the device, and how many exponentials it takes."""
    programs = torch.cuda.get_device_properties().multi_processor_count * PROGRAMS_PER_PROCESSOR
    out = torch.empty(programs * BLOCK, device="cuda")
    return lambda: _exp2_kernel[(programs,)](out, STEPS, BLOCK=BLOCK, num_warps=4), programs * BLOCK * STEPS
