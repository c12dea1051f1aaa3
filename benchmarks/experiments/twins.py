"""Whether the reward puts overthinking below its concise twin and below the control, and means over problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.comparisons import paired_difference, resampled_ratio
from benchmarks.experiments import measuring
from entra.config import ScoreConfig
from entra.metrics import wilson_interval

PAIRS = (("overthinking", "concise"), ("overthinking", "control"))
"""Kinds of traces of one problem of which the first should score lower."""


def rewards_of(measured: measuring.Measurement, config: ScoreConfig) -> tuple[list[float], list[float]]:
    """r of each trace, and r adjusted to as many positions as the shortest trace leaves unprotected."""
    positions = measured.fewest_unprotected(config.protect_fraction)
    both = [measuring.scored(measured.traces, replace(config, length_adjusted=m)).rewards for m in (None, positions)]
    plain, adjusted = ([0.0 if reward is None else reward for reward in rewards] for rewards in both)
    return plain, adjusted


def compare(measured: measuring.Measurement, rewards: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """For each of `PAIRS` that there is and each reward by name: in how many pairs the first is lower, by how much, the AUC.

    The AUC is how often any trace of the first kind scores lower than any of the second, ties counting half.
    """
    result = []
    for kind, other in PAIRS:
        pairs = measured.pairs(kind, other)
        if len(pairs) < 2:
            continue
        for name, values in rewards.items():
            first, second = [values[i] for i, _ in pairs], [values[j] for _, j in pairs]
            lower = [float(a < b) for a, b in zip(first, second, strict=True)]
            result.append(
                {
                    "reward": name,
                    "kind": kind,
                    "other": other,
                    "pairs": len(pairs),
                    "lower": int(sum(lower)),
                    "share": list(wilson_interval(fmean(lower), len(lower))),
                    "difference": list(paired_difference(first, second)),
                    "auc": fmean((a < b) + 0.5 * (a == b) for a in first for b in second),
                }
            )
    return result


def over_problems(rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> list[float]:
    """Mean of a column over rows that have a `problem`, and the 95 % interval that resamples problems."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["problem"], []).append(row[name])
    return list(resampled_ratio([(sum(values), len(values)) for values in groups.values()], seed=seed))
