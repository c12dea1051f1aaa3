"""Time and peak memory of scoring against model size and length, compared with what one would write without ENTRA.

Measured on one sequence of random tokens, with random weights in the Qwen3 architecture:

- the forward: the model with all its logits and fused attention. Any log-prob costs at least this.
- ENTRA: `score_batch`, its forward included.
- eager, all layers: a forward with `output_attentions=True`. Then the column means of the last layer's attention, averaged over
  heads, and the log-softmax of the logits.
- eager, last layer: the same forward without the fused kernels. A hook keeps the last layer's attention only. Eager attention
  can do no better.

Every function first runs once on a short sequence, then under measurement of its peak memory. Then all functions run in turn,
round after round, so that a busy machine slows all alike. The median counts. Eager attention is left out where its attention
matrices would need more than `--memory-limit`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments.drawing import COLOURS
from benchmarks.experiments.results import Figure, Result, Table
from entra.progress import progress_bar

FORWARD, ENTRA, EAGER, EAGER_LAST = "forward", "ENTRA", "eager, all layers", "eager, last layer"
METHODS = (FORWARD, ENTRA, EAGER_LAST, EAGER)
_VOCABULARY = 32_768
_HEAD_DIM = 64
_PROMPT = 16
_MODELS = {"cpu": ["256x4", "512x8", "768x12"], "cuda": ["1024x28", "2048x28", "2560x36"]}
_LENGTHS = {"cpu": [512, 1024, 2048, 4096], "cuda": [1024, 4096, 8192, 16384, 32768]}
_LIMITS = {"cpu": 4.0, "cuda": 40.0}
_WORK = {"cpu": 1.5e11, "cuda": math.inf}


class Shape(NamedTuple):
    """A model's hidden size and number of layers, written as in `512x8`."""

    hidden: int
    layers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `overhead`. The defaults depend on the device."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda when there is one)")
    parser.add_argument("--models", nargs="+", metavar="HIDDENxLAYERS", help=f"(default: {_choices(_MODELS)})")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help=f"(default: {_choices(_LENGTHS)})")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help=f"for eager attention's matrices (default: {_choices(_LIMITS)})"
    )
    parser.add_argument(
        "--work-limit",
        type=float,
        metavar="N",
        help=f"leave out what has more parameters times tokens (default: {_choices(_WORK)})",
    )
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of a function (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """Measures; see the module.

    Raises:
        ValueError: a model, length or number that cannot be measured.
    """
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lengths = sorted(options.lengths or _LENGTHS[device])
    shapes = [_shape(text) for text in options.models or _MODELS[device]]
    if lengths[0] <= _PROMPT or options.rounds < 1:
        raise ValueError(f"lengths={lengths} must exceed the prompt's {_PROMPT} tokens, rounds={options.rounds} be at least 1")
    limit = options.memory_limit or _LIMITS[device]
    work = options.work_limit or _WORK[device]
    rows = []
    with progress_bar(len(shapes) * len(lengths), 0, "sizes") as bar:
        for shape in shapes:
            model, eager = build(shape, device)
            parameters = sum(p.numel() for p in model.parameters())
            for length in lengths:
                if parameters * length <= work:
                    cell = {"model": f"{shape.hidden}x{shape.layers}", "parameters": parameters, "tokens": length}
                    rows += [{**cell, **row} for row in _measured(model, eager, length, limit, options)]
                bar.update()
            del model, eager
    dtype = "bfloat16" if device == "cuda" else "float32"
    settings = {
        "device": device,
        "dtype": dtype,
        "memory_limit_gib": limit,
        "work_limit": None if math.isinf(work) else work,
        "rounds": options.rounds,
        "vocabulary": _VOCABULARY,
    }
    return Result(
        name="overhead", settings={**settings, "seconds": options.seconds}, rows=rows, summary={"compared": _compared(rows)}
    )


def build(shape: Shape, device: str, **config: Any) -> tuple[Any, Any]:
    """A random Qwen3 with fused attention, and the same weights with eager attention."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = shape.hidden // _HEAD_DIM
    made = Qwen3Config(
        **{
            "vocab_size": _VOCABULARY,
            "hidden_size": shape.hidden,
            "intermediate_size": 3 * shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
            "head_dim": _HEAD_DIM,
            "max_position_embeddings": 2**17,
            "tie_word_embeddings": True,
            **config,
        }
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model, eager = (  # each with a config of its own: a model keeps the one that it is given, and the implementation is in it
        Qwen3ForCausalLM._from_config(copy.deepcopy(made), attn_implementation=attention, dtype=dtype).eval().to(device)
        for attention in ("sdpa", "eager")
    )
    eager.load_state_dict(model.state_dict(), assign=True)
    eager.tie_weights()
    return model, eager


def functions(model: Any, eager: Any, ids: Any) -> dict[str, Callable[[], Any]]:
    """What is measured, by name. Each scores the completion in `ids` [1, N], whose first tokens are the prompt.

    Returns:
        `FORWARD` gives logits; `ENTRA` gives `Scores`; the eager ones give (log-probs, mean incoming attention), float32 [n].
    """
    import torch

    from entra.score import score_batch

    tokens = ids[0].tolist()

    def forward() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    def entra() -> Any:
        return score_batch([tokens[:_PROMPT]], [tokens[_PROMPT:]], model=model, details=True)

    def eager_all() -> Any:
        with torch.no_grad():
            output = eager(input_ids=ids, use_cache=False, output_attentions=True)
        return _by_hand(output.logits, output.attentions[-1], ids)

    def eager_last() -> Any:
        kept = []
        hook = eager.model.layers[-1].self_attn.register_forward_hook(lambda module, inputs, output: kept.append(output[1]))
        try:
            with torch.no_grad():
                logits = eager(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return _by_hand(logits, kept[0], ids)

    return {FORWARD: forward, ENTRA: entra, EAGER_LAST: eager_last, EAGER: eager_all}


def _by_hand(logits: Any, attention: Any, ids: Any) -> tuple[Any, Any]:
    """log P and mu of the completion from logits [1, N, V] and attention [1, H, N, N]."""
    import torch

    matrix = attention[0].mean(0, dtype=torch.float32)
    count = ids.shape[1]
    future = torch.arange(count - 1, -1, -1, device=ids.device)
    incoming = (matrix.sum(0) - matrix.diagonal()) / future.clamp(min=1)
    logprobs = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[_PROMPT - 1 :], incoming[_PROMPT:]


def _measured(model: Any, eager: Any, length: int, limit: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each method."""
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, _VOCABULARY, (1, length), generator=generator).to(device)
    for warm in functions(model, eager, ids[:, : 4 * _PROMPT]).values():
        warm()
    config = model.config
    matrix = config.num_attention_heads * length**2 * 4 / 2**30  # of one layer, float32: eager's softmax is computed in it
    needed = {EAGER_LAST: 3 * matrix, EAGER: (config.num_hidden_layers + 3) * matrix}
    possible = {name: f for name, f in functions(model, eager, ids).items() if needed.get(name, 0.0) <= limit}
    memory = {name: _median_peak(function, device.type) for name, function in possible.items()}
    times = _side_by_side(possible, options.rounds, options.seconds, device.type)
    rows = []
    for name in METHODS:
        if name in possible:
            peak = memory[name]
            measured: dict[str, Any] = {
                "seconds": round(statistics.median(times[name]), 5),
                "fastest": round(min(times[name]), 5),
                "slowest": round(max(times[name]), 5),
                "rounds": len(times[name]),
                "peak_mib": None if peak is None else round(peak / 2**20, 1),
            }
        else:
            measured = {"left_out": f"its attention needs some {needed[name]:.1f} GiB"}
        rows.append({"method": name, **measured})
    return rows


