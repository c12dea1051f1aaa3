"""The experiment on real traces, on a tiny model and made-up files of the same shape."""

import argparse
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from tiny_tokenizer import build_tokenizer

from benchmarks.experiments import measuring, real, real_measures, real_signals, real_traces, results
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.influence import layer_attention
from entra import ScoreConfig
from entra.encode import Encoder
from entra.policy import Policy

STEPS = ("First I add 4 and 5.", "That makes 9 in all.", "Wait, 4 and 5 make 9.", "So the answer is 9, I think.")
CATEGORIES = ("problem_setup", "active_computation", "self_checking", "final_answer_emission")


@pytest.fixture(scope="module")
def policy():
    model = tiny_models.build("llama")
    model.requires_grad_(False)
    return Policy(model, build_tokenizer())


def row(problem, model, kind, completion, **more):
    about = {"prompt": f"What is {problem}?", "problem_id": problem, "model": model, "kind": kind, "correct": True}
    return {**about, "complete": True, "completion": completion, "annotations": [], **more}


def annotated(problem, kind, seed):
    order = random.Random(seed)
    text, notes = "<think>\n", []
    for chunk in range(8):
        step = order.randrange(4)
        notes.append(
            {
                "start": len(text),
                "end": len(text) + len(STEPS[step]),
                "label": CATEGORIES[step],
                "chunk": chunk,
                **{target: order.random() for target in real.TARGETS},
            }
        )
        text += STEPS[step] + " "
    right = kind == "correct"
    return row(problem, "R1", kind, text, annotations=notes, settled_at=notes[5]["start"] if right else None, correct=right)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("traces")
    short, long = "The sum is 9, so we are done with it. " * 2, " ".join(STEPS) + " "
    files = {
        "thought_anchors": [annotated(f"p{i}", kind, 9 * i + len(kind)) for i in range(3) for kind in ("correct", "incorrect")],
        "thinkonoff": [
            row(f"q{i}", "Qwen3-8B (somewhere)", kind, text, task="arith")
            for i in range(4)
            for kind, text in (("thinking", long * (2 + i)), ("no-thinking", short + "x" * i))
        ],
        "mip_gsm8k": [
            row(f"g{i}", model, "well-posed", text, model_kind=kind)
            for i in range(4)
            for model, kind, text in (("QwQ-32B", "reasoning", long * 3), ("Qwen2.5-32B-Instruct", "instruct", short))
        ],
    }
    for name, rows in files.items():
        (place / name).mkdir()
        (place / name / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


def options(folder, cache, **changes):
    parser = argparse.ArgumentParser()
    real.add_arguments(parser)
    given = {"folder": folder, "cache": cache, "gradient": True, "limit": 4, **changes}
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


@pytest.fixture(scope="module")
def traces(policy, folder):
    encoder = Encoder(policy.tokenizer, policy.model, {})
    found, faults = real_traces.read(folder, encoder, policy.tokenizer, {})
    assert faults == []
    return found


@pytest.fixture(scope="module")
def one(policy, traces):
    trace = next(trace for trace in traces if trace.settled is not None)
    found = real_signals.signals(policy.model, trace.prompt_ids, trace.token_ids, all_layers=True, gradient=True)
    return real_measures.Measured(trace=trace, signals=found)


def scored(policy, one, **config):
    trace = one.trace
    found = measuring.score_batch(
        [trace.prompt_ids],
        None,
        [trace.token_ids],
        model=policy.model,
        tokenizer=policy.tokenizer,
        config=ScoreConfig(**config),
        details=True,
    )
    return found[0]


def test_signals_are_those_of_score_batch_and_of_eager_attention(policy, one):
    ours, lift = scored(policy, one), scored(policy, one, attention_statistic="lift")
    assert np.abs(ours.logprobs.numpy() - one.signals.logprobs).max() < 1e-4
    assert np.abs(ours.incoming.numpy() - one.signals.mean).max() < 1e-6
    assert np.abs(lift.incoming.numpy() - one.signals.lift).max() < 1e-4
    layers = layer_attention(policy.model, one.trace.prompt_ids + one.trace.token_ids).mean.mean(0)
    assert np.abs(layers[-len(one.trace.token_ids) :].numpy() - one.signals.mean_all).max() < 1e-6


def test_a_run_that_asks_for_the_gradient_later_measures_nothing_else_again(policy, one, tmp_path, monkeypatch):
    asked = (tmp_path, "a model", policy.model, one.trace.prompt_ids, one.trace.token_ids)
    first = real_signals.cached(*asked, all_layers=True)
    assert np.isnan(first.gradient).all()
    monkeypatch.delattr(real_signals, "signals")
    second = real_signals.cached(*asked, all_layers=True, gradient=True)
    assert np.array_equal(first.logprobs, second.logprobs)
    assert np.array_equal(second.gradient, one.signals.gradient)
    monkeypatch.delattr(real_signals, "_gradient")
    assert np.array_equal(real_signals.cached(*asked, all_layers=True, gradient=True).gradient, second.gradient)


def test_blocks_and_the_nearest_queries(monkeypatch):
    """Against the whole matrix, with blocks that do not divide the number of tokens."""
    monkeypatch.setattr(real_signals, "_BLOCK", 7)
    monkeypatch.setattr(real_signals, "NEAREST", 3)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 40, 8)
    found = real_signals._columns(query, key, value)
    places = torch.arange(40)
    scores = (query @ key.transpose(1, 2)).masked_fill(places > places[:, None], -torch.inf)
    future = scores.softmax(-1).tril(-1)
    torch.testing.assert_close(found.total, future.mean(0).sum(0))
    torch.testing.assert_close(found.lifted, (future.mean(0) * (places + 1)[:, None]).sum(0))
    torch.testing.assert_close(found.far, future.mean(0).tril(-4).sum(0))
    torch.testing.assert_close(found.value, (future.sum(1) * value.norm(dim=-1)).mean(0))


