"""What ENTRA adds to a training, clocked by itself: between whole steps it drowns in the noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import entra
import entra.capture
from benchmarks.speed.measure import synchronize


@contextmanager
def clock_of_entra() -> Iterator[dict[str, float]]:
    """Seconds, by where they go. "override": in the trainer's three overrides. "trl": in the methods of TRL's that these call.
    "ours": in what ENTRA does inside those, which is finding the rows, reducing q and k, and the reward with its gate."""
    import trl

    from entra.trl import _Ride

    seconds = {"override": 0.0, "trl": 0.0, "ours": 0.0}

    def timed(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                seconds[kind] += time.perf_counter() - begin

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_generate", "_get_per_token_logps_and_entropies", "_calculate_rewards"):
            patch.setattr(trl.GRPOTrainer, name, timed(getattr(trl.GRPOTrainer, name), "trl"))
            patch.setattr(entra.EntraGRPOTrainer, name, timed(getattr(entra.EntraGRPOTrainer, name), "override"))
        for name in ("_packed_rows", "_reduce"):
            patch.setattr(entra.capture.Capture, name, timed(getattr(entra.capture.Capture, name), "ours"))
        patch.setattr(_Ride, "before", timed(_Ride.before, "ours"))
        patch.setattr(entra.EntraReward, "__call__", timed(entra.EntraReward.__call__, "ours"))
        yield seconds
