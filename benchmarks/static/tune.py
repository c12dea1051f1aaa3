"""Times other launch sizes on this GPU: `python -m benchmarks.static.tune --head-dim 128` those of the attention passes, with
`--log-probs` those of the fused head, and the rates by which `fused_is_faster` chooses.

Prints one row per size, fastest first. The size in use is marked, one whose result differs from it is named as wrong, and one
that the chip cannot run is listed with the reason. `--write entra_kernels/_triton/launch.json` makes the fastest size the one
in use, for attention that of both passes together. `make static-proof` shows what sizes cost in instructions, registers and
shared memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from entra_kernels._spans import Spans
from entra_kernels._torch.logprobs import factor, product
from entra_kernels._triton import attention, logprobs
from entra_kernels._triton.launch import AttentionLaunch, Chip, Ring, attention_launch, chip_of, shared_bytes
from entra_kernels._triton.logprobs import Tiling, tiling
from entra_kernels.reference import AttentionOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VARIANTS = ("plain", "window", "softcap")

SPREAD = 1e-5
"""How far, relative to the largest sum, two sizes may differ: they add up in other orders, in float32."""


class Trial(NamedTuple):
    """One launch size with its times in milliseconds, or why it has none."""

    size: AttentionLaunch
    column: float | None
    """The column pass, log-sum-exp given."""
    both: float | None
    reason: str = ""


PRODUCTS = {"sm_90": 2048, "sm_100": 4096}
"""Products of two numbers that an SM's matrix unit adds up in a clock, in bfloat16; elsewhere 1024."""


def taken(size: AttentionLaunch, element_size: int, chip: Chip) -> int:
    """Bytes that a program takes of the shared memory: a ring has the log-sum-exp of its tiles, and barriers, besides."""
    if size.ring is None:
        return shared_bytes(size, element_size, chip)
    return (
        shared_bytes(size._replace(num_stages=size.ring.stages), element_size, chip)
        + 4 * size.ring.stages * size.streamed
        + 1024
    )


def clocks(size: AttentionLaunch, element_size: int, chip: Chip) -> float:
    """Modelled clocks of an SM for a score, both passes: how candidates are ordered, and no prediction.

    A score takes matrix products, an exponential (16 in a clock), instructions (128) and copies (32 bytes). A product reads
    shared memory (128 bytes): the streamed tile once per 64 resident rows, or per rows of a warp where the chip has no HGMMA.
    These run at the same time where two programs share the SM, where a program starts its products ahead, or in a ring; else
    the products wait for the rest. The instructions are a line through the counts in benchmarks/README.md: a thread with more
    scores takes fewer for each.
    """
    warps = 8 if size.ring else size.num_warps
    accumulators = size.resident * size.streamed // (32 * warps)
    scores = size.streamed if size.ring else accumulators
    rows = 64 if chip.arch in PRODUCTS else size.resident // warps
    kept = chip.arch not in PRODUCTS or bool(size.ring and size.ring.in_registers)
    reads = size.depth * element_size * (1 / rows + (0 if kept else 1 / size.streamed)) / 128
    products = max(size.depth / PRODUCTS.get(chip.arch, 1024), reads)
    instructions = 4 + 140 / scores + (0 if chip.arch in PRODUCTS else size.depth / 64)
    copies = size.depth * element_size / size.resident / 32
    rest = max(1 / 16, instructions / 128)
    registers = size.max_registers or min(96 + accumulators * (1 + size.ahead), 255)
    programs = min(65_536 // (registers * 32 * warps), (chip.shared_memory + 1024) // (taken(size, element_size, chip) + 1024))
    side_by_side = size.ring or size.ahead or programs > 1
    parts = [products, rest, copies] if side_by_side else [products + rest, copies]
    # With one stage a program waits for its copies. What does not limit costs a little, too.
    return 2 * ((max(parts) if size.ring or size.num_stages > 1 else sum(parts)) + sum(parts) / 8)


def candidates(current: AttentionLaunch, element_size: int, chip: Chip) -> list[AttentionLaunch]:
    """First the size in use, then the others, the most promising first: the first 12 are worth a try."""
    others = {size for size in sizes_that_fit(current, element_size, chip) if size != current}
    return [current, *sorted(others, key=lambda size: (clocks(size, element_size, chip), str(size)))]


def sizes_that_fit(current: AttentionLaunch, element_size: int, chip: Chip) -> Iterator[AttentionLaunch]:
    """Where the size in use has a ring, the other rings and the plain passes. All plain sizes that fit into shared memory and
    leave a thread registers next to its accumulators."""
    if current.ring is not None:
        yield from rings(current, element_size, chip)
        current = current._replace(ring=None)
        yield current
    for resident, streamed, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3)):
        accumulators = resident * streamed // (32 * warps)
        if streamed > resident or accumulators > 128 or accumulators < 8:
            continue
        # Bounds that let two programs of 8 warps, or three of 4, share the registers of an SM.
        for registers in (None, {8: 128, 4: 168}[warps]) if chip.is_nvidia and accumulators <= 64 else (None,):
            # Two sets of accumulators leave too few of them.
            for ahead in (False, True) if accumulators * 2 + 64 <= (registers or 255) else (False,):
                size = AttentionLaunch(resident, streamed, current.depth, warps, stages, registers, current.least_piece, ahead)
                if taken(size, element_size, chip) <= chip.shared_memory:
                    yield size


