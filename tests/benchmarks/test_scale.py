"""docs/scale.md says what `benchmarks/scale.py` computes, and its formulas count what they say."""

from pathlib import Path

import pytest

from benchmarks import scale

PAGE = (Path(__file__).parents[2] / "docs/scale.md").read_text()


def test_the_page_holds_the_table():
    assert scale.table() in PAGE


@pytest.mark.parametrize("model", scale.MODELS)
def test_flops_are_those_of_the_visible_pairs(model):
    """Pair by pair: 2 D for a score and as much for the sum of values; the formulas leave out half of the diagonal."""
    tokens = 4_096
    pairs = tokens * (tokens + 1) // 2
    score = 2 * model.head_dim * model.heads * pairs
    assert scale.column_flops(model, tokens) == pytest.approx(score, rel=1 / tokens)
    attention = scale.forward_flops(model, tokens) - 2 * model.parameters * tokens
    assert attention == pytest.approx(2 * score * model.layers, rel=1 / tokens)


def test_riding_is_at_most_the_share_of_one_layer():
    for model in scale.MODELS:
        for tokens in (4_096, 131_072, 10**9):
            assert scale.column_flops(model, tokens, lse_known=False) < scale.forward_flops(model, tokens) / model.layers
