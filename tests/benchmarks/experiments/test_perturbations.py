"""Perturbations: what they make of a prompt, and that one which changes nothing keeps everything."""

from dataclasses import replace

import pytest
import torch

import entra
from benchmarks.experiments import measuring, perturbations


def test_a_perturbation_that_changes_nothing_keeps_everything(policy, measured, monkeypatch):
    monkeypatch.setitem(perturbations._PROMPTS, "polite", lambda prompt: prompt)
    config = entra.ScoreConfig()
    before = measuring.scored(measured.traces, config)
    again = perturbations.measure_again(policy, measured, "polite")
    same = perturbations.stability_of(before, measuring.scored(list(again.values()), config))
    assert list(again) == list(range(9))
    assert all(row == {"kept": 1.0, "jaccard": 1.0, "reward_change": 0.0, "logprob_change": 0.0} for row in same)
    changed = perturbations.measure_again(policy, measured, "plain")
    moved = perturbations.stability_of(before, measuring.scored(list(changed.values()), config))
    assert min(row["kept"] for row in moved) < 1
    assert min(row["logprob_change"] for row in moved) > 0


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("plain", [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "S\n\nQ\n\n"),
        ("plain", "Q", None),
        ("polite", "Q", perturbations._POLITE + "Q"),
        ("polite", [1, 2], None),
        ("system", [1, 2], None),
    ],
)
def test_prompts_of_perturbations(name, prompt, expected):
    assert perturbations._PROMPTS[name](prompt) == expected


def test_another_system_message_replaces_the_first():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert [message["content"] for message in perturbations._PROMPTS["system"](messages)] == [perturbations._SYSTEM, "Q"]


def test_bfloat16_leaves_the_model_as_it_was(policy, measured):
    perturbations.measure_again(policy, replace(measured, traces=measured.traces[:1]), "bfloat16")
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