def _side_by_side(possible: dict[str, Callable[[], Any]], rounds: int, seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each call. A slow function gets fewer rounds, but at least two."""
    times: dict[str, list[float]] = {name: [] for name in possible}
    for turn in range(rounds):
        for name, function in possible.items():
            if turn < min(2, rounds) or sum(times[name]) * (turn + 1) / turn <= seconds:
                _synchronize(device)
                start = time.perf_counter()
                function()
                _synchronize(device)
                times[name].append(time.perf_counter() - start)
    return times


def _median_peak(function: Callable[[], Any], device: str) -> float | None:
    """The median of three calls. What the allocator keeps from one call to the next moves a single peak by tens of MiB."""
    peaks = [_peak_memory(function, device) for _ in range(3)]
    return statistics.median(peak for peak in peaks if peak is not None) if None not in peaks else None


def _peak_memory(function: Callable[[], Any], device: str) -> int | None:
    """Bytes beyond what was there before. On CUDA this is the allocator's peak, else the peak resident set. Linux resets that
    when 5 is written to /proc/self/clear_refs (proc(5)). None on other systems.
    """
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier calls left behind
    before = _status("VmRSS")
    reset.write_text("5")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _shape(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) % _HEAD_DIM or not int(match[1]) or not int(match[2]):
        raise ValueError(f"models={text!r} must be HIDDENxLAYERS, the hidden size a multiple of {_HEAD_DIM}, such as 512x8")
    return Shape(int(match[1]), int(match[2]))


def _choices(defaults: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else "no limit" if value == math.inf else f"{value:g}"

    return ", ".join(f"{shown(value)} on {device}" for device, value in defaults.items())


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method in every cell as a multiple of the forward there."""
    forward = {(row["model"], row["tokens"]): row for row in rows if row["method"] == FORWARD}
    compared = []
    for row in rows:
        base = forward[row["model"], row["tokens"]]
        ratios = {
            name: round(row[of] / base[of], 3) if row.get(of) is not None and base.get(of) else None
            for name, of in (("time", "seconds"), ("memory", "peak_mib"))
        }
        compared.append({**{name: row[name] for name in ("model", "tokens", "method")}, **ratios})
    return compared


def tables(result: Result) -> list[Table]:
    """Time and memory of every method in every cell, and both as multiples of the forward."""
    settings = result.settings
    cells = {(row["model"], row["tokens"]): row["parameters"] for row in result.rows}
    by_method = {(row["model"], row["tokens"], row["method"]): row for row in result.rows}
    ratios = {(row["model"], row["tokens"], row["method"]): row for row in result.summary["compared"]}

    def shown(key: tuple[str, int, str]) -> str:
        row, ratio = by_method[key], ratios[key]
        if row.get("seconds") is None:
            return "left out"
        return f"{1e3 * row['seconds']:,.0f} ms" + ("" if key[2] == FORWARD else f" ({ratio['time']:.2f} x)")

    def memory(key: tuple[str, int, str]) -> str:
        row, ratio = by_method[key], ratios[key]
        if row.get("peak_mib") is None:
            return "left out" if row.get("seconds") is None else "unknown"
        return f"{row['peak_mib']:,.0f} MiB" + (f" ({ratio['memory']:.2f} x)" if key[2] != FORWARD and ratio["memory"] else "")

    def lines(cell: Callable[[tuple[str, int, str]], str]) -> list[list[str]]:
        return [
            [f"{parameters / 1e6:.0f} M", f"{tokens:,}", *(cell((model, tokens, method)) for method in METHODS)]
            for (model, tokens), parameters in cells.items()
        ]

    what = (
        f"One sequence, random weights in the Qwen3 architecture, {settings['dtype']}, on {result.environment['machine']} "
        f"({result.environment['threads']} threads). In brackets the multiple of the forward."
    )
    counts = {row["rounds"] for row in result.rows if "rounds" in row}
    rounds = f"{min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
    left_out = _left_out(result)
    header = ["parameters", "tokens", *METHODS]
    return [
        Table(
            caption=f"**Time.** {what} Medians of {rounds[0]} to {rounds[-1]} rounds in which the methods take turns."
            + left_out,
            header=header,
            rows=lines(shown),
        ),
        Table(
            caption=f"**Peak memory beyond the weights.** {what} Medians of 3 calls." + left_out,
            header=header,
            rows=lines(memory),
        ),
    ]


def _left_out(result: Result) -> str:
    """A sentence on what was not measured, with the space before it; empty when all was."""
    limits = []
    if any("left_out" in row for row in result.rows):
        limits.append(f"attention of more than {result.settings['memory_limit_gib']:g} GiB")
    cells = {(row["model"], row["tokens"]) for row in result.rows}
    if len(cells) < len({model for model, _ in cells}) * len({tokens for _, tokens in cells}):
        limits.append(f"sizes of more than {result.settings['work_limit'] / 1e9:g} billion parameters times tokens")
    return f" Not measured: {'; '.join(limits)}." if limits else ""


def figures(result: Result) -> list[Figure]:
    """Time as a multiple of the forward, and peak memory, against length and against size."""
    model, length = _most(result.rows, "model", "tokens"), _most(result.rows, "tokens", "model")
    parameters = next(row["parameters"] for row in result.rows if row["model"] == model)
    return [
        Figure(
            name="overhead",
            title="What scores cost, compared with the forward and with eager attention",
            caption="Above: time as a multiple of the model's forward with fused attention. Below: peak memory beyond the "
            f"weights. Left: against length, {parameters / 1e6:.0f} M parameters. Right: against size, {length:,} tokens. "
            f"One sequence, {result.settings['dtype']}, {result.environment['machine']}; medians.{_left_out(result)}",
            draw=lambda canvas: _draw(canvas, result.rows, model, length),
            size=(9.0, 6.5),
        )
    ]


def _most(rows: list[dict[str, Any]], name: str, other: str) -> Any:
    """The largest value of `name` that was measured with the most values of `other`."""
    met = {row[name]: len({r[other] for r in rows if r[name] == row[name]}) for row in rows}
    size = {row[name]: row["parameters"] if name == "model" else row[name] for row in rows}
    return max(met, key=lambda value: (met[value], size[value]))


def _draw(canvas: Any, rows: list[dict[str, Any]], model: str, length: int) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    grid = canvas.subplots(2, 2, sharex="col")
    columns = (
        ("tokens", "tokens", 1.0, [row for row in rows if row["model"] == model]),
        ("parameters", "parameters, millions", 1e6, [row for row in rows if row["tokens"] == length]),
    )
    for (above, below), (name, label, unit, chosen) in zip(grid.T, columns, strict=True):
        forward = {row[name]: row["seconds"] for row in chosen if row["method"] == FORWARD}
        for i, method in enumerate(METHODS):
            points = [row for row in chosen if row["method"] == method and row.get("seconds") is not None]
            x = [row[name] / unit for row in points]
            style: dict[str, Any] = {"color": COLOURS[i], "marker": "osD^"[i], "label": method}
            above.plot(x, [row["seconds"] / forward[row[name]] for row in points], **style)
            known = [row for row in points if row["peak_mib"]]
            below.plot([row[name] / unit for row in known], [row["peak_mib"] for row in known], **style)
        ticks = sorted({row[name] / unit for row in chosen})
        for axes in (above, below):
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.minorticks_off()
        above.set(ylabel="time / time of the forward", ylim=(0, None))
        below.set(ylabel="peak memory, MiB", yscale="log", xlabel=label)
        below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        below.yaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_title(f"{next(row['parameters'] for row in rows if row['model'] == model) / 1e6:.0f} M parameters")
    grid[0, 1].set_title(f"{length:,} tokens")
    canvas.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
