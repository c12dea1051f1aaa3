"""Counts in the machine code of a kernel: what one trip of its inner loop takes.

Pure functions over text: the output of `nvdisasm -c` for CUDA, the `amdgcn` assembly for ROCm.

A loop is a natural loop of the control flow, not a stretch of text: from a branch back to an instruction that every path to
the branch has passed. On sm_100 the waits for the matrix unit stand behind the kernel's end and branch back into the middle of
the loop. As stretches of text they would all be loops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma_")
EXPONENTIAL = re.compile(r"MUFU\.EX2|v_exp_f32")
SHUFFLE = re.compile(r"SHFL|ds_bpermute|ds_swizzle|v_permlane|\w+_dpp")

_CUDA = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);")
_ROCM = re.compile(r"\t(?P<guard>)(?P<name>[a-z]\w+)[ \t]*(?P<operands>[^;]*)")
_COPY_WAIT = re.compile(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)")  # cp.async.wait_group
_LABEL = re.compile(r"(?P<label>[.\w$]+):")
_TARGET = re.compile(r"(?P<label>\.L\w+)")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One machine instruction. `target` is the label it may branch to, `goes_on` whether the next one may follow it."""

    name: str
    operands: str = ""
    target: str = ""
    goes_on: bool = True


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A kernel's instructions, and for each label the index of the instruction that it stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Listing:
    """The listing of one kernel. ValueError where there is no instruction, or a branch to a label that is not there."""
    line_of = _CUDA if ".headerflags" in text or "/*0000*/" in text else _ROCM
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := line_of.match(line):
            instructions.append(_instruction(found["guard"], found["name"], found["operands"].strip()))
        elif found := _LABEL.match(line):
            labels[found["label"]] = len(instructions)
    if not instructions:
        raise ValueError("the disassembly holds no instruction; pass the output of nvdisasm -c, or amdgcn assembly")
    for instruction in instructions:
        if instruction.target and instruction.target not in labels:
            raise ValueError(f"a branch goes to {instruction.target!r}, which is no label here; disassemble the whole kernel")
    return Listing(instructions=tuple(instructions), labels=labels)


def _instruction(guard: str | None, name: str, operands: str) -> Instruction:
    kind = name.split(".")[0]
    found = _TARGET.search(operands)
    # On sm_80, CALL.REL.NOINC to a label of the kernel's own is a far jump; to a function it returns.
    if found and (kind in ("BRA", "CALL", "s_branch") or name.startswith("s_cbranch")):
        # `BRA.U UP0, label` has its condition among the operands, `@P0 BRA label` in front.
        goes_on = bool(guard) or "," in operands or name.startswith("s_cbranch")
        return Instruction(name=name, operands=operands, target=found["label"], goes_on=goes_on)
    ends = kind in ("EXIT", "RET", "BRX", "s_endpgm") and not guard
    return Instruction(name=name, operands=operands, goes_on=not ends)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a thread executes in one trip of the inner loop.

    Every instruction counts that stands in the loop, also where a predicate turns it off: it takes its issue slot all the
    same. So does what a single warp does for all (the products on sm_100) and the retry of a wait, once.
    """

    instructions: int
    exponentials: int
    shuffles: int
    matrix: int
    matrix_name: str
    """Of the loop's first matrix instruction, for example "HGMMA.64x128x16.F32.BF16"."""
    matrix_in_kernel: int
    overlapped: int | None
    """Exponentials taken while a matrix product of the same warp is under way; None where the code does not show it."""
    copies_left: int | None = None
    """Groups of copies into shared memory that the strictest wait of a trip leaves under way; None where it waits for none.
    With 0 each trip waits for the copy that was issued last."""


