"""The output file: finished rows in input order, each once, whatever happened in between.

Rows are appended a batch at a time and are on disk before the next batch is scored. What a killed run left of a half-written
line is cut off when the file is opened again. Beside the file stands `<name>.meta.json`, written before the first row: input,
model, options and versions that the rows belong to. A run that does not belong to them is refused.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from entra.cli import CommandError


class Output:
    """A JSON Lines file that is opened for writing, or for going on.

    Args:
        path: of the file.
        identity: what the rows belong to, nested dicts of JSON values; must be as it was.
        facts: recorded beside it, and not compared.
        overwrite: throw away what is there, whatever it belongs to.

    Raises:
        CommandError: the file belongs to something else, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], overwrite: bool = False) -> None:
        self._path = path
        with _writing(path, "choose another --output"):
            self._file: BinaryIO = path.open("a+b")
        try:
            _lock(self._file, path)
            with _writing(path, "choose another --output"):
                if overwrite:
                    self._file.truncate(0)
                check(path, identity)
                if recorded(path) is None:
                    write_whole(_sidecar(path), json.dumps({**identity, **facts}, indent=1, default=json_value) + "\n")
                self._file.truncate(_end_of_last_line(self._file))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # bytes that `append` could not write, either
            self._file.close()

    def finished(self, error: str, numbers: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows that are there, read from the start.

        Args:
            error: a row has text in this column,
            numbers: or a number in each of these.

        Raises:
            CommandError: a line that is not such a row.
        """
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not (
                isinstance(row.get(error), str) or all(isinstance(row.get(name), int | float) for name in numbers)
            ):
                raise CommandError(
                    f"line {number} of {self._path} is not a row of scores: {line[:40]!r}; --overwrite starts again"
                )
            yield row

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows`; when this returns they are on disk.

        Raises:
            CommandError: they cannot be written; the rows before them are on disk.
        """
        with _writing(self._path, "the rows before are there; make room, and the same command goes on", 1):
            self._file.write(b"".join(map(_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())


def recorded(path: Path) -> dict[str, Any] | None:
    """What the rows of an output belong to; None when nothing has been written yet.

    Raises:
        CommandError: an output without its sidecar, or with a damaged one.
    """
    if not os.path.exists(path) or path.stat().st_size == 0:  # Path.exists raises when the name is too long
        return None
    sidecar = _sidecar(path)
    try:
        return dict(json.loads(sidecar.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(
            f"{path} exists, but {sidecar.name} beside it, which says what it belongs to, cannot be read ({error}); "
            "use another --output, or --overwrite to start again"
        ) from error


def check(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse an output that was made from something other than `identity` (which may be a part of the whole).

    Raises:
        CommandError: names the first thing that differs, its value then and now.
    """
    before = recorded(path)
    if before is None:
        return
    then = dict(flat(before))
    for name, now in flat(json.loads(json.dumps(identity, default=json_value))):
        if then.get(name) != now:
            raise CommandError(
                f"{path} exists and was made with {name}={then.get(name)!r}, now it is {now!r}; "
                "use another --output, or --overwrite to start again"
            )


def check_destination(option: str, path: Path, inputs: Sequence[Path]) -> None:
    """Refuse a file that cannot be written, or that would overwrite what is read.

    Raises:
        CommandError: names `option`.
    """
    if os.path.exists(path):  # Path.exists raises when the name is too long
        if not path.is_file():
            raise CommandError(f"cannot write {option} {path}: it is no ordinary file; name one")
        if any(path.samefile(source) for source in inputs):
            raise CommandError(f"{option} {path} is the input; choose another file")
    elif not os.path.isdir(path.parent):
        raise CommandError(f"cannot write {option} {path}: there is no folder {path.parent}; make it first")


def json_value(value: Any) -> Any:
    """Values that Parquet has and JSON has not: bytes become base64, dates and everything else their text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, default=json_value).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        text = json.dumps(row, default=json_value).encode("ascii")
    return text + b"\n"


@contextmanager
def _writing(path: Path, remedy: str, exit_code: int = 2) -> Iterator[None]:
    """Inside, what the operating system refuses is a CommandError."""
    try:
        yield
    except OSError as error:
        name = error.filename2 or error.filename or path
        raise CommandError(f"cannot write {name}: {error.strerror or error}; {remedy}", exit_code) from error


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def write_whole(path: Path, text: str) -> None:
    """Either all of the file is there or nothing."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CommandError(f"{path} is being written by another entra score; wait for it, or stop it") from error


def _end_of_last_line(file: BinaryIO) -> int:
    """The size of `file` without an unfinished last line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
