"""Results as tables and plots: `python -m benchmarks.speed.render DIR [--readme FILE]` reads DIR/*.json.

Without --readme the tables go between the markers of benchmarks/README.md, with it into that file. Plots go into the folder of
the JSON, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.speed.targets import Content, verdicts

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
README = Path(__file__).parents[1] / "README.md"


def _milliseconds(record: dict[str, Any]) -> str:
    return (
        f"{record['ms']:.4g} ({record['ms_low']:.3g} to {record['ms_high']:.3g})"
        if "ms_low" in record
        else f"{record['ms']:.4g}"
    )


# Title, the field that a record must have, and how it reads.
COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("ms, median (range)", "ms", _milliseconds),
    ("TFLOP/s", "tflops", lambda r: f"{r['tflops']:.3g}"),
    ("of matmul bound", "of_matmul_bound", lambda r: f"{r['of_matmul_bound']:.0%}"),
    ("of exp bound", "of_exp_bound", lambda r: f"{r['of_exp_bound']:.0%}"),
    ("extra MiB", "peak_bytes", lambda r: f"{r['peak_bytes'] / 2**20:.4g}"),
    ("first call, s", "first_call_s", lambda r: f"{r['first_call_s']:.2g}"),
    ("of a step", "share_of_step", lambda r: f"{r['share_of_step']:.2%}"),
    ("error, max", "error_max", lambda r: f"{r['error_max']:.1e}"),
    ("error, mean", "error_mean", lambda r: f"{r['error_mean']:.1e}"),
    ("error / allowed", "error_of_allowed", lambda r: f"{r['error_of_allowed']:.1g}"),
    ("error, L1", "error_l1", lambda r: f"{r['error_l1']:.1%}"),
    ("within 1.96 SE", "covered", lambda r: "all exact" if r["covered"] is None else f"{r['covered']:.1%}"),
    *(
        (f"within 1.96 SE, quarter {n}", f"covered_quarter_{n}", lambda r, n=n: f"{r[f'covered_quarter_{n}']:.1%}")
        for n in (1, 2, 3, 4)
    ),
    ("same top 20 %, mu", "same_top_mu", lambda r: f"{r['same_top_mu']:.1%}"),
    ("same top 20 %, importance", "same_top_importance", lambda r: f"{r['same_top_importance']:.1%}"),
)

BASELINES = {
    "linear_token_logprobs": "matmul",
    "score_batch": "bare forward",
    "training step": "without ENTRA",
    "sampled rows": "ours, exact",
}
"""The unit of the last column: times are multiples of this peer's. Of ours where nothing is named."""

SECTIONS = {
    "incoming_attention": "Every case of incoming_attention",
    "memory": "Memory of incoming_attention on top of q and k",
    "accuracy": "Column sums against float64",
    "sampled rows": "m sampled rows of N",
    "coverage": "Real coverage of sampled rows' standard error",
    "linear_token_logprobs": "Log-probs from hidden states (tokens x hidden size x vocabulary)",
    "token_logprobs": "Log-probs from logits",
    "redundancy": "Epilogue, by device events on a GPU",
    "redundancy, host clock": "Epilogue, by the host's clock",
    "copies": "Which tokens are copies",
    "score_batch": "score_batch and the forward that it rides on",
    "training step": "A GRPO step (generation, and the optimiser steps on it)",
    "test": "Tests that were not run",
}


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _records(content: Content, operation: str) -> list[dict[str, Any]]:
    return [record for record in content["records"] if record["operation"] == operation]


def _details(records: list[dict[str, Any]]) -> Iterator[str]:
    columns = [column for column in COLUMNS if any(column[1] in record for record in records)]
    skipped = [record for record in records if "skipped" in record]
    baseline = BASELINES.get(records[0]["operation"], "ours")
    units = {record["case"]: record["ms"] for record in records if record["name"] == baseline and "ms" in record}
    rows = (
        [
            f"{record['case']}, {record['date']}" if "date" in record else record["case"],
            record["name"],
            *(show(record) if field in record else "" for _, field, show in columns),
            *([f"{record['ms'] / units[record['case']]:.3g}" if record["case"] in units else ""] if units else []),
        ]
        for record in records
        if "skipped" not in record
    )
    if len(skipped) < len(records):
        header = ["case", "", *(title for title, _, _ in columns), *([f"times of {baseline}"] if units else [])]
        yield from _table(header, rows)
    if skipped:
        yield ""
        yield "Not measured:"
        yield ""
        by_reason: dict[tuple[str, str], list[str]] = {}
        for record in skipped:
            by_reason.setdefault((record["name"], record["skipped"]), []).append(record["case"])
        for (name, reason), of in by_reason.items():
            yield f"- {name} ({'; '.join(of)}): {reason}"


def _sweep(content: Content) -> list[dict[str, Any]]:
    return sorted(
        (r for r in _records(content, "incoming_attention") if r.get("sweep") == "tokens"), key=lambda r: int(r["tokens"])
    )


