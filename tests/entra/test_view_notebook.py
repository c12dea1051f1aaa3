"""`Scores.show()`: tokens with their numbers as HTML that runs nothing, and as text."""

import html
import pickle
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra

TEXT = '<script>alert("1")</script> 1 + 1 = 2 & 2'


@pytest.fixture(scope="module")
def scores():
    model, tokenizer = build("llama"), build_tokenizer()
    return entra.score_batch(["1+1=", "2+2="], [TEXT, "4 4 4 4"], model=model, tokenizer=tokenizer, details=True)


class Spans(HTMLParser):
    """The tags of a page, and the title, style and text of each token."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[list[str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self._inside = "title" in given
        if self._inside:
            self.tokens.append([given["title"], given["style"], ""])

    def handle_data(self, data):
        if self._inside:
            self.tokens[-1][2] += data

    def handle_endtag(self, tag):
        self._inside = False


def test_each_line_has_the_direction_of_its_first_letter(scores):
    (style,) = set(re.findall(r'</summary><div style="([^"]*)">', scores.show()._repr_html_()))
    assert "unicode-bidi: plaintext" in style


def test_every_token_with_its_numbers(scores):
    tokens = Spans(scores.show(0)._repr_html_()).tokens
    assert "".join(text for _, _, text in tokens) == TEXT
    for i, (title, style, _) in enumerate(tokens):
        assert f"log-prob {float(scores.logprobs[0][i]):.3f}" in title
        assert f"incoming attention {float(scores.incoming[0][i]):.5f}" in title
        assert f"importance {float(scores.importance[0][i]):.3f}" in title
        same = (scores.token_ids[0] == scores.token_ids[0][i]) & ~scores.protected[0]
        assert f"{int(same.sum())} times among the unprotected" in title
        assert ("outline" in style) == bool(scores.protected[0][i])
    strengths = torch.tensor([float(re.search(r"rgba\([^)]*, ([0-9.]+)\)", style).group(1)) for _, style, _ in tokens])
    ranked = scores.importance[0].argsort(stable=True)
    assert bool((strengths[ranked].diff() >= 0).all())
    assert (float(strengths.min()), float(strengths.max())) == pytest.approx((0.05, 0.5))


def test_nothing_in_a_completion_is_markup(scores):
    page = scores.show()._repr_html_()
    assert set(Spans(page).tags) == {"div", "p", "span", "b", "details", "summary"}
    assert html.escape("<") in page


def test_text_has_marks_and_shows_control_characters():
    tokenizer = build_tokenizer()
    shown = entra.score_batch(["1"], ["1\x1b[31m 2 3"], model=build("llama"), tokenizer=tokenizer, details=True).show()
    assert "completion 0" in repr(shown)
    assert "«" in repr(shown)
    assert "\x1b" not in repr(shown) + shown._repr_html_()


def test_which_completions(scores):
    assert [re.findall(r"completion \d", repr(scores.show(rows))) for rows in (None, 1, -1, slice(1))] == [
        ["completion 0", "completion 1"],
        ["completion 1"],
        ["completion 1"],
        ["completion 0"],
    ]
    with pytest.raises(IndexError, match="rows=2 must be an index of the 2 completions"):
        scores.show(2)
    many = entra.score_batch(["1"] * 21, ["2 3"] * 21, model=build("llama"), tokenizer=build_tokenizer(), details=True)
    assert repr(many.show()).endswith("The first 20 of 21; others: show(index) or show(slice).")
    assert "completion 20" in repr(many.show(slice(20, None)))


def test_ids_without_a_tokenizer_are_shown_as_ids():
    scores = entra.score_batch([[1, 2]], None, [[5, 6, 5]], model=build("llama"), details=True)
    assert scores.tokenizer is None
    assert [text for _, _, text in Spans(scores.show()._repr_html_()).tokens] == ["5 ", "6 ", "5 "]


def test_scores_are_pickled_with_their_texts(scores):
    again = pickle.loads(pickle.dumps(scores))
    assert again.show()._repr_html_() == scores.show()._repr_html_()
    assert "tokenizer" not in repr(scores)


def test_a_row_that_is_not_finite_says_so():
    with pytest.warns(RuntimeWarning, match="not finite"):
        scores = entra.score_batch([[1]], None, [[5, 6]], logprobs=[[float("nan"), 0.0]], incoming=[[0.0, 0.0]], details=True)
    assert "error: a log-prob or incoming attention is not finite" in repr(scores.show())


def test_ipython_shows_the_html(scores):
    formatters = pytest.importorskip("IPython.core.formatters", reason="needs IPython")
    shown = scores.show()
    data, _ = formatters.DisplayFormatter().format(shown)
    assert data["text/html"] == shown._repr_html_()
    assert data["text/plain"] == repr(shown)
