"""Marks that a row brings along: from characters to tokens, and as every view shows them."""

import io
import math

import pytest
from shown_traces import scores_of

from entra.view.lines import token_facts, with_marks
from entra.view.marked import Mark, marks_of
from entra.view.terminal import print_traces
from entra.view.trace import Trace

PIECES = ["So", " 3", " is", ".", "\n", "", "\U0001f389", " Wait"]
TEXT = "".join(PIECES)


def stretch(start, end, **more):
    return {"start": start, "end": end, **more}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([stretch(0, 8, label="plan", category=[1])], [Mark("plan", 0, 3, 0, 8)]),
        ([stretch(3, 4, label="a")], [Mark("a", 1, 1, 3, 4)]),
        ([stretch(9, 10, label="a"), stretch(0, 2)], [Mark("col", 0, 0, 0, 2), Mark("a", 6, 6, 9, 10)]),
        ([stretch(10.0, 15, label=3)], [Mark("3", 7, 7, 10, 15)]),
        (9, [Mark("col", 6, 6, 9, 9)]),
        ("9", [Mark("col", 6, 6, 9, 9)]),
        (None, []),
        (math.nan, []),
        ([], []),
    ],
    ids=["several", "inside", "sorted", "float", "place", "text", "none", "nan", "empty"],
)
def test_marks_are_on_the_tokens_that_hold_their_characters(value, expected):
    assert marks_of("col", value, PIECES, TEXT) == (expected, None)


@pytest.mark.parametrize(
    ("value", "completion", "why"),
    [
        ([stretch(5, 2)], TEXT, "has no start and end in characters"),
        ([stretch(2, 2)], TEXT, "has no start and end in characters"),
        ([{"label": "a"}], TEXT, "has no start and end in characters"),
        (["a"], TEXT, "has no start and end in characters"),
        ("nonsense", TEXT, "has no start and end in characters"),
        (True, TEXT, "has no start and end in characters"),
        (-1, TEXT, "has no start and end in characters"),
        (15, TEXT, "reaches beyond character 15, the end of the text"),
        ([stretch(4, 8)], "So 3 was.", "reaches beyond character 5, where the tokens' text differs from the completion"),
    ],
)
def test_what_is_no_mark_is_left_out_and_named(value, completion, why):
    marks, left_out = marks_of("col", value, PIECES, completion)
    assert marks == []
    assert left_out.startswith("col: 1 of 1 marks are left out; the first " + why)


@pytest.fixture
def trace():
    marks = marks_of("notes", [stretch(0, 8, label="plan\x1b"), stretch(10, 15, label="check")], PIECES, TEXT)[0]
    place = marks_of("settled_at", 9, PIECES, TEXT)[0]
    scores = scores_of(list(range(8)), protected=[False, True, *[False] * 6])
    marked = sorted([*marks, *place], key=lambda mark: mark.start)
    return Trace(name="t", prompt="p", pieces=PIECES, scores=scores, marked=marked, left_out=["notes: 1 of 3"])


def test_text_says_what_is_marked(trace):
    file = io.StringIO()
    print_traces([trace], title="t", facts={}, file=file)
    text = file.getvalue()
    assert "marks, between ⟦ and ⟧: plan␛ 1 · settled_at at character 9 (token 7) · check 1\n" in text
    assert "notes: 1 of 3\n" in text
    assert with_marks(trace) == ["⟦plan␛: So «3» is.⟧↵", "⟦settled_at⟧\U0001f389 ⟦check: Wait⟧"]
    assert token_facts(trace, 7)[-1] == "marked: check"
    assert token_facts(trace, 4)[-1] == "marked: nothing"


def test_without_marks_nothing_is_said_of_them():
    trace = Trace(name="t", prompt="p", pieces=PIECES, scores=scores_of(list(range(8))))
    file = io.StringIO()
    print_traces([trace], title="t", facts={}, file=file)
    assert "⟦" not in file.getvalue()
    assert not any("marked" in line for line in token_facts(trace, 0))
