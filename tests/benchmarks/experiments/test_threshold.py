"""The experiment `threshold` with a tiny model: protected sets, twins, a random choice, perturbations that do not apply."""

import json
import math
from itertools import pairwise

import entra
from benchmarks.experiments import measuring, perturbations, results, threshold, twins
from benchmarks.experiments.__main__ import main


def test_perturbations_that_apply_to_no_prompt_are_left_out(policy, problems, tmp_path, monkeypatch):
    """Another system message and no chat template: neither can be said of prompts that are plain text."""
    monkeypatch.setattr(measuring, "load_policy", lambda name: policy)
    monkeypatch.setattr(results, "draw", lambda figure, folder: None)
    rows = [{"prompt": prompt, "completion": text, "kind": kind} for prompt, texts in problems for kind, text in texts.items()]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", "tiny", "--traces", str(tmp_path / "traces.jsonl"), "--output", str(tmp_path), "--draws", "2"]
    assert main(["threshold", *arguments]) == 0
    stability = results.read(tmp_path / "threshold.json").summary["stability"]
    assert {row["perturbation"] for row in stability} == {"bfloat16", "polite"}
    left_out = "Left out, because no prompt here is made of chat messages: another system message, no chat template."
    assert left_out in (tmp_path / "threshold.md").read_text()


def test_protected_sets_are_nested_over_tau(measured):
    chosen = [
        measuring.scored(measured.traces, entra.ScoreConfig(protect_fraction=tau)).protected
        for tau in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    for smaller, larger in pairwise(chosen):
        for one, other in zip(smaller, larger, strict=True):
            assert bool((~one | other).all())
    assert [int(last.sum()) > int(first.sum()) for first, last in zip(chosen[0], chosen[-1], strict=True)] == [True] * 9


def test_threshold_compares_twins(folder):
    result = results.read(folder("threshold") / "threshold.json")
    rows = {(row["protect_fraction"], row["selection"], row["trace"]): row for row in result.rows}
    assert {(tau, selection) for tau, selection, _ in rows if tau == 0} == {(0.0, "importance")}
    own = [rows[0.2, "importance", i]["reward"] for i in range(9)]
    assert own != [rows[0.2, "random", i]["reward"] for i in range(9)]
    (found,) = [
        row
        for row in result.summary["separation"]
        if (row["protect_fraction"], row["selection"], row["reward"], row["other"]) == (0.2, "importance", "r", "control")
    ]
    differences = [own[1] - own[2], own[4] - own[5], own[7] - own[8]]
    assert found["lower"] == sum(difference < 0 for difference in differences)
    assert math.isclose(found["difference"][0], sum(differences) / 3)
    assert {row["perturbation"] for row in result.summary["stability"]} == set(perturbations.PERTURBATIONS)


def test_a_random_choice_is_as_large_and_depends_on_the_seed_alone(measured):
    config = entra.ScoreConfig(protect_fraction=0.5)
    drawn = threshold._random_rewards(measured, config, 2, 0)
    assert drawn == threshold._random_rewards(measured, config, 2, 0) != threshold._random_rewards(measured, config, 2, 1)
    most = threshold._random_rewards(measured, entra.ScoreConfig(protect_fraction=1.0), 2, 0)
    assert most == ([0.0] * 9, [0.0] * 9)  # nothing is left unprotected


def test_auc_counts_ties_half_and_all_pairs(measured):
    rewards = [0.9, 0.5, 0.5, 0.8, 0.6, 0.7, 0.1, 0.4, 0.3]  # concise, overthinking, control of each problem
    found = {row["other"]: row for row in twins.compare(measured, {"r": rewards})}
    # Overthinking is .5, .6, .4; concise .9, .8, .1; control .5, .7, .3.
    assert (found["concise"]["lower"], found["concise"]["pairs"], found["concise"]["auc"]) == (2, 3, 6 / 9)
    assert (found["control"]["lower"], found["control"]["auc"]) == (1, 4.5 / 9)
