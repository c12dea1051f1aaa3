"""Statistics against answers worked out by hand."""

import math

import pytest

from benchmarks.comparisons import paired_difference, pareto_front, resampled_ratio
from entra.metrics import mean_interval


def test_paired_differences_ignore_what_problems_have_in_common():
    base = [float(i) for i in range(100)]
    assert paired_difference([value + 2 for value in base], base) == pytest.approx((2.0, 2.0, 2.0))


def test_paired_difference_of_right_and_wrong():
    """10 of 100 problems lost, 20 won: mean .1, variance (.3 - .01) * 100 / 99."""
    values, base = [1.0] * 20 + [0.0] * 80, [0.0] * 20 + [1.0] * 10 + [0.0] * 70
    mean, low, high = paired_difference(values, base)
    half = 1.959964 * math.sqrt((0.3 - 0.01) * 100 / 99 / 100)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), rel=1e-6)


def test_pareto_front():
    points = [(10, 0.9), (20, 0.95), (20, 0.9), (5, 0.5), (10, 0.9)]
    assert pareto_front(points) == [True, True, False, True, True]


def test_resampled_ratio_is_the_ratio_of_sums():
    parts = [(1, 4), (3, 4), (0, 2), (5, 10)]
    interval = resampled_ratio(parts)
    assert interval.mean == 9 / 20
    assert 0 < interval.low < 9 / 20 < interval.high < 0.75
    assert resampled_ratio(parts) == interval
    parts = [(i % 7 + i / 97, 1) for i in range(97)]
    assert resampled_ratio(parts) != resampled_ratio(parts, seed=1)


def test_resampled_ratio_covers_the_mean_like_the_normal_interval():
    # 400 numbers: the percentile bootstrap of a mean and the normal approximation differ by the noise of 2,000 draws, a few %.
    values = [math.sin(i * 12.9898) for i in range(400)]
    resampled, normal = resampled_ratio([(value, 1) for value in values]), mean_interval(values)
    assert resampled.mean == pytest.approx(normal.mean)
    width = normal.high - normal.low
    assert resampled.low == pytest.approx(normal.low, abs=0.06 * width)
    assert resampled.high == pytest.approx(normal.high, abs=0.06 * width)


def test_resampled_ratio_needs_something_to_divide_by():
    with pytest.raises(ValueError, match="2 groups whose denominators sum to 0"):
        resampled_ratio([(1, 0), (2, 0)])
    assert resampled_ratio([(0, 0), (2, 4)]) == (0.5, 0.5, 0.5)
    assert resampled_ratio([(2, 4)]) == (0.5, 0.5, 0.5)


def test_values_of_other_problems_are_refused():
    with pytest.raises(ValueError, match="must be of the same problems"):
        paired_difference([1.0, 2.0], [1.0])
