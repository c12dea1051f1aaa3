"""The maker of the shipped traces: what it would write is what is shipped, and how it reads answers and written texts."""

from __future__ import annotations

import pytest

from benchmarks.traces.make_traces import RECIPES, SHIPPED, WRITTEN, read_written, stated_answer
from entra.traces import Problem, load_traces, parse_traces

PROBLEMS = load_traces()


def test_the_file_holds_what_the_script_would_write():
    assert parse_traces(SHIPPED.read_text(encoding="utf-8").split("\n")) == PROBLEMS
    written = read_written(WRITTEN.read_text(encoding="utf-8"))
    assert [problem.id for problem in PROBLEMS] == [recipe.id for recipe in RECIPES] == list(written)
    for problem, recipe in zip(PROBLEMS, RECIPES, strict=True):
        for kind, (style, text) in written[problem.id].items():
            assert (problem.completion(kind).style, problem.completion(kind).text) == (style, text)
        kept = tuple((problem.completion(kind).sampling or {})["index"] for kind in ("concise", "sample"))
        assert kept == recipe.kept


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_overthinking_reaches_the_answer_of_its_concise_twin(problem: Problem):
    concise, overthinking = problem.completion("concise"), problem.completion("overthinking")
    assert overthinking.correct == concise.correct
    assert stated_answer(overthinking.text, problem.answer) == stated_answer(concise.text, problem.answer)


@pytest.mark.parametrize(
    ("text", "answer", "stated"),
    [
        ("2 + 2 = 4\nThe answer is 1,204.", "1204", "1204"),
        ("First the answer is 3. Wait. **Answer:** 3 + 4 = 7", "7", "7"),
        ("It gives 12, then 15", "15", "15"),
        ("No, it does not follow. Yes was close.", "No", "No"),
        ("So the answer is mother of Tom.", "mother", "mother"),
        ("Step one\nThe answer is: by, IS, does", "by, IS, does", "by, IS, does"),
        ("", "4", ""),
    ],
    ids=["thousands", "last answer", "no marker", "yes or no", "word", "list", "empty"],
)
def test_stated_answer(text: str, answer: str, stated: str):
    assert stated_answer(text, answer) == stated


def test_sections_of_the_written_texts_must_not_come_twice():
    with pytest.raises(ValueError, match="id='a' twice"):
        read_written("## a\n### control\nx\n## a\n### control\ny\n")
    with pytest.raises(ValueError, match="kind='control' twice"):
        read_written("## a\n### control\nx\n### control\ny\n")
