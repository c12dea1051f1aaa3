"""Input rows from JSON Lines or Parquet, one at a time and never the whole file in memory.

Decisions taken here:

- JSON Lines are read line by line and not through `datasets`, whose reader gives up on a whole file for one malformed line,
  and forces one type on a column. Only `\\n` ends a line: text may hold Unicode line separators. Blank lines are no rows.
- Parquet is streamed through `datasets`.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from entra.cli import CommandError


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
        CommandError: the file cannot be read, or is not Parquet although its name ends in .parquet.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from error
    if _is_parquet(path):
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        try:
            with ParquetFile(path) as parquet:
                return Survey(parquet.metadata.num_rows, parquet.schema_arrow.names, digest.hexdigest())
        except ArrowException as error:
            raise CommandError(f"{path} is not a Parquet file ({error}); JSON Lines must not be named .parquet") from error
    rows = 0
    columns: dict[str, None] = {}
    for row in read_rows(path, 0):
        rows += 1
        columns.update(dict.fromkeys(row.columns))
    return Survey(rows, list(columns), digest.hexdigest())


def read_rows(path: Path, start: int) -> Iterator[Row]:
    """The rows of a file from row `start` (counted from 0) on; a malformed line is a row, too."""
    if not _is_parquet(path):
        with path.open("rb") as file:
            for number, line in islice(_lines(file), start, None):
                yield _parsed(number, line)
        return
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    for columns in stream.skip(start):
        yield Row(dict(columns))


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise CommandError("reading Parquet needs datasets; get it with: pip install datasets") from None
    return True


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
