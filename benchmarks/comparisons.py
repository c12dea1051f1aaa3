"""Statistics that compare runs and groups of traces; those that `entra eval` reports, too, are in `entra/metrics.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from entra.metrics import Interval, mean_interval, paired_bootstrap


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """`mean_interval` of value minus baseline: what problems have in common cancels, so it is narrower than two intervals.

    Args:
        values, baseline: the i-th numbers belong to the same problem.

    Raises:
        ValueError: different numbers of values, or fewer than two.
    """
    if len(values) != len(baseline):
        raise ValueError(f"values holds {len(values)} numbers and baseline {len(baseline)}; they must be of the same problems")
    return mean_interval([value - other for value, other in zip(values, baseline, strict=True)])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other point beats: cost (lower is better) and value (higher is better), one of them strictly.

    Args:
        points: (cost, value) pairs.
    """
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points) for cost, value in points]


def resampled_ratio(parts: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Interval:
    """`sum(a) / sum(b)` over groups (a, b), with the interval of `paired_bootstrap`, which draws whole groups.

    For shares and means of things that are not independent, such as the tokens of a trace. There each problem is a group: a is
    the sum over its tokens, and b their number. With b = 1 it is the mean of a. A draw whose b sum to 0 says nothing and counts
    as the ratio itself. So does a single group, whose interval is a point.

    Args:
        parts: [groups, 2], b at least 0 and not all 0.
        draws, seed: as in `paired_bootstrap`.

    Raises:
        ValueError: no groups, or b that are all 0.
    """
    table = np.asarray(parts, dtype=np.float64).reshape(-1, 2)
    total = table.sum(axis=0)
    if not total[1] > 0:
        raise ValueError(f"parts holds {len(table)} groups whose denominators sum to {total[1]:g}; it must be positive")
    ratio = float(total[0] / total[1])
    if len(table) == 1:
        return Interval(ratio, ratio, ratio)

    def statistic(means: NDArray[Any]) -> NDArray[Any]:
        above, below = means[..., 0], means[..., 1]
        result: NDArray[Any] = np.divide(above, below, out=np.full_like(above, ratio), where=below > 0)
        return result

    return paired_bootstrap(table, statistic, draws=draws, seed=seed)
