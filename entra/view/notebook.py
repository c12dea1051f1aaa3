"""Scores in a notebook: HTML without scripts for IPython, plain text for a terminal.

Colours are translucent and text keeps the notebook's own, so that light and dark themes both work. Token text is escaped:
markup in a completion is shown, never run.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from entra.view.lines import marks, summary, with_marks
from entra.view.trace import Trace
from entra.view.visible import visible

_SHADE = "230, 150, 30"
_PROTECTED = "outline: 1px solid currentColor; outline-offset: -1px; border-radius: 2px;"
_TEXT = "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; line-height: 1.6; unicode-bidi: plaintext;"


class NotebookView:
    """What `entra.Scores.show` returns: traces that a notebook shows as HTML, and everything else as text.

    Args:
        traces: to show.
        more: a line about what is not shown; empty when all is.
    """

    def __init__(self, traces: Sequence[Trace], more: str = "") -> None:
        self._traces = traces
        self._more = more

    def __repr__(self) -> str:
        parts = [line for trace in self._traces for line in (visible(trace.name), summary(trace), *with_marks(trace), "")]
        return "\n".join([*parts, *([self._more] if self._more else [])]).rstrip("\n")

    def _repr_html_(self) -> str:
        traces = "".join(map(_trace, self._traces))
        legend = (
            f'<p style="opacity: 0.8"><span style="background: rgba({_SHADE}, 0.05)">low</span> to '
            f'<span style="background: rgba({_SHADE}, 0.5)">high</span> importance; '
            f'<span style="{_PROTECTED}">protected</span> tokens, which the reward does not look at, are outlined. '
            "Point at a token for its numbers.</p>"
        )
        return f"<div>{legend}{traces}{f'<p>{html.escape(self._more)}</p>' if self._more else ''}</div>"


def _trace(trace: Trace) -> str:
    heading = f"<b>{html.escape(visible(trace.name))}</b>: {html.escape(summary(trace))}"
    shown = zip(_strengths(trace.importance), marks(trace.protected), strict=True)
    tokens = "".join(_token(trace, i, strength, mark) for i, (strength, mark) in enumerate(shown))
    return f'<details open><summary>{heading}</summary><div style="{_TEXT}">{tokens}</div></details>'


def _token(trace: Trace, i: int, strength: float, mark: int) -> str:
    token = trace.token_ids[i]
    numbers = (
        f"token {i + 1}, id {token}\nlog-prob {trace.logprobs[i]:.3f}\nincoming attention {trace.incoming[i]:.5f}\n"
        f"importance {trace.importance[i]:.3f}\n{trace.scores.counts[token]} times among the unprotected tokens"
    )
    style = f"background: rgba({_SHADE}, {0.05 + 0.45 * strength:.2f});{_PROTECTED if mark else ''}"
    text = "\n".join(visible(line) for line in trace.pieces[i].split("\n"))
    return f'<span title="{html.escape(numbers)}" style="{style}">{html.escape(text)}</span>'


def _strengths(importance: Sequence[float]) -> list[float]:
    """Each token's rank among the others, from 0, least important, to 1; equal ones have equal strengths."""
    ordered = sorted(set(importance))
    rank = {value: i / max(1, len(ordered) - 1) for i, value in enumerate(ordered)}
    return [rank[value] for value in importance]