def _time_by_length(content: Content) -> Iterator[str]:
    records = _sweep(content)
    lengths = sorted({record["tokens"] for record in records})
    names = list(dict.fromkeys(record["name"] for record in records if "ms" in record))
    cell = {(record["name"], record["tokens"]): f"{record['ms']:.4g}" for record in records if "ms" in record}
    yield from _table(
        ["ms at N =", *(f"{tokens:,}" for tokens in lengths)],
        ([name, *(cell.get((name, tokens), "-") for tokens in lengths)] for name in names),
    )


def section(content: Content, plots: list[str]) -> Iterator[str]:
    """One device."""
    bounds = content["bounds"]
    software = [f"torch {content['torch']}", *(f"{name} {version}" for name, version in content["packages"].items())]
    yield f"## {content['device']}"
    yield ""
    yield f"`{content['command']}`, {content['date']}, sizes: {content['sizes']}, {content['threads']} threads of the host."
    yield f"Python {content['python']}, {', '.join(software)}."
    yield ""
    yield (
        f"The bounds, measured in the same run: matmul {bounds['matmul_flops'] / 1e12:.4g} TFLOP/s, "
        f"{bounds['exps'] / 1e9:.4g} billion exponentials/s, copy {bounds['copied_bytes'] / 1e9:.4g} GB/s (read + write)."
    )
    yield ""
    states = {True: "met", False: "**missed**", None: "not measured"}
    yield from _table(
        ["target", "measured", ""], ([verdict.target, verdict.measured, states[verdict.met]] for verdict in verdicts(content))
    )
    yield ""
    if _sweep(content):
        shape = _sweep(content)[0]
        yield f"{shape['heads']} query heads, {shape['kv_heads']} kv heads, D = {shape['head_dim']}, causal:"
        yield ""
        yield from _time_by_length(content)
        yield ""
    for plot, title in zip(plots, ("Time against N", "Share of the bounds against N"), strict=False):
        yield f"![{title}, {content['device']}]({plot})"
        yield ""
    for operation, title in SECTIONS.items():
        records = _records(content, operation)
        if not records:
            continue
        yield f"<details><summary>{title}</summary>"
        yield ""
        yield from _details(records)
        yield ""
        yield "</details>"
        yield ""


def draw(content: Content, folder: Path, stem: str) -> list[Path]:
    """Time against N and share of the bounds against N, as SVG. Draws nothing without matplotlib, or with a single N."""
    records = [record for record in _sweep(content) if "ms" in record]
    if len({record["tokens"] for record in records}) < 2 or importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "entra", "font.size": 9})
    from matplotlib import pyplot

    shape = f"{records[0]['heads']} query heads, {records[0]['kv_heads']} kv heads, D = {records[0]['head_dim']}"
    paths = []
    for kind, ylabel in (("time", "time, ms"), ("bound", "share of the bound, %")):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
        for name in dict.fromkeys(record["name"] for record in records):
            mine = [record for record in records if record["name"] == name]
            lengths = [record["tokens"] for record in mine]
            width = 2.2 if name.startswith("ours") else 1.1
            if kind == "time":
                style = "--" if name.startswith("SDPA") else "-"
                axes.plot(lengths, [r["ms"] for r in mine], style, marker=".", linewidth=width, label=name)
                continue
            for bound, style in (("matmul", "-"), ("exp", ":")):
                shares = [100 * r.get(f"of_{bound}_bound", 0) for r in mine]
                if any(shares):
                    axes.plot(lengths, shares, style, marker=".", linewidth=width, label=f"{name}: {bound}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({r["tokens"] for r in records}), [f"{n:,}" for n in sorted({r["tokens"] for r in records})])
        if kind == "time":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens N")
        axes.set_ylabel(ylabel)
        title = "Column sums of causal attention" if kind == "time" else "How much of what the machine can do"
        axes.set_title(f"{title}\n{content['device']}, {shape}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        paths.append(folder / f"{stem}-{kind}.svg")
        figure.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(figure)
    return paths


def render(folder: Path, readme: Path) -> str:
    """The tables of every file in `folder`. Plots go into the same folder; their links start at `readme`."""
    lines: list[str] = []
    for path, content in of_devices(folder):
        plots = [os.path.relpath(plot, readme.parent) for plot in draw(content, folder, path.stem)]
        lines += section(content, plots)
    return "\n".join(lines)


def between_markers(text: str, tables: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"no line {BEGIN} followed by {END} in the file to fill; put them back")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def of_devices(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of this suite and what they hold, in order; results of other commands lie beside them."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if "device" in content:
            yield path, content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", type=Path, help="write the tables alone into this file")
    arguments = parser.parse_args()
    if not list(of_devices(arguments.folder)):
        raise SystemExit(
            f"{arguments.folder} has no results of a device; run the benchmarks with --results {arguments.folder} first"
        )
    if arguments.readme is None:
        README.write_text(between_markers(README.read_text(), render(arguments.folder, README)))
    else:
        arguments.readme.write_text(f"# Measured\n\n{render(arguments.folder, arguments.readme)}\n")


if __name__ == "__main__":
    main()
