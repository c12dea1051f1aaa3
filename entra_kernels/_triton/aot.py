"""Compile every Triton kernel for every chip, on a machine that needs no GPU: `python -m entra_kernels._triton.aot [--all]`.

Triton's compiler does not fail when a kernel asks for more shared memory than the chip has, or when registers spill. This
does. Without `--all` it takes the subset that the tests take.

Every case has a stride of 1 along the innermost dimension (head dim, channels, vocabulary), as a model's tensors have. Other
strides run as well, but as other code: loads are scalar there and registers may spill.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entra_kernels._triton.launch import KernelCase

MODULES = ("attention", "logprobs", "redundancy")
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A compilation target and the shared memory, in bytes, that one program may take on it."""

    backend: str
    arch: int | str
    shared_memory: int

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


CHIPS = (
    Chip(backend="cuda", arch=80, shared_memory=163 * 1024),
    Chip(backend="cuda", arch=86, shared_memory=99 * 1024),
    Chip(backend="cuda", arch=89, shared_memory=99 * 1024),
    Chip(backend="cuda", arch=90, shared_memory=227 * 1024),
    Chip(backend="cuda", arch=100, shared_memory=227 * 1024),
    Chip(backend="cuda", arch=120, shared_memory=99 * 1024),
    Chip(backend="hip", arch="gfx942", shared_memory=64 * 1024),
)

NO_SPILLS_UP_TO = 128
"""Head dim up to which a spill on sm_90 is an error; beyond it the tile of K alone can exceed the registers."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiled case takes. `spills` counts local loads and stores (CUDA) or spilled vector registers (ROCm)."""

    name: str
    registers: int
    shared_memory: int
    spills: int
    problem: str

    def __str__(self) -> str:
        text = f"{self.name:<64} {self.registers:>4} registers {self.shared_memory:>7} B shared {self.spills:>4} spills"
        return f"{text}  FAIL: {self.problem}" if self.problem else text


def compile_case(case: KernelCase, chip: Chip) -> Any:
    """Triton's compiled kernel, with `.asm` and `.metadata`."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.arguments[name] for name in names}
    source = ASTSource(
        case.kernel,
        signature,
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    target = GPUTarget(chip.backend, chip.arch, 32 if chip.backend == "cuda" else 64)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages})


def nvidia_tool(name: str, option: str, cubin: bytes) -> str:
    """Output of one of the CUDA binary tools that come with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def inspect(case: KernelCase, chip: Chip, name: str) -> Compiled:
    """Compiles one case and reads its resources from the machine code."""
    kernel = compile_case(case, chip)
    if chip.backend == "cuda":
        registers = _number(r"REG:(\d+)", nvidia_tool("cuobjdump", "-res-usage", kernel.asm["cubin"]))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", nvidia_tool("nvdisasm", "-c", kernel.asm["cubin"])))
    else:
        registers = _number(r"\.vgpr_count:\s+(\d+)", kernel.asm["amdgcn"])
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
    problem = ""
    if kernel.metadata.shared > chip.shared_memory:
        problem = f"{kernel.metadata.shared} B of shared memory, {chip.name} has {chip.shared_memory}"
    elif spills and chip.arch == 90 and (case.head_dim or 0) <= NO_SPILLS_UP_TO:
        problem = f"{spills} spills on sm_90"
    return Compiled(name=name, registers=registers, shared_memory=kernel.metadata.shared, spills=spills, problem=problem)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(
            f"no match for {pattern!r} in the output of the disassembler; is this Triton {triton.__version__} known?"
        )
    return int(found.group(1))


def _cases(module: str, chip: Chip, dtype: str) -> Iterator[KernelCase]:
    yield from importlib.import_module(f"entra_kernels._triton.{module}").aot_cases(dtype, chip.shared_memory)


def _name(module: str, chip: Chip, dtype: str, case: KernelCase) -> str:
    return f"{chip.name} {dtype} {module} {case.label}"


SUBSET = re.compile(
    r"sm_90 bf16 attention .* d=128"
    r"|sm_90 bf16 attention .* d=80$"
    r"|sm_90 fp32 attention .* d=128 window softcap"
    r"|bf16 attention .* d=128$"
    r"|fp32 attention column_sum d=16$"
    r"|(sm_86|gfx942) bf16 attention column_sum d=512$"
    r"|sm_90 \w+ logprobs"
    r"|bf16 logprobs head$"
    r"|sm_90 bf16 attention (lay_out|add_heads)$"
    r"|(sm_90|gfx942) bf16 redundancy"
)
"""What is compiled without `--all`, by name: every kernel and option on sm_90; on every chip the attention passes (D = 128 in
bfloat16, D = 16 in float32) and the fused head; the tightest fits into shared memory; and on gfx942 the redundancy kernels."""


def _inspect_one(job: tuple[str, int, str, str]) -> Compiled:
    module, chip_index, dtype, label = job
    chip = CHIPS[chip_index]
    case = next(case for case in _cases(module, chip, dtype) if case.label == label)
    return inspect(case, chip, _name(module, chip, dtype, case))


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
    jobs = [
        (module, index, dtype, case.label)
        for module in MODULES
        for index, chip in enumerate(CHIPS)
        for dtype in DTYPES
        for case in _cases(module, chip, dtype)
        if wanted.search(_name(module, chip, dtype, case))
    ]
    if not jobs:
        parser.error(f"--only {arguments.only!r} matches no kernel; names look like 'sm_90 bf16 attention column_sum d=128'")
    began = time.perf_counter()
    failed = 0
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for compiled in pool.map(_inspect_one, jobs):
            print(compiled, flush=True)
            failed += bool(compiled.problem)
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - began:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
