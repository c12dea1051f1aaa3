"""The traces of the experiments: what is loaded, what is left out, and that one forward gives what `score_batch` gives."""

import argparse
from dataclasses import replace

import pytest
import torch

import entra
from benchmarks.experiments import measuring
from entra.traces import load_traces

ROWS = [
    ({"prompt": "1+1=", "completion": "2, 2, 2", "kind": "concise", "id": "sum"}, None),
    ({"prompt": "1+1=", "completion": "two. wait: 2. yes, 2", "kind": "overthinking", "id": "another"}, None),
    ({}, "line 3 cannot be parsed: it is no JSON"),
    ({"prompt": "2+2=", "completion": None}, None),
    ({"prompt": [{"role": "user", "content": "3+3="}], "completion": "6 is it"}, None),
    ({"prompt": "4+4=", "completion": {"no": "text"}}, None),
]


def options(**changes):
    return argparse.Namespace(**{"model": "none", "traces": None, "rows": None, "limit": None, "seed": 0, **changes})


def test_completions_of_one_prompt_are_one_problem_and_bad_rows_are_counted():
    found = measuring.from_rows(ROWS)
    assert [(sample.problem, sample.kind) for sample in found.samples] == [
        ("sum", "concise"),
        ("sum", "overthinking"),
        ("problem 2", "trace"),
        ("problem 3", "trace"),
    ]
    assert found.left_out == measuring.LeftOut(("line 3 cannot be parsed: it is no JSON", "row 4 has no completion"))


def test_what_cannot_be_encoded_is_left_out_and_the_rest_goes_on(policy):
    measured = measuring.measure(policy, measuring.from_rows(ROWS))
    assert [trace.sample.problem for trace in measured.traces] == ["sum", "sum", "problem 2"]
    summary = measured.left_out.summary()
    assert summary["left_out"] == " Left out: 3 rows that cannot be scored, the first: line 3 cannot be parsed: it is no JSON."
    assert summary["left_out_rows"][:2] == ["line 3 cannot be parsed: it is no JSON", "row 4 has no completion"]
    assert summary["left_out_rows"][2].startswith("problem 3, trace: ")
    assert measured.by_problem() == {"sum": [0, 1], "problem 2": [2]}
    assert "".join(measured.traces[1].pieces) == ROWS[1][0]["completion"]


@pytest.mark.parametrize("statistic", ["mean", "lift"])
def test_one_forward_gives_what_score_batch_gives(policy, statistic):
    measured = measuring.measure(policy, measuring.from_rows(ROWS)).traces
    config = entra.ScoreConfig(attention_statistic=statistic, attention_weight=3.0)
    expected = entra.score_batch(
        [trace.sample.prompt for trace in measured],
        [trace.sample.completion for trace in measured],
        model=policy.model,
        tokenizer=policy.tokenizer,
        config=entra.ScoreConfig(attention_statistic=statistic, attention_weight=3.0, token_budget=1),
        details=True,
    )
    scores = measuring.scored(measured, config)
    assert scores.rewards == expected.rewards
    for name in ("token_ids", "logprobs", "incoming", "importance", "protected"):
        for one, other in zip(getattr(scores, name), getattr(expected, name), strict=True):
            assert torch.equal(one, other)


def test_limit_counts_problems():
    found = measuring.load(options(limit=2))
    assert [sample.completion for sample in found.samples] == [c.text for p in load_traces()[:2] for c in p.completions]
    with pytest.raises(ValueError, match="--limit 0 must be at least 1"):
        measuring.load(options(limit=0))


def test_nothing_that_can_be_used_names_the_first_fault(policy):
    with pytest.raises(ValueError, match="line 3 cannot be parsed"):
        measuring.load(options(traces="x.jsonl", rows=ROWS[2:3]))
    with pytest.raises(ValueError, match=r"none of 1 completions .* must be text"):
        measuring.measure(policy, measuring.from_rows(ROWS[5:]))


def test_pairs_are_each_problems_first_traces(measured):
    assert measured.pairs("overthinking", "concise") == [(1, 0), (4, 3), (7, 6)]
    twice = replace(measured, traces=[*measured.traces, measured.traces[0]])
    assert twice.pairs("overthinking", "concise") == [(1, 0), (4, 3), (7, 6)]
    assert measured.pairs("overthinking", "sample") == []
    shortest = len("9 > 7.")  # one character a token
    assert measured.fewest_unprotected(0.0) == shortest
    assert measured.fewest_unprotected(0.5) == shortest - 3


def test_overlap_of_choices():
    one, other = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([0, 1, 0, 1]).bool()
    assert measuring.overlap(one, other) == {"kept": 1 / 3, "jaccard": 1 / 4}
    assert measuring.overlap(one & ~one, one & ~one) == {"kept": 1.0, "jaccard": 1.0}
