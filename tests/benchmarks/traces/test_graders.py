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
        (r"\boxed{\$9,\!360}", "9360", True),
        ("It costs 10, so the change is $1,204.50.", "1204.5", True),
        ("It costs 1204, so the change is 10.", "1204", False),
        ("The sum is -3", "3", False),
        (r"\boxed{none}, not 5", "5", False),
        ("no number", "5", False),
        ("it is 168000", "168,000", True),
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


NUMERIC = {"grader": "numeric", "answer": "5", "accept": ["5 minutes", "one hand"]}
TEXT = {"grader": "text", "answer": "Côte d'Ivoire", "accept": ["ivory coast"]}
OPTIONS = {"feathers": ["feathers"], "lead": ["lead", "the metal"]}
CHOICE = {"grader": "choice", "answer": "feathers", "accept": [], "options": OPTIONS}


@pytest.mark.parametrize(
    ("item", "reply", "correct"),
    [
        (NUMERIC, "It takes 100 minutes.\n**Answer:** 5", True),
        (NUMERIC, "Answer: 5\nThat took 100 machines.", True),
        (NUMERIC, "Answer: 4\nAnswer: 5 minutes", True),
        (NUMERIC, "Answer: 5\nAnswer: 4", False),
        (NUMERIC, "It takes 4.\n5 minutes", True),
        (NUMERIC, "Five machines.\nAnswer: five", True),
        (NUMERIC, "Answer: One hand.", True),
        (NUMERIC, "Answer: many", False),
        (NUMERIC, "", False),
        (TEXT, "Answer: Cote d\u2019Ivoire.", True),
        (TEXT, "Answer: It is the Ivory Coast, I think.", True),
        (TEXT, "Answer: coast", False),
        (TEXT, "One of " + "many " * 10 + "is the Ivory Coast", False),
        (CHOICE, "Lead is dense.\nAnswer: the feathers", True),
        (CHOICE, "Answer: feathers, not lead", False),
        (CHOICE, "Answer: feathers, not metal", False),
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
        ("word_count", {"n": 3}, "Rain - falls softly.", "Rain falls."),
        ("repeat_word", {"word": "ripple", "n": 2}, "Ripple ripple.", "ripple ripple ripple"),
        ("upper_csv", {"n": 2}, "RED, BLUE", "RED, Blue"),
        ("json_keys", {"keys": ["a", "b"]}, '```json\n{"a": 1, "b": 1}\n```', '{"b": 1, "a": 1}'),
        ("json_keys", {"keys": ["a"]}, '{"a": 1}', "a: 1"),
        ("json_keys", {"keys": ["a"]}, '{"a":1}', "[" * 100_000),
        ("exact_chars", {"char": "*", "n": 4}, "****\n", "*****"),
        ("desc_range", {"lo": 3, "hi": 5}, "5, 4, 3", "3,4,5"),
        ("start_end", {"start": "Blue", "end": "today"}, "**Blue** skies today.", "Blue skies"),
        ("start_end", {"start": "Blue", "end": "blue"}, "Blue is blue", "Blue"),
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
