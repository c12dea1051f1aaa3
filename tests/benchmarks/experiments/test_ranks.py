"""Rank statistics by hand, and beside what they must not depend on."""

import numpy as np
import pytest

from benchmarks.experiments.ranks import ranks, spearman, top, top_overlap


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([0.5, -1.0, 0.5, 9.0, 0.5]).tolist() == [3.0, 1.0, 3.0, 5.0, 3.0]


def test_spearman_of_values_without_ties_is_the_textbook_formula():
    values, others = [1.0, 5.0, 2.0, 9.0, 3.0], [2.0, 1.0, 8.0, 9.0, 7.0]
    squares = [(a - b) ** 2 for a, b in zip([1, 4, 2, 5, 3], [2, 1, 4, 5, 3], strict=True)]
    assert spearman(values, others) == pytest.approx(1 - 6 * sum(squares) / (5 * 24))
    assert spearman([value**3 for value in values], [-other for other in others]) == pytest.approx(-spearman(values, others))


def test_spearman_with_ties_is_the_correlation_of_mean_ranks():
    assert spearman([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1])


def test_what_does_not_vary_agrees_with_nothing():
    assert spearman([2, 2, 2], [1, 2, 3]) == 0.0
    assert spearman([1, 2, 3, 4], [4, 1, 2, 3], given=[[10, 20, 30, 40]]) == 0.0


def test_partial_correlation_is_the_textbook_formula():
    random = np.random.default_rng(0)
    z = random.normal(size=200)
    x, y = z + random.normal(size=200), z + random.normal(size=200)
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, given=[z]) == pytest.approx(expected)
    assert abs(expected) < 0.2 < xy  # z was all that they had in common


def test_top_is_what_would_be_protected():
    assert top([3.0, 1.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0.2) == {0, 2}  # ties go to the lower index
    assert top([1.0, 2.0, 3.0], 1 / 3) == {2}


def test_overlap_is_a_share_of_the_top():
    values = list(range(10))
    assert top_overlap(values, values, 0.2) == 1.0
    assert top_overlap(values, [*range(9), -1], 0.2) == 0.5
    assert top_overlap(values, values[::-1], 0.2) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        top_overlap([1, 2, 3], [1, 2, 3], 0.2)
    with pytest.raises(ValueError, match="same things"):
        spearman([1, 2, 3], [1, 2])
