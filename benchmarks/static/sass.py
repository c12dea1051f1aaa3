"""What the kernels' inner loops cost, counted in machine code, on a machine that needs no GPU.

`python -m benchmarks.static.sass` prints the table of benchmarks/README.md, with `--write benchmarks/README.md` it replaces
the one there. One launch size by hand, as resident x streamed x warps x stages, and x registers where they are bounded:

    python -m benchmarks.static.sass --tile 256x64x8x2x128 --tile 256x128x8x2 --head-dim 128
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import triton

from benchmarks.static import aot
from benchmarks.static.launches import Case

BEGIN, END = "<!-- static counts: begin -->", "<!-- static counts: end -->"

SHOWN = aot.Selection(
    names=re.compile(
        r"sm_90 bf16 (attention|hopper) (ring_)?(row_lse|column_sum) d=(64|128|256)( window)?$"
        r"|(sm_80|sm_100|gfx942) bf16 attention (row_lse|column_sum) d=(64|128)$"
        r"|sm_80 bf16 attention (row_lse|column_sum) d=256$"
        r"|(sm_80|sm_90|sm_100|gfx942) bf16 logprobs head$"
    ),
    calls=re.compile(r"(sm_80|sm_90|sm_100|gfx942) bf16 (d=(64|128|256)( window)?)?$"),
)
"""The cases in the table."""

COLUMNS = {
    "kernel": "",
    "chip": "on gfx942 for tensors of less than 2 GiB, which Triton reads by buffer loads",
    "tile": "resident x streamed tokens of an attention pass, rows x columns x depth of the fused head",
    "warps": "",
    "stages": "",
    "instr./score": "instructions that a thread executes in one trip of the loop over unmasked tiles, by its scores",
    "EX2/score": "exponentials per score in that loop; above 1 what rescales the log-sum-exp, 2 where threads repeat scores",
    "SHFL/EX2": "shuffles between threads per exponential",
    "products": "matrix instructions in one trip, and the first of them; for the fused head, of its loop over channels",
    "instr./product": "instructions per matrix instruction in that loop of the fused head",
    "EX2 under HGMMA": "exponentials of a trip that a warp takes while a product of its own is under way",
    "copies left": "copies into shared memory that the strictest wait of a trip leaves under way; 0: it waits for the last one",
    "registers": "per thread",
    "shared": "KiB per program",
    "spills": "local loads and stores in the whole kernel; on gfx942 spilled vector registers",
    "programs/SM": "that fit at a time, by registers, shared memory and warps; sm_100 has tensor memory to share as well",
}


def programs_per_sm(compiled: aot.Compiled, warps: int, shared_memory: int) -> int:
    """How many programs an SM of sm_80 or sm_90 holds at a time, where one may take `shared_memory` bytes.

    65,536 registers, given out in 256 per warp; 1 KiB of shared memory more per program, for the system; 64 warps.
    """
    registers = -(-compiled.registers * 32 // 256) * 256 * warps
    return min(65_536 // registers, (shared_memory + 1024) // (compiled.shared_memory + 1024), 64 // warps)


def tile_of(case: Case) -> str:
    """Sizes of an attention pass's tile, or of the fused head's."""
    if case.is_gluon:  # of `hopper.py`, whose resident tile is the same everywhere
        return f"256 x {case.constexprs['STREAMED']}"
    names = ("RESIDENT", "STREAMED") if "STREAMED" in case.constexprs else ("ROWS", "COLUMNS", "DEPTH")
    return " x ".join(str(case.constexprs[name]) for name in names if name in case.constexprs)


def warps_and_stages(case: Case) -> tuple[str, str]:
    """Of a ring: two groups of warps and the one that copies, and the tiles in shared memory."""
    if case.is_gluon:
        return "4 + 4 + 1", str(case.constexprs["STAGES"])
    return str(case.num_warps), str(case.options["num_stages"])


def row(case: Case, compiled: aot.Compiled) -> list[str]:
    """One row of the table, a cell per entry of `COLUMNS`; "-" where there is nothing to count."""
    chip, counts, scores = case.chip, compiled.counts, compiled.scores
    per_score = compiled.per_score
    # Warps come in groups of 4: the ring's copying one takes the room of a group.
    programs = programs_per_sm(compiled, 12 if case.is_gluon else case.num_warps, chip.shared_memory)
    cells: list[str | int | None] = [
        case.label,
        chip.arch,
        tile_of(case),
        *warps_and_stages(case),
        f"{per_score:.2f}" if per_score is not None else None,
        f"{counts.exponentials / scores:.2f}" if counts and scores else None,
        f"{counts.shuffles / counts.exponentials:.3f}" if counts and scores else None,
        f"{counts.matrix} {counts.matrix_name}" if counts else None,
        f"{counts.instructions / counts.matrix:.1f}" if counts and not scores else None,
        None if not (counts and scores) or counts.overlapped is None else f"{counts.overlapped} of {counts.exponentials}",
        counts.copies_left if counts else None,
        compiled.registers,
        f"{compiled.shared_memory / 1024:.0f}",
        compiled.spills,
        programs if chip.arch in ("sm_80", "sm_90") else None,
    ]
    return ["-" if cell is None else str(cell) for cell in cells]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table with its caption."""
    lines = [
        f"Compiled for each chip by Triton {triton.__version__} in bfloat16, disassembled and counted; no GPU took part",
        "(`make static-proof`). A trip of the loop counts as one tile.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        *(f"- {name}: {meaning}" for name, meaning in COLUMNS.items() if meaning),
    ]
    return "\n".join(lines)