def rings(current: AttentionLaunch, element_size: int, chip: Chip) -> Iterator[AttentionLaunch]:
    """Rings that fit into shared memory. With the resident tile in registers too, 128 streamed tokens would spill."""
    for streamed, stages, in_registers in itertools.product((128, 64), (3, 4, 6), (False, True)):
        size = current._replace(streamed=streamed, ring=Ring(stages, in_registers))
        if taken(size, element_size, chip) <= chip.shared_memory and not (in_registers and streamed == 128):
            yield size


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a call after two others; by device events on a GPU."""
    times = []
    for turn in range(rounds + 2):
        if device.type == "cpu":
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        if turn >= 2:
            times.append(elapsed)
    return statistics.median(times)


def why_not(run: Callable[[], Tensor], expected: list[Tensor]) -> str:
    """Why a size is not timed; "" where it is. The first result goes into `expected`, and the others are held to it."""
    try:
        result = run().clone()
    except Exception as error:  # a size that the chip or the compiler refuses is a result too
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if not expected:
        expected.append(result)
    # Negated, so that NaN is wrong.
    return "" if (result - expected[0]).abs().max() <= SPREAD * expected[0].abs().max() else "wrong result"


def trials(q: Tensor, k: Tensor, sizes: Sequence[AttentionLaunch], variant: str, rounds: int) -> Iterator[Trial]:
    """Each size in turn; the first one's result is what the others are held to."""
    batch, heads, tokens, head_dim = q.shape
    spans = Spans(None, None, batch, tokens, batch)
    out = torch.zeros(batch, 1, tokens, dtype=torch.float32, device=q.device)
    # Any log-sum-exp takes the same time; one above every score keeps the sums finite.
    lse = torch.full((batch, heads, tokens), 100.0, device=q.device)
    options = AttentionOptions(
        scale=head_dim**-0.5,
        sliding_window=max(tokens // 8, 1) if variant == "window" else None,
        softcap=50.0 if variant == "softcap" else None,
        reduction="sum",
    )
    expected: list[Tensor] = []
    for size in sizes:

        def run(lse: Tensor | None = None, size: AttentionLaunch = size) -> Tensor:
            attention._launch(q, k, spans, out, size, replace(options, lse=lse))
            return out

        if reason := why_not(run, expected):
            yield Trial(size, None, None, reason)
            continue
        yield Trial(
            size,
            column=milliseconds(lambda run=run: run(lse), q.device, rounds),  # type: ignore[misc]
            both=milliseconds(run, q.device, rounds),
        )


def table(found: Sequence[Trial], current: AttentionLaunch, flops: float) -> str:
    """Markdown, fastest column pass first, those without times last."""
    lines = [
        "| resident x streamed | warps | stages | registers at most | ahead | column pass, ms | TFLOP/s | both passes, ms | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for trial in sorted(found, key=lambda trial: (trial.column is None, trial.column)):
        size = trial.size
        rate = "" if trial.column is None else f"{flops / trial.column / 1e9:.0f}"
        times = ["" if value is None else f"{value:.3f}" for value in (trial.column, trial.both)]
        note = trial.reason or ("in use" if size == current else "")
        warps, stages, registers = str(size.num_warps), str(size.num_stages), str(size.max_registers or "-")
        if size.ring is not None:
            warps, stages, registers = "4 + 4 + 1", f"ring of {size.ring.stages}", "-"
            if size.ring.in_registers:
                stages += ", resident tile in registers"
        lines.append(
            f"| {size.resident} x {size.streamed} | {warps} | {stages} | {registers} "
            f"| {'yes' if size.ahead else ''} | {times[0]} | {rate} | {times[1]} | {note} |"
        )
    return "\n".join(lines)


class HeadTrial(NamedTuple):
    """One launch size of the fused head with its time in milliseconds, or why it has none."""

    size: Tiling
    ms: float | None
    reason: str = ""


def head_candidates(current: Tiling, element_size: int, chip: Chip) -> list[Tiling]:
    """First the size in use, then the others that fit, those that differ from it in the fewest numbers first,
    and of those the largest."""
    found = []
    choices = itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
    for rows, columns, depth, warps, stages in choices:
        fits = stages * (rows + columns) * depth * element_size <= chip.shared_memory
        if fits and 32 <= rows * columns // (32 * warps) <= 128:  # logits of a thread: with more it would spill
            found.append(Tiling(rows, columns, depth, warps, stages, current.band))

    def order(size: Tiling) -> tuple[int, ...]:
        return sum(a != b for a, b in zip(size, current, strict=True)), *(-number for number in size)

    others = sorted(set(found) - {current}, key=order)
    return [current, *others]


def head_trials(hidden: Tensor, weight: Tensor, targets: Tensor, sizes: Sequence[Tiling], rounds: int) -> Iterator[HeadTrial]:
    """Each size in turn; the first one's result is what the others are held to."""
    expected: list[Tensor] = []
    more: dict[str, Any] = {"bias": None, "logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    for size in sizes:

        def run() -> Tensor:
            return logprobs.linear_token_logprobs(hidden, weight, targets, **more, way="fused")[0]

        with mock.patch.object(logprobs, "tiling", lambda *_, size=size: size):
            reason = why_not(run, expected)
            yield HeadTrial(size, None if reason else milliseconds(run, hidden.device, rounds), reason)


def head_table(found: Sequence[HeadTrial], flops: float) -> str:
    """Markdown, the fastest first, those without times last. The first of `found` is in use."""
    lines = ["| rows x columns x depth | warps | stages | ms | TFLOP/s | |", "|---|---|---|---|---|---|"]
    for trial in sorted(found, key=lambda trial: (trial.ms is None, trial.ms)):
        rows, columns, depth, warps, stages, _ = trial.size
        time_and_rate = "|" if trial.ms is None else f"{trial.ms:.3f} | {flops / trial.ms / 1e9:.0f}"
        note = trial.reason or ("in use" if trial is found[0] else "")
        lines.append(f"| {rows} x {columns} x {depth} | {warps} | {stages} | {time_and_rate} | {note} |")
    return "\n".join(lines)


def rates(hidden: Tensor, weight: Tensor, fused_ms: float, rounds: int, copied: int) -> dict[str, float]:
    """What `fused_is_faster` reckons with, to three digits: the rates of the products by cuBLAS, in chunks as the chunked way
    makes them, and of the fused head; of a copy of so many bytes, read and written; and the time of a small launch."""
    flops = 2.0 * hidden.shape[0] * weight.shape[0] * hidden.shape[1]
    rows, columns = logprobs.chunk(hidden.shape[0], weight.shape[0])
    logits = hidden.new_empty(rows * columns, dtype=torch.float32)
    source = torch.zeros(copied, dtype=torch.int8, device=hidden.device)
    target, small, many = torch.empty_like(source), logits[:1], 100

    def products() -> None:
        for part in map(factor, weight.split(columns)):
            for states in map(factor, hidden.split(rows)):
                product(states, part.t(), out=logits[: len(states) * len(part)].view(len(states), len(part)))

    def launches() -> None:
        for _ in range(many):
            small.zero_()

    product_ms, copy_ms, launches_ms = (
        milliseconds(run, hidden.device, rounds) for run in (products, lambda: target.copy_(source), launches)
    )
    found = {
        "product_tflops": flops / product_ms / 1e9,
        "fused_tflops": flops / fused_ms / 1e9,
        "copy_tb_per_s": 2 * copied / copy_ms / 1e9,
        "launch_us": launches_ms * 1e3 / many,
    }
    return {name: float(f"{rate:.3g}") for name, rate in found.items()}


def as_text(sizes: dict[str, list[dict[str, Any]]]) -> str:
    """The table of launch sizes as its file has it, an entry on each line."""
    kinds = [f'"{kind}": [\n  ' + ",\n  ".join(map(json.dumps, entries)) + "\n]" for kind, entries in sizes.items()]
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def with_entry(text: str, kind: str, key: dict[str, Any], found: dict[str, Any], measured: dict[str, str]) -> str:
    """`text`, a table of launch sizes, with what was found for what `key` says: a chip, bytes per element, a head dim, and
    whether there are options. It takes the place of the entry with the same key, or stands before all."""
    sizes = json.loads(text)
    others = [each for each in sizes[kind] if any(each.get(name) != key.get(name) for name in (*key, "up_to"))]
    sizes[kind] = [{**key, **found, "measured": measured}, *others]
    return as_text(sizes)


def with_fastest(text: str, found: Sequence[Trial], key: dict[str, Any], measured: dict[str, str]) -> str:
    """`with_entry` of the launch size with the fastest two attention passes."""
    fastest = min((trial for trial in found if trial.both is not None), key=lambda trial: trial.both or 0.0).size
    size = {name: value for name, value in fastest._asdict().items() if name != "least_piece" and value not in (None, False)}
    return with_entry(text, "attention", key, {"size": size}, measured)


def counted(found: Iterator[Any], sizes: Sequence[Any]) -> list[Any]:
    """All trials, with a line on stderr that tells how far they are."""
    trials = []
    for trial in found:
        trials.append(trial)
        print(f"{len(trials)} of {len(sizes)}", end="\r", file=sys.stderr, flush=True)
    return trials


def tune_attention(options: argparse.Namespace, device: torch.device, name: str, measured: dict[str, str]) -> int:
    """The launch sizes of the attention passes."""
    dtype, group = DTYPES[options.dtype], options.heads // options.kv_heads
    q = torch.randn(1, options.heads, options.tokens, options.head_dim, device=device, dtype=dtype)
    k = torch.randn(1, options.kv_heads, options.tokens, options.head_dim, device=device, dtype=dtype)
    chip = chip_of(device)
    current = attention_launch(options.head_dim, group, dtype.itemsize, chip, options=options.variant != "plain")
    sizes = candidates(current, dtype.itemsize, chip)[: options.most]
    found: list[Trial] = counted(trials(q, k, sizes, options.variant, options.rounds), sizes)
    print(
        f"{name}, Triton {triton.__version__}, {options.dtype}, {options.variant}: N = {options.tokens}, "
        f"{options.heads} query and {options.kv_heads} kv heads, D = {options.head_dim}\n"
    )
    print(table(found, current, options.heads * options.tokens**2 * options.head_dim))
    if options.write and found[0].column is not None:
        key = {"chip": chip.arch, "element_size": dtype.itemsize, "head_dim": options.head_dim}
        key["options"] = options.variant != "plain"
        options.write.write_text(with_fastest(options.write.read_text(), found, key, measured))
    return int(found[0].column is None)


def tune_head(options: argparse.Namespace, device: torch.device, name: str, measured: dict[str, str]) -> int:
    """The launch sizes of the fused head. And the rates; float32 needs none, it is always fused."""
    dtype, vocabulary = DTYPES[options.dtype], options.vocabulary
    hidden = torch.randn(options.tokens, options.channels, device=device, dtype=dtype)
    weight = (torch.randn(vocabulary, options.channels, device=device) * options.channels**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (options.tokens,), device=device)
    chip = chip_of(device)
    sizes = head_candidates(tiling(dtype.itemsize, chip), dtype.itemsize, chip)[: options.most]
    found: list[HeadTrial] = counted(head_trials(hidden, weight, targets, sizes, options.rounds), sizes)
    shape = f"{options.tokens} x {options.channels} x {vocabulary}"
    print(f"{name}, Triton {triton.__version__}, {options.dtype}, log-probs: {shape}\n")
    print(head_table(found, 2 * options.tokens * options.channels * vocabulary))
    if found[0].ms is None:
        return 1
    ms, fastest = min((trial.ms, trial.size) for trial in found if trial.ms is not None)
    size = {field: value for field, value in fastest._asdict().items() if field != "band"}
    kinds: dict[str, dict[str, Any]] = {"head": {"size": size}}
    if dtype.itemsize == 2:
        kinds["rates"] = rates(hidden, weight, ms, options.rounds, copied=min(2**31, 64 * hidden.numel()))
        print("\n" + ", ".join(f"{rate} = {value:g}" for rate, value in kinds["rates"].items()))
    if options.write:
        for kind, content in kinds.items():
            key = {"chip": chip.arch, **({"element_size": dtype.itemsize} if kind == "head" else {})}
            options.write.write_text(with_entry(options.write.read_text(), kind, key, content, measured))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when the size in use has no time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--log-probs", action="store_true", help="the fused head and the rates, instead of attention")
    parser.add_argument("--channels", type=int, default=4096, help="of the hidden states, with --log-probs")
    parser.add_argument("--vocabulary", type=int, default=131_072, help="with --log-probs")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each size")
    parser.add_argument("--most", type=int, help="try only this many sizes, the one in use first, then the most promising")
    parser.add_argument("--write", type=Path, metavar="FILE", help="make the fastest size the one in use, in this table")
    options = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        parser.error("no GPU is visible to torch to time launch sizes on; python -m benchmarks.static.sass counts without")
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} must be a multiple of --kv-heads {options.kv_heads}")

    torch.manual_seed(0)
    name = "Triton's interpreter, whose times mean nothing" if interpreted else torch.cuda.get_device_name()
    measured = {"device": name, "date": date.today().isoformat(), "triton": triton.__version__}
    tune = tune_head if options.log_probs else tune_attention
    return tune(options, torch.device("cpu" if interpreted else "cuda"), name, measured)


if __name__ == "__main__":
    sys.exit(main())
