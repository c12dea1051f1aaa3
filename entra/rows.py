"""Rows of a file as they stand there, one at a time and never the whole file in memory.

Decisions taken here:

- Content tells gzip, Zstandard, Parquet, a JSON array and JSON Lines apart, whatever the file is called. A name that ends in
  .csv or .tsv, perhaps with .gz or .zst, says CSV, and .parquet must be Parquet. Where a name has no ending, as a pipe's, a
  first line of nothing but names says CSV.
- JSON Lines are read line by line and not through `datasets`, whose reader gives up on a whole file for one malformed line,
  and forces one type on a column. Only `\\n` ends a line: text may hold Unicode line separators. Blank lines are no rows.
- Parquet is streamed through `datasets`, Zstandard through `pyarrow`, which comes with it.
- JSON has no NaN and Infinity. They are read as Python and pandas write them, and written again as they came: otherwise every
  Parquet file with a missing number would be refused.
- CSV holds text. An empty cell is not there.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from entra.commands import CommandError, one_line

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What surrogateescape makes of bytes that are not UTF-8."""

_NAME = re.compile(r'\s*("[^":]+"|[^\W\d][^\t",:{}\[\]]*)\s*')
"""Of a column of CSV."""


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
    prompt: Any = None
    """Text, chat messages or token ids, as `entra.shapes` finds them; None where it has not looked, or there is none."""
    completion: Any = None
    """The same."""
    fault: str | None = None
    """"kind: message": why there is no prompt or no completion."""


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


class Format(NamedTuple):
    """How a file is read."""

    kind: str
    """parquet, csv, array or lines."""
    packed: str | None = None
    """gzip, zstd, or None."""
    delimiter: str = ","
    """Of CSV."""


