"""Compile every Triton kernel for every chip, on a machine that needs no GPU: `python -m benchmarks.static.aot [--all]`.

Triton's compiler does not fail when a kernel asks for more shared memory than the chip has, or when registers spill. This
does, and when an attention pass takes more instructions than its budget. Spills and instructions are facts about one compiler:
with another Triton than the pinned one they are listed and fail nothing. Without `--all` it takes the subset that the tests
take.

Every case has a stride of 1 along the innermost dimension (head dim, channels, vocabulary), as a model's tensors have. Other
strides run as well, but as other code: loads are scalar there and registers may spill.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks.static import disassembly
from entra_kernels._triton.launch import FUSED, Chip, KernelCase

MODULES = ("plan", "attention", "hopper", "sampled", "logprobs", "redundancy")
DTYPES = ("bf16", "fp32")


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

NO_SPILLS_UP_TO = 128
"""Head dim up to which a spill on sm_90 is an error; beyond it the tile of K alone can exceed the registers."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an attention pass in bfloat16 may take on sm_90. `per_score` is instructions per score in the loop over unmasked
    tiles, `per_shuffle` the fewest exponentials per shuffle there, `under_products` the least share of them that a warp takes
    while a product of its own is under way; None where there is no limit."""

    per_score: float | None = None
    per_shuffle: float | None = None
    under_products: float | None = None


BUDGETS = {
    "column_sum d=64": Budget(per_score=7.5, per_shuffle=8),
    "column_sum d=128": Budget(per_score=7.5, per_shuffle=8),
    "column_sum d=256": Budget(),
    "row_lse d=64": Budget(per_score=8.5),
    "row_lse d=128": Budget(per_score=8.5),
    "row_lse d=256": Budget(),
    "ring_column_sum d=64": Budget(per_score=4.6, per_shuffle=8, under_products=1),
    "ring_column_sum d=128": Budget(per_score=4.6, per_shuffle=8, under_products=1),
    "ring_column_sum d=256": Budget(per_score=6.2, per_shuffle=8, under_products=1),
    "ring_row_lse d=64": Budget(per_score=5.5, under_products=0.9),
    "ring_row_lse d=128": Budget(per_score=5.5, under_products=0.9),
    "ring_row_lse d=256": Budget(per_score=7.1, under_products=0.9),
}
"""By label. At each of these head dims the products must run on the warpgroup matrix unit (HGMMA). An exponential takes 1/16
clock of an SM, and the products of a score at d = 128 the same; in that time 4 schedulers of 32 lanes issue 8 instructions per
score. A pass that needs more is bound by their issue, whatever overlaps."""

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


def compile_case(case: KernelCase, chip: Chip) -> Any:
    """Triton's compiled kernel, with `.asm` and `.metadata`."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.arguments[name] for name in names}
    source = (GluonASTSource if case.kernel.is_gluon() else ASTSource)(
        case.kernel,
        signature,
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    target = (
        GPUTarget("cuda", int(chip.arch.removeprefix("sm_")), chip.lanes)
        if chip.is_nvidia
        else GPUTarget("hip", chip.arch, chip.lanes)
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **FUSED}
    if case.max_registers is not None and chip.is_nvidia:
        options["maxnreg"] = case.max_registers
    return triton.compile(source, target=target, options=options)


def nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    """Output of one of the CUDA binary tools that come with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def inspect(case: KernelCase, chip: Chip, name: str) -> Compiled:
    """Compiles one case, reads its resources from the machine code, and holds them against its chip and its budget."""
    kernel = compile_case(case, chip)
    if chip.is_nvidia:
        registers = _number(r"REG:(\d+)", nvidia_tool("cuobjdump", "-res-usage", kernel.asm["cubin"]))
        text = nvidia_tool("nvdisasm", "-c", kernel.asm["cubin"])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    else:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    # One trip of an attention pass is one tile. Other kernels have no tile of scores: the loop of their products, if any.
    tile = case.constexprs.get("RESIDENT", 0) * case.constexprs.get("STREAMED", 0)
    scores = case.scores or tile / (case.num_warps * chip.lanes)
    counts = disassembly.count(disassembly.parse(text), math.ceil(scores))
    compiled = Compiled(
        name=name, registers=registers, shared_memory=kernel.metadata.shared, spills=spills, scores=scores, counts=counts
    )
    problem = excess = ""
    if kernel.metadata.shared > chip.shared_memory:
        problem = f"{kernel.metadata.shared} B of shared memory, {chip.arch} has {chip.shared_memory}"
    if chip.arch == "sm_90":
        budget = BUDGETS.get(case.label) if any("bf16" in kind for kind in case.arguments.values()) else None
        if spills and not case.may_spill and (case.head_dim or 0) <= NO_SPILLS_UP_TO:
            excess = f"{spills} spills on sm_90"
        elif budget:
            excess = over_budget(compiled, budget)
    return replace(compiled, problem=problem, excess=excess)


def over_budget(compiled: Compiled, budget: Budget) -> str:
    """The first rule that a compiled attention pass breaks, with its number; "" where it breaks none."""
    counts, per_score = compiled.counts, compiled.per_score
    if counts is None or per_score is None:
        return "no loop with matrix products and an exponential per score; was the kernel changed?"
    if not counts.matrix_name.startswith("HGMMA"):
        return f"its products run as {counts.matrix_name}, they must run as HGMMA"
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


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(
            f"no match for {pattern!r} in the output of the disassembler; is this Triton {triton.__version__} known?"
        )
    return int(found.group(1))


class Job(NamedTuple):
    """Names a case: the kernel module, the chip's place in `CHIPS`, the dtype, the label. Small, for a process of its own."""

    module: str
    chip: int
    dtype: str
    label: str

    @property
    def name(self) -> str:
        return f"{CHIPS[self.chip].arch} {self.dtype} {self.module} {self.label}"

    def case(self) -> KernelCase:
        cases = importlib.import_module(f"entra_kernels._triton.{self.module}").aot_cases
        return next(case for case in cases(self.dtype, CHIPS[self.chip]) if case.label == self.label)


def jobs(wanted: re.Pattern[str]) -> list[Job]:
    """The cases whose name has a match for `wanted`."""
    found = []
    for module in MODULES:
        cases = importlib.import_module(f"entra_kernels._triton.{module}").aot_cases
        for index, chip in enumerate(CHIPS):
            for dtype in DTYPES:
                found += [Job(module, index, dtype, case.label) for case in cases(dtype, chip)]
    return [job for job in found if wanted.search(job.name)]


def inspect_all(jobs: list[Job], processes: int) -> Iterator[Compiled]:
    """`inspect` for each job, in their order."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        yield from pool.map(_inspect_job, jobs)


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


def _inspect_job(job: Job) -> Compiled:
    return inspect(job.case(), CHIPS[job.chip], job.name)


SUBSET = re.compile(
    r"sm_90 bf16 attention .* d=128"
    r"|sm_90 bf16 attention .* d=(64|256)$"
    r"|sm_90 bf16 attention .* d=80$"
    r"|sm_90 bf16 hopper .* d=\d+$"
    r"|sm_90 fp32 attention .* d=128 window softcap"
    r"|bf16 attention .* d=128$"
    r"|fp32 attention column_sum d=16$"
    r"|(sm_86|gfx942) bf16 attention column_sum d=512$"
    r"|sm_90 \w+ logprobs"
    r"|bf16 logprobs head$"
    r"|sm_90 bf16 attention (lay_out|add)$"
    r"|sm_90 \w+ sampled .* d=(64|128)"
    r"|(sm_80|sm_100|gfx942) bf16 sampled .* d=128$"
    r"|(sm_90|gfx942) bf16 (plan|redundancy)"
)
"""What is compiled without `--all`, by name: every kernel and option on sm_90; on every chip the attention passes (D = 128 in
bfloat16, D = 16 in float32) and the fused head; the tightest fits into shared memory; and on gfx942 the redundancy kernels."""


def main() -> int:
    """Prints one line per case; returns 1 when one takes more than its chip has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every chip, dtype, head dim and kernel")
    parser.add_argument("--only", default="", metavar="REGEX", help="those whose name matches, instead of the subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter does not compile; unset it")

    try:
        wanted = re.compile(arguments.only) if arguments.all or arguments.only else SUBSET
    except re.error as error:
        parser.error(f"--only {arguments.only!r} is no regular expression: {error}")
    selected = jobs(wanted)
    if not selected:
        parser.error(f"--only {arguments.only!r} matches no kernel; names look like 'sm_90 bf16 attention column_sum d=128'")
    began = time.perf_counter()
    failed = 0
    for compiled in inspect_all(selected, arguments.processes):
        print(compiled, flush=True)
        failed += compiled.fails
    seconds = time.perf_counter() - began
    print(f"{len(selected)} kernels compiled by Triton {triton.__version__} in {seconds:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
