"""The output file: finished rows in input order, each once, whatever happened in between.

Rows are appended a batch at a time and are on disk before the next batch is scored. What a killed run left of a half-written
line is cut off when the file is opened again. Beside the file stands `<name>.meta.json`, written before the first row: input,
model, options and versions that the rows belong to. A run that does not belong to them is refused, and so are rows that are not
those of the input, in its order. Nothing is ever replaced that something else wrote, with --overwrite neither.

An output that is not JSON Lines (`entra.cli.formats`) is `<name>.part` until all rows are there; then its hash is recorded. So
are rows that --overwrite asked for. Their record is `<name>.part.meta.json`; the old file and its record stay until then. A
pipe has no file beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

from entra.cli import CommandError
from entra.cli.formats import PART, convert, part_of
from entra.rows import format_of, is_finite, read_rows
from entra.source import PIPE, SIDECAR
from entra.whole_file import write_whole

FORMAT = 3
"""Of the sidecar. Those of earlier versions do not say what was taken for prompt and completion, or note other things of the
model."""
_MOST_THREADS = 4096


class Output:
    """A JSON Lines file that is opened for writing, or for going on.

    Args:
        path: of the file.
        identity: what the rows belong to, as nested dicts of JSON values. It must be as it was.
        facts: recorded beside it, and not compared.
        overwrite: start again, whatever is there. The old file is replaced when all rows are there.

    Raises:
        CommandError: the file belongs to something else, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], overwrite: bool = False) -> None:
        self._path = path
        self._part, self._sidecar = _places(path, overwrite)
        self.done = part_of(path) != path and not overwrite and _has_content(path) and not os.path.exists(self._part)
        """All rows are there, in their format."""
        self.going_on = f"the same command{' without --overwrite' if overwrite else ''} goes on"
        """What to do when this one was stopped."""
        replaces = self._part != path and not self.done and _has_content(path)
        with ExitStack() as opened:
            with _writing(path, "choose another --output"):
                self._file: BinaryIO = path.open("rb") if self.done else self._part.open("a+b")
                opened.enter_context(self._file)
                files = [self._file, *([opened.enter_context(path.open("rb"))] if replaces else [])]
            for file in files:
                _lock(file, path)
            with _writing(path, "choose another --output"):
                if overwrite:
                    check_output(path, [], overwrite)
                    self._file.truncate(0)
                else:
                    check(path, identity)
                if self.done and _record(self._sidecar).get("finished") != _sha256(path):
                    raise CommandError(
                        f"{path} is not as entra score left it; restore it, use another --output, or --overwrite to start again"
                    )
                if overwrite or recorded(path) is None:
                    content = {"written_by": "entra score", "format": FORMAT, **identity, **facts}
                    write_whole(self._sidecar, json.dumps(content, indent=1, default=json_value) + "\n")
            self._opened = opened.pop_all()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # bytes that `append` could not write, either
            self._opened.close()

    def finished(
        self, expected: Iterable[Mapping[str, Any]], error: str, numbers: Sequence[str], added: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """The rows that are there, read from the start; then what a killed run left of a line is cut off.

        Args:
            expected: the input's rows, which they must carry, in its order.
            error: the column that holds text in a row that was not scored.
            numbers: the columns that each hold a number in any other row.
            added: all columns that are not the input's.

        Raises:
            CommandError: a line that is not such a row, or not of the input's row of that number.
        """
        own = set(added)
        self._file.seek(0)
        end = 0
        for number, (line, given) in enumerate(zip(self._file, chain(expected, _nothing()), strict=False), start=1):
            carried = b"" if given is None else json_line(given)
            if not line.endswith(b"\n"):
                # Columns come before scores, so all of them is the start of the line, or the line is the start of all of them.
                if given is not None and any(line.startswith(c) or c.startswith(line) for c in _beginnings(given)):
                    break
                raise self._wrong(number, "a row of scores, and its end is missing", line)
            row = _row(line, error, numbers)
            if row is None:
                raise self._wrong(number, "a row of scores", line)
            if given is None or json_line({name: value for name, value in row.items() if name not in own}) != carried:
                raise self._wrong(number, f"row {number} of the input", line)
            end += len(line)
            yield row
        self._file.truncate(end)

    def finish(self) -> list[str]:
        """All rows are there: the output gets its format. The columns of Parquet that hold JSON.

        Raises:
            CommandError: it cannot be written; the rows are on disk.
        """
        path, sidecar = self._path, _sidecar(self._path)
        mixed: list[str] = []
        if self.done or (self._part, self._sidecar) == (path, sidecar):
            return mixed
        with _writing(path, f"the rows are in {self._part}; make room, and {self.going_on}", 1):
            if part_of(path) == path:
                sidecar.unlink(missing_ok=True)  # never new rows beside an old record
                self._part.replace(_target(path))
                self._sidecar.replace(sidecar)
            else:
                mixed = convert(self._part, path)
                content = {**_record(self._sidecar), "finished": _sha256(path)}
                write_whole(sidecar, json.dumps(content, indent=1) + "\n")
                if self._sidecar != sidecar:
                    self._sidecar.unlink()
                self._part.unlink()
        return mixed

    def _wrong(self, number: int, what: str, line: bytes) -> CommandError:
        return CommandError(
            f"line {number} of {self._part} is not {what}: {line[:40]!r}; restore it, use another --output, or --overwrite to "
            "start again"
        )

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows`; when this returns they are on disk.

        Raises:
            CommandError: they cannot be written; the rows before them are on disk.
        """
        with _writing(self._path, f"the rows before are there; make room, and {self.going_on}", 1):
            self._file.write(b"".join(map(json_line, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())


class Stream:
    """An output that is written once, from its first row to its last: nothing stands beside it, and nothing goes on in it.

    Args:
        path: of the file, which is not there or empty; "-" for stdout.

    Raises:
        CommandError: the file cannot be written.
    """

    done = False

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path if path == PIPE else part_of(path)
        self._stdout = path == PIPE
        with _writing(path, "choose another --output"):
            self._file: BinaryIO = sys.stdout.buffer if self._stdout else self._part.open("wb")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._stdout:
            with suppress(OSError):
                self._file.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows`.

        Raises:
            CommandError: they cannot be written, or nobody reads them any more.
        """
        try:
            with _writing(self._path, "give the command again", 1):
                self._file.write(b"".join(map(json_line, rows)))
                self._file.flush()
        except CommandError:
            if self._stdout:  # Python would try once more when it ends
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise

    def finish(self) -> list[str]:
        """As `Output.finish`."""
        if self._part == self._path:
            return []
        with _writing(self._path, f"the rows are in {self._part}", 1):
            self._file.close()
            mixed = convert(self._part, self._path)
            self._part.unlink()
        return mixed


def check_stream(path: Path, inputs: Sequence[Path]) -> None:
    """Refuse a file for a run that can never go on, because it reads a pipe, where there is something already.

    Raises:
        CommandError: names `--output`.
    """
    if path != PIPE:
        with _writing(path, "choose another --output"):
            for each in dict.fromkeys((path, part_of(path))):
                check_destination("--output", each, inputs, lambda file: False, "a run that reads a pipe, and never goes on,")


def _has_content(path: Path) -> bool:
    return os.path.exists(path) and path.stat().st_size > 0  # Path.exists raises when the name is too long


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nothing() -> Iterator[None]:
    while True:
        yield None


def _row(line: bytes, error: str, numbers: Sequence[str]) -> dict[str, Any] | None:
    """A line as a row of scores; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    if row.get(error) is not None:
        return row if isinstance(row[error], str) else None
    values = [row.get(name) for name in numbers]
    return row if all(is_finite(value) and not isinstance(value, bool) for value in values) else None


def recorded(path: Path) -> dict[str, Any] | None:
    """What the rows of an output belong to; None when nothing has been written yet.

    Raises:
        CommandError: an output without its sidecar, or with a damaged one.
    """
    part, sidecar = _places(path)
    if not _has_content(path) and not _has_content(part):
        return None
    try:
        return _record(sidecar)
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(
            f"{path} exists, but {sidecar.name} beside it cannot be read ({error}), and that says what it belongs to; "
            f"use another --output, or remove {path}"
        ) from error


def _record(sidecar: Path) -> dict[str, Any]:
    """The content of a sidecar; ValueError where it is none of ours."""
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    # Versions of entra before the format wrote no name.
    versions = content.get("versions") if isinstance(content, dict) else None
    if not isinstance(versions, dict) or "entra" not in versions or not isinstance(content.get("input"), dict):
        raise ValueError("entra score did not write it")
    for _ in flat(content):  # nested too deeply is found here
        pass
    return dict(content)


def recorded_threads(path: Path) -> int | None:
    """The number of threads on record; None when nothing has been written yet.

    Raises:
        CommandError: as `recorded`, and for a number that is none.
    """
    before = recorded(path)
    if before is None:
        return None
    threads = before.get("threads")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= _MOST_THREADS:
        raise CommandError(
            f"{_places(path)[1]} says threads={shortened(threads)}, which must be a whole number from 1 to {_MOST_THREADS:,}; "
            "use another --output, or --overwrite to start again"
        )
    return threads


def check(path: Path, identity: Mapping[str, Any], remedy: str = "use another --output, or --overwrite to start again") -> None:
    """Refuse an output that was made from something other than `identity` (which may be a part of the whole).

    The message ends with `remedy`.

    Raises:
        CommandError: names the first thing that differs, its value then and now.
    """
    before = recorded(path)
    if before is None:
        return
    part, sidecar = _places(path)
    if part != path and sidecar == _sidecar(part):
        path, remedy = part, f"use another --output, --overwrite to start again, or remove {part}"
    if before.get("format") != FORMAT:
        raise CommandError(f"{path} was written by another version of entra, which noted other things; {remedy}")
    then = dict(flat(before))
    now = dict(flat(json.loads(json.dumps(identity, default=json_value))))
    gone = [name for name in then if name.partition(".")[0] in identity and name not in now]
    for name in (*now, *gone):
        if then.get(name) != now.get(name):
            raise CommandError(
                f"{path} exists and was made with {name}={shortened(then.get(name))}, now it is {shortened(now.get(name))}; "
                f"{remedy}"
            )


def shortened(value: Any) -> str:
    """A value from a file in a message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def check_destination(
    option: str, path: Path, inputs: Sequence[Path], is_ours: Callable[[Path], bool], what: str = "this command"
) -> None:
    """Refuse a file that cannot be written, that is read, or that something else wrote.

    Args:
        option: that names it.
        path: of the file.
        inputs: files that are read, and that exist.
        is_ours: whether a file that exists may be replaced, because `what` wrote it. A file without content may.
        what: writes such files.

    Raises:
        CommandError: names `option`.
    """
    if os.path.exists(path):  # Path.exists raises when the name is too long
        if not path.is_file():
            raise CommandError(f"cannot write {option} {path}: it is no ordinary file; name one")
        if _is_one_of(path, inputs):
            raise CommandError(f"{option} {path} is the input; choose another file")
        if path.stat().st_size and not _is_ours(path, is_ours):
            raise CommandError(f"{option} {path} exists, and {what} did not write it; choose another file, or remove it")
    elif not os.path.isdir(path.parent):
        raise CommandError(f"cannot write {option} {path}: there is no folder {path.parent}; make it first")


def _is_one_of(path: Path, others: Sequence[Path]) -> bool:
    return any(os.path.exists(other) and path.samefile(other) for other in others)


def _is_ours(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    try:
        return is_ours(path)
    except (OSError, ValueError, RecursionError, CommandError):
        return False


def check_output(path: Path, inputs: Sequence[Path], overwrite: bool = False) -> None:
    """Refuse an output of `entra score` that it, or a file beside it, would put in the place of something else.

    Raises:
        CommandError: names `--output`.
    """
    part, record = _places(path, overwrite)
    sidecars = list(dict.fromkeys((_sidecar(path), record)))
    with _writing(path, "choose another --output"):
        if os.path.exists(path) and path.is_file() and not _is_one_of(path, inputs):
            recorded(path)  # which says what is wrong with the sidecar
        check_destination("--output", path, inputs, _is_output, "entra score")
        if part != path:
            check_destination(
                "--output",
                part,
                inputs,
                lambda file: any(_is_ours(file, partial(_is_part, sidecar=sidecar)) for sidecar in sidecars),
                "entra score",
            )
        for sidecar in sidecars:
            if not os.path.exists(sidecar) or not sidecar.is_file():
                continue
            if _is_one_of(sidecar, inputs):
                raise CommandError(f"--output {path} needs {sidecar.name} beside it, which is the input; choose another file")
            if sidecar.stat().st_size and not _is_ours(sidecar, lambda file: bool(_record(file))):
                raise CommandError(
                    f"--output {path} needs {sidecar.name} beside it, but there is one that entra score did not write; choose "
                    f"another file, or remove {sidecar}"
                )


def _is_output(path: Path) -> bool:
    """Whether a file is an output of `entra score`, by its sidecar and first row."""
    sidecar = own if os.path.exists(own := _sidecar(path)) else _places(path)[1]
    if part_of(path) == path:
        return _is_part(path, sidecar)
    row = next(read_rows(path, path, format_of(path, path)), None)
    return _record(sidecar)["input"].get("rows") == 0 if row is None else _is_scored(row.columns, sidecar)


def _is_part(file: Path, sidecar: Path) -> bool:
    """Whether a file holds rows of scores as JSON Lines, to which the sidecar belongs."""
    with file.open("rb") as rows:
        line = rows.readline()
    if not line.endswith(b"\n"):  # a run was killed in its first line
        return bool(_record(sidecar)) and line.startswith(b"{")
    return _is_scored(json.loads(line), sidecar)


def _is_scored(row: Any, sidecar: Path) -> bool:
    prefix = _record(sidecar).get("prefix")
    return isinstance(row, dict) and any(f"{prefix}{name}" in row for name in ("reward", "error"))


def json_value(value: Any) -> Any:
    """Values that Parquet has and JSON has not: bytes become base64, dates and everything else their text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _beginnings(row: Mapping[str, Any]) -> list[bytes]:
    """How a line with these columns may begin, up to what follows them."""
    return [json_line(row)[:-2], json.dumps(row, default=json_value).encode("ascii")[:-1]]


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON Lines."""
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
    return path.with_name(path.name + SIDECAR)


def _places(path: Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Where the rows are until all are there, and their record. Both stand beside an output that they are to replace."""
    target = _target(path)
    part = target.with_name(target.name + PART)
    own, beside = _sidecar(path), _sidecar(part)
    if (overwrite and _has_content(path)) or (os.path.exists(part) and os.path.exists(beside)):
        return part, beside
    # A run that was killed between the two renamings of `Output.finish` has left its record there.
    return part_of(path), beside if os.path.exists(beside) and not os.path.exists(own) else own


def _target(path: Path) -> Path:
    """What a link points to, which is replaced; the link stays."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CommandError(f"{path} is being written by another entra score; wait for it, or stop it") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
