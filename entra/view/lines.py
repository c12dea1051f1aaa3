"""Traces in the terminal: a full-screen program where there is a terminal, else the same as plain text, trace after trace.

In plain text marks stand for colour: protected tokens are between « and ».
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TextIO

from entra.view.blocks import bars, column_chart, scatter
from entra.view.trace import Trace
from entra.view.visible import NEWLINE, quoted, visible

PROTECTED = ("«", "»")
RUN_LENGTHS = (1, 2, 4, 8)
"""Tokens of the runs whose repetitions are listed."""


def show(traces: Sequence[Trace], *, title: str, facts: Mapping[str, str], interactive: bool) -> None:
    """Show traces until the user ends it, or print them.

    Args:
        traces: at least one.
        title: of the whole, such as the name of the file.
        facts: further ones for the heading, by name.
        interactive: whether there is a terminal to show them in; else they are printed to standard output.

    Raises:
        ImportError: textual is missing, or rich.
    """
    if interactive:
        from entra.view.terminal_app import Inspector

        Inspector(traces, title=title, facts=facts).run()
    else:
        print_traces(traces, title=title, facts=facts, file=sys.stdout)


def print_traces(traces: Sequence[Trace], *, title: str, facts: Mapping[str, str], file: TextIO) -> None:
    """Print every trace with its numbers and charts, then all of them in one table and one chart."""
    from rich.console import Console
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="backslashreplace")  # where the locale has not all characters
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    width = min(console.width, 120)

    def lines(text: list[str] | str) -> None:
        for line in [text] if isinstance(text, str) else text:
            console.print(Text(line), soft_wrap=True)

    lines(visible(title))
    lines([f"{visible(name)}: {visible(value)}" for name, value in facts.items()])
    lines(
        f"Protected tokens, which the reward does not look at, are between {' and '.join(PROTECTED)}; {NEWLINE} is a newline."
    )
    for trace in traces:
        console.print(Rule(Text(visible(trace.name)), align="left"), width=width)
        lines(about(trace))
        lines("")
        lines(with_marks(trace))
        lines("")
        if trace.error is None:
            lines([*charts(trace, width), ""])
    console.print(Rule(Text("all traces"), align="left"), width=width)
    table = Table(box=None, pad_edge=False)
    table.add_column("trace", overflow="fold", ratio=1)
    for heading in COLUMNS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for trace in traces:
        table.add_row(*map(Text, row_of(trace)))
        if trace.error is not None:
            table.add_row(Text("  " + visible(trace.error)))
    console.print(table, width=width)
    good = [trace for trace in traces if trace.reward is not None]
    lines(["", *rewards_chart(good, width, 14)])


COLUMNS = ("trace", "reward", "tokens", "entropy, nats", "repeated, %")


def row_of(trace: Trace) -> list[str]:
    """A trace's cells in a table of `COLUMNS`."""
    if trace.error is not None or trace.reward is None:
        return [visible(trace.name), "error", "", "", ""]
    numbers = [f"{trace.reward:.3f}", f"{len(trace.token_ids):,}", f"{trace.entropy:.2f}", f"{100 * trace.repeated_share:.1f}"]
    return [visible(trace.name), *numbers]


def summary(trace: Trace) -> str:
    """A trace's numbers in a line."""
    if trace.error is not None or trace.reward is None:
        return f"error: {visible(trace.error or 'no reward')}"
    protected = len(trace.token_ids) - trace.unprotected
    return (
        f"reward {trace.reward:.3f} · {len(trace.token_ids):,} tokens, {protected:,} protected · "
        f"entropy {trace.entropy:.2f} nats · {100 * trace.repeated_share:.1f} % of the unprotected tokens repeat an earlier one"
    )


def about(trace: Trace) -> list[str]:
    """A trace's numbers, its other columns and its prompt, in lines."""
    columns = [f"{visible(name)}: {visible(str(value))}" for name, value in trace.columns.items()]
    prompt = [f"│ {visible(line)}" for line in trace.prompt.split("\n")]
    return [summary(trace), *([" · ".join(columns)] if columns else []), *prompt]


def with_marks(trace: Trace) -> list[str]:
    """The completion in lines, neighbouring protected tokens between marks."""
    text = ""
    for protected, group in groupby(zip(trace.pieces, trace.protected, strict=True), key=lambda token: token[1]):
        run = "".join(piece for piece, _ in group)
        inside = run.strip(" \n") or run  # marks stand at words, not at the space around them
        text += run.replace(inside, PROTECTED[0] + inside + PROTECTED[1], 1) if protected and run else run
    lines = [visible(line) for line in text.split("\n")]
    return [line + NEWLINE for line in lines[:-1]] + lines[-1:]


def charts(trace: Trace, width: int) -> list[str]:
    """Importance over position and what comes most often, in lines."""
    lines = column_chart(trace.importance, width, 8, label="importance, log-prob in nats + lambda x attention", axis="token")
    for length in RUN_LENGTHS:
        what = "unprotected tokens" if length == 1 else f"runs of {length} tokens, protected or not"
        found = trace.most_repeated(length, limit=8 if length == 1 else 5)
        lines += ["", *bars(found, width, label=f"most repeated {what}, times")]
    return lines


def rewards_chart(traces: Sequence[Trace], width: int, height: int, marked: int | None = None) -> list[str]:
    """Reward against length of traces that have a reward."""
    points: list[tuple[float, float]] = [(len(trace.token_ids), trace.reward or 0.0) for trace in traces]
    return scatter(points, width, height, x="length, tokens", y="reward", marked=marked)


def token_facts(trace: Trace, token: int) -> list[str]:
    """What is known of a token, in lines."""
    times = trace.counts[trace.token_ids[token]]
    share = f" ({100 * times / trace.unprotected:.1f} %)" if trace.unprotected else ""
    return [
        f"token {token + 1:,} of {len(trace.token_ids):,}: {quoted(trace.pieces[token])}, id {trace.token_ids[token]}, "
        + ("protected" if trace.protected[token] else "not protected"),
        f"log-prob {trace.logprobs[token]:.3f} nats · incoming attention {trace.incoming[token]:.6f} · "
        f"importance {trace.importance[token]:.3f}",
        f"occurs {times:,} times among the {trace.unprotected:,} unprotected tokens{share}",
    ]
