"""What the tests of recorded launches look at, as JSON; see conftest.py for why it is a process of its own."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.static import aot, launches, sass
from benchmarks.static.calls import empty
from benchmarks.static.launches import Call
from entra_kernels import incoming_attention
from entra_kernels._triton.launch import Chip

SM_90, GFX942 = (next(chip for chip in aot.CHIPS if chip.arch == arch) for arch in ("sm_90", "gfx942"))


@triton.jit
def _probe_kernel(values, count):
    pass


def refusal(chip, device, grid, value=None):
    """The message on a launch of `_probe_kernel`, "" where it is taken."""

    def run():
        values = empty(64) if value is None else value()
        with torch.cuda.device_of(empty(1)) if device == 1 else torch.cuda.device_of(torch.empty(1)):
            _probe_kernel[grid](values, 1)

    try:
        launches.record(chip, [Call("", "fp32", run)])
    except ValueError as error:
        return str(error)
    return ""


def described(block):
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(empty(1024, 64, dtype=torch.bfloat16), [1024, 64], [64, 1], [block, 64], layout)


def in_the_default_stream():
    launches.driver.active.get_current_stream = lambda device: 0
    return empty(64)


def as_dict(case):
    return {
        "name": case.name,
        "kernel": f"{case.module} {case.function}",
        "types": case.signature,
        "constexprs": {str(name): value for name, value in case.constexprs.items()},
        "attributes": {name: case.attributes.get((place,), []) for place, name in enumerate(case.signature)},
        "row": [f"| {case.label}", case.chip.arch, sass.tile_of(case), *sass.warps_and_stages(case)],
    }


def scaled():
    """The attention kernels that calls of different scales launch: whole numbers are floats like any other."""

    def call(scale, **options):
        def run():
            q = empty(1, 512, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
            incoming_attention(q, q, scale=scale, row_weights=empty(1, 512), **options)

        return Call("", "bf16", run)

    calls = [call(scale, **more) for more in ({}, {"sample_rows": 300}) for scale in (0.1, 1.0, 16.0)]
    return [case.function for case in launches.record(SM_90, calls) if "score_factors" in case.signature]


def main():
    calls = re.compile(r"sm_90 bf16 (d=72|d=128|one token|given lse)$|sm_90 fp32 $|gfx942 bf16 (d=128)?$")
    with ThreadPoolExecutor(1) as pool:  # processes would import torch twice more, which takes longer than the recording
        found = {
            name: [as_dict(case) for case in aot.cases(selection, pool)]
            for name, selection in (
                ("sample", aot.SUBSET),
                ("table", sass.SHOWN),
                ("some", aot.Selection(re.compile(""), calls)),
            )
        }
        small = next(case for case in aot.cases(aot.Selection(re.compile("row_lse"), re.compile("sm_90 bf16 d=16$")), pool))
    little = aot.inspect(launches.replace(small, chip=Chip("sm_90", 1024)))
    wide = 2**24  # programs; with 4 warps of 64 lanes, 2**32 threads
    refusals = {
        "taken": refusal(SM_90, 1, (1,)),
        "another device": refusal(SM_90, 0, (1,)),
        "memory of the host": refusal(SM_90, 1, (1,), lambda: torch.empty(64)),
        "another stream": refusal(SM_90, 1, (1,), in_the_default_stream),
        "no program": refusal(SM_90, 1, (0,)),
        "second axis": refusal(SM_90, 1, (1, 65_536)),
        "programs": refusal(SM_90, 1, (2**15, 2**15, 2)),
        "many, taken": refusal(SM_90, 1, (wide,)),
        "threads": refusal(GFX942, 1, (wide,)),
        "block, taken": refusal(SM_90, 1, (1,), lambda: described(256)),
        "block": refusal(SM_90, 1, (1,), lambda: described(512)),
    }
    json.dump({**found, "refusals": refusals, "little": little.problem, "scaled": scaled()}, sys.stdout)


if __name__ == "__main__":
    main()
