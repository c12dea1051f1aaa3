"""Compile every Triton kernel for every chip, on a machine that needs no GPU: `python -m benchmarks.static.aot [--all]`.

What is compiled are the launches of real calls, recorded without a GPU (`calls.py`, `launches.py`), in every distinct form.

Triton's compiler does not fail when a kernel asks for more shared memory or registers than the chip has, or when registers
spill. This does, and when an attention pass takes more instructions than its budget. Spills and instructions are facts about
one compiler: with another Triton than the pinned one they are listed and fail nothing. Without `--all` it takes the subset that
the tests take.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.static import disassembly
from benchmarks.static.launches import Case, record, target_of
from entra_kernels._triton.launch import AttentionLaunch, Chip, shared_bytes

MODULES = ("plan", "attention", "hopper", "sampled", "logprobs", "redundancy", "copies")
"""Those with kernels, in the order of the output."""

CHIPS = (
    Chip("sm_80", 163 * 1024),
    Chip("sm_86", 99 * 1024),
    Chip("sm_89", 99 * 1024),
    Chip("sm_90", 227 * 1024),
    Chip("sm_100", 227 * 1024),
    Chip("sm_120", 99 * 1024),
    Chip("gfx942", 64 * 1024),
)

PINNED = "3.7.1"
"""The Triton that spills and budgets are asserted for: that of the torch which constraints.txt pins."""

_NOT_HERE = "the launch size is chosen for sm_90; here ptxas takes"
_TWO, _THREE = f"{_NOT_HERE} 128 registers, 2 programs to an SM", f"{_NOT_HERE} 80 registers, 3 programs to an SM"
SPILLS = {
    r"d=(192|256|512)": "the tile of K alone can exceed the registers",
    r"^sm_80 bf16 attention column_sum d=128 tokens far apart": (
        "128 registers for 2 programs to an SM, and addresses of 64 bits: 4 words are read once per head, none in an inner loop"
    ),
    r"d=72": "heads lie 72 apart, no multiple of 16: loads are narrower, and each has an address of its own",
    r"fp32 attention row_lse d=128 negative scale softcap": (
        "ptxas keeps 80 registers, 3 programs to an SM; 16 bytes wait outside the loops, one word is read per masked tile"
    ),
    r"^sm_(86|89|100) fp32 attention row_lse d=\d+ (queries )?window softcap": _THREE,
    r"^sm_100 bf16 attention row_lse queries, .* window": _THREE,
    r"^sm_(86|89|120) bf16 attention column_sum one token": _THREE,
    r"^sm_(80|86|89) bf16 attention column_sum d=16 window": _TWO,
    r"^sm_120 (bf16|fp16) attention (row_lse|column_sum)": _TWO,
    r"^sm_(86|89) bf16 sampled sampled_columns (d=128( tokens far apart)?$|sampled, not normalized)": _TWO,
    r"^sm_120 bf16 sampled (sampled_columns d=(32$|64 window softcap)|sampled_lse d=128 negative scale)": _TWO,
    r"^sm_100 bf16 logprobs head (int32 targets|rows)$": (
        f"{_NOT_HERE} 255 registers, all that a thread can have; neither rows nor vocabulary are a multiple of 16"
    ),
    r"^sm_120 fp32 redundancy select protect last$": f"{_NOT_HERE} 128 registers, all that a thread of 16 warps can have",
    r"fp32 sampled": "on FMA units the tile of sums over heads does not fit beside that of products",
    r"(rows with a gap|every second|tokens innermost|not aligned|transposed|odd|uneven sizes|one of all)": (
        "no vectors can be loaded: every value has an address of its own"
    ),
}
"""By name, where registers may spill and why."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an attention pass in bfloat16 may take. `per_score` is instructions per score in the loop over unmasked tiles.
    `per_shuffle` is the fewest exponentials per shuffle there. `under_products` is the least share of them that a warp takes
    while one of its products is under way. None: there is no limit. `unit` begins the name of the matrix unit's instruction."""

    per_score: float | None = None
    per_shuffle: float | None = None
    under_products: float | None = None
    unit: str = "HGMMA"


QUERIES = ("row_lse d=128 queries", *(f"column_sum d=128 queries{what}" for what in ("", " max", " max weights")))
"""Passes of fewer queries than keys."""

