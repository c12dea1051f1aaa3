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

from benchmarks.experiments import measuring, real, real_attempts, real_measures, real_signals, real_traces, results
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.influence import layer_attention
from benchmarks.experiments.ranks import ranks, spearman
from entra import ScoreConfig
from entra.encode import Encoder
from entra.policy import Policy
from entra.traces import load_traces

STEPS = ("First I add 4 and 5.", "That makes 4 + 5 = 9.", "Wait, 4 and 5 make 9.", "So the answer is 9, I think.")
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
    given = {"folder": folder, "cache": cache, "windows": True, "gradient": True, "limit": 4, **changes}
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


@pytest.fixture(scope="module")
def traces(policy, folder):
    encoder = Encoder(policy.tokenizer, policy.model, {})
    found, faults = real_traces.read(folder, encoder, policy.tokenizer, {})
    assert faults == []
    return found


@pytest.fixture(scope="module")
def one(policy, traces, tmp_path_factory):
    trace = next(trace for trace in traces if trace.settled is not None)
    asked = (tmp_path_factory.mktemp("cache"), "a model", policy.model, trace.prompt_ids, trace.token_ids)
    return real_measures.Measured(
        trace=trace, signals=real_signals.cached(*asked, all_layers=True, windows=True, gradient=True)
    )


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
    first = real_signals.cached(*asked, all_layers=True, windows=True)
    assert np.isnan(first.gradient).all()
    for measured in ("_forward", "_windows"):
        monkeypatch.delattr(real_signals, measured)
    second = real_signals.cached(*asked, all_layers=True, gradient=True)
    assert np.array_equal(first.logprobs, second.logprobs)
    assert np.array_equal(first.far_8, second.far_8)
    assert np.array_equal(second.gradient, one.signals.gradient)
    monkeypatch.delattr(real_signals, "_gradient")
    assert np.array_equal(real_signals.cached(*asked, all_layers=True).gradient, second.gradient)


def test_the_windows_are_those_of_eager_attention(policy, one):
    ids = torch.tensor([one.trace.prompt_ids + one.trace.token_ids])
    before = policy.model.config._attn_implementation
    policy.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            future = policy.model(ids, output_attentions=True).attentions[-1][0].mean(0)
    finally:
        policy.model.set_attn_implementation(before)
    count = len(one.trace.token_ids)
    for nearest, found in ((8, one.signals.far_8), (32, one.signals.far), (128, one.signals.far_128)):
        left = torch.arange(ids.shape[1] - 1 - nearest, -1 - nearest, -1).clamp(min=1)
        far = future.tril(-1 - nearest).sum(0) / left
        assert np.abs(far[-count:].numpy() - found).max() < 1e-6


def test_blocks_and_the_nearest_queries(monkeypatch):
    """Against the whole matrix, with blocks that do not divide the number of tokens."""
    monkeypatch.setattr(real_signals, "_BLOCK", 7)
    monkeypatch.setattr(real_signals, "NEAREST", (3, 9))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 40, 8)
    found = real_signals._columns(query, key, value)
    places = torch.arange(40)
    scores = (query @ key.transpose(1, 2)).masked_fill(places > places[:, None], -torch.inf)
    future = scores.softmax(-1).tril(-1)
    torch.testing.assert_close(found.total, future.mean(0).sum(0))
    torch.testing.assert_close(found.lifted, (future.mean(0) * (places + 1)[:, None]).sum(0))
    torch.testing.assert_close(found.far, torch.stack([future.mean(0).tril(-1 - nearest).sum(0) for nearest in (3, 9)]))
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
    mixed = real_traces.shuffled(trace, random.Random(1).shuffle)
    assert sorted(mixed.token_ids) == sorted(trace.token_ids)
    assert mixed.token_ids != trace.token_ids
    moved = {s.text: mixed.token_ids[s.first : s.last + 1] for s in mixed.sentences}
    assert moved == {s.text: trace.token_ids[s.first : s.last + 1] for s in trace.sentences}
    assert real_traces.shuffled(trace, lambda numbers: None).token_ids == trace.token_ids


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


