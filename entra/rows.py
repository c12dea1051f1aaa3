"""Input rows from JSON Lines or Parquet, one at a time and never the whole file in memory.

Decisions taken here:

- JSON Lines are read line by line and not through `datasets`, whose reader gives up on a whole file for one malformed line,
  and forces one type on a column. Only `\\n` ends a line: text may hold Unicode line separators. Blank lines are no rows.
- Parquet is streamed through `datasets`.
- NaN and Infinity, which JSON does not have, are read as Python and pandas write them, and written again as they came:
  refusing them would refuse every Parquet file with a missing number.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from entra.commands import CommandError, one_line


def is_finite(value: Any) -> bool:
    """Whether a field holds a number, true or false, that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


class Row(NamedTuple):
    """One row of the input: its columns, or none of them and what is wrong with the line."""

    columns: dict[str, Any]
    malformed: str | None = None


class Survey(NamedTuple):
    """What must be known of the input before the first row is scored."""

    rows: int
    columns: list[str]
    """Every column that some row has, in order of appearance."""
    sha256: str
    """Of the file."""


def survey(path: Path) -> Survey:
    """Rows, columns and fingerprint of a file, in one pass.

    Raises:
        CommandError: the file cannot be read, is not Parquet although its name ends in .parquet, or starts as something
            other than JSON Lines does.
    """
    check_readable_again(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            head = block = file.read(2**20)
            while block:
                digest.update(block)
                block = file.read(2**20)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from error
    if _is_parquet(path):
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        try:
            with ParquetFile(path) as parquet:
                return Survey(parquet.metadata.num_rows, parquet.schema_arrow.names, digest.hexdigest())
        except (ArrowException, OSError) as error:
            raise CommandError(
                f"{path} is not a Parquet file ({one_line(error)}); JSON Lines must not be named .parquet"
            ) from error
    _check_json_lines(path, head)
    rows = 0
    columns: dict[str, None] = {}
    for row in read_rows(path, 0):
        rows += 1
        columns.update(dict.fromkeys(row.columns))
    return Survey(rows, list(columns), digest.hexdigest())


def check_readable_again(path: Path, what: str = "") -> None:
    """Refuse a pipe: it is empty when it is read a second time.

    Raises:
        CommandError: such a file; `what` comes before its name.
    """
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        raise CommandError(
            f"cannot read {what}{path}: it is a pipe or a device, which can be read only once; write what comes out of it "
            "into a file first"
        )


def read_rows(path: Path, first: int) -> Iterator[Row]:
    """The rows of a file from row `first` (counted from 0) on; a malformed line is a row, too.

    Raises:
        CommandError: the file cannot be read any further.
    """
    parquet = _is_parquet(path)
    try:
        if parquet:
            yield from _parquet_rows(path, first)
        else:
            with path.open("rb") as file:
                for number, line in islice(_lines(file), first, None):
                    yield _parsed(number, line)
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's errors about damaged pages are one of these
        raise CommandError(
            f"cannot read {path} to its end: {one_line(error)}; the file is damaged or has changed, write it again", 1
        ) from error


def _parquet_rows(path: Path, first: int) -> Iterator[Row]:
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    for columns in stream.skip(first):
        yield Row(dict(columns))


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise CommandError("reading Parquet needs datasets; get it with: pip install datasets") from None
    return True


def _check_json_lines(path: Path, head: bytes) -> None:
    """Refuse a file whose start shows that it is something else; a line that is merely bad is a row with an error."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"\x1f\x8b"):
        found = "gzip; unpack it first"
    elif head.startswith(b"PAR1"):
        found = "Parquet; name it *.parquet"
    elif b"\0" in head.partition(b"\n")[0]:
        found = "a binary file, or text in UTF-16; write one JSON object a line, in UTF-8"
    elif re.match(rb"\[\s*(\{|$)", head):
        found = "a JSON array; write its objects one a line"
    else:
        return
    raise CommandError(f"{path} is not JSON Lines but starts as {found}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _parsed(number: int, line: bytes) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row({}, f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Row({}, f"line {number} cannot be parsed: {error}")
    if not isinstance(value, dict):
        return Row({}, f"line {number} holds a {type(value).__name__}; it must be an object with a field for each column")
    return Row(value)