def format_of(path: Path, name: Path) -> Format:
    """How to read the file at `path`, which is called `name`.

    Raises:
        CommandError: it cannot be read, needs a package that is missing, is not what its name says, or starts as something
            else than rows do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError as error:
        raise CommandError(f"cannot read {name}: {error.strerror or error}") from error
    packed = "gzip" if head.startswith(b"\x1f\x8b") else "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else None
    ending = name.suffix.lower()
    if packed is not None:
        if ending in (".gz", ".zst"):
            ending = name.with_suffix("").suffix.lower()
        try:
            with unpacked(path, packed) as unpacking:
                head = unpacking.read(2**16)
        except (OSError, EOFError, zlib.error) as error:
            raise CommandError(f"cannot read {name}: it starts as {packed}, but {one_line(error)}; write it again") from error
    if head.startswith(b"PAR1") or ending == ".parquet":
        if packed is not None:
            raise CommandError(f"{name} is Parquet inside {packed}; unpack it first")
        _check_parquet(path, name)
        return Format("parquet")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\0" in text.partition(b"\n")[0]:
        raise CommandError(
            f"{name} is not JSON Lines but starts as a binary file, or text in UTF-16; write one JSON object a line, in UTF-8"
        )
    if ending in (".csv", ".tsv"):
        return Format("csv", packed, "\t" if ending == ".tsv" else ",")
    if not ending and (delimiter := _delimiter(text)) is not None:
        return Format("csv", packed, delimiter)
    # A line of JSON Lines that holds a list of other things is a malformed row.
    return Format("array" if re.match(rb"\[\s*(\{|\]?\s*$)", text) else "lines", packed)


def _delimiter(text: bytes) -> str | None:
    """What is between the names of columns in the first line of CSV; None where that line is anything else."""
    line = text.partition(b"\n")[0].decode("utf-8", "replace").strip()
    return next((mark for mark in ",\t" if mark in line and all(map(_NAME.fullmatch, line.split(mark)))), None)


def _check_parquet(path: Path, name: Path) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise CommandError("reading Parquet needs datasets; get it with: pip install datasets") from None
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        ParquetFile(path).close()
    except (ArrowException, OSError) as error:
        raise CommandError(
            f"{name} is not a Parquet file ({one_line(error)}); JSON Lines must not be named .parquet"
        ) from error


def parquet_columns(path: Path) -> tuple[int, dict[str, bool]]:
    """The number of rows of a Parquet file, and its columns: whether each holds lists or objects."""
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as parquet:
        return parquet.metadata.num_rows, {field.name: types.is_nested(field.type) for field in parquet.schema_arrow}


def unpacked(path: Path, packed: str | None) -> IO[bytes]:
    """The file, open, as what it holds.

    Raises:
        CommandError: Zstandard without pyarrow.
        OSError: it cannot be opened.
    """
    if packed == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if packed == "zstd":
        return io.BufferedReader(zstandard().CompressedInputStream(str(path), "zstd"), 2**20)
    return path.open("rb")


def zstandard() -> Any:
    """pyarrow, which reads and writes it; CommandError without."""
    try:
        import pyarrow
    except ImportError:
        raise CommandError("Zstandard (.zst) needs pyarrow; get it with: pip install pyarrow") from None
    return pyarrow


def read_rows(path: Path, name: Path, form: Format, first: int = 0) -> Iterator[Row]:
    """The rows of a file from row `first` (counted from 0) on; a malformed line is a row, too.

    Raises:
        CommandError: the file, called `name`, cannot be read any further.
    """
    try:
        if form.kind == "parquet":
            yield from _parquet_rows(path, first)
            return
        with unpacked(path, form.packed) as file:
            if form.kind == "csv":
                yield from islice(_csv_rows(file, form.delimiter), first, None)
            elif form.kind == "array":
                yield from islice(_array_rows(file), first, None)
            else:
                for number, line in islice(_lines(cast(BinaryIO, file)), first, None):
                    yield _parsed(number, line)
    # pyarrow's errors about damaged pages, and those of the unpackers, are one of these
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise CommandError(
            f"cannot read {name} to its end: {one_line(error)}; the file is damaged or has changed, write it again", 1
        ) from error


def _parquet_rows(path: Path, first: int) -> Iterator[Row]:
    from datasets import load_dataset

    if parquet_columns(path)[0] == 0:  # of a file without columns datasets makes a row
        return
    stream = load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    for columns in stream.skip(first):
        yield Row(dict(columns))


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
    return _object(f"line {number}", value)


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row({}, f"{where} holds a {type(value).__name__}; it must be an object with a field for each column")
    return Row(value)


def _array_rows(file: IO[bytes]) -> Iterator[Row]:
    """The elements of a JSON array, one at a time. After one that cannot be parsed nothing tells where the next begins."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    buffer, at, size = "", 0, 2**16
    number = 0
    opened = ended = False

    def skip(places: int) -> int:
        return cast(re.Match[str], space.match(buffer, at + places)).end()

    while True:
        at = skip(0)
        if not opened and at < len(buffer):
            opened, at = True, skip(1)
        if number and buffer.startswith(",", at):
            at = skip(1)
        if buffer.startswith("]", at):
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
            whole = ended or end < len(buffer)  # else it may go on
        except (ValueError, RecursionError) as error:
            whole = False
            if ended:
                yield Row({}, f"element {number + 1} of the array cannot be parsed, and the rest is left out: {error}")
                return
        if not whole:
            more = text.read(size)
            buffer, at, ended = buffer[at:] + more, 0, not more
            size *= 2  # an element is parsed from its start each time
            continue
        number += 1
        size = 2**16
        written, at = buffer[at:end], end
        if _NOT_UTF8.search(written):
            yield Row({}, f"element {number} of the array is not UTF-8")
        else:
            yield _object(f"element {number} of the array", value)


def _csv_rows(file: IO[bytes], delimiter: str) -> Iterator[Row]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    limit = csv.field_size_limit(2**31 - 1)  # of a cell; the default of 131,072 characters is less than a long trace
    try:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise ValueError(f"the first line names a column twice: {', '.join(header)}")
        while True:
            start = lines.line_num + 1
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row({}, f"line {start} cannot be parsed: {error}")
                continue
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                yield Row({}, f"line {start} has {len(cells)} cells, but the first line names {len(header)} columns")
            elif any(map(_NOT_UTF8.search, cells)):
                yield Row({}, f"line {start} is not UTF-8")
            else:
                yield Row({name: cell for name, cell in zip(header, cells, strict=True) if cell})
    finally:
        csv.field_size_limit(limit)
