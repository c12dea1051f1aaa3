"""`entra eval`: numbers worked out by hand, what is read from which column, pairs and bad rows."""

import importlib.metadata
import json
import os
import sys
import types

import numpy as np
import pytest
from tiny_tokenizer import build_tokenizer

from entra.cli import main
from entra.grading import READ_VERSION, answer_checker, answer_reward, exact_match, math_verify_match


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def evaluate(*words):
    """All numbers of `entra eval`, in full."""
    assert main(["eval", *words, "--json", "numbers.json"]) == 0
    with open("numbers.json") as file:
        return json.load(file)


def rows(right, tokens, **columns):
    return [{"id": i, "correct": bool(r), "tokens": t, **columns} for i, (r, t) in enumerate(zip(right, tokens, strict=True))]


BASE = rows([1, 1, 1, 0], [100, 200, 300, 400], truncated=False)
NEW = rows([1, 0, 1, 0], [50, 100, 150, 100], truncated=True)


def test_numbers_by_hand(capsys):
    write_rows("base.jsonl", BASE)
    write_rows("new.jsonl", [*NEW[::-1]])
    found = evaluate("base.jsonl", "new.jsonl")
    base, new, change = found["base"], found["new"], found["change"]
    assert (base["problems"], base["completions"], base["tokens_mean"]["estimate"]) == (4, 4, 250)
    assert (base["tokens_median"], base["tokens_p95"]) == (250, pytest.approx(385))
    # Wilson's for 3 of 4: (.75 + .480183 -+ 1.959964 sqrt(.046875 + .060023)) / 1.960365
    accuracy = base["accuracy"]
    assert (accuracy["estimate"], accuracy["low"], accuracy["high"]) == pytest.approx((0.75, 0.300642, 0.954413), abs=1e-6)
    assert (new["accuracy"]["estimate"], new["tokens_mean"]["estimate"]) == (0.5, 100)
    assert (base["truncated"]["estimate"], new["truncated"]["estimate"]) == (0, 1)
    assert change["accuracy"]["estimate"] == -0.25
    assert change["tokens_mean"]["estimate"] == -150
    assert change["length_reduction"]["estimate"] == pytest.approx(0.6)
    assert change["truncated"] == {"estimate": 1, "low": 1, "high": 1}
    assert change["compression_effectiveness"]["estimate"] == pytest.approx(2 / 3 - 0.4)
    text = capsys.readouterr().out
    for shown in ("75.0 (30.1 to 95.4)", "-150.0 (", "+60.0 (", "+0.267 (", "the paper's was not available to us"):
        assert shown in text
    assert "Right: where the column correct is true or at least 1." in text
    assert "Tokens: the column tokens." in text


def test_one_file_alone(capsys):
    write_rows("base.jsonl", BASE)
    found = evaluate("base.jsonl")
    assert found["base"]["accuracy"]["estimate"] == 0.75
    assert "new" not in found
    assert found["change"] == {}
    text = capsys.readouterr().out
    assert "accuracy, %" in text
    for absent in ("change", "length reduction", "Compression"):
        assert absent not in text


def test_samples_of_a_problem_count_together():
    """Problem a has three completions in the new file: it weighs as much as b, and its copies are no new evidence."""
    write_rows("base.jsonl", [{"id": "a", "correct": 1, "tokens": 10}, {"id": "b", "correct": 1, "tokens": 30}])
    samples = [{"id": "a", "correct": 1, "tokens": t} for t in (4, 5, 6)]
    write_rows("new.jsonl", [*samples, {"id": "b", "correct": 0, "tokens": 25}])
    found = evaluate("base.jsonl", "new.jsonl")
    assert (found["new"]["problems"], found["new"]["completions"]) == (2, 4)
    assert found["new"]["accuracy"]["estimate"] == 0.5
    assert found["new"]["tokens_mean"]["estimate"] == 15
    assert found["change"]["tokens_mean"] == {"estimate": -5, "low": -5, "high": -5}
    one = rows([i % 2 for i in range(40)], range(40))
    write_rows("one.jsonl", one)
    write_rows("copied.jsonl", one * 5)
    alone, copied = (evaluate(name)["base"]["accuracy"] for name in ("one.jsonl", "copied.jsonl"))
    assert copied == pytest.approx(alone)


