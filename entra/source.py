"""The input of a command: files, folders, patterns and pipes as one sequence of rows with prompt and completion.

Decisions taken here:

- A folder is read with all below it, in the order of names: *.jsonl, *.json, *.csv, *.tsv (each perhaps with .gz or .zst) and
  *.parquet. Hidden files, the records of `entra score`, the output, and JSON that holds no rows are left out. So are
  the last three of what a pattern finds.
- Columns for prompt and completion are found for each file by itself (`entra.shapes`).
- A pipe is written into a temporary file first: which columns there are must be known before the first row is scored.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from entra.commands import CommandError
from entra.rows import Format, Row, format_of, parquet_columns, read_rows
from entra.shapes import (
    ANSWERS,
    INDEX,
    REQUEST,
    Taken,
    columns_of,
    count,
    from_table,
    is_request,
    prompt_of_request,
    rows_of,
    take,
    take_if_any,
)

SIDECAR = ".meta.json"
"""The record beside an output of `entra score` has the output's name with this behind it."""
PIPE = Path("-")
"""Stands for stdin, and as an output for stdout."""
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")


class File(NamedTuple):
    """One file of the input, looked at before its first row is scored."""

    path: Path
    name: Path
    """What it was called: it differs from `path` for a pipe."""
    form: Format
    taken: Taken
    why: str | None
    """Why nothing was taken for prompt or completion."""
    lines: int
    """Rows as they stand there."""
    rows: int
    """More than that where one holds several completions."""
    columns: list[str]
    more: dict[str, int]
    """How many more rows than lines there are if this column holds the completions."""
    sha256: str