BUDGETS = {
    "sm_90 column_sum d=64": Budget(per_score=7.5, per_shuffle=8),
    "sm_90 column_sum d=128": Budget(per_score=7.5, per_shuffle=8),
    "sm_90 column_sum d=256": Budget(),
    "sm_90 row_lse d=64": Budget(per_score=8.5),
    "sm_90 row_lse d=128": Budget(per_score=8.5),
    "sm_90 row_lse d=256": Budget(),
    "sm_90 ring_column_sum d=64": Budget(per_score=4.6, per_shuffle=8, under_products=1),
    "sm_90 ring_column_sum d=128": Budget(per_score=4.6, per_shuffle=8, under_products=1),
    "sm_90 ring_column_sum d=256": Budget(per_score=6.2, per_shuffle=8, under_products=1),
    "sm_90 ring_row_lse d=64": Budget(per_score=5.5, under_products=0.9),
    "sm_90 ring_row_lse d=128": Budget(per_score=5.5, under_products=0.9),
    "sm_90 ring_row_lse d=256": Budget(per_score=7.1, under_products=0.9),
    **{
        f"{chip} {label}": Budget(per_score=most, unit=unit)
        for chip, unit, limits in (
            ("sm_80", "HMMA", (12.1, 9.7, 9.7, 10.8)),
            ("sm_90", "HGMMA", (8.4, 7.9, 7.9, 9.6)),
            ("sm_100", "UTCHMMA", (8.0, 7.6, 7.5, 9.3)),
            ("gfx942", "v_mfma", (11.7, 9.4, 12.7, 13.8)),
        )
        for label, most in zip(QUERIES, limits, strict=True)
    },
}
"""By chip and label. On sm_90 an exponential takes 1/16 clock of an SM, and the products of a score at d = 128 the same. In
that time 4 schedulers of 32 lanes issue 8 instructions per score. A pass that needs more is bound by their issue, whatever
overlaps. Of `QUERIES` the limits are what was counted and a twentieth."""

UNDER_WAY = {
    "sm_80": r"(row_lse|column_sum) d=(64|128|256)",
    "sm_90": r"(row_lse|column_sum) d=(256|(64|128) window( softcap)?)",
    "sm_100": r"(row_lse|column_sum) d=(64|128)",
}
"""By chip: the passes in bfloat16 whose waits for a copy must leave at least one other under way. The ring waits for no copy by
itself: another warp does."""

REPEATED = 1.25
"""Exponentials per score from which on a trip of a budgeted loop does not make one tile once: the log-sum-exp adds at most 1/16
for its rescaling. Either the loop is unrolled or the tile is so small that threads repeat each other's scores."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiled case takes. `spills` counts local loads and stores (CUDA) or spilled vector registers (ROCm).

    `counts` are those of the inner loop, None for a kernel without matrix products. For an attention pass that is the loop over
    unmasked tiles, and `scores` how many of a tile's scores fall to one thread; otherwise 0.
    """

    name: str
    registers: int
    shared_memory: int
    spills: int
    scores: float = 0
    counts: disassembly.Counts | None = None
    problem: str = ""
    """Why it does not run on its chip."""
    excess: str = ""
    """What it takes more of than it may, though it runs."""

    @property
    def fails(self) -> bool:
        """Whether the command fails: what runs and takes too much fails it with the pinned Triton only."""
        return bool(self.problem or (self.excess and triton.__version__.partition("+")[0] == PINNED))

    @property
    def per_score(self) -> float | None:
        """Instructions per score. A trip counts as one tile: were a loop unrolled this would be too high, never too low."""
        return self.counts.instructions / self.scores if self.counts and self.scores else None

    def __str__(self) -> str:
        text = f"{self.name:<64} {self.registers:>4} registers {self.shared_memory:>7} B shared {self.spills:>4} spills"
        if self.per_score is not None:
            text += f" {self.per_score:>6.2f} instructions a score"
        text += f"  OVER BUDGET: {self.excess}" if self.excess else ""
        return f"{text}  FAIL: {self.problem}" if self.problem else text


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel, with `.asm` and `.metadata`."""
    source = (GluonASTSource if case.is_gluon else ASTSource)(
        case.kernel, case.signature, constexprs=case.constexprs, attrs=case.attributes
    )
    return triton.compile(source, target=target_of(case.chip), options=case.options)


def nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    """Output of one of the CUDA binary tools that come with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def inspect(case: Case) -> Compiled:
    """Compiles one case, reads its resources from the machine code, and holds them against its chip and its budget."""
    kernel, chip = compile_case(case), case.chip
    if chip.is_nvidia:
        registers = _number(r"REG:(\d+)", nvidia_tool("cuobjdump", "-res-usage", kernel.asm["cubin"]))
        text = nvidia_tool("nvdisasm", "-c", kernel.asm["cubin"])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    counts = disassembly.count(disassembly.parse(text), math.ceil(case.scores))
    compiled = Compiled(
        name=case.name,
        registers=registers,
        shared_memory=kernel.metadata.shared,
        spills=spills,
        scores=case.scores,
        counts=counts,
    )
    problem = too_much(compiled, chip, kernel.metadata.num_warps)
    budget = BUDGETS.get(f"{chip.arch} {case.label}") if case.dtype == "bf16" else None
    excess = ""
    if spills and not may_spill(case.name):
        excess = f"{spills} spills, and SPILLS gives no reason"
    elif budget:
        excess = over_budget(compiled, budget)
    if not excess and case.module == "attention" and case.scores and case.dtype != "fp32":
        excess = unreckoned(case, compiled.shared_memory)
    if not excess and case.dtype == "bf16" and re.fullmatch(UNDER_WAY.get(chip.arch, "-"), case.label):
        excess = late(counts)
    return replace(compiled, problem=problem, excess=excess)


