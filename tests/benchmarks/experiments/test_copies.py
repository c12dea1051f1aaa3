import gzip
import math

import numpy as np
import pytest

import entra
from benchmarks.experiments import copies


def test_a_copy_may_start_in_the_prompt_and_overlap_itself():
    assert copies.continues([1, 2], [3, 1, 2, 3], 3).tolist() == [False, False, False, True]
    assert copies.continues([], [7, 7, 7, 7], 2).tolist() == [False, False, True, True]


def test_entropy_of_single_tokens_is_the_reward():

    ids = np.random.default_rng(1).integers(0, 9, 40)
    counted = np.random.default_rng(2).random(40) < 0.8
    counts = np.unique(ids[counted], return_counts=True)[1]
    share = counts / counts.sum()
    expected = -(share * np.log(share)).sum() / math.log(counts.sum())
    assert copies.entropy(ids.tolist(), counted, 1) == pytest.approx(expected)


@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_entropy_of_ngrams_is_the_option_without_the_first_tokens(ngram):
    """docs/method.md, "Entropy of n-grams": the n-grams that recur are the same, M lacks the tokens that end none."""
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 4, 60).tolist()
    signals = {"logprobs": [(-generator.random(60)).tolist()], "incoming": [[0.0] * 60]}
    config = entra.ScoreConfig(reward_ngram=ngram)
    (one,) = entra.score_batch([[4, 4, 4]], None, [ids], config=config, details=True, **signals)
    counted = ~one.protected.numpy()
    judged, m, fewer = copies.entropy(ids, counted, ngram), int(counted.sum()), int(counted[ngram - 1 :].sum())
    assert 0.1 < one.reward < 1
    assert fewer < m
    assert (1 - judged) * fewer * math.log(fewer) == pytest.approx((1 - one.reward) * m * math.log(m), rel=1e-5)


def test_entropy_ends():
    all_counted = np.ones(8, dtype=bool)
    assert copies.entropy(list(range(8)), all_counted, 2) == pytest.approx(1)
    assert copies.entropy([5] * 8, all_counted, 2) == pytest.approx(0, abs=1e-12)
    assert copies.entropy([1, 2], all_counted[:2], 2) == 0.0


def test_a_copy_costs_its_address():
    text = [1, 2, 3, 4, 5]
    explained = copies.copied(text, [*text, 9])
    assert explained.tolist() == [1 - 2 / 5] * 5 + [0.0]
    assert copies.copied([1, 2], [1, 2]).tolist() == [0.0, 0.0]


def test_what_repeats_more_is_explained_more():
    step = list(range(20))
    shares = [float(copies.copied([], step * k).mean()) for k in (1, 2, 4)]
    assert shares[0] == 0 < shares[1] < shares[2] < 1
    noise = np.random.default_rng(3).integers(0, 200, 500)
    assert float(copies.copied([], noise.tolist()).mean()) < 0.01
    assert len(gzip.compress(bytes(noise.astype(np.uint8)))) > 400
