"""A file that stands there whole, or as it was: written beside and renamed, so that a full disk leaves the old one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path


def write_whole(path: Path, text: str | Iterable[str], encoding: str = "utf-8") -> None:
    """Either all of the file is there or what was there before; nothing else is touched.

    Args:
        path: replaced, if it is there. A link stays one: what it points to is replaced.
        text: of the file, or its parts in order.
        encoding: of the file.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    for attempt in count():
        unfinished = path.with_name(f"{path.name}.{os.getpid()}-{attempt}.tmp")
        try:
            file = unfinished.open("x", encoding=encoding)
        except FileExistsError:
            continue
        break
    try:
        with file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