def unreckoned(case: Case, shared_memory: int) -> str:
    """What an attention pass takes of the shared memory, where the launcher reckons with less; else ""."""
    resident, streamed, depth = (case.constexprs[name] for name in ("RESIDENT", "STREAMED", "DEPTH"))
    size = AttentionLaunch(resident, streamed, depth, case.num_warps, case.options["num_stages"], None, 0)
    reckoned = shared_bytes(size, 2, case.chip)
    return f"{shared_memory} B of shared memory, the launcher reckons with {reckoned}" if shared_memory > reckoned else ""


def may_spill(name: str) -> bool:
    """Whether `SPILLS` gives a reason."""
    return any(re.search(pattern, name) for pattern in SPILLS)


def too_much(compiled: Compiled, chip: Chip, num_warps: int) -> str:
    """What a compiled kernel takes more of than its chip has; "" where nothing."""
    if compiled.shared_memory > chip.shared_memory:
        return f"{compiled.shared_memory} B of shared memory, {chip.arch} has {chip.shared_memory}"
    # An SM of an NVIDIA chip has 65,536 registers, and a warp gets a multiple of 256. A compute unit of a CDNA chip has 4
    # SIMDs. Each has 512 registers per lane for the warps that it holds.
    if chip.is_nvidia:
        taken, limit = -(-compiled.registers * chip.lanes // 256) * 256 * num_warps, 65_536
    else:
        taken, limit = compiled.registers * -(-num_warps // 4), 512
    return f"{taken} registers, {chip.arch} has {limit}" if taken > limit else ""


def over_budget(compiled: Compiled, budget: Budget) -> str:
    """The first rule that a compiled attention pass breaks, with its number; "" where it breaks none."""
    counts, per_score = compiled.counts, compiled.per_score
    if counts is None or per_score is None:
        return "no loop with matrix products and an exponential per score; was the kernel changed?"
    if not counts.matrix_name.startswith(budget.unit):
        return f"its products run as {counts.matrix_name}, they must run as {budget.unit}"
    if counts.exponentials > REPEATED * compiled.scores:
        repeated = counts.exponentials / compiled.scores
        return f"{repeated:.2f} exponentials per score, at most {REPEATED} where one trip makes one tile once"
    if budget.per_score is not None and per_score > budget.per_score:
        return f"{per_score:.2f} instructions per score, at most {budget.per_score}"
    if budget.under_products is not None and (counts.overlapped or 0) < budget.under_products * counts.exponentials:
        share = (counts.overlapped or 0) / counts.exponentials
        return f"{share:.2f} of the exponentials run under a product, at least {budget.under_products} must"
    if budget.per_shuffle is not None and counts.exponentials < budget.per_shuffle * counts.shuffles:
        return f"a shuffle per {counts.exponentials / counts.shuffles:.1f} exponentials, at most one per {budget.per_shuffle}"
    return ""


def late(counts: disassembly.Counts | None) -> str:
    """What is wrong with the wait for a copy in a loop that must leave one under way; "" where nothing."""
    if counts is None or counts.copies_left is None:
        return "no wait for a copy in the loop, though one must leave another copy under way; was the kernel changed?"
    return "" if counts.copies_left else "each trip waits for the copy that was issued last, at least one must stay under way"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(
            f"no match for {pattern!r} in the output of the disassembler; is this Triton {triton.__version__} known?"
        )
    return int(found.group(1))


class Selection(NamedTuple):
    """Which cases are wanted. Calls are named like "sm_90 bf16 d=128 window", and not made where `calls` has no match."""

    names: re.Pattern[str]
    calls: re.Pattern[str] = re.compile("")


def cases(selection: Selection, pool: Executor) -> list[Case]:
    """Those wanted, recorded in the processes of `pool`: by module, then by chip, then in the order of the calls."""
    recorded = pool.map(_record, CHIPS, [selection] * len(CHIPS))
    found = [case for of_chip in recorded for case in of_chip]
    return sorted(found, key=lambda case: MODULES.index(case.module))


def _record(chip: Chip, selection: Selection) -> list[Case]:
    from benchmarks.static.calls import calls

    wanted = [call for call in calls() if selection.calls.search(f"{chip.arch} {call.dtype} {call.label}")]
    return [case for case in record(chip, wanted) if selection.names.search(case.name)]


def processes(count: int) -> ProcessPoolExecutor:
    """A pool that ends with this process."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends this process and its assembler when the parent is gone, killed by a time limit: a pool's worker waits for ever."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


SUBSET = Selection(
    names=re.compile(
        r"bf16 attention (row_lse|column_sum) d=128$"
        r"|sm_90 bf16 attention (row_lse|column_sum) d=(64|80|256)$"
        r"|sm_90 bf16 attention ((row_lse|column_sum) d=128|lay_out|add)"
        r"|sm_90 fp32 attention (row_lse|column_sum) d=128 window softcap"
        r"|fp32 attention column_sum d=16$"
        r"|(sm_86|gfx942) bf16 attention column_sum d=512$"
        r"|sm_90 bf16 attention row_lse d=128 queries$|sm_90 bf16 plan place_queries"
        r"|(sm_80|sm_90|sm_100|gfx942) bf16 attention column_sum d=128 queries max weights$"
        r"|sm_90 bf16 hopper .* d=\d+$"
        r"|sm_90 \w+ sampled .* d=(64|128)"
        r"|(sm_80|sm_100|gfx942) bf16 sampled .* d=128$"
        r"|sm_90 \w+ logprobs|bf16 logprobs head$"
        r"|(sm_90|gfx942) \w+ (plan .* d=(64|128)|redundancy|copies)"
    ),
    calls=re.compile(
        r"(sm_80|sm_90|sm_100|gfx942) bf16 d=128 queries( max weights)?$"
        r"|bf16 (d=128)?$|fp32 d=16$|sm_90 bf16 d=(64|80|256)$|(sm_86|gfx942) bf16 d=512$"
        r"|sm_90 bf16 d=128 (sinks per head packed|window|window softcap)$"
        r"|sm_90 (bf16 d=64 window softcap|fp32 d=(64|128)( window softcap)?)$"
        r"|sm_90 \w+ (with entropy|with all options( uneven channels)?|protect last|first places)?$"
        r"|gfx942 (fp32|i64) $|gfx942 i64 first places$"
    ),
)
"""What is compiled without `--all`, by name. On sm_90 every kernel and option. On every chip the attention passes (D = 128 in
bfloat16, D = 16 in float32) and the fused head. The tightest fits into shared memory. On gfx942 the kernels of
redundancy and copies, too."""

SAMPLE = Selection(
    names=re.compile(
        r"bf16 attention (row_lse|column_sum) d=128$"
        r"|fp32 attention column_sum d=16$|bf16 logprobs head$"
        r"|sm_90 bf16 attention (row_lse|column_sum) d=(64|256)$"
        r"|sm_90 bf16 attention row_lse d=128 queries$"
        r"|(sm_80|sm_90|sm_100|gfx942) bf16 attention column_sum d=128 queries max weights$"
        r"|sm_90 bf16 hopper .* d=\d+$"
    ),
    calls=re.compile(
        r"(sm_80|sm_90|sm_100|gfx942) bf16 d=128 queries( max weights)?$|bf16 (d=128)?$|fp32 d=16$|sm_90 bf16 d=(64|256)$"
    ),
)
"""A third of the subset, for `make test`: on every chip, and on sm_90 all that has a budget."""


def main() -> int:
    """Prints one line per case; returns 1 when one takes more than its chip has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every chip, dtype, head dim and kernel")
    parser.add_argument("--sample", action="store_true", help="a third of the subset")
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose name matches, instead of the subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter does not compile; unset it")

    try:
        every = arguments.all or arguments.only
        selection = Selection(re.compile(arguments.only)) if every else SAMPLE if arguments.sample else SUBSET
    except re.error as error:
        parser.error(f"--only {arguments.only!r} is no regular expression: {error}")
    began = time.perf_counter()
    failed = 0
    with processes(arguments.processes) as pool:
        selected = cases(selection, pool)
        if not selected:
            parser.error(
                f"--only {arguments.only!r} matches no kernel; names look like 'sm_90 bf16 attention column_sum d=128'"
            )
        for compiled in pool.map(inspect, selected):
            print(compiled, flush=True)
            failed += compiled.fails
    seconds = time.perf_counter() - began
    print(f"{len(selected)} kernels compiled by Triton {triton.__version__} in {seconds:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
