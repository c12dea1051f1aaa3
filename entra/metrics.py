"""Statistics that experiments report: pure functions of lists of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_Z95 = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A mean with the 95 % interval around it."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """`mean -+ 1.96 s / sqrt(n)`: the normal approximation, for at least some dozens of independent values.

    Args:
        values: n numbers, of any unit; s is their standard deviation (n - 1).

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"values holds {len(values)} numbers; an interval needs at least 2")
    mean = statistics.fmean(values)
    half = _Z95 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


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


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linearly interpolated between neighbours.

    Args:
        values: at least one number.
        share: in [0, 1].

    Raises:
        ValueError: no values, or a share outside its range.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"values holds {len(values)} numbers and share={share}; at least 1, and a share in [0, 1]")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other point beats: cost (lower is better) and value (higher is better), one of them strictly.

    Args:
        points: (cost, value) pairs.
    """
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points) for cost, value in points]


def resampled_ratio(parts: Sequence[tuple[float, float]], *, draws: int = 2000, seed: int = 0) -> Interval:
    """`sum(a) / sum(b)` over groups (a, b), with the 95 % percentile interval of the bootstrap that draws whole groups.

    For shares and means of things that are not independent, such as the tokens of a trace: one group for each problem, a the
    sum over its tokens and b their number. With b = 1 it is the mean of a. Draws whose b sum to 0 do not count.

    Args:
        parts: (a, b) of each group, b at least 0 and not all 0.
        draws: how often as many groups as there are are drawn, with replacement.
        seed: of the draws.

    Raises:
        ValueError: no groups, or b that are all 0.
    """
    import numpy as np

    values = np.asarray(parts, dtype=np.float64).reshape(-1, 2)
    if not values[:, 1].sum() > 0:
        raise ValueError(
            f"parts holds {len(values)} groups whose denominators sum to {values[:, 1].sum()}; it must be positive"
        )
    chosen = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    sums = values[chosen].sum(axis=1)
    sums = sums[sums[:, 1] > 0]
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    total = values.sum(axis=0)
    return Interval(float(total[0] / total[1]), float(low), float(high))
