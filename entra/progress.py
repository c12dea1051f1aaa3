"""The progress bar of everything that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any


@contextmanager
def progress_bar(total: int, finished: int, unit: str, quiet: bool = False) -> Iterator[Any]:
    """A tqdm bar on stderr with things per second (never seconds per thing) and the time that is left.

    It is drawn every second, also while one thing takes longer. With `quiet`, nothing is drawn.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar_format = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    stopped = Event()
    with tqdm(total=total, initial=finished, unit=f" {unit}", bar_format=bar_format, disable=quiet) as bar:

        def draw() -> None:
            while not stopped.wait(1.0):
                bar.refresh()

        clock = Thread(target=draw, name="progress", daemon=True)
        if not quiet:
            clock.start()
        try:
            yield bar
        finally:
            stopped.set()
            if not quiet:
                clock.join()