def test_interval_of_the_difference_is_the_paired_one():
    """Tokens vary by 1,000 between problems, their difference by 1: the interval must be of the latter."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(1000, 4000, size=200)
    write_rows("base.jsonl", rows(np.ones(200), tokens.tolist()))
    write_rows("new.jsonl", rows(np.ones(200), (tokens - generator.integers(9, 12, size=200)).tolist()))
    found = evaluate("base.jsonl", "new.jsonl", "--draws", "1000")["change"]["tokens_mean"]
    # The difference is 9, 10 or 11: standard error .82 / sqrt(200) = .058; the interval is 3.9 of them wide, within 10 %.
    assert found["high"] - found["low"] == pytest.approx(3.92 * 0.0577, rel=0.15)
    assert found == evaluate("base.jsonl", "new.jsonl", "--draws", "1000")["change"]["tokens_mean"]
    assert found != evaluate("base.jsonl", "new.jsonl", "--draws", "1000", "--seed", "1")["change"]["tokens_mean"]


def test_unpaired_problems_and_bad_rows_are_counted_and_left_out(capsys):
    bad = [
        '{"id": 9',
        {"id": 9, "tokens": 5},
        {"id": 9, "correct": "yes", "tokens": 5, "truncated": False},
        {"correct": 1, "tokens": 5},
    ]
    bad += [{"id": 9, "correct": 1, "tokens": -3}, {"id": 9, "correct": 1, "tokens": float("nan")}]
    bad += [{"id": 9, "correct": 1, "tokens": 10**400}]
    write_rows("base.jsonl", [*BASE, *bad, {"id": "only here", "correct": 0, "tokens": 1, "truncated": True}])
    write_rows("new.jsonl", [row for row in NEW if row["id"] != 3])
    found = evaluate("base.jsonl", "new.jsonl")
    assert found["base"]["problems"] == found["new"]["problems"] == 3
    assert found["base"]["accuracy"]["estimate"] == 1
    assert (found["base"]["unpaired_problems"], found["new"]["unpaired_problems"]) == (2, 0)
    assert [(row["row"], row["error"].partition(":")[0]) for row in found["base"]["bad_rows"]] == [
        (5, "malformed"),
        (6, "missing field"),
        (7, "malformed"),
        (8, "missing field"),
        (9, "malformed"),
        (10, "malformed"),
        (11, "malformed"),
    ]
    text = capsys.readouterr().out
    assert "base.jsonl: 2 problems are not in the other file" in text
    assert "base.jsonl: 7 bad rows were left out (5 malformed, 2 missing field); the first is row 5: malformed: line 5" in text


ANSWERS = [
    {"prompt": "2+2", "completion": "It is 4. It is 4.\nThe answer is 4.", "answer": "4"},
    {"prompt": "3+3", "completion": [{"role": "assistant", "content": "so <answer>7</answer>"}], "answer": "6"},
]


def test_words_and_exact_match_where_there_is_nothing_better(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_rows("base.jsonl", ANSWERS)
    found = evaluate("base.jsonl")
    assert found["base"]["accuracy"]["estimate"] == 0.5
    assert found["base"]["tokens_mean"]["estimate"] == (10 + 2) / 2
    text = capsys.readouterr().out
    assert "exact match after normalisation" in text
    assert "words, mean" in text
    assert "no --model" in text
    assert "truncated" not in text


def fake_math_verify(monkeypatch, version=READ_VERSION):
    fake = types.ModuleType("math_verify")
    fake.__spec__ = types.SimpleNamespace(name="math_verify")
    fake.parse = lambda text: [text]
    fake.verify = lambda gold, given: (gold, given) == (["$6$"], ["$7$"])
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def test_math_verify_is_used_where_it_is_installed(monkeypatch, capsys):
    fake_math_verify(monkeypatch)
    write_rows("base.jsonl", [*ANSWERS, {"prompt": "who", "completion": "Celia", "answer": "Alice"}])
    assert evaluate("base.jsonl")["base"]["accuracy"]["estimate"] == pytest.approx(2 / 3)
    assert "math-verify, exact match for answers in words" in capsys.readouterr().out


def test_a_math_verify_that_was_not_read_compares_nothing(monkeypatch, capsys):
    fake_math_verify(monkeypatch, "99.1")
    write_rows("base.jsonl", ANSWERS)
    assert evaluate("base.jsonl")["base"]["accuracy"]["estimate"] == 0.5
    assert "99.1 has not been read, so it may run an answer as code; pip install math-verify==0.9.0" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="math-verify 99.1 has not been read"):
        assert answer_reward(["<answer>7</answer>", "<answer>6.0</answer>"], ["6", "6"]) == [0.0, 1.0]


def test_tokens_of_a_tokenizer_or_of_ids():
    folder = "tokenizer"
    build_tokenizer().save_pretrained(folder)
    write_rows("base.jsonl", ANSWERS)
    assert evaluate("base.jsonl", "--model", folder)["base"]["tokens_mean"]["estimate"] == (34 + 21) / 2
    ids = [{"prompt": "a", "completion": [9, 10, 2], "answer": "45"}, {"prompt": "b", "completion": [9], "answer": "5"}]
    write_rows("ids.jsonl", ids)
    found = evaluate("ids.jsonl", "--model", folder)["base"]
    assert found["tokens_mean"]["estimate"] == (2 + 1) / 2, "the trailing EOS is no token of the completion"
    assert found["accuracy"]["estimate"] == 0.5, "ids 9 and 10 are the characters 4 and 5"
    write_rows("both.jsonl", [{**row, "completion_ids": [1, 2, 3, 4]} for row in ANSWERS])
    assert evaluate("both.jsonl", "--model", folder)["base"]["tokens_mean"]["estimate"] == 4


def test_entries_of_reasoning_gym_are_scored_by_its_scorer(monkeypatch, capsys):
    """A stand-in, because importing reasoning-gym takes seconds: half right is not right."""
    scorers = {"chain_sum": lambda answer, entry: {entry["answer"]: 1.0, "near": 0.5}.get(answer, 0.0)}
    monkeypatch.setattr("entra.problems._scorer", scorers.__getitem__)
    entry = json.dumps({"answer": "7", "metadata": {"source_dataset": "chain_sum"}})
    texts = ["<answer>7</answer>", "<answer>near</answer>", "it is 8", "so\nThe answer is 7."]
    table = [{"prompt": f"{i}", "completion": text, "entry": entry} for i, text in enumerate(texts)]
    write_rows("base.jsonl", [*table, {**table[0], "entry": "{}"}])
    found = evaluate("base.jsonl")["base"]
    assert found["accuracy"]["estimate"] == 0.5
    assert [(row["row"], row["error"]) for row in found["bad_rows"]] == [
        (5, "malformed: entry is no problem of reasoning-gym: 'metadata'")
    ]
    assert "reasoning-gym's scorer gives the answer 1" in capsys.readouterr().out


def _entry(task, **metadata):
    return json.dumps({"answer": "7", "metadata": {"source_dataset": task, **metadata}})


CODE = "__import__('os').system('touch executed')"


@pytest.mark.parametrize("options", [[], ["--run-answers-as-code"]], ids=["by-default", "in-a-child"])
def test_code_in_a_file_is_not_run(options, capsys):
    """`entra eval` called the tasks' own scorers, and those of n_queens and others evaluate the answer, or the problem."""
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    answers = {
        "n_queens": {"valid_answers": []},
        "spiral_matrix": {},
        "binary_matrix": {},
        "string_insertion": {},
        "countdown": {"numbers": [7], "target": 7},
        "puzzle24": {},
        "polynomial_multiplication": {},
        "simple_integration": {"variable": "x", "integrand": "x"},
        "no such task": {},
        "composite": {},
    }
    table = [{"prompt": t, "completion": f"<answer>{CODE}</answer>", "entry": _entry(t, **m)} for t, m in answers.items()]
    sorting = json.dumps({"answer": CODE, "metadata": {"source_dataset": "number_sorting", "direction": "ascending"}})
    table += [
        {"prompt": "bits", "completion": "<answer>7</answer>", "entry": _entry("bitwise_arithmetic", problem=CODE)},
        {"prompt": "sort", "completion": "<answer>[7]</answer>", "entry": sorting},
        {"prompt": "fine", "completion": "<answer>7</answer>", "entry": _entry("gcd")},
    ]
    write_rows("base.jsonl", table)
    found = evaluate("base.jsonl", *options)["base"]
    assert not os.path.exists("executed")
    bad = {row["row"]: row["error"] for row in found["bad_rows"]}
    assert set(bad) == ({7, 8, 9, 10} if not options else {9, 10})
    assert all(error.startswith("not scored: ") for error in bad.values())
    if not options:
        assert "runs the answer, or the problem, as Python code" in bad[7]
        assert "entra eval --run-answers-as-code" in bad[7]
    assert "no problems of a task 'no such task'" in bad[9]
    assert found["accuracy"]["estimate"] == pytest.approx(1 / (len(table) - len(bad)))


