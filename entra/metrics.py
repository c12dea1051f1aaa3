"""Statistics that experiments and `entra eval` report: pure functions of numbers.

The paper's formula of compression effectiveness was not available to us; `compression_effectiveness` is our own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Z95 = statistics.NormalDist().inv_cdf(0.975)
_DRAWS_AT_ONCE = 2**22
"""Numbers of a bootstrap that are in memory together: 32 MiB."""


class Interval(NamedTuple):
    """A mean, or another statistic, with the 95 % interval around it."""

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


def wilson_interval(share: float, n: float) -> Interval:
    """`(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`, z = 1.96: of a share of right answers.

    Stays in [0, 1] and is not empty where all or none are right. The mean of the result is `share` itself, not the middle.

    Args:
        share: p in [0, 1], of right answers.
        n: independent answers, more than 0; need not be whole (`effective_size`).

    Raises:
        ValueError: a share or n outside its range.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= share <= 1 or not 0 < n < math.inf:
        raise ValueError(f"share={share} and n={n}; the share must be in [0, 1], n a finite number above 0")
    square = _Z95**2 / n
    middle = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return Interval(share, 0.0 if share == 0 else low, 1.0 if share == 1 else high)


def effective_size(shares: Sequence[float], answers: int) -> float:
    """`p (1 - p) / (variance of the shares / problems)`: how many independent answers tell as much about p as these.

    The answers to one problem are alike, so several to a problem tell less than as many to different ones. Between 0 and
    `answers`. It is the number of problems when there is one answer to each. It is so, too, when all answers are right or all
    are wrong, because then nothing tells how alike they are.

    Args:
        shares: of right answers to each problem, in [0, 1]; p is their mean.
        answers: to all problems together.

    Raises:
        ValueError: no problems, or fewer answers than problems.

    Source: the design effect of cluster samples, Kish, Survey Sampling (1965).
    """
    if not 0 < len(shares) <= answers:
        raise ValueError(
            f"shares holds {len(shares)} problems and answers={answers}; at least one problem, and one answer to each"
        )
    p = statistics.fmean(shares)
    variance = statistics.pvariance(shares, p) / len(shares)
    if not 0 < p < 1:
        return float(len(shares))
    return min(float(answers), p * (1 - p) / variance) if variance else float(answers)


def paired_bootstrap(
    values: ArrayLike, statistic: Callable[[NDArray[Any]], NDArray[Any]], *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The 95 % percentile interval of `statistic(values.mean(0))` when the problems are drawn again with replacement.

    What is drawn is a problem with all its numbers, so what base and new have in common stays together, and so do several
    samples of one problem. At least some dozens of problems; where no problem differs the interval is a single point.

    Args:
        values: [problems, k], the k numbers of each problem, such as its mean tokens before and after.
        statistic: from means [..., k] to [...]. Infinite results stay in their place in the order. When any
            draw gives NaN, both ends are NaN.
        draws: how often to draw. 10,000 hold each end to a standard error of 0.7 % of the interval's width.
        seed: the same values and seed give the same interval.

    Raises:
        ValueError: fewer than two problems, or no draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or len(table) < 2 or draws < 1:
        raise ValueError(
            f"values has shape {list(table.shape)} and draws={draws}; at least 2 problems [problems, k], and 1 draw"
        )
    generator = np.random.default_rng(seed)
    problems = len(table)
    at_once = max(1, _DRAWS_AT_ONCE // problems)
    results = np.empty(draws)
    for first in range(0, draws, at_once):
        size = min(at_once, draws - first)
        drawn = generator.integers(problems, size=(size, problems)) + np.arange(size)[:, None] * problems
        times = np.bincount(drawn.ravel(), minlength=size * problems).reshape(size, problems)
        results[first : first + size] = statistic(times @ table / problems)
    low, high = np.quantile(results, [0.025, 0.975])
    return Interval(float(statistic(table.mean(0))), float(low), float(high))


def length_reduction(tokens: ArrayLike, base_tokens: ArrayLike) -> NDArray[Any]:
    """`1 - tokens / base_tokens`: 0 when nothing became shorter, towards 1 when little is left, negative when longer.

    Args:
        tokens, base_tokens: mean tokens of a completion, any shape; base above 0.
    """
    return 1 - np.asarray(tokens, dtype=np.float64) / np.asarray(base_tokens, dtype=np.float64)


def compression_effectiveness(
    tokens: ArrayLike, base_tokens: ArrayLike, accuracy: ArrayLike, base_accuracy: ArrayLike
) -> NDArray[Any]:
    """`min(1, accuracy / base_accuracy) - tokens / base_tokens`: the length reduction less the share of accuracy lost for it.

    Our formula; the paper's was not available. At most 1, without a lower bound. It is the length reduction where no
    accuracy is lost. It is 0 for the base itself, and for a base that leaves any share of the problems blank and answers the
    others as before. Above 0 is shorter than that. It falls strictly with the tokens, rises with the accuracy up to the
    base's, and counts nothing beyond, which is not compression (the accuracy stands beside it). Where the base has nothing
    right, nothing can be lost: the share kept is 1.

    Args:
        tokens, base_tokens: mean tokens of a completion, any shape; base above 0.
        accuracy, base_accuracy: in [0, 1].
    """
    right, base_right = np.asarray(accuracy, dtype=np.float64), np.asarray(base_accuracy, dtype=np.float64)
    lost = np.maximum(0.0, base_right - right) / np.where(base_right == 0, 1.0, base_right)
    return length_reduction(tokens, base_tokens) - lost


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
