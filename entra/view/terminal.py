"""Traces in the terminal: a full-screen program where there is a terminal, else the same as plain text, trace after trace.

In plain text marks stand for colour: protected tokens are between « and ».
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from entra.view.lines import COLUMNS, PROTECTED, about, charts, rewards_chart, row_of, with_marks
from entra.view.trace import Trace
from entra.view.visible import NEWLINE, visible


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