@pytest.mark.parametrize(
    ("rewards", "options", "accuracy"),
    [
        pytest.param([1, 0.0], [], 0.5, id="0-and-1"),
        pytest.param([True, False], [], 0.5, id="bool"),
        pytest.param([0.9, 0.7], [], None, id="redundancy-reward"),
        pytest.param([1.0, 0.7], ["--correct-column", "reward"], 0.5, id="named"),
    ],
)
def test_a_reward_that_is_no_correctness_is_not_taken_for_it(rewards, options, accuracy, capsys):
    write_rows("base.jsonl", [{"id": i, "reward": reward, "tokens": 7} for i, reward in enumerate(rewards)])
    found = evaluate("base.jsonl", *options)["base"]
    assert (found["accuracy"] and found["accuracy"]["estimate"]) == accuracy
    assert ("reward is not taken for correctness" in capsys.readouterr().out) == (accuracy is None)


@pytest.mark.parametrize(
    ("columns", "options", "share"),
    [
        pytest.param([{"truncated": True}, {"truncated": False}], [], 0.5, id="column"),
        pytest.param([{"finish_reason": "length"}, {"finish_reason": "stop"}], [], 0.5, id="finish-reason"),
        pytest.param([{}, {}], ["--max-tokens", "100"], 0.5, id="limit"),
        pytest.param([{"truncated": True}, {"truncated": True}], ["--max-tokens", "101"], 0.0, id="limit-goes-before-column"),
        pytest.param([{}, {}], [], None, id="unknown"),
    ],
)
def test_truncated(columns, options, share):
    write_rows("base.jsonl", [{"id": i, "tokens": 100 - i, **more} for i, more in enumerate(columns)])
    found = evaluate("base.jsonl", *options)["base"]["truncated"]
    assert (found and found["estimate"]) == share