class Source:
    """What a command reads.

    Args:
        names: files, folders, shell patterns, "-" for stdin.
        prompt: the column of the prompt. None: it is found.
        completion: the column of the completion. None: it is found.
        limit: only so many rows.
        output: the file that is written. A folder or pattern that holds it is read without it.
        required: whether there must be a prompt and a completion.

    Raises:
        CommandError: a file cannot be read, or nobody can tell its columns. The message says what to do.
    """

    def __init__(
        self,
        names: Sequence[Path],
        *,
        prompt: str | None = None,
        completion: str | None = None,
        limit: int | None = None,
        output: Path | None = None,
        required: bool = True,
    ) -> None:
        if limit is not None and limit < 1:
            raise CommandError(f"--limit {limit} must be at least 1 row")
        self.title = ", ".join(map(str, names))
        self.left_out: list[Path] = []
        """Files of a folder that hold no rows."""
        self._temporary: list[Any] = []  # what came out of pipes; gone when this object is
        self._limit = limit
        self._names = (prompt, completion)
        found = [path for name in names for path in self._files(name, output)]
        looked = [self._look(path) for path in dict.fromkeys(found)]
        self._requests = self._read_requests([file for file in looked if is_request(file.columns)])
        self.files = [self._taken(file, required) for file in looked if self._requests is None or not is_request(file.columns)]
        if not self.files:
            raise CommandError(f"{self.title} holds the requests of a batch alone; name the file of its output, too")
        self.paths = [file.path for file in looked]
        self.columns = list(dict.fromkeys(name for f in self.files for name in columns_of(f.columns, f.taken, self._requests)))
        total = sum(file.rows for file in self.files)
        self.rows = total if limit is None else min(limit, total)
        digests = [file.sha256 for file in looked]
        self._sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def piped(self) -> bool:
        """Whether some of it was a pipe, which cannot be read again."""
        return bool(self._temporary)

    @property
    def taken(self) -> dict[str, Any]:
        """The columns that were taken for prompt and completion; lists where files differ."""
        pairs = list(dict.fromkeys(file.taken for file in self.files))
        return pairs[0]._asdict() if len(pairs) == 1 else {"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]}

    def has_prompt(self) -> list[str]:
        """The name `prompt` where every row could have one, whatever its column is called."""
        lacking = (None, REQUEST) if self._requests is None else (None,)
        return [] if any(file.taken.prompt in lacking for file in self.files) else ["prompt"]

    def record(self) -> dict[str, Any]:
        """What tells this input from another."""
        return {"rows": sum(f.rows for f in self.files), "columns": self.columns, "sha256": self._sha256, "taken": self.taken}

    def lines(self) -> list[str]:
        """What was taken for prompt and completion, and what was left out, for people."""
        pairs: dict[Taken, list[File]] = {}
        for file in self.files:
            if file.taken.completion is not None:
                pairs.setdefault(file.taken, []).append(file)
        told = []
        for taken, files in pairs.items():
            name = self.title if len(pairs) == 1 else f"{files[0].name}" + (f" and {len(files) - 1} more" if files[1:] else "")
            several = sum(file.rows > file.lines for file in files)
            told.append(f"{name}: {taken}" + ("; several completions in one row become rows" if several else ""))
        if self.left_out:
            told.append(f"left out, without rows: {', '.join(map(str, self.left_out))}")
        return told

    def read(self, first: int = 0) -> Iterator[Row]:
        """The rows from row `first` (counted from 0) on; a bad one is a row, too.

        Raises:
            CommandError: a file cannot be read any further, or has become shorter.
        """
        return islice(self._read(first), None if self._limit is None else max(0, self._limit - first))

    def _read(self, first: int) -> Iterator[Row]:
        for file in self.files:
            start, first = first, max(0, first - file.rows)
            if start >= file.rows:
                continue
            found = start
            for row in islice(self._rows(file, start), file.rows - start):
                found += 1
                yield row
            if found < file.rows:
                raise CommandError(f"{file.name} has become shorter; it had {file.rows} rows when the run began", 1)

    def _rows(self, file: File, first: int) -> Iterator[Row]:
        each = file.rows == file.lines
        stream = (
            made
            for row in _raw(file.path, file.name, file.form, first if each else 0)
            for made in rows_of(row, file.taken, file.why, self._requests)
        )
        return stream if each else islice(stream, first, None)

    def _files(self, name: Path, output: Path | None) -> list[Path]:
        if name == PIPE or (not os.path.exists(name) and not glob.has_magic(str(name))):
            return [name]
        if os.path.isdir(name):
            found = sorted(path for path in name.rglob("*") if _ending(path) and not _hidden(path.relative_to(name)))
            what = f"the folder {name} has no file *{', *'.join(_ENDINGS)} or *.parquet with rows"
        elif os.path.exists(name):
            return [name]
        else:
            matching = map(Path, glob.glob(str(name), recursive=True))
            found = sorted(path for path in matching if path.is_file() and not path.name.endswith(SIDECAR))
            what = f"no file matches {name}"
        holding: list[Path] = []
        for path in found:
            (self.left_out if _ending(path) == ".json" and not _holds_rows(path) else holding).append(path)
        kept = [path for path in holding if output is None or not (output.exists() and path.samefile(output))]
        if not kept:
            raise CommandError(what)
        return kept

    def _look(self, name: Path) -> File:
        """A file before prompt and completion are known: the counts are those of its lines."""
        path = self._readable(name)
        form = format_of(path, name)
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise CommandError(f"cannot read {name}: {error.strerror or error}") from error
        columns: dict[str, None] = {}
        more = dict.fromkeys([*ANSWERS, *(column for column in self._names[1:] if column is not None)], 0)
        if form.kind == "parquet":
            lines, nested = parquet_columns(path)
            columns.update(dict.fromkeys(nested))
        else:
            lines = 0
            for row in _raw(path, name, form, 0):
                lines += 1
                columns.update(dict.fromkeys(row.columns))
                for column in more:
                    if column in row.columns:
                        more[column] += count(row.columns[column]) - 1
        return File(path, name, form, Taken(None, None), None, lines, lines, list(columns), more, digest.hexdigest())

    def _readable(self, name: Path) -> Path:
        """The file itself, or a copy of what comes out of a pipe."""
        if name != PIPE and (not os.path.exists(name) or name.is_file()):
            return name
        if name.is_dir():
            raise CommandError(f"cannot read {name}: Is a directory")
        copy = tempfile.NamedTemporaryFile(prefix="entra-")  # noqa: SIM115
        self._temporary.append(copy)
        try:
            if name == PIPE:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            else:
                with name.open("rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
            copy.flush()
        except OSError as error:
            raise CommandError(f"cannot read {name}: {error.strerror or error}") from error
        return Path(copy.name)

    def _read_requests(self, files: Sequence[File]) -> dict[str, Any] | None:
        if not files:
            return None
        return {
            str(row.columns["custom_id"]): prompt_of_request(row.columns)
            for file in files
            for row in _raw(file.path, file.name, file.form, 0)
            if "custom_id" in row.columns
        }

    def _taken(self, file: File, required: bool) -> File:
        if required:
            taken, why = take(file.columns, *self._names, where=str(file.name)), None
        else:
            taken, why = take_if_any(file.columns, *self._names)
        if taken.completion is None or taken.completion == taken.prompt:
            return file._replace(taken=taken, why=why)
        if file.form.kind == "parquet":
            rows = file.lines
            if parquet_columns(file.path)[1].get(taken.completion):
                rows = sum(count(row.columns[taken.completion]) for row in _raw(file.path, file.name, file.form, 0))
        else:
            rows = file.lines + file.more.get(taken.completion, 0)
        if rows > file.lines and INDEX in file.columns:
            raise CommandError(
                f"{file.name}: rows hold several completions, whose number goes into the column {INDEX}; the file has one "
                "already: rename it"
            )
        return file._replace(taken=taken, why=why, rows=rows)


def _raw(path: Path, name: Path, form: Format, first: int) -> Iterator[Row]:
    for row in read_rows(path, name, form, first):
        yield Row(from_table(row.columns), row.malformed) if form.kind == "csv" else row


def _ending(path: Path) -> str | None:
    """The ending of a file in a folder that may hold rows; None for others."""
    if path.name.endswith(SIDECAR) or not path.is_file():
        return None
    ending = path.suffix.lower()
    if ending == ".parquet":
        return ending
    if ending in (".gz", ".zst"):
        ending = path.with_suffix("").suffix.lower()
    return ending if ending in _ENDINGS else None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _holds_rows(path: Path) -> bool:
    """Whether JSON is an array, or begins with an object on a line."""
    form = format_of(path, path)
    first = next(read_rows(path, path, form), None)
    return first is not None and first.malformed is None
