"""The progress bar of everything that takes long."""

from __future__ import annotations

from typing import Any


def progress_bar(total: int, finished: int, unit: str) -> Any:
    """A tqdm bar on stderr with things per second (never seconds per thing) and the time that is left."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar_format = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    return tqdm(total=total, initial=finished, unit=f" {unit}", bar_format=bar_format)
