"""What a launch depends on besides its tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Chip(NamedTuple):
    """What a launch has to fit: an architecture and the bytes of shared memory that one program may take."""

    arch: str
    """ "sm_90" for compute capability 9.0, "gfx942" as ROCm names it."""
    shared_memory: int

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def lanes(self) -> int:
        """Threads per warp."""
        return 32 if self.is_nvidia else 64


FUSED = {"enable_fp_fusion": True}
"""For every launch: a product and a sum are one instruction. The budgets count on it, and Triton 3.10 has it off by default."""

HOPPER = Chip("sm_90", 227 * 1024)


def check_products(tensor: Tensor) -> None:
    """Raises a RuntimeError where Triton would multiply wrongly: bfloat16 in its interpreter."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        raise RuntimeError(
            "backend='triton' on a CPU is Triton's interpreter, and the interpreter multiplies bfloat16 wrongly; use float32 "
            "or float16, or backend='torch'"
        )


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind `device`; for a CPU (Triton's interpreter) an H200."""
    if device.type == "cpu":
        return HOPPER
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    shared_memory = int(driver.active.utils.get_device_properties(index)["max_shared_mem"])
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Chip(properties.gcnArchName.split(":")[0], shared_memory)
    return Chip(f"sm_{properties.major}{properties.minor}", shared_memory)


class Ring(NamedTuple):
    """How `hopper.py` streams the tiles of a launch."""

    stages: int
    """Streamed tiles in shared memory at a time."""
    in_registers: bool
    """Whether the resident tile is kept in registers: half of what the matrix unit reads then comes from shared memory."""


def gluon_is_known() -> bool:
    """Whether this Triton is one that compiles `hopper.py`: Gluon is experimental and changes from version to version. With
    others the plain passes run, which give the same bits."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= version <= (3, 8)


class AttentionLaunch(NamedTuple):
    """Launch size of the attention passes."""

    resident: int
    """Tokens that stay in place: keys in the column pass, queries in the row pass."""
    streamed: int
    """Tokens per tile that passes by; divides `resident`."""
    depth: int
    """How much of the head dim one dot takes."""
    num_warps: int
    num_stages: int
    max_registers: int | None
    """Bound on the registers of a thread: 128 lets two programs of 8 warps share an SM. On NVIDIA chips only."""
    least_piece: int
    """Streamed tiles, per query head, that a program of the column pass walks over at least."""
    ahead: bool = False
    """Whether the column pass starts the product of the next tile before it takes the exponentials of this one. A second set
    of accumulators, for exponentials that run under a product of their own warp."""
    ring: Ring | None = None
    """For the kernels of `hopper.py`, where they take q and k as they lie; None where they never do. `attention.py` takes the
    others with the same tiles, so that a result does not depend on the strides."""

    @property
    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        bound = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **bound, **FUSED}


TABLE = Path(__file__).with_suffix(".json")
"""Launch sizes of the attention passes ("attention") and of the fused head ("head"), and the rates ("rates") by which
`logprobs.fused_is_faster` chooses. An entry says what it is for: a chip, bytes per element, a head dim or the highest one, and
whether there are options. It says on which GPU it was "measured", or why it is "assumed". The first that fits is taken.
`python -m benchmarks.static.tune --write` writes what it measured."""


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def entries(kind: str, chip: Chip, head_dim: int = 0, **facts: Any) -> Iterator[dict[str, Any]]:
    """Those of the table for a chip and what else is known of a launch, in the order of the table."""
    facts |= {"chip": chip.arch, "head_dim": head_dim}
    for entry in _table()[kind]:
        if head_dim <= entry.get("up_to", head_dim) and all(entry.get(name, fact) == fact for name, fact in facts.items()):
            yield entry


THROUGH_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_120")
"""NVIDIA chips whose products read registers. Their streamed tile leaves shared memory before the product begins."""


def shared_bytes(size: AttentionLaunch, element_size: int, chip: Chip) -> int:
    """The most that Triton takes of the shared memory for a plain pass: a buffer for each stage, and one less on
    `THROUGH_REGISTERS`. There two warps that share a row meet in 8 more bytes for each resident token. Barriers and their
    alignment take 1 KiB on later chips. The static proof holds what compiled kernels take to it."""
    buffers, scratch = size.num_stages, 1024 if chip.is_nvidia else 0
    if chip.arch in THROUGH_REGISTERS:
        buffers, scratch = max(1, size.num_stages - 1), 8 * size.resident
    return (size.resident + buffers * size.streamed) * size.depth * element_size + scratch


LEAST_WORK = 8
"""Tiles of scores, counted over the group's heads, that a program has at least: fewer would not pay for loading the keys."""


@functools.lru_cache
def attention_launch(head_dim: int, group: int, element_size: int, chip: Chip, *, options: bool) -> AttentionLaunch:
    """The launch size of both attention passes for a head dim, G heads per kv head, bytes per element, and a chip.

    `options` says whether there is a window, a softcap or row weights. Static counts stand behind each choice. Some are of the
    compiled inner loop: instructions per score, column pass / row pass, bfloat16, Triton 3.7.1. (3.6 takes a little less, and
    spills nowhere up to D = 128 either.) The others are of the registers and the shared memory, which decide how many programs
    share an SM. benchmarks/README.md has the counts, and `python -m benchmarks.static.sass` makes them. The sizes are in TABLE.
    On a GPU, `python -m benchmarks.static.tune` times the alternatives.

    On sm_90 a warp waits for its product before it takes exponentials. Meanwhile two things can keep the matrix unit busy. One
    is a second program on the same SM, which for 8 warps means 128 registers and 113 KiB each. The other is the product of the
    next tile (`ahead`), which takes a second set of accumulators.

    | D | tile | counts | instead of |
    |---|---|---|---|
    | to 128 | 256 x 64 | 5.6 / 6.7, 128 registers, 96 KiB: two programs | 256 x 128: 4.6 / 5.6, 239 registers, one program |
    | | | | 128 x 64 ahead, two programs: 7.4, and twice the traffic from L2 and into shared memory |
    | to 128, options | 128 x 64 | 8.2 / 8.0, no spills, 3 stages | 256 x 64 spilled 26 times |
    | to 256 | 128 x 128 ahead | 7.7 / 7.6, 192 KiB: one program; 60 of 64 exponentials under a product | not ahead: 6.9, none |
    | to 512 | 64 x 64 | 16.6 / 16.2 | |

    sm_100 keeps accumulators in tensor memory, a row to a thread. With 4 warps and 128 x 64 there are no shuffles at all (5.6 /
    6.0 with 3 stages, 192 registers). With options this spilled and 8 warps did not. 128 x 128 with 4 warps spilled 366 times.
    Other chips take the largest of TABLE that fits. No matrix unit multiplies float32 exactly. On the FMA units the operands of
    a dot sit in registers: a shallow one.

    sm_80 has 128 x 64 as well. With 2 stages each trip waits for the copy that was issued last. With 3 a wait leaves one under
    way, for 4 % more instructions: 9.6 / 11.9 instead of 9.2 / 11.4 at D = 128. Without a bound 3 stages took 160 registers;
    with 128 there are two programs and no spills. At D = 256 one program fits in any case. There 256 x 32 takes 11.9 / 13.5 and
    160 KiB with 3 stages, 128 x 64 takes 13.7 / 15.9 and twice the traffic. 256 x 64 takes 11.2 / 13.7, but fits with 2 stages
    only, and a trip would again wait for the last copy. At D = 512 on sm_86, sm_89 and sm_120, 2 stages take up to 10 % more
    instructions than 1 in the column pass. They are taken because with 1 no copy is under way beside a product.
    """
    depth = max(16, 1 << (head_dim - 1).bit_length())
    for entry in entries("attention", chip, head_dim, element_size=element_size, options=options):
        given = {"depth": depth, "max_registers": None, "least_piece": -(-LEAST_WORK // group), **entry["size"]}
        size = AttentionLaunch(**given | {"ring": Ring(*given["ring"]) if "ring" in given else None})
        if shared_bytes(size, element_size, chip) <= chip.shared_memory:
            return size
    raise ValueError(f"head_dim={head_dim} does not fit into {chip.shared_memory} bytes of shared memory; use backend='torch'")