def count(listing: Listing, exponentials: int = 0) -> Counts | None:
    """Counts of the kernel's inner loop; None where there is none.

    That is the shortest loop with matrix products and at least so many exponentials: pass the scores that fall to a thread in
    one trip. The attention passes have a loop over unmasked tiles and one or two over masked ones. Masking adds a comparison
    and a select per score, so the shortest is the unmasked one. Nearly all the time of a long sequence goes there. A loop
    around another is longer. With 0 it is the loop of the products alone.
    """
    found = []
    for body in loops(listing):
        inside = [listing.instructions[index] for index in body]
        names = [each.name for each in inside]
        if _matches(MATRIX, names) and _matches(EXPONENTIAL, names) >= exponentials:
            found.append(inside)
    if not found:
        return None
    inner = min(found, key=len)
    names = [each.name for each in inner]
    matrix = [name for name in names if MATRIX.match(name)]
    return Counts(
        instructions=len(names),
        exponentials=_matches(EXPONENTIAL, names),
        shuffles=_matches(SHUFFLE, names),
        matrix=len(matrix),
        matrix_name=matrix[0],
        matrix_in_kernel=_matches(MATRIX, [each.name for each in listing.instructions]),
        overlapped=_overlapped(inner),
        copies_left=min(
            (int(wait[1], 16) for each in inner if (wait := _COPY_WAIT.match(f"{each.name} {each.operands}"))), default=None
        ),
    )


def _matches(pattern: re.Pattern[str], names: list[str]) -> int:
    return sum(bool(pattern.match(name)) for name in names)


def _overlapped(body: list[Instruction]) -> int | None:
    """Exponentials between the issue of an HGMMA and the wait for it, in the order of the text. The loop is gone through
    twice and counted the second time, because a product may be waited for in the next trip. None without HGMMA: HMMA holds
    its warp up, and waits for other units do not name what they wait for."""
    if not any(each.name.startswith("HGMMA") for each in body):
        return None
    open_group, groups, overlapped = False, 0, 0
    for trip in (1, 2):
        for each in body:
            if each.name.startswith("HGMMA"):
                open_group = True
                if "gsb0" in each.operands:
                    open_group, groups = False, groups + 1
            elif each.name.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(each.operands.split(",")[-1], 0))
            elif EXPONENTIAL.match(each.name) and trip == 2:
                overlapped += open_group or groups > 0
    return overlapped


def loops(listing: Listing) -> list[tuple[int, ...]]:
    """The natural loops, each as the ascending indices of its instructions, in the order of the labels they begin at. Branches
    back to one label are one loop."""
    instructions, labels = listing.instructions, listing.labels
    size = len(instructions)
    starts = {0} | {index for index in labels.values() if index < size}
    starts |= {i + 1 for i, each in enumerate(instructions) if (each.target or not each.goes_on) and i + 1 < size}
    firsts = sorted(starts)
    block_of = {first: block for block, first in enumerate(firsts)}
    ends = [*firsts[1:], size]

    successors: list[list[int]] = []
    for end in ends:
        last = instructions[end - 1]
        following = [block_of[end]] if last.goes_on and end < size else []
        successors.append(following + ([block_of[labels[last.target]]] if last.target in labels else []))
    predecessors: list[list[int]] = [[] for _ in firsts]
    for block, after in enumerate(successors):
        for successor in after:
            predecessors[successor].append(block)

    dominators = _dominators(predecessors)
    reached = _walk(0, successors, set())
    bodies: dict[int, set[int]] = {}
    for block in reached:
        for header in successors[block]:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_walk(block, predecessors, {header}))
    return [
        tuple(index for block in sorted(body) for index in range(firsts[block], ends[block]))
        for _, body in sorted(bodies.items())
    ]


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """For each block, those that every path from block 0 to it passes. For one that no path reaches, all."""
    everything = set(range(len(predecessors)))
    found = [{0}] + [set(everything) for _ in predecessors[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            new = everything.intersection(*(found[each] for each in predecessors[block])) | {block}
            if new != found[block]:
                found[block], changed = new, True
    return found


def _walk(block: int, edges: list[list[int]], stops: set[int]) -> set[int]:
    """`stops`, and the blocks that `edges` lead to from `block` without passing them."""
    seen, waiting = set(stops), [block]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting.extend(edges[each])
    return seen
