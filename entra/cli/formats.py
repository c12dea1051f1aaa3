"""The formats of an output, by its name. Rows are appended as JSON Lines; other formats are made of them when all are there.

Decisions taken here:

- Parquet has one type for a column. A column whose values have none in common holds each of them as JSON.
- CSV holds text: lists and objects are JSON, what is not there is an empty cell.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from entra.cli import CommandError
from entra.rows import zstandard

PART = ".part"
"""What follows the output's name in that of the JSON Lines that it is made of."""
_KINDS = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet", ".json": "array", ".csv": "csv", ".tsv": "csv"}
_CHUNK = 200
"""Rows of a row group: with --details, each can hold a few numbers for tens of thousands of tokens."""


def kind_of_output(path: Path) -> str:
    """How a file of that name is written: lines, where its name says nothing else.

    Raises:
        CommandError: the name says what cannot be written, or a package is missing.
    """
    kind = _KINDS.get(path.suffix.lower(), "lines")
    inside = path.with_suffix("").suffix.lower()
    if kind in ("gzip", "zstd") and inside in (".parquet", ".csv", ".tsv", ".json"):
        raise CommandError(f"--output {path}: only JSON Lines are packed; name it *.jsonl{path.suffix}, or {path.stem}")
    if kind == "zstd":
        zstandard()
    if kind == "parquet":
        try:
            import pyarrow.parquet  # type: ignore[import-untyped] # noqa: F401
        except ImportError:
            raise CommandError("writing Parquet needs pyarrow; get it with: pip install pyarrow") from None
    return kind


def part_of(path: Path) -> Path:
    """Where the rows of an output are until all are there: itself, if it is JSON Lines."""
    return path if kind_of_output(path) == "lines" else path.with_name(path.name + PART)


def convert(lines: Path, path: Path) -> list[str]:
    """Make of a file of JSON Lines what `path` says by its name. It stands there whole, or as it was.

    Returns:
        the columns of Parquet that hold JSON.

    Raises:
        OSError: it cannot be written.
    """
    kind = kind_of_output(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    mixed: list[str] = []
    try:
        if kind == "parquet":
            mixed = _write_parquet(lines, unfinished)
        elif kind == "zstd":
            with lines.open("rb") as file, zstandard().CompressedOutputStream(str(unfinished), "zstd") as packed:
                shutil.copyfileobj(file, packed)
        elif kind == "gzip":
            # Without a time and a name the same rows are the same bytes.
            with lines.open("rb") as file, unfinished.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as gz:
                shutil.copyfileobj(file, gz)
        else:
            with unfinished.open("w", encoding="utf-8", newline="" if kind == "csv" else None) as text:
                if kind == "csv":
                    _write_csv(lines, text, "\t" if path.suffix.lower() == ".tsv" else ",")
                else:
                    _write_array(lines, text)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return mixed


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _write_array(lines: Path, text: Any) -> None:
    before = "[\n"
    with lines.open(encoding="utf-8") as file:
        for line in file:
            text.write(before + line.removesuffix("\n"))
            before = ",\n"
    text.write("[]\n" if before == "[\n" else "\n]\n")


def _write_csv(lines: Path, text: Any, delimiter: str) -> None:
    columns = dict.fromkeys(name for row in _rows(lines) for name in row)
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(map(_encodable, columns))
    for row in _rows(lines):
        writer.writerow([_cell(row.get(name)) for name in columns])


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return _encodable(value)
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def _encodable(text: str) -> str:
    """A text with halves of surrogate pairs, which only JSON can hold, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_parquet(lines: Path, path: Path) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    types: dict[str, Any] = {}
    for chunk in _chunks(lines):
        for name in dict.fromkeys(name for row in chunk for name in row):
            found = _type_of([row.get(name) for row in chunk])
            types[name] = found if name not in types else _common(types[name], found)
    schema = pa.schema([(_encodable(name), pa.string() if kind is None else kind) for name, kind in types.items()])
    mixed = [name for name, kind in types.items() if kind is None]
    with parquet.ParquetWriter(path, schema) as writer:
        for chunk in _chunks(lines):
            for row in chunk:
                row.update({name: json.dumps(row[name]) for name in mixed if row.get(name) is not None})
            rows = [{_encodable(name): value for name, value in row.items()} for row in chunk]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return mixed


def _chunks(lines: Path) -> Iterator[list[dict[str, Any]]]:
    rows = _rows(lines)
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _type_of(values: list[Any]) -> Any:
    """The type of a column of Parquet that holds these values as they are; None where there is none."""
    import pyarrow as pa

    try:
        array = pa.array(values)
        # A type that drops or changes a value, such as that of objects with different keys, is none.
        return array.type if _can_be_written(array.type) and _same(array.to_pylist(), values) else None
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or json.dumps(one) == json.dumps(other)  # NaN is not equal to itself


def _can_be_written(kind: Any) -> bool:
    """Parquet has no objects without fields."""
    from pyarrow import types

    inside = [kind.field(i).type for i in range(kind.num_fields)]
    return not (types.is_struct(kind) and not inside) and all(map(_can_be_written, inside))


def _keys(kind: Any) -> frozenset[str]:
    """The keys of the objects inside, with what they are inside of."""
    from pyarrow import types

    fields = [kind.field(i) for i in range(kind.num_fields)]
    own = frozenset(field.name for field in fields) if types.is_struct(kind) else frozenset()
    return own.union(f"{field.name}.{inner}" for field in fields for inner in _keys(field.type))


def _common(one: Any, other: Any) -> Any:
    import pyarrow as pa

    if one is None or other is None:
        return None
    if len({keys for keys in (_keys(one), _keys(other)) if keys}) > 1:
        return None  # pyarrow would give each object the other's keys
    try:
        found = pa.unify_schemas([pa.schema([("x", one)]), pa.schema([("x", other)])], promote_options="permissive")
    except pa.ArrowException:
        return None
    return found.field("x").type
