"""The shipped traces: complete, of the promised lengths, and what their kinds say they are."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from entra.traces import KINDS, Problem, load_traces, parse_traces

PROBLEMS = load_traces()
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)


def repeated_share(text: str, size: int = 3) -> float:
    """Share of the word n-grams of `text` that occurred before in it."""
    words = text.lower().split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams)


def test_there_are_enough_problems_and_ids_are_unique():
    assert 24 <= len(PROBLEMS) <= 40
    assert len({problem.id for problem in PROBLEMS}) == len(PROBLEMS)
    assert len({problem.task for problem in PROBLEMS}) >= 10


@each_problem
def test_every_problem_has_every_kind(problem: Problem):
    assert problem.kinds == KINDS
    for completion in problem.completions:
        assert completion.text == completion.text.strip() != ""
        if completion.kind in ("concise", "sample"):
            assert completion.source == "SmolLM2-135M-Instruct"
            assert completion.sampling is not None
            assert {"seed", "temperature", "max_new_tokens", "index"} <= set(completion.sampling)
        else:
            assert completion.source == "written"
            assert completion.sampling is None
    assert problem.completion("concise").text != problem.completion("sample").text
    assert problem.completion("overthinking").style in ("reverify", "restate", "dead-end", "second-guess", "loop")


@each_problem
def test_lengths(problem: Problem):
    concise, overthinking, control = (problem.completion(kind).tokens for kind in ("concise", "overthinking", "control"))
    assert 2.5 <= overthinking / concise <= 5
    assert 0.85 <= control / overthinking <= 1.15


@each_problem
def test_overthinking_repeats_itself_more_than_its_control(problem: Problem):
    assert repeated_share(problem.completion("overthinking").text) > repeated_share(problem.completion("control").text)


def test_the_styles_are_varied():
    styles = [problem.completion("overthinking").style for problem in PROBLEMS]
    assert all(styles.count(style) >= 3 for style in ("reverify", "restate", "dead-end", "second-guess", "loop"))


def test_unknown_and_missing_kinds_are_refused():
    with pytest.raises(ValueError, match="use one of concise, sample, overthinking, control"):
        PROBLEMS[0].completion("verbose")
    bare = Problem(id="bare", task="t", prompt="p", answer="a", completions=PROBLEMS[0].completions[:1])
    with pytest.raises(ValueError, match="'bare' has no completion of kind='control'; it has concise"):
        bare.completion("control")


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"id": "a", "completions": []}', json.dumps({"completions": [{"kind": "concise"}]})]
)
def test_a_damaged_line_is_named(line: str):
    with pytest.raises(ValueError, match="line 2 of the traces is not a problem"):
        parse_traces(["", line])


def test_a_repeated_id_is_refused():
    line = (files("entra") / "data" / "traces.jsonl").read_text(encoding="utf-8").splitlines()[0]
    with pytest.raises(ValueError, match="a second time"):
        parse_traces([line, line])
