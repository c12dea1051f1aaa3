"""The experiment `lambda` with a tiny model: what its choices have in common, and where in a completion they are."""

import pytest
import torch

from benchmarks.experiments import attention_weight, results


def test_lambda_zero_protects_what_log_p_protects(folder):
    rows = results.read(folder("lambda") / "lambda.json").rows
    unweighted = [row for row in rows if row["attention_weight"] == 0]
    assert len(unweighted) == 18
    assert all((row["kept"], row["jaccard"], row["reward_change"]) == (1, 1, 0) for row in unweighted)
    heavy = [row for row in rows if row["attention_weight"] == 100]
    assert min(row["jaccard"] for row in heavy) < 1
    assert [row["kept"] for row in heavy[:9]] != [row["kept"] for row in heavy[9:]]  # mean, then lift


def test_tokens_of_the_question(policy, measured):
    trace = measured.traces[0]
    near = attention_weight._in_prompt(policy.tokenizer, trace).tolist()
    found = {piece for piece, is_near in zip(trace.pieces, near, strict=True) if is_near}
    assert found == {"3", "4", "2", "o"}  # of letters and digits of "Compute 3 * 4 + 2.", not of operators
    assert attention_weight._nearness(torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([0, 1, 1, 1, 1]).bool()) == {
        "first_fifth": 1 / 3,
        "in_prompt": 2 / 3,
    }


def test_each_trace_counts_once_in_a_bin_of_positions(measured):
    values = [torch.arange(len(trace.token_ids)) / len(trace.token_ids) for trace in measured.traces]
    found = attention_weight._over_position(measured, {"value": values}, [0, 1, 2], 0)
    assert [row["position"] for row in found] == pytest.approx([0.05 + b / 10 for b in range(10)])
    for b, row in enumerate(found):
        inside = [value[(value * 10 + 1e-6).floor() == b].mean() for value in values[:3]]
        assert row["value"][0] == pytest.approx(float(sum(inside)) / 3, abs=1e-6)
