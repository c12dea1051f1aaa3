"""Tokens on lines of a given width, so that every token has its place and every place its token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

from entra.view.visible import NEWLINE, visible


class Span(NamedTuple):
    """A token on a line, or the part of it that fits there."""

    token: int
    """Its number in the completion."""
    text: str
    column: int
    """Of its first cell."""
    width: int
    """Cells."""


def wrapped(pieces: Sequence[str], width: int) -> list[list[Span]]:
    """Lines of at most `width` cells. A newline ends one; words, tokens up to the next one with a space in front, stay whole.

    Args:
        pieces: the tokens' texts; an empty one gets an empty span, so that each token is on some line.
        width: at least 1.
    """
    lines: list[list[Span]] = [[]]
    column = 0
    word: list[tuple[int, str, int]] = []

    def put() -> None:
        nonlocal column
        cells = sum(size for _, _, size in word)
        if column and column + cells > width >= cells:
            lines.append([])
            column = 0
        for token, text, size in word:
            if column + size <= width or not text:
                lines[-1].append(Span(token, text, column, size))
                column += size
                continue
            for part, part_size in _cut(text, width, column):
                if column + part_size > width and column:
                    lines.append([])
                    column = 0
                lines[-1].append(Span(token, part, column, part_size))
                column += part_size
        word.clear()

    for token, piece in enumerate(pieces):
        if piece[:1].isspace() and piece[:1] != "\n":
            put()
        *ended, rest = piece.split("\n")
        for text in ended:
            shown = visible(text) + NEWLINE
            word.append((token, shown, cell_len(shown)))
            put()
            lines.append([])
            column = 0
        if rest or not ended:
            shown = visible(rest)
            word.append((token, shown, cell_len(shown)))
    put()
    return lines


def _cut(text: str, width: int, column: int) -> list[tuple[str, int]]:
    """The text in parts that end where lines of `width` cells are full; the first line has room from `column` on."""
    parts: list[tuple[str, int]] = []
    part, size, room = "", 0, width - column
    for character in text:
        cells = cell_len(character)
        if part and size + cells > room:
            parts.append((part, size))
            part, size, room = "", 0, width
        elif not part and cells > room:
            room = width
        part += character
        size += cells
    return [*parts, (part, size)] if part else parts
