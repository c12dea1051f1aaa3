"""Statistics against answers worked out by hand."""

import math

import pytest

from entra.metrics import mean_interval, paired_difference, pareto_front, quantile


def test_interval_of_a_mean():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # s = 1, n = 3
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3)), rel=1e-6)


def test_paired_differences_ignore_what_problems_have_in_common():
    base = [float(i) for i in range(100)]
    assert paired_difference([value + 2 for value in base], base) == pytest.approx((2.0, 2.0, 2.0))


def test_paired_difference_of_right_and_wrong():
    """10 of 100 problems lost, 20 won: mean .1, variance (.3 - .01) * 100 / 99."""
    values, base = [1.0] * 20 + [0.0] * 80, [0.0] * 20 + [1.0] * 10 + [0.0] * 70
    mean, low, high = paired_difference(values, base)
    half = 1.959964 * math.sqrt((0.3 - 0.01) * 100 / 99 / 100)
    assert (mean, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half), rel=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.25, 1.75), (0.5, 2.5), (1.0, 4.0)])
def test_quantiles_are_interpolated(share, expected):
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_pareto_front():
    points = [(10, 0.9), (20, 0.95), (20, 0.9), (5, 0.5), (10, 0.9)]
    assert pareto_front(points) == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "values holds 1 numbers"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "must be of the same problems"),
        (lambda: quantile([], 0.5), "values holds 0 numbers"),
        (lambda: quantile([1.0], 1.5), r"share=1.5"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
