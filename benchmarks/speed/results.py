"""One JSON file per device: what it was measured on, and one record per measurement, written as they come.

A record is flat. `operation` and `case` say what was run, `name` who ran it. Records of the same operation and case were
measured side by side. `ms` is the median, `ms_low` and `ms_high` the extremes of `rounds` calls. What was not measured has
`skipped`, the reason, instead of `ms`. A record of another run than the rest of the file has that run's `date`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import DEVICE, SIZES, bounds

PACKAGES = ("triton", "transformers", "flash-colreduce", "liger-kernel", "cut-cross-entropy")


def device_name() -> str:
    """Of the GPU, else of the processor."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return f"CPU {model.group(1) if model else platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """Collects records; with a folder it also writes them into `<device>.json` there, anew at each `add`."""

    def __init__(self, folder: Path | None, max_minutes: float | None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        name = device_name()
        self.content: dict[str, Any] = {
            "device": name,
            "cuda": torch.version.cuda or torch.version.hip if DEVICE == "cuda" else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "packages": {package: version for package in PACKAGES if (version := _version(package)) is not None},
            "command": " ".join(["pytest", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "sizes": SIZES,
            "bounds": None,
            "records": [],
        }
        self.path = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / (re.sub(r"(\(r\)|[^a-z0-9])+", "-", name.lower()).strip("-") + ".json")

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.content["records"]

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def asserts(self) -> bool:
        """Whether ratios are to hold: at sizes for a CPU, with all of them measured."""
        return SIZES == "small" and not self.out_of_time()

    def add(self, operation: str, case: str, name: str, **fields: Any) -> dict[str, Any]:
        """One record. The machine's bounds are measured before the first."""
        if self.content["bounds"] is None:
            self.content["bounds"] = bounds()._asdict()
        record = {"operation": operation, "case": case, "name": name, **fields}
        self.records.append(record)
        if self.path is not None:
            # Replaced in one step, so that a run which is killed leaves a whole file.
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(partial, self.path)
        return record
