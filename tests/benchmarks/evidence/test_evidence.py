"""The evidence experiment: problems, traces and checker agree; one tiny run goes from SFT to the report."""

import json
import random

import pytest

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")

from benchmarks.evidence import arms, processes
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.model import EOS_ID, build_tokenizer
from benchmarks.evidence.problems import KINDS, correct, mixed, tokens_of, trace


@pytest.fixture(scope="module")
def some():
    return mixed(200, "train", seed=7)


def test_the_core_is_right_unless_a_guess_goes_unchecked(some):
    rng = random.Random(0)
    for problem in some:
        text = trace(problem, rng, 0)
        assert correct(problem, text) or (problem.kind == "guess" and "check" not in text)


def test_unchecked_guesses_are_often_wrong(some):
    rng = random.Random(0)
    texts = [(problem, trace(problem, rng)) for problem in some * 10 if problem.kind == "guess"]
    unchecked = [correct(problem, text) for problem, text in texts if "check" not in text.split(".")[1]]
    # 40 % wrong over some 75 traces: standard deviation 6 %
    assert 0.4 < sum(unchecked) / len(unchecked) < 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_another_answer_is_wrong(some, kind):
    problem, other = [problem for problem in some if problem.kind == kind][:2]
    assert correct(problem, f"answer : {problem.answer}")
    assert not correct(problem, f"answer : {other.answer}")
    assert not correct(problem, problem.answer), "without the marker"
    assert not correct(problem, f"answer : {problem.answer} answer : {other.answer}"), "the last answer counts"


def test_episodes_lengthen_a_trace_and_leave_the_answer(some):
    rng = random.Random(0)
    for problem in some:
        if problem.kind != "guess":
            assert len(tokens_of(trace(problem, rng, 4))) > len(tokens_of(trace(problem, rng, 0)))
            assert correct(problem, trace(problem, rng, 4))


def test_no_held_out_problem_is_ever_trained_on():
    assert not {p.prompt for p in mixed(2000, "train", 1)} & {p.prompt for p in mixed(500, "held-out", 2)}


def test_the_tokenizer_gives_text_back(some):
    tokenizer, rng = build_tokenizer(), random.Random(0)
    for problem in some:
        text = trace(problem, rng)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == EOS_ID


def rollouts(problem, texts):
    """Arguments of a reward function: one group of completions of one problem."""
    ids = [[*build_tokenizer()(text).input_ids, EOS_ID] for text in texts]
    columns = {name: [getattr(problem, name)] * len(texts) for name in ("kind", "answer", "entry")}
    return {"prompts": [problem.prompt] * len(texts), "completions": texts, "completion_ids": ids, **columns}


def test_rewards_of_one_group(some):
    right = f"answer : {some[0].answer}"
    group = rollouts(some[0], [right, "so " * 4 + right, "answer : 1 2 3 4", "so " * 8 + right])
    assert arms.accuracy(**group) == [1.0, 1.0, 0.0, 1.0]
    shortest, longest = (len(group["completion_ids"][i]) for i in (0, 3))
    wrong = 0.5 - (len(group["completion_ids"][2]) - shortest) / (longest - shortest)
    assert arms.kimi(**group) == pytest.approx([0.5, 0.0, min(0.0, wrong), -0.5])
    cosine = arms.cosine(**group)
    assert 1 > cosine[0] > cosine[1] > cosine[3] > 0.5
    assert -1 < cosine[2] < -0.5


def test_a_cut_completion_is_wrong(some):
    group = rollouts(some[0], [f"answer : {some[0].answer}"])
    group["completion_ids"][0].pop()
    assert arms.accuracy(**group) == [0.0]


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="arm='entropy' must be one of accuracy, entra-additive"):
        arms.rewards_of("entropy", 0)


def test_missing_runs_are_made_with_a_bar_and_failures_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "make_sft", lambda sft, steps: 0)
    monkeypatch.setattr(processes, "_process", lambda name, *words, **flags: int(name == "b"))
    (tmp_path / "c.json").touch()
    runs = [processes.Run([name], tmp_path / f"{name}.json", {}) for name in "abc"]
    assert processes.make_missing(runs, tmp_path) == 1
    lines = capsys.readouterr().err
    assert "1 of 3 runs are there, 2 to do, 2 at a time" in lines
    assert " 50% |" in lines
    assert "| 2/2 runs [" in lines


def test_from_sft_to_the_report(tmp_path, capsys):
    """The processes' work in this process: 2 SFT steps, one GRPO step, 8 held-out problems."""
    sft, results = tmp_path / "sft", tmp_path / "results"
    assert main(["sft", "--into", str(sft), "--sft-steps", "2"]) == 0
    held_out = ["--sft", str(sft), "--held-out", "8"]
    assert main(["base", "0", *held_out, "--into", str(results / "sft-seed0.json")]) == 0
    for arm in ("accuracy", "entra-banded"):
        into = str(results / f"{arm}-seed0.json")
        assert main(["one", arm, "0", *held_out, "--steps", "1", "--prompts-per-step", "1", "--into", into]) == 0
    result = json.loads((results / "entra-banded-seed0.json").read_text())
    assert len(result["held_out"]["tokens"]) == len(result["held_out"]["correct"]) == 8
    assert len(result["curve"]["within_group_std"]) == 1
    assert result["command"].startswith("python -m benchmarks.evidence ")
    assert main(["report", "--results", str(results), "--into", str(tmp_path)]) == 0
    page, plot = (tmp_path / "evidence.md").read_text(), (tmp_path / "evidence.svg").read_text()
    assert f"| {arms.ARMS['entra-banded']} | 0.0 | +0.0 (+0.0 to +0.0) |" in page
    assert "<svg" in plot
    assert "| accuracy only |" in capsys.readouterr().out