def test_the_gradient_is_that_of_a_gate_on_the_key(policy, one):
    trace = one.trace
    ids = torch.tensor([trace.prompt_ids + trace.token_ids])
    count = len(trace.token_ids)

    def likelihood(place, gate):
        gates = torch.zeros(ids.shape[1])
        gates[len(trace.prompt_ids) + place] = gate
        with real_signals._attention(policy.model, gates), torch.no_grad():
            logits = policy.model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1].double()
        return float(logits.log_softmax(-1).gather(1, ids[0, -count:, None]).sum())

    for place in (0, 5, count - 2):
        slope = (likelihood(place, 0.05) - likelihood(place, -0.05)) / 0.1
        assert slope == pytest.approx(one.signals.gradient[place], rel=0.02, abs=2e-4)


def test_a_passage_is_protected_and_rewarded_as_score_batch_does_it(policy, one):
    whole = real._whole(one)
    ours = scored(policy, one)
    importance = one.paper.astype(np.float32).astype(np.float64)
    assert (real_measures.protected(importance) == ours.protected.numpy()).all()
    assert -real_measures.REWARDS[real_measures.R](whole) == pytest.approx(ours.reward, abs=1e-6)
    assert real_measures.REWARDS["D = M (1 - r)"](whole) == pytest.approx(ours.redundant_tokens, abs=1e-3)


def test_copies_are_protected_last(one):
    copy = one.copies[2]
    assert 0 < copy.sum() < len(copy)
    kept = real_measures.protected(real_measures.IMPORTANCES["no copies, n = 2"](one), 0.5)
    assert not (kept & copy).any() or (kept | copy).all()


def test_sentences_hold_their_tokens_and_settling_has_its_token(traces):
    trace = next(trace for trace in traces if trace.settled is not None)
    for sentence, following in zip(trace.sentences, trace.sentences[1:], strict=False):
        assert sentence.last < following.first
        text = trace.text[trace.starts[sentence.first] : trace.starts[sentence.last + 1]]
        assert any(step.startswith(text.strip()[:12]) or text.strip() in step for step in STEPS)
    assert trace.settled == trace.sentences[5].first
    assert sorted(real_traces.shuffled(trace, random.Random(1).shuffle)) == sorted(trace.token_ids)
    assert real_traces.shuffled(trace, lambda numbers: None) == trace.token_ids


def test_a_larger_limit_adds_problems_to_a_smaller_one():
    names = [f"problem {i}" for i in range(30)]
    few, more = (real_traces.chosen(names, limit) for limit in (5, 12))
    assert len(few) == 5
    assert len(more) == 12
    assert few < more
    assert real_traces.chosen(names, None) == set(names)


def test_a_verified_step_is_inserted_and_the_length_kept(policy, traces):
    trace = next(trace for trace in traces if trace.settled is not None)
    step = replace(next(s for s in trace.sentences if s.last - s.first >= 8), label="active_computation")
    versions = dict(real._verified_again(replace(trace, sentences=[step]), policy.tokenizer))
    assert list(versions) == [0, 1, 2, 3, 4]
    assert versions[0] == trace.token_ids[: len(versions[0])]
    assert {len(ids) for ids in versions.values()} == {len(versions[0])}
    said = trace.token_ids[step.first : step.last + 1]
    again = policy.tokenizer(real._AGAIN, add_special_tokens=False)["input_ids"]
    assert versions[1][step.last + 1 :][: len(again) + len(said)] == again + said
    assert len({tuple(ids) for ids in versions.values()}) > 1
    assert not dict(real._verified_again(replace(trace, sentences=[replace(step, label="self_checking")]), policy.tokenizer))


def test_a_run_goes_on_from_its_cache_and_can_be_drawn_again(policy, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "load_model", lambda options: policy)
    monkeypatch.setattr(real, "_PROXY", tmp_path / "none.json")
    result = real.run(options(folder, tmp_path / "cache"))
    assert {r["part"] for r in result.rows} >= {"pair", "whole", "sentences", "category", "settled"}
    pairs = result.summary["pairs"]["QwQ-32B or Qwen2.5-32B-Instruct"]["whole"]
    assert pairs["problems"] == 2
    assert pairs["ordered"]["length"][0] == 1
    assert result.summary["sentences"]["resampling_importance_kl"]["mean"]["gradient"]["alone"]["value"] is not None
    assert {r["text"] for r in result.rows if r["part"] == "settled"} == {"as written", "shuffled"}

    def never(*arguments, **options):
        raise AssertionError("what is in the cache is not measured again")

    monkeypatch.setattr(real_signals, "signals", never)
    again = real.run(options(folder, tmp_path / "cache"))
    assert again.rows == result.rows
    assert again.summary == result.summary
    results.write(result, tmp_path, real.tables(result), real.figures(result))
    drawn = (tmp_path / "real.md").read_text()
    assert main(["real", "--output", str(tmp_path / "again"), "--redraw", str(tmp_path / "real.json")]) == 0
    assert (tmp_path / "again" / "real.md").read_text() == drawn
    capsys.readouterr()


def test_what_is_missing_is_named(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(measuring, "load_model", lambda options: policy)
    with pytest.raises(ValueError, match="--folder None"):
        real.run(options(None, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"thought_anchors\.jsonl; python -m benchmarks\.traces\.real_traces makes it"):
        real.run(options(tmp_path, tmp_path))