def test_an_attempt_again_needs_the_result_half_of_the_numbers_and_doubt_in_between():
    said = [
        ("active_computation", "So 6 * 64 = 384."),
        ("active_computation", "That is 6 * 64 = 384."),  # no doubt in between
        ("uncertainty_management", "Wait, 6 * 64 = 384?"),
        ("active_computation", "Again, 64 * 6 is 384."),
        ("active_computation", "And 400 - 16 = 384."),  # other numbers
        ("active_computation", "6 * 64 = 1,384"),  # another result
        ("active_computation", "It is 384."),  # one number
    ]
    sentences = [
        real_traces.Sentence(first=9 * i, last=9 * i + 8, label=label, importance={}, text=text)
        for i, (label, text) in enumerate(said)
    ]
    found = real_attempts.attempts(sentences)
    assert [sentence.first // 9 for sentence, _ in found] == [0, 1, 3, 4, 5]
    assert [first and first.text for _, first in found] == [None, None, said[0][1], None, None]


def test_what_a_sentence_adds_sums_to_the_reward(one):
    """D of the whole text is what its pieces add, each times its tokens."""
    judge, count = real_attempts.judged(one)["added: D = M (1 - r)"], len(one.trace.token_ids)
    pieces = [slice(start, min(start + 7, count)) for start in range(0, count, 7)]
    total = sum(judge(piece) * (piece.stop - piece.start) for piece in pieces)
    assert total == pytest.approx(real_measures.REWARDS["D = M (1 - r)"](real._whole(one)), rel=1e-9)


def test_a_weighted_partial_correlation_is_that_of_the_repeated_rows():
    generator = np.random.default_rng(3)
    columns = generator.normal(size=(3, 40))
    columns[2] += columns[1] + columns[0]
    weights = np.concatenate([np.ones((1, 40)), generator.integers(0, 3, size=(1, 40))])
    found = real._partial(np.array([ranks(column) for column in columns]), weights)
    assert found[0, 0] == pytest.approx(spearman(columns[2], columns[1], [columns[0]]))
    drawn = np.array([ranks(column) for column in columns]).repeat(weights[1].astype(int), axis=1)
    left = [column - np.polyval(np.polyfit(drawn[0], column, 1), drawn[0]) for column in drawn[1:]]
    assert found[1, 0] == pytest.approx(np.corrcoef(left)[0, 1])


def test_a_choice_is_judged_where_it_was_not_made():
    """b is best on problem 2 alone: chosen without it, it is never judged there."""
    scores = {
        "a": {"1": 0.3, "2": 0.0, "3": 0.3},
        "b": {"1": 0.0, "2": 1.0, "3": 0.0},
        "basis": {"1": 0.1, "2": 0.1, "3": 0.1},
    }
    found = real._left_one_out(scores, ("a", "b"), "basis")
    assert found["picks"] == ["b", "a", "b"]
    assert found["gain"][0] == pytest.approx((-0.1 - 0.1 - 0.1) / 3)


def left_out(policy):
    """What `proxy` could have measured of two shipped traces: leaving out a token costs as much as it is late."""
    encoder = Encoder(policy.tokenizer, policy.model, {})
    rows = []
    for sample in measuring.shipped(load_traces()).samples[::7][:2]:
        prompt = len(encoder.encode(sample.prompt, sample.completion).prompt)
        about = {"problem": sample.problem, "kind": sample.kind}
        recorded = {"logprob": -1.0, "mu": 0.1, "lift": 1.0, "mu_all": 0.1}
        rows += [{**about, **recorded, "position": prompt + i, "later": 12 - i, "loo": float(i)} for i in range(11)]
    return rows


def test_what_proxy_recorded_is_enough_for_most_importances(policy, tmp_path, monkeypatch):
    (tmp_path / "proxy.json").write_text(json.dumps({"settings": {"model": "smollm2"}, "rows": left_out(policy)}))
    monkeypatch.setattr(real, "_PROXY", tmp_path / "proxy.json")
    encoder = Encoder(policy.tokenizer, policy.model, {})
    assert real._left_out(encoder, "another model") == []
    trace, rows = real._left_out(encoder, "smollm2")[0]
    found = {row["importance"]: row for row in real._loo_rows(real._recorded(trace, rows), rows) if row["target"] == "sum"}
    assert found["position (early first)"]["alone"] == -1
    assert found["log P"]["alone"] == 0
    assert {"mu shrunk by 16 queries", "no copies of the completion, n = 2", real_measures.PAPER} <= found.keys()
    assert not {"gradient", "value-weighted", "mu without the nearest 8"} & found.keys()


def test_a_run_goes_on_from_its_cache_and_can_be_drawn_again(policy, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "load_model", lambda options: policy)
    (tmp_path / "proxy.json").write_text(json.dumps({"settings": {"model": "smollm2"}, "rows": left_out(policy)}))
    monkeypatch.setattr(real, "_PROXY", tmp_path / "proxy.json")
    result = real.run(options(folder, tmp_path / "cache"))
    assert {r["part"] for r in result.rows} >= {"pair", "whole", "sentences", "category", "settled", "leave-one-out"}
    pairs = result.summary["pairs"]["QwQ-32B or Qwen2.5-32B-Instruct"]["whole"]
    assert pairs["problems"] == 2
    assert pairs["ordered"]["length"][0] == 1
    assert result.summary["sentences"]["resampling_importance_kl"]["mean"]["gradient"]["alone"]["value"] is not None
    judge = result.summary["leave_one_out"]
    assert judge["position (early first)"]["sum"]["alone"][0] == -1
    assert judge["gradient"]["mean"]["place"] is not None
    assert result.summary["beyond_length"]["attempts again"]["completions"] == 6
    assert {r["text"] for r in result.rows if r["part"] == "settled"} == {"as written", "shuffled"}

    def never(*arguments, **options):
        raise AssertionError("what is in the cache is not measured again")

    monkeypatch.setattr(real_signals, "_forward", never)
    monkeypatch.setattr(real_signals, "_windows", never)
    monkeypatch.setattr(real_signals, "_gradient", never)
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
