"""Charts of characters, each a list of lines that fit a width; for terminals, logs and notebooks without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from textwrap import wrap

from entra.view.trace import Repeated
from entra.view.visible import quoted

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_LEFT_EIGHTHS = ("", *"▏▎▍▌▋▊▉█")
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille character by column and row."""


def column_chart(values: Sequence[float], width: int, height: int, *, label: str, axis: str) -> list[str]:
    """Columns of means over position, from the lowest to the highest of them.

    Args:
        values: n numbers in order.
        width, height: of the whole chart, in cells. A column stands for n / columns neighbouring values, or for one if they
        fit.
        label: of the values, with their unit; stands on top.
        axis: of the position; stands below, between the first and the last number.
    """
    if not values:
        return wrap(f"{label}: none", width)
    columns = min(len(values), max(1, width - 9))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    each = f"; mean of {len(values) / columns:.3g} tokens a column" if columns < len(values) else ""
    lines = wrap(label + each, width)
    rows = max(1, height - 1 - len(lines))
    step = (high - low) / (8 * rows) or 1.0
    levels = [max(1, round((mean - low) / step)) for mean in means]
    for row in reversed(range(rows)):
        mark = f"{high:8.3g} " if row == rows - 1 else f"{low:8.3g} " if row == 0 else " " * 9
        lines.append(mark + "".join(_EIGHTHS[min(8, max(0, level - 8 * row))] for level in levels))
    last = f"{len(values):,}"
    middle = axis.center(max(0, columns - len(last) - 1))[: max(0, columns - len(last) - 1)]
    lines.append(" " * 9 + ("1" + middle + last if columns > len(last) else last))
    return lines


def bars(items: Sequence[Repeated], width: int, *, label: str) -> list[str]:
    """One line for each: how often, a bar in proportion, the text."""
    if not items:
        return wrap(f"{label}: none", width)
    most = max(item.times for item in items)
    digits = len(f"{most:,}")
    room = max(4, min(24, width // 3))
    lines = wrap(label, width)
    for item in items:
        eighths = max(1, round(8 * room * item.times / most))
        bar = "█" * (eighths // 8) + _LEFT_EIGHTHS[eighths % 8]
        lines.append(_fitted(f"{item.times:{digits},} {bar:<{room}} {quoted(item.text)}", width))
    return lines


def scatter(
    points: Sequence[tuple[float, float]], width: int, height: int, *, x: str, y: str, marked: int | None = None
) -> list[str]:
    """Points as dots, eight to a character; both axes from the lowest to the highest value.

    Args:
        points: (x, y) pairs.
        x, y: names of the axes with their units.
        marked: the number of a point that is shown as a diamond.
    """
    if not points:
        return [f"{y} against {x}: none"]
    columns, rows = max(1, width - 9), max(1, height - 2)
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))

    def place(value: float, first: float, last: float, size: int) -> int:
        return round((value - first) / (last - first) * (size - 1)) if last > first else size // 2

    cells = [[0] * columns for _ in range(rows)]
    places = [(place(a, left, right, 2 * columns), 4 * rows - 1 - place(b, low, high, 4 * rows)) for a, b in points]
    for across, down in places:
        cells[down // 4][across // 2] |= _DOTS[across % 2][down % 4]
    grid = [[chr(0x2800 + bits) if bits else " " for bits in row] for row in cells]
    if marked is not None:
        grid[places[marked][1] // 4][places[marked][0] // 2] = "◆"
    lines = [_fitted(f"{y} against {x}" + ("; ◆ is the trace of the cursor" if marked is not None else ""), width)]
    for number, row in enumerate(grid):
        mark = f"{high:8.3g} " if number == 0 else f"{low:8.3g} " if number == rows - 1 else " " * 9
        lines.append(mark + "".join(row))
    first, last = f"{left:,.0f}", f"{right:,.0f}"
    lines.append(" " * 9 + first + " " * max(1, columns - len(first) - len(last)) + last)
    return lines


def _fitted(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, max(1, width - 1)) + "…"
