"""Marks that a row brings along, such as the category of each sentence: from characters of the completion to its tokens."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple


class Mark(NamedTuple):
    """A stretch of a completion with a label, or a place in it."""

    label: str
    first: int
    """The token of its first character, from 0."""
    last: int
    """The token of its last character."""
    start: int
    """Its first character, from 0."""
    end: int
    """The character after its last one; of a place the same as `start`."""

    @property
    def is_place(self) -> bool:
        """Whether it is one character's place, not a stretch."""
        return self.start == self.end


def marks_of(column: str, value: Any, pieces: Sequence[str], completion: str | None) -> tuple[list[Mark], str | None]:
    """What a column says of a completion, and what is wrong with it.

    Args:
        column: its name, which is the label of what has none.
        value: a list of {start, end, label}, by character of the completion and without its end; one character's number; the
            same as JSON text; or None for no marks.
        pieces: the tokens' texts.
        completion: to which the characters belong; None: to the joined pieces.

    Returns:
        the marks in the order of their starts, and why others were left out (None where none were).
    """
    text = "".join(pieces)
    known = len(text)
    if completion is not None:
        pairs = enumerate(zip(text, completion, strict=False))
        known = next((i for i, (one, other) in pairs if one != other), min(len(text), len(completion)))
    ends = list(accumulate(map(len, pieces)))
    marks, faults = [], []
    for label, start, end in _stretches(column, value):
        if start is None or end is None or not 0 <= start <= end:
            faults.append("has no start and end in characters, 0 <= start < end")
        elif max(end, start + 1) > known:
            why = "the end of the text" if known == len(text) else "where the tokens' text differs from the completion"
            faults.append(f"reaches beyond character {known:,}, {why}")
        else:
            last = bisect_left(ends, end) if end > start else bisect_right(ends, start)
            marks.append(Mark(label, bisect_right(ends, start), last, start, end))
    left_out = None
    if faults:
        total = len(faults) + len(marks)
        left_out = f"{column}: {len(faults):,} of {total:,} marks are left out; the first {faults[0]}"
    return sorted(marks, key=lambda mark: (mark.start, -mark.end)), left_out


def _stretches(column: str, value: Any) -> Iterator[tuple[str, int | None, int | None]]:
    """Label, start and end of each mark; None for what is no number of a character."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):  # as CSV has it
        with suppress(ValueError):
            value = json.loads(value)
    if value is None or value != value:  # pandas writes NaN for what is not there
        return
    if not isinstance(value, list | tuple):
        place = _character(value)
        yield column, place, place
        return
    for entry in value:
        given = entry if isinstance(entry, Mapping) else {}
        start, end = _character(given.get("start")), _character(given.get("end"))
        yield _label(given.get("label"), column), start, None if start == end else end


def _label(label: Any, column: str) -> str:
    if label is None or label == []:
        return column
    return label if isinstance(label, str) else json.dumps(label, ensure_ascii=False, default=str)


def _character(value: Any) -> int | None:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole else None