def test_a_column_that_one_file_lacks_is_not_used():
    write_rows("base.jsonl", [{"id": 0, "completion": "a b", "tokens": 100, "correct": 1}])
    write_rows("new.jsonl", [{"id": 0, "completion": "a b c", "correct": 1}])
    found = evaluate("base.jsonl", "new.jsonl")
    assert (found["base"]["tokens_mean"]["estimate"], found["new"]["tokens_mean"]["estimate"]) == (2, 3)
    assert found["change"]["tokens_mean"] == {"estimate": 1, "low": None, "high": None}, "one problem has no interval"


@pytest.mark.parametrize(
    ("new_ids", "options", "pairs"),
    [
        pytest.param(["x", "y"], [], "id", id="id"),
        pytest.param(["u", "v"], [], "prompt", id="ids-are-of-each-file"),
        pytest.param(["x", "y"], ["--pair-on", "prompt"], "prompt", id="named"),
    ],
)
def test_what_rows_are_paired_on(new_ids, options, pairs):
    base = [{"id": name, "prompt": [{"role": "user", "content": name}], "tokens": 8, "correct": 1} for name in "xy"]
    write_rows("base.jsonl", base)
    write_rows("new.jsonl", [{**row, "id": new} for row, new in zip(base, new_ids, strict=True)])
    found = evaluate("base.jsonl", "new.jsonl", *options)
    assert found["read_as"]["problems"] == pairs
    assert found["new"]["problems"] == 2


def test_prompts_that_repeat_under_ids_of_their_own_are_pointed_out():
    write_rows("base.jsonl", [{"id": i, "prompt": "same", "tokens": 8, "correct": 1} for i in range(3)])
    assert "3 ids but 1 prompts" in evaluate("base.jsonl")["read_as"]["notes"][0]


def test_base_of_empty_completions_has_no_length_reduction():
    write_rows("base.jsonl", rows([1, 0], [0, 0]))
    write_rows("new.jsonl", rows([1, 0], [5, 6]))
    assert set(evaluate("base.jsonl", "new.jsonl")["change"]) == {"tokens_mean", "accuracy"}


