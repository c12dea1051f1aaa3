"""What the plots of the experiments share: colours that differ for every eye, and dots with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's; in the order in which series are drawn."""
REFERENCE: dict[str, Any] = {"color": "#777777", "linewidth": 1.2, "linestyle": "--", "zorder": 1}
"""How a line of chance or of no difference looks."""
_MARKERS = "osD^vPX"


def dots(
    axes: Any,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Sequence[float] | None]],
    colours: Sequence[str] = COLOURS,
) -> None:
    """One row for each label, from top to bottom. In it one dot with its interval for each series.

    Args:
        axes: matplotlib's.
        labels: of the rows.
        series: by name (mean, low, high) for each label; None draws nothing.
        colours: of the series.
    """
    step = 0.8 / max(len(series), 1)
    for s, (name, intervals) in enumerate(series.items()):
        rows = [(y, interval) for y, interval in enumerate(intervals) if interval is not None]
        offset = (s - (len(series) - 1) / 2) * step
        means = [interval[0] for _, interval in rows]
        axes.errorbar(
            means,
            [y + offset for y, _ in rows],
            xerr=[[max(0.0, i[0] - i[1]) for _, i in rows], [max(0.0, i[2] - i[0]) for _, i in rows]],
            fmt=_MARKERS[s % len(_MARKERS)],
            color=colours[s % len(colours)],
            markersize=5,
            capsize=2,
            label=name,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    for y in range(1, len(labels)):
        axes.axhline(y - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
