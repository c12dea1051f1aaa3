"""The experiments `importance`, `threshold` and `lambda` with a tiny model: what they count; reports can be redrawn."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny_models
import torch
from tiny_tokenizer import build_tokenizer

import entra
from benchmarks.experiments import attention_weight, importance, perturbations, results, threshold, traces, twins
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.token_kinds import KINDS, kinds_of
from entra.policy import Policy

PROBLEMS = [
    (
        "Compute 3 * 4 + 2.",
        {
            "concise": "3 * 4 = 12, so 12 + 2 = 14.",
            "overthinking": "3 * 4 = 12, so 12 + 2 = 14. Wait, let me check again: 3 * 4 = 12, yes, 12 + 2 = 14.",
            "control": "12 and 2 make 14; the next even numbers are 16 and 18, because each is two more than before.",
        },
    ),
    (
        "Is every square a rectangle?",
        {
            "concise": "Yes: it has four right angles.",
            "overthinking": "Yes: it has four right angles. Hmm, does it? Yes, it has four right angles.",
            "control": "Yes, though not the reverse. Kites, by contrast, need two pairs of equal sides that touch.",
        },
    ),
    (
        "Which is larger, 7 or 9?",
        {
            "concise": "9 > 7.",
            "overthinking": "9 > 7. Let me verify: 9 > 7, so 9.",
            "control": "9, as 9 - 7 = 2. Ten is rounder.",
        },
    ),
]
NAMES = {"importance": importance, "threshold": threshold, "lambda": attention_weight}


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_models.build("llama"), build_tokenizer())


@pytest.fixture(scope="module")
def measured(policy):
    samples = [
        traces.Sample(problem=str(i), kind=kind, prompt=[{"role": "user", "content": prompt}], completion=text)
        for i, (prompt, texts) in enumerate(PROBLEMS)
        for kind, text in texts.items()
    ]
    return traces.measure(policy, traces.Samples(samples))


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    """What each experiment wrote about the problems and one bad row, without the plots."""
    folder = tmp_path_factory.mktemp("experiments")
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "completion": text, "kind": kind, "id": str(i)}
        for i, (prompt, texts) in enumerate(PROBLEMS)
        for kind, text in texts.items()
    ]
    lines = [*map(json.dumps, rows), '{"prompt": "no completion"}']
    (folder / "traces.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "load_policy", lambda name: policy)
        patch.setattr(results, "draw", lambda figure, folder: None)
        for name in NAMES:
            arguments = ["--model", "tiny", "--traces", str(folder / "traces.jsonl"), "--output", str(folder)]
            assert main([name, *arguments, *(["--draws", "3"] if name == "threshold" else [])]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_redraw_writes_the_same_report_from_the_json_alone(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda figure, folder: None)
    monkeypatch.setattr(traces, "load_policy", None)
    assert main([name, "--redraw", str(folder / f"{name}.json"), "--output", str(tmp_path)]) == 0
    for ending in ("md", "json", "csv"):
        assert (tmp_path / f"{name}.{ending}").read_bytes() == (folder / f"{name}.{ending}").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_report_says_what_was_left_out(name, folder):
    assert "Left out: 1 rows that cannot be scored, the first: row 10 has no completion." in (folder / f"{name}.md").read_text()
    assert results.read(folder / f"{name}.json").summary["left_out_rows"] == ["row 10 has no completion"]


def test_perturbations_that_apply_to_no_prompt_are_left_out(policy, tmp_path, monkeypatch):
    """Another system message and no chat template: neither can be said of prompts that are plain text."""
    monkeypatch.setattr(traces, "load_policy", lambda name: policy)
    monkeypatch.setattr(results, "draw", lambda figure, folder: None)
    rows = [{"prompt": prompt, "completion": text, "kind": kind} for prompt, texts in PROBLEMS for kind, text in texts.items()]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", "tiny", "--traces", str(tmp_path / "traces.jsonl"), "--output", str(tmp_path), "--draws", "2"]
    assert main(["threshold", *arguments]) == 0
    stability = results.read(tmp_path / "threshold.json").summary["stability"]
    assert {row["perturbation"] for row in stability} == {"bfloat16", "polite"}
    left_out = "Left out, because no prompt here is made of chat messages: another system message, no chat template."
    assert left_out in (tmp_path / "threshold.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_plots_have_labels_and_captions(name, folder):
    from matplotlib.figure import Figure

    drawn = NAMES[name].figures(results.read(folder / f"{name}.json"))
    assert len({figure.name for figure in drawn}) == 3
    for figure in drawn:
        canvas = Figure()
        figure.draw(canvas)
        assert figure.title
        assert any(axes.get_xlabel() for axes in canvas.axes)
        assert any(axes.get_ylabel() for axes in canvas.axes)
        assert all(axes.has_data() for axes in canvas.axes)
        assert "9 completions of 3 problems" in figure.caption
        assert "95 % intervals" in figure.caption or "quartile" in figure.caption


def cut(text):
    """Words with the space before them in pieces of at most four letters, digits one by one: as tokenizers cut."""
    return re.findall(r"\n|\s?\d|\s?[^\W\d_]{1,4}|\s?[^\w\s]|\s", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("x = 5.5", "word operator number number number", id="decimal-point"),
        pytest.param("9,001 is", "number number number number number word", id="thousands"),
        pytest.param("- well-known", "punctuation word punctuation word word", id="bullet-and-hyphen"),
        pytest.param("(4 + 1)^2", "punctuation number operator number punctuation operator number", id="brackets"),
        pytest.param("**Bold**", "punctuation punctuation word punctuation punctuation", id="markdown"),
        pytest.param("Double-check it", "reflection reflection reflection reflection reflection word", id="word-of-pieces"),
        pytest.param("let me see", "reflection reflection word", id="phrase"),
        pytest.param("let us see", "word word word", id="not-the-phrase"),
        pytest.param("Therefore I add", "connective connective connective word word", id="connective"),
        pytest.param("sandy", "word word", id="connective-inside-a-word"),
        pytest.param("\n\n", "punctuation punctuation", id="space"),
    ],
)
def test_kinds_of_tokens(text, expected):
    assert [kind.kind for kind in kinds_of(cut(text))] == expected.split()


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("1. So (5 * 3) = 15, then 2", "(5 * 3) = 15"),
        ("get x = 5 now", "x = 5"),
        ("a well-known a/b of 7 - I", ""),
        ("5 * 3\n= 15", "5 * 3"),
        ("x = y", ""),
    ],
)
def test_formulas(text, formula):
    pieces = cut(text)
    inside = "".join(piece for piece, kind in zip(pieces, kinds_of(pieces), strict=True) if kind.in_formula)
    assert inside.strip() == formula


def test_pieces_without_text_have_the_kind_of_what_follows():
    assert [kind.kind for kind in kinds_of(["so ", "", "5"])] == ["connective", "number", "number"]
    assert [kind.kind for kind in kinds_of(["", ""])] == ["punctuation"] * 2


def test_importance_counts_every_token_once(folder, measured):
    rows = results.read(folder / "importance.json").rows
    scores = traces.scored(measured.traces, entra.ScoreConfig())
    by_mu = [trace.mean.argsort(descending=True, stable=True)[: int(0.2 * len(trace.mean) + 1e-9)] for trace in measured.traces]
    for i, trace in enumerate(measured.traces):
        own = {row["token_kind"]: row for row in rows if row["trace"] == i}
        assert sum(own[kind]["tokens"] for kind in KINDS) == own["all"]["tokens"] == len(trace.token_ids)
        protected = sum(own[kind]["protected_by_importance"] for kind in KINDS)
        assert protected == own["all"]["protected_by_importance"] == int(scores.protected[i].sum())
        digits = torch.tensor([piece.isdigit() for piece in trace.pieces])
        assert own["number"]["protected_by_incoming"] == int(digits[by_mu[i]].sum())
        assert math.isclose(own["number"]["sum_logprob"], float(trace.logprobs[digits].double().sum()), abs_tol=1e-9)
    summary = results.read(folder / "importance.json").summary
    everything = summary["by_kind"]["all"]["number"]
    counted = [row for row in rows if row["token_kind"] == "number"]
    share = sum(row["protected_by_logprob"] for row in counted) / sum(row["tokens"] for row in counted)
    assert math.isclose(everything["protected_by_logprob"][0], share)


def test_marked_text_is_neither_markdown_nor_html():
    assert importance.marked(["a|b*", "<i>\n", "c"], [False, True, True]) == "a&#124;b&#42;<b>&lt;i&gt;<br>c</b>"


def test_protected_sets_are_nested_over_tau(measured):
    chosen = [
        traces.scored(measured.traces, entra.ScoreConfig(protect_fraction=tau)).protected for tau in (0.1, 0.2, 0.3, 0.4, 0.5)
    ]
    for smaller, larger in pairwise(chosen):
        for one, other in zip(smaller, larger, strict=True):
            assert bool((~one | other).all())
    assert [int(last.sum()) > int(first.sum()) for first, last in zip(chosen[0], chosen[-1], strict=True)] == [True] * 9


def test_a_perturbation_that_changes_nothing_keeps_everything(policy, measured, monkeypatch):
    monkeypatch.setitem(perturbations._PROMPTS, "polite", lambda prompt: prompt)
    config = entra.ScoreConfig()
    before = traces.scored(measured.traces, config)
    again = perturbations.measure_again(policy, measured, "polite")
    same = perturbations.stability_of(before, traces.scored(list(again.values()), config))
    assert list(again) == list(range(9))
    assert all(row == {"kept": 1.0, "jaccard": 1.0, "reward_change": 0.0, "logprob_change": 0.0} for row in same)
    changed = perturbations.measure_again(policy, measured, "plain")
    moved = perturbations.stability_of(before, traces.scored(list(changed.values()), config))
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


def test_threshold_compares_twins(folder):
    result = results.read(folder / "threshold.json")
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
    assert traces.overlap(one, other) == {"kept": 1 / 3, "jaccard": 1 / 4}
    assert traces.overlap(one & ~one, one & ~one) == {"kept": 1.0, "jaccard": 1.0}


def test_auc_counts_ties_half_and_all_pairs(measured):
    rewards = [0.9, 0.5, 0.5, 0.8, 0.6, 0.7, 0.1, 0.4, 0.3]  # concise, overthinking, control of each problem
    found = {row["other"]: row for row in twins.compare(measured, {"r": rewards})}
    # Overthinking is .5, .6, .4; concise .9, .8, .1; control .5, .7, .3.
    assert (found["concise"]["lower"], found["concise"]["pairs"], found["concise"]["auc"]) == (2, 3, 6 / 9)
    assert (found["control"]["lower"], found["control"]["auc"]) == (1, 4.5 / 9)


def test_lambda_zero_protects_what_log_p_protects(folder):
    rows = results.read(folder / "lambda.json").rows
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["importance", "--protect-fraction", "2"], "protect_fraction=2.0 must be in"),
        (["threshold", "--draws", "0"], "--draws 0 must be at least 1"),
        (["lambda", "--attention-weight", "nan"], "attention_weight=nan must be finite"),
        (["lambda", "--traces", "no-such.jsonl"], "cannot read no-such.jsonl"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(traces, "load_policy", None)  # found before the model is loaded
    assert main([*arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
