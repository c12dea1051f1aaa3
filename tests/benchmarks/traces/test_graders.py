"""The grades of completions that others published: which number counts, and what each kind of item asks of a reply."""

from __future__ import annotations

import pytest

from benchmarks.traces.graders import correct_item, correct_number, last_boxed


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        (r"First \boxed{3}, no: \boxed{4}. I tried 7 ways.", "4", True),
        (r"First \boxed{4}, no: \boxed{3}.", "4", False),
        (r"\boxed{\frac{x}{2} = \text{12 apples}}", "12", True),
        (r"\boxed{\$7,\!125}", "7125", True),
        ("It costs 10, so the change is $1,204.50.", "1204.5", True),
        ("It costs 1204, so the change is 10.", "1204", False),
        ("The sum is -3", "3", False),
        (r"\boxed{none}, not 5", "5", False),
        ("no number", "5", False),
        ("it is 412000", "412,000", True),
    ],
    ids=[
        "last box",
        "only the last box",
        "nested braces",
        "thin space",
        "last number",
        "only the last number",
        "sign",
        "box without a number",
        "no number",
        "comma in the reference",
    ],
)
def test_correct_number(completion: str, answer: str, correct: bool):
    assert correct_number(completion, answer) is correct


def test_a_box_ends_where_its_brace_closes_or_with_the_text():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}} or 3") == r"\frac{1}{2}"
    assert last_boxed(r"so \boxed{12") == "12"
    assert last_boxed("12") is None


NUMERIC = {"grader": "numeric", "answer": "5", "accept": ["5 hours", "one hand"]}
TEXT = {"grader": "text", "answer": "N'Djaména", "accept": ["fort lamy"]}
OPTIONS = {"cork": ["cork"], "iron": ["iron", "the metal"]}
CHOICE = {"grader": "choice", "answer": "cork", "accept": [], "options": OPTIONS}


@pytest.mark.parametrize(
    ("item", "reply", "correct"),
    [
        (NUMERIC, "It needs 30 steps.\n**Answer:** 5", True),
        (NUMERIC, "Answer: 5\nThat needed 30 steps.", True),
        (NUMERIC, "Answer: 4\nAnswer: 5 hours", True),
        (NUMERIC, "Answer: 5\nAnswer: 4", False),
        (NUMERIC, "It takes 4.\n5 hours", True),
        (NUMERIC, "Five of them.\nAnswer: five", True),
        (NUMERIC, "Answer: One hand.", True),
        (NUMERIC, "Answer: many", False),
        (NUMERIC, "", False),
        (TEXT, "Answer: N\u2019Djamena.", True),
        (TEXT, "Answer: It is the Fort Lamy, I think.", True),
        (TEXT, "Answer: fort", False),
        (TEXT, "One of " + "many " * 10 + "is the Fort Lamy", False),
        (CHOICE, "Iron is dense.\nAnswer: the cork", True),
        (CHOICE, "Answer: cork, not iron", False),
        (CHOICE, "Answer: cork, not metal", False),
        (CHOICE, "Answer: both", False),
    ],
    ids=[
        "label",
        "label before the last line",
        "last label",
        "only the last label",
        "no label",
        "number word",
        "accepted words",
        "no number",
        "empty",
        "accents and apostrophes",
        "short reply that names it",
        "part of the answer",
        "long reply that names it",
        "choice",
        "two choices",
        "two choices without the article",
        "no choice",
    ],
)
def test_correct_item(item: dict, reply: str, correct: bool):
    assert correct_item(item, reply) is correct


@pytest.mark.parametrize(
    ("check", "params", "right", "wrong"),
    [
        ("word_count", {"n": 3}, "Tea - so warm.", "Tea, warm."),
        ("repeat_word", {"word": "pebble", "n": 2}, "Pebble pebble.", "pebble pebble pebble"),
        ("upper_csv", {"n": 2}, "RED, BLUE", "RED, Blue"),
        ("json_keys", {"keys": ["a", "b"]}, '```json\n{"a": 1, "b": 1}\n```', '{"b": 1, "a": 1}'),
        ("json_keys", {"keys": ["a"]}, '{"a": 1}', "a: 1"),
        ("json_keys", {"keys": ["a"]}, '{"a":1}', "[" * 100_000),
        ("exact_chars", {"char": "*", "n": 4}, "****\n", "*****"),
        ("desc_range", {"lo": 3, "hi": 5}, "5, 4, 3", "3,4,5"),
        ("start_end", {"start": "Snow", "end": "here"}, "**Snow** falls here.", "Snow falls"),
        ("start_end", {"start": "Snow", "end": "snow"}, "Snow is snow", "Snow"),
        ("forbidden_letter", {"letter": "E", "min_words": 2}, "Storms part", "Storms end"),
        ("forbidden_letter", {"letter": "e", "min_words": 2}, "Storms part", "Storms"),
    ],
)
def test_replies_in_a_form(check: str, params: dict, right: str, wrong: str):
    item = {"grader": "constraint", "check": check, "params": params, "answer": "", "accept": []}
    assert correct_item(item, right) is True
    assert correct_item(item, wrong) is False


def test_unknown_graders_are_named():
    with pytest.raises(ValueError, match="grader='essay'"):
        correct_item({"grader": "essay", "answer": "", "accept": []}, "x")
    with pytest.raises(ValueError, match="check='rhyme'"):
        correct_item({"grader": "constraint", "check": "rhyme", "params": {}}, "x")