def replaced(text: str, table: str, name: str) -> str:
    """`text` with `table` between the two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{name} has no section for the table; add the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def resized(case: Case, tile: str, ahead: bool = False) -> Case:
    """The same attention pass at another launch size, written as resident x streamed x warps x stages, and x registers where
    they are bounded: "128x64x8x2" or "256x64x8x2x128"."""
    if not re.fullmatch(r"\d+(x\d+){3,4}", tile):
        raise ValueError(f"--tile {tile!r} must be RESIDENTxSTREAMEDxWARPSxSTAGES[xREGISTERS], for example 128x64x8x2")
    resident, streamed, warps, stages, *registers = (int(part) for part in tile.split("x"))
    constexprs = case.constexprs | {"RESIDENT": resident, "STREAMED": streamed}
    if "AHEAD" in constexprs:
        constexprs["AHEAD"] = ahead
    options = case.options | {"num_warps": warps, "num_stages": stages, "maxnreg": registers[0] if registers else None}
    if not case.chip.is_nvidia:
        del options["maxnreg"]
    return replace(case, constexprs=constexprs, options=options)


def main() -> int:
    """Prints or writes the table. 1 when a kernel of it takes more than its chip or its budget has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what stands between the markers {BEGIN} and {END}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tile", action="append", default=[], metavar="SIZE", help="only this size; may be repeated")
    parser.add_argument("--head-dim", type=int, default=128, help="for --tile")
    parser.add_argument("--chip", default="sm_90", help="for --tile")
    parser.add_argument("--variant", default="", help="for --tile: 'window' or 'window softcap'")
    parser.add_argument("--ahead", action="store_true", help="for --tile: start the next product before the exponentials")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter does not compile; unset it")

    with aot.processes(arguments.processes) as pool:
        if arguments.tile:
            label = f"d={arguments.head_dim} {arguments.variant}".strip()
            call = rf"^{re.escape(arguments.chip)} bf16 "
            passes = re.compile(rf"{call}attention (row_lse|column_sum) {re.escape(label)}$")
            found = aot.cases(aot.Selection(passes, re.compile(f"{call}{re.escape(label)}$")), pool)
            if not found:
                parser.error(
                    f"no attention pass on {arguments.chip!r} ends in {label!r}; python -m benchmarks.static.aot lists them"
                )
            try:
                selected = [resized(case, tile, arguments.ahead) for tile in arguments.tile for case in found]
            except ValueError as error:
                parser.error(str(error))
        else:
            selected = aot.cases(SHOWN, pool)
        compiled = list(pool.map(aot.inspect, selected))
    table = markdown([row(case, each) for case, each in zip(selected, compiled, strict=True)])
    if arguments.write:
        arguments.write.write_text(replaced(arguments.write.read_text(), table, str(arguments.write)))
    else:
        print(table)
    problems = [
        f"{case.name} {tile_of(case)}: {each.problem or each.excess}"
        for case, each in zip(selected, compiled, strict=True)
        if each.problem or each.excess
    ]
    if problems:
        print("\n".join(problems), file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
