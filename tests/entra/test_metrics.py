"""Statistics against answers worked out by hand."""

import math

import numpy as np
import pytest

from entra.metrics import (
    compression_effectiveness,
    effective_size,
    length_reduction,
    mean_interval,
    paired_bootstrap,
    quantile,
    wilson_interval,
)


def test_interval_of_a_mean():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # s = 1, n = 3
    assert mean == 2.0
    assert (low, high) == pytest.approx((2 - 1.959964 / math.sqrt(3), 2 + 1.959964 / math.sqrt(3)), rel=1e-6)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.25, 1.75), (0.5, 2.5), (1.0, 4.0)])
def test_quantiles_are_interpolated(share, expected):
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == expected


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # 8 of 10: (.8 + .19207 -+ 1.95996 sqrt(.016 + .0096037)) / 1.38415
        pytest.param(8, 10, 0.490162, 0.943318, id="8-of-10"),
        pytest.param(0, 10, 0.0, 0.277533, id="none"),  # high = z^2 / n / (1 + z^2 / n) = .384146 / 1.384146
        pytest.param(10, 10, 0.722467, 1.0, id="all"),
        pytest.param(50, 100, 0.403832, 0.596168, id="half"),
    ],
)
def test_wilson_interval(right, n, low, high):
    assert wilson_interval(right / n, n) == pytest.approx((right / n, low, high), abs=1e-6)


def test_answers_to_one_problem_that_are_all_alike_count_once():
    assert effective_size([1.0, 0.0, 1.0, 1.0], answers=4) == pytest.approx(4)
    assert effective_size([1.0, 0.0, 1.0, 1.0], answers=40) == pytest.approx(4)
    assert effective_size([1.0, 1.0, 1.0], answers=30) == 3, "nothing tells how alike they are"
    assert effective_size([0.5, 0.5, 0.5], answers=30) == 30, "as different as they can be"


def test_effective_size_of_independent_answers_is_their_number():
    """2,000 problems, 4 answers each: the size's relative standard error is about sqrt(2 / 2000) = 3 %."""
    shares = np.random.default_rng(0).binomial(4, 0.6, size=2000) / 4
    assert effective_size(list(shares), answers=8000) == pytest.approx(8000, rel=0.1)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Correlated pairs of a known distribution, difference of means 0.5, 400 times: 95 % with a standard error of 1.1 %."""
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(400):
        base = generator.exponential(2.0, size=100)
        values = np.stack([base, base + generator.normal(0.5, 1.0, size=100)], axis=1)
        _, low, high = paired_bootstrap(values, lambda means: means[..., 1] - means[..., 0], draws=500, seed=seed)
        covered += low <= 0.5 <= high
    assert 0.95 - 3 * 0.011 <= covered / 400 <= 0.95 + 3 * 0.011


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(300, 1))
    mean, low, high = paired_bootstrap(values, lambda means: means[..., 0])
    expected = mean_interval(list(values[:, 0]))
    # Each end of 10,000 draws has a standard error of 0.7 % of the width; n in the variance instead of n - 1 takes 0.2 % away.
    width = expected.high - expected.low
    assert mean == pytest.approx(expected.mean, rel=1e-12)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_bootstrap_keeps_pairs_together_and_its_seed():
    base = np.random.default_rng(2).normal(100.0, 30.0, size=50)
    values = np.stack([base, base - 7], axis=1)
    difference = paired_bootstrap(values, lambda means: means[..., 1] - means[..., 0])
    assert difference == pytest.approx((-7, -7, -7), abs=1e-9)
    first, again, other = (paired_bootstrap(values, lambda means: means[..., 0], draws=99, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_bootstrap_is_the_same_in_parts(monkeypatch):
    values = np.random.default_rng(3).normal(size=(20, 2))
    whole = paired_bootstrap(values, lambda means: means[..., 0] * means[..., 1], draws=501)
    monkeypatch.setattr("entra.metrics._DRAWS_AT_ONCE", 20 * 7)
    assert paired_bootstrap(values, lambda means: means[..., 0] * means[..., 1], draws=501) == pytest.approx(whole, rel=1e-12)


def test_length_reduction():
    assert list(length_reduction([50.0, 100.0, 150.0, 0.0], 100.0)) == [0.5, 0.0, -0.5, 1.0]


class TestCompressionEffectiveness:
    """Each property that the docstring and docs state."""

    def test_is_the_length_reduction_where_no_accuracy_is_lost(self):
        assert compression_effectiveness(40, 100, 0.8, 0.8) == pytest.approx(0.6)
        assert compression_effectiveness(40, 100, 0.95, 0.8) == pytest.approx(0.6), "accuracy above the base's counts nothing"
        assert compression_effectiveness(130, 100, 0.8, 0.8) == pytest.approx(-0.3)

    def test_by_hand_where_accuracy_is_lost(self):
        assert compression_effectiveness(40, 100, 0.6, 0.8) == pytest.approx(0.75 - 0.4)
        assert compression_effectiveness(40, 100, 0.0, 0.8) == pytest.approx(-0.4)

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_leaving_a_share_blank_is_worth_nothing(self, share):
        """Also the base itself: none left blank."""
        assert compression_effectiveness((1 - share) * 120, 120, (1 - share) * 0.7, 0.7) == pytest.approx(0, abs=1e-15)

    def test_base_without_a_right_answer_has_nothing_to_lose(self):
        assert compression_effectiveness(40, 100, 0.0, 0.0) == pytest.approx(0.6)
        assert compression_effectiveness(40, 100, 0.5, 0.0) == pytest.approx(0.6)

    def test_is_monotone_in_both_and_at_most_1(self):
        tokens, accuracy = np.meshgrid(np.linspace(0, 300, 61), np.linspace(0, 1, 41), indexing="ij")
        for base_accuracy in (0.0, 0.3, 1.0):
            value = compression_effectiveness(tokens, 100, accuracy, base_accuracy)
            assert np.isfinite(value).all()
            assert value.max() == 1
            assert (np.diff(value, axis=0) < 0).all(), "shorter is better"
            assert (np.diff(value, axis=1) >= 0).all(), "more right is not worse"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "values holds 1 numbers"),
        (lambda: quantile([], 0.5), "values holds 0 numbers"),
        (lambda: quantile([1.0], 1.5), r"share=1.5"),
        (lambda: wilson_interval(1.1, 10), r"share=1.1 and n=10"),
        (lambda: wilson_interval(0.5, 0), r"n=0"),
        (lambda: effective_size([], 0), "shares holds 0 problems"),
        (lambda: effective_size([1.0, 0.0], 1), "answers=1"),
        (lambda: paired_bootstrap([[1.0, 2.0]], lambda m: m[..., 0]), r"shape \[1, 2\]"),
        (lambda: paired_bootstrap([1.0, 2.0], lambda m: m), r"shape \[2\]"),
        (lambda: paired_bootstrap([[1.0], [2.0]], lambda m: m[..., 0], draws=0), "draws=0"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