def test_interval_that_is_undefined_in_some_draws_is_left_out_with_a_word(capsys):
    """Of 5 problems 2 have an empty base completion: in 1 % of the draws all have, which is 0 / 0 or -inf."""
    write_rows("base.jsonl", rows([1] * 5, [0, 0, 30, 40, 20]))
    write_rows("new.jsonl", rows([1] * 5, [0, 0, 20, 30, 10]))
    found = evaluate("base.jsonl", "new.jsonl")["change"]
    assert found["length_reduction"] == {"estimate": pytest.approx(1 / 3), "low": None, "high": None}
    assert None not in found["tokens_mean"].values()
    note = "No interval of length reduction, compression effectiveness: in some draws it is a division by 0."
    assert note in capsys.readouterr().out
    write_rows("base.jsonl", rows([1], [4]))
    write_rows("new.jsonl", rows([1], [2]))
    evaluate("base.jsonl", "new.jsonl")
    assert "No interval of tokens mean, length reduction" in (out := capsys.readouterr().out)
    assert "one problem alone has none" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["no.jsonl"], "cannot read no.jsonl: No such file", id="no-file"),
        pytest.param(["base.jsonl", "empty.jsonl"], "empty.jsonl has no rows", id="empty"),
        pytest.param(
            ["base.jsonl", "other.jsonl"], "the files have no problem in common by the column id; use --pair-on", id="disjoint"
        ),
        pytest.param(
            ["bad.jsonl"], "bad.jsonl has no good row (1 malformed); the first: malformed: line 1 cannot", id="all-bad"
        ),
        pytest.param(
            ["base.jsonl", "--pair-on", "x"], "--pair-on x: not a column of every file; these are: id, correct", id="pair-on"
        ),
        pytest.param(["base.jsonl", "--correct-column", "x"], "--correct-column x: not a column", id="correct-column"),
        pytest.param(["base.jsonl", "--model", "no/such"], "cannot load --model no/such: ", id="model"),
        pytest.param(["base.jsonl", "--draws", "0"], "--draws 0 must be at least 1", id="draws"),
        pytest.param(["base.jsonl", "--seed", "-1"], "--seed -1 must be at least 0", id="seed"),
        pytest.param(["base.jsonl", "--max-tokens", "0"], "--max-tokens 0 must be at least 1 token", id="max-tokens"),
        pytest.param(["base.jsonl", "--json", "base.jsonl"], "--json base.jsonl is the input", id="json-is-input"),
        pytest.param(["base.jsonl", "--json", "mine.json"], "--json mine.json exists, and entra eval did not", id="not-ours"),
        pytest.param(["base.jsonl", "--json", "no/x.json"], "there is no folder no; make it first", id="no-folder"),
    ],
)
def test_bad_usage_is_one_line(words, message, capsys):
    write_rows("base.jsonl", BASE)
    write_rows("other.jsonl", [{**row, "id": "other"} for row in BASE])
    write_rows("bad.jsonl", ["{"])
    write_rows("empty.jsonl", [])
    write_rows("mine.json", [{"entra": 1}])
    assert main(["eval", *words]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("entra eval: "))
    assert message in line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so \boxed{\text{Yes.}}", "yes", True),
        ("<answer> 1,000.0 </answer>", "1000", True),
        ("The answer is -0.50.", "-.5", True),
        ("<answer>( 1, 2 )</answer>", "(1,2)", True),
        ("<answer>12</answer>", "1 2", False),
        ("<answer>1,00</answer>", "100", False),
        ("", "43", False),
        ("<answer></answer>", "", False),
        ("<answer>" + "9" * 5000 + "</answer>", "9" * 4999, False),  # more digits than int() reads
    ],
)
def test_exact_match(completion, answer, right):
    assert exact_match(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        ("<answer>1 + x^2</answer>", "x^2+1", True),
        ("The answer is 44", "43", False),
        ("Celia", "Alice", False),
        ("", "43", False),
    ],
)
def test_real_math_verify(completion, answer, right):
    pytest.importorskip("math_verify", reason=f"pip install math-verify=={READ_VERSION}")
    assert answer_checker()[1] is math_verify_match
    assert math_verify_match(completion, answer) is right
