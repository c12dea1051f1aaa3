"""Kinds of tokens: by the whole word, whatever pieces a tokenizer cuts it into."""

import re

import pytest

from benchmarks.experiments.token_kinds import kinds_of


def cut(text):
    """Words with the space before them in pieces of at most four letters, digits one by one: as tokenizers cut."""
    return re.findall(r"\n|\s?\d|\s?[^\W\d_]{1,4}|\s?[^\w\s]|\s", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("x = 5.5", "word operator number number number", id="decimal-point"),
        pytest.param("9,001 is", "number number number number number word", id="thousands"),
        pytest.param("- well-known", "punctuation word punctuation word word", id="bullet-and-hyphen"),
        pytest.param("(4 + 1)^2", "punctuation number operator number punctuation operator number", id="brackets"),
        pytest.param("**Bold**", "punctuation punctuation word punctuation punctuation", id="markdown"),
        pytest.param("Double-check it", "reflection reflection reflection reflection reflection word", id="word-of-pieces"),
        pytest.param("let me see", "reflection reflection word", id="phrase"),
        pytest.param("let us see", "word word word", id="not-the-phrase"),
        pytest.param("Therefore I add", "connective connective connective word word", id="connective"),
        pytest.param("sandy", "word word", id="connective-inside-a-word"),
        pytest.param("\n\n", "punctuation punctuation", id="space"),
    ],
)
def test_kinds_of_tokens(text, expected):
    assert [kind.kind for kind in kinds_of(cut(text))] == expected.split()


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("1. So (5 * 3) = 15, then 2", "(5 * 3) = 15"),
        ("get x = 5 now", "x = 5"),
        ("a well-known a/b of 7 - I", ""),
        ("5 * 3\n= 15", "5 * 3"),
        ("x = y", ""),
    ],
)
def test_formulas(text, formula):
    pieces = cut(text)
    inside = "".join(piece for piece, kind in zip(pieces, kinds_of(pieces), strict=True) if kind.in_formula)
    assert inside.strip() == formula


def test_pieces_without_text_have_the_kind_of_what_follows():
    assert [kind.kind for kind in kinds_of(["so ", "", "5"])] == ["connective", "number", "number"]
    assert [kind.kind for kind in kinds_of(["", ""])] == ["punctuation"] * 2
