"""Time and memory of the presses of docs/kv-eviction.md beside kvpress' own, on a CPU.

    .venv-kvpress/bin/python -m benchmarks.kv_eviction benchmarks/results/kv-eviction-cpu.json
    python -m benchmarks.kv_eviction benchmarks/results/kv-eviction-cpu.json --write docs/kv-eviction.md

The first measures, in the environment of `make test-kvpress`. The second puts the table into the page. The model is one layer
of Llama with random weights, whose attention takes most of the time. All presses take turns, round after round, and the table
has medians. Two presses are timed after their scores agreed. Other work may share the machine, so time is the processor's, in
one thread. Memory is the peak of the process above what it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

PAGE = Path(__file__).parents[1] / "docs/kv-eviction.md"
TOKENS = (2_048, 4_096, 8_192, 16_384)
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
ROUNDS = 5
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
# What eager attention holds at once: scores, scores with the mask, and their softmax of each head, and the mask.
MATRICES = 3 * HEADS + 1
PRESSES = {"ObservedAttention": "eager", "SnapKV": "sdpa"}
"""Name on the page, and the attention that kvpress' own press runs with."""


def measure() -> dict[str, Any]:
    """Times in seconds and peaks in bytes, by tokens, press and whose it is."""
    import kvpress
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    ours: dict[str, Any] = {}
    exec(compile(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)[0], str(PAGE), "exec"), ours)
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        intermediate_size=256,
        vocab_size=512,
        initializer_range=0.1,
        max_position_embeddings=32_768,
        **sizes,
    )
    models = {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        models[attention] = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention).eval()
    records: list[dict[str, Any]] = []
    for tokens in TOKENS:
        ids = torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(0))
        entries = [("no press", "sdpa", "SDPA", None)]
        for name, attention in PRESSES.items():
            entries.append((name, "sdpa", "entra_kernels", ours[name](compression_ratio=0.5)))
            entries.append((name, attention, "kvpress", getattr(kvpress, f"{name}Press")(compression_ratio=0.5)))
        scores: dict[str, torch.Tensor] = {}
        for name, attention, whose, press in entries:
            record: dict[str, Any] = {"tokens": tokens, "press": name, "whose": whose, "attention": attention}
            records.append(record)
            need, have = MATRICES * 4 * tokens**2, _memory("/proc/meminfo", "MemAvailable")
            if attention == "eager" and need > 0.9 * have:
                record["skipped"] = f"eager attention takes {need / 2**30:.1f} GiB; {have / 2**30:.1f} GiB were free"
                continue
            kept = _forward(models[attention], ids, press, record, warm_up=True)
            if kept is not None and name in scores:
                torch.testing.assert_close(scores[name], kept, rtol=0, atol=1e-6)
            elif kept is not None:
                scores[name] = kept
        for _ in range(ROUNDS):
            for (_, attention, _, press), record in zip(entries, records[-len(entries) :], strict=True):
                if "skipped" not in record:
                    _forward(models[attention], ids, press, record)
    return {
        "command": f"python -m benchmarks.kv_eviction {' '.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "kvpress")},
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "records": records,
    }


def _forward(model: Any, ids: torch.Tensor, press: Any, record: dict[str, Any], *, warm_up: bool = False) -> Any:
    """One prompt under a press, into the record; the scores, or None without a press."""
    kept, spent = None, 0.0
    if press is not None:
        score = type(press).score

        def timed(*given: Any) -> Any:
            nonlocal kept, spent
            before = time.process_time()
            kept = score(press, *given)
            spent = time.process_time() - before
            return kept

        press.score = timed
    ctypes.CDLL(None).malloc_trim(0)  # what earlier forwards left to the allocator would not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    held = _memory("/proc/self/status", "VmRSS")
    before, clock = time.process_time(), time.perf_counter()
    with torch.no_grad(), nullcontext() if press is None else press(model):
        model(ids, use_cache=True, logits_to_keep=1)
    seconds, wall = time.process_time() - before, time.perf_counter() - clock
    if not warm_up:
        record.setdefault("seconds", []).append(seconds)
        record.setdefault("wall_seconds", []).append(wall)
        record.setdefault("score_seconds", []).append(spent)
        record.setdefault("peak_bytes", []).append(_memory("/proc/self/status", "VmHWM") - held)
    return kept


def _memory(file: str, name: str) -> int:
    """Bytes of a line of a file under /proc."""
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def _processor() -> str:
    (name, *_) = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) or ["unknown"]
    return f"{name}, {os.cpu_count()} cores"


def table(results: dict[str, Any]) -> str:
    """The Markdown of docs/kv-eviction.md: prompts under ObservedAttention, then the scores of SnapKV."""
    by = {(one["tokens"], one["press"], one["whose"]): one for one in results["records"]}
    first = ["| tokens | no press | `ObservedAttentionPress`, eager | here | time | memory |", "|---|---|---|---|---|---|"]
    second = ["| tokens | `SnapKVPress` | here | time |", "|---|---|---|---|"]
    for tokens in sorted({one["tokens"] for one in results["records"]}):
        its, here = (by[tokens, "ObservedAttention", whose] for whose in ("kvpress", "entra_kernels"))
        cells = [
            f"{_number(_time(one))} s, {_number(_peak(one) / 2**20)} MiB" if "seconds" in one else one["skipped"]
            for one in (by[tokens, "no press", "SDPA"], its, here)
        ]
        ratios = [f"{one(here) / one(its):.2f}" if "seconds" in its else "" for one in (_time, _peak)]
        first.append(f"| {tokens:,} | {' | '.join([*cells, *ratios])} |")
        its, here = (by[tokens, "SnapKV", whose] for whose in ("kvpress", "entra_kernels"))
        cells = [f"{_number(1e3 * _score_time(one))} ms" for one in (its, here)]
        second.append(f"| {tokens:,} | {' | '.join(cells)} | {_score_time(here) / _score_time(its):.2f} |")
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    about = f"{results['machine']}, one thread, {packages}, {results['date'][:10]}."
    return "\n".join([*first, "", "SnapKV's scores alone:", "", *second, "", about])


def _time(record: dict[str, Any]) -> float:
    return median(record["seconds"])


def _score_time(record: dict[str, Any]) -> float:
    return median(record["score_seconds"])


def _peak(record: dict[str, Any]) -> float:
    return median(record["peak_bytes"])


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main() -> None:
    """Measures into a file, or writes the page's table out of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if options.write is None:
        options.results.write_text(json.dumps(measure(), indent=1) + "\n")
        return
    before, _, rest = options.write.read_text().partition(BEGIN)
    after = rest[rest.index(END) :]
    options.write.write_text(f"{before}{BEGIN}\n{table(json.loads(options.results.read_text()))}\n\n{after}")


if __name__ == "__main__":
    main()
