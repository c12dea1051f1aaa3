"""Static counts of the kernels' inner loops, without a GPU: `python -m entra_kernels._triton.sass`.

One tile size by hand: `--tile 128x64x8x2 --head-dim 128` (resident x streamed x warps x stages).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from entra_kernels._triton import aot
from entra_kernels._triton.launch import KernelCase

REGISTERS = 65_536
WARPS = 64


def programs_per_sm(compiled: aot.Compiled, warps: int, chip: aot.Chip) -> int:
    """How many programs an SM holds at a time, by registers (given out in 256 per warp), shared memory and warps."""
    by_registers = REGISTERS // (-(-compiled.registers * 32 // 256) * 256 * warps)
    by_shared_memory = (chip.shared_memory + 1024) // (compiled.shared_memory + 1024)
    return min(by_registers, by_shared_memory, WARPS // warps)


def resized(case: KernelCase, resident: int, streamed: int, warps: int, stages: int) -> KernelCase:
    """The same case with another launch size."""
    constexprs = case.constexprs | {"RESIDENT": resident, "STREAMED": streamed}
    return replace(case, constexprs=constexprs, num_warps=warps, num_stages=stages)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", action="append", default=[], metavar="RESIDENTxSTREAMEDxWARPSxSTAGES")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--chip", default="sm_90")
    parser.add_argument("--variant", default="", help="'window' or 'window softcap'")
    arguments = parser.parse_args()
    chip = next(chip for chip in aot.CHIPS if chip.name == arguments.chip)
    for tile in arguments.tile:
        size = [int(part) for part in tile.split("x")]
        for kernel in ("column_sum", "row_lse"):
            label = f"{kernel} d={arguments.head_dim} {arguments.variant}".strip()
            case = next(case for case in aot._cases("attention", chip, "bf16") if case.label == label)
            compiled = aot.inspect(resized(case, *size), chip, f"{chip.name} {label} {tile}")
            print(compiled, programs_per_sm(compiled, size[2], chip), compiled.counts, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
