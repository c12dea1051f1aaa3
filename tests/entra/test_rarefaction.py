"""The length-adjusted reward against brute force over every possible draw."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entra.rarefaction import rarefied_redundancy


def plain(tokens):
    total = len(tokens)
    entropy = -sum(c / total * math.log(c / total) for c in Counter(tokens).values())
    return entropy / math.log(total)


@pytest.mark.parametrize("positions", [2, 3, 5, 8])
@pytest.mark.parametrize("tokens", [[1, 1, 1, 2, 2, 3, 4, 4], [7] * 8, list(range(8)), [1, 1, 1, 1, 1, 1, 1, 2]])
def test_equals_the_mean_over_all_draws(tokens, positions):
    draws = [plain(draw) for draw in itertools.combinations(tokens, positions)]
    assert rarefied_redundancy(torch.tensor(tokens), positions) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, 6), min_size=2, max_size=60), more=st.integers(0, 40))
def test_equals_the_plain_reward_at_its_own_length_and_beyond(tokens, more):
    assert rarefied_redundancy(torch.tensor(tokens), len(tokens) + more) == pytest.approx(plain(tokens), abs=1e-9)


def test_does_not_fall_with_length_where_the_plain_reward_does():
    # The same source at two lengths: every draw of 50 positions looks alike.
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(0, 200, (200,), generator=generator)
    long = torch.randint(0, 200, (4000,), generator=generator)
    assert plain(short.tolist()) - plain(long.tolist()) > 0.1
    assert rarefied_redundancy(short, 50) == pytest.approx(rarefied_redundancy(long, 50), abs=0.01)


@pytest.mark.parametrize(("tokens", "positions"), [([1], 5), ([1, 2], 1)])
def test_too_few_are_an_error(tokens, positions):
    with pytest.raises(ValueError, match="both must be at least 2"):
        rarefied_redundancy(torch.tensor(tokens), positions)
