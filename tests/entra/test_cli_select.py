"""`entra select`: what is kept, what makes a pair, what stays out and why; TRL's trainers train on the result."""

import gzip
import json
import math
import subprocess
import sys

import pytest
import torch
from tiny_models import build
from tiny_tokenizer import build_tokenizer
from transformers import AutoModelForCausalLM

from entra.cli import main
from entra.rarefaction import rarefied_redundancy


def scored(completion, reward, tokens, protected=0, prompt="1+1=", correct=True, **columns):
    """A row as `entra score` writes it."""
    scores = {"reward": reward, "tokens": tokens, "mean_logprob": -1.0, "mean_incoming": 0.1, "protected_tokens": protected}
    return {"prompt": prompt, "completion": completion, "correct": correct, **scores, **columns}


def detailed(completion, ids, protected):
    """The same with --details, whose reward is that of all unprotected tokens."""
    kept = torch.tensor([i for i, is_protected in zip(ids, protected, strict=True) if not is_protected])
    reward = rarefied_redundancy(kept, len(kept)) if len(kept) > 1 else 0.0
    others = {name: [0.0] * len(ids) for name in ("logprobs", "incoming", "importance")}
    return {**scored(completion, reward, len(ids), sum(protected)), "token_ids": ids, "protected": protected, **others}


@pytest.fixture
def select(tmp_path, capsys):
    """Runs the command on rows and returns exit code, the rows that it wrote, and what it printed."""

    def run(rows, *flags, config=None, output="out.jsonl", record=True):
        scores = tmp_path / "scores.jsonl"
        scores.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        source = {"rows": len(rows), "taken": {"prompt": "prompt", "completion": "completion"}}
        sidecar = {"versions": {"entra": "1"}, "input": source, "prefix": "", "config": config or {}}
        if record:
            (tmp_path / "scores.jsonl.meta.json").write_text(json.dumps(sidecar))
        code = main(["select", str(scores), "-o", str(tmp_path / output), *flags])
        written = (tmp_path / output).read_text() if code == 0 and output.endswith(".jsonl") else ""
        return code, [json.loads(line) for line in written.splitlines()], capsys.readouterr().err

    return run


def record_of(tmp_path, output="out.jsonl"):
    return json.loads((tmp_path / f"{output}.meta.json").read_text())


# D: 4, 5 and 0.99; r: .9, .5 and .967; tokens: 50, 12 and 40. Ten tokens of each are protected, but two of the second.
THREE = [scored("long", 0.9, 50, 10), scored("short", 0.5, 12, 2), scored("clean", 0.967, 40, 10)]


@pytest.mark.parametrize(
    ("by", "best"),
    [
        ("redundant_tokens", ["clean", "long", "short"]),
        ("r", ["clean", "long", "short"]),
        ("tokens", ["short", "clean", "long"]),
    ],
)
def test_keeps_the_least_redundant_by_each_measure(select, by, best):
    config = {"length_adjusted": 10} if by == "r" else None
    for most in (1, 2, 3):
        code, rows, _ = select(THREE, "--by", by, "--per-prompt", str(most), config=config)
        assert code == 0
        assert [row["completion"] for row in rows] == best[:most]
    assert all(set(row) == set(rows[0]) for row in rows)


def test_redundant_tokens_are_unprotected_tokens_times_what_r_lacks(select):
    _, rows, _ = select(THREE, "--per-prompt", "3")
    assert [row["select_value"] for row in rows] == pytest.approx([30 * 0.033, 4, 5])
    assert [row["select_row"] for row in rows] == [3, 1, 2]
    assert rows[1]["select_reason"] == "redundant_tokens 4, number 2 of 3 right ones"


def test_ties_go_to_the_fewest_tokens_and_then_to_the_first(select):
    same = [scored("a", 1.0 - 1e-8, 30), scored("b", 1.0 - 2e-8, 20), scored("c", 1.0, 20), scored("d", 1.0, 21)]
    _, rows, _ = select(same, "--per-prompt", "4")
    assert [row["completion"] for row in rows] == ["b", "c", "d", "a"]


def test_what_stays_out_is_counted_and_said(select, tmp_path):
    rows = [
        scored("right", 0.9, 20),
        scored("wrong", 1.0, 5, correct=False),
        scored("unknown", 1.0, 5, correct=None),
        scored("unknown, too", 1.0, 5, correct=math.nan),
        scored("cut", 1.0, 5, complete=False),
        scored("cut, too", 1.0, 5, truncated=True),
        scored("cut again", 1.0, 5, finish_reason="length"),
        scored("ended", 0.5, 20, complete=True, truncated=False, finish_reason="stop"),
        scored("one token", 0.0, 2, 1),
        scored("right", 1.0, 20),
        scored([5, 6], 1.0, 2),
        scored("odd", 1.0, 5, correct="yes"),
        {"prompt": "1+1=", "completion": "", "correct": True, "error": "empty completion: it has no tokens"},
        {"error": "malformed: line 3 cannot be parsed"},
        "{",
        scored("none right", 1.0, 5, prompt="2+2=", correct=False),
    ]
    code, kept, said = select(rows, "--per-prompt", "9")
    assert code == 0
    assert [row["completion"] for row in kept] == ["right", "ended"]
    left_out = {
        "wrong": 2,
        "not known to be right": 2,
        "not complete": 3,
        "at most one unprotected token": 1,
        "the same text as one before": 1,
        "the completion is not text": 1,
        "malformed: correct is neither a number nor true or false": 1,
        "error: empty completion": 1,
        "error: malformed": 1,
        "malformed": 1,
    }
    record = record_of(tmp_path)
    assert record["left_out"] == left_out
    assert record["prompts_without_completions"] == {"no right completion": 1}
    assert "left out  14 of 16 rows: 3 not complete, 2 wrong" in said
    assert "2 completions of 1 prompt, by redundant_tokens" in said
    assert "nothing   for 1 of 2 prompts: 1 no right completion" in said


def test_a_right_completion_without_others_is_kept_and_makes_no_pair(select):
    rows = [scored("alone", 0.5, 9), scored("x", 0.5, 9, correct=False)]
    code, kept, _ = select(rows)
    assert code == 0
    assert kept[0]["select_reason"] == "redundant_tokens 4.5, the only right one"
    code, _, said = select(rows, "--pairs", output="pairs.jsonl")
    assert code == 2
    assert "1 one right completion alone" in said


PAIRS = [scored("D 0", 1.0, 9, task="a"), scored("D 0.5", 0.95, 10, task="a"), scored("D 4", 0.6, 10, task="a", id=7)]


@pytest.mark.parametrize(
    ("flags", "rejected"),
    [
        ([], ["D 4"]),
        (["--per-prompt", "5"], ["D 4"]),
        (["--per-prompt", "5", "--min-difference", "0.5"], ["D 4", "D 0.5"]),
        (["--min-difference", "0.5"], ["D 4"]),
        (["--min-difference", "4"], ["D 4"]),
    ],
)
def test_pairs_are_the_best_with_those_that_are_really_more_redundant(select, flags, rejected):
    code, rows, _ = select(PAIRS, "--pairs", *flags)
    assert code == 0
    assert [row["chosen"] for row in rows] == ["D 0"] * len(rows)
    assert [row["rejected"] for row in rows] == rejected
    # `id` is of one completion, `task` of the prompt.
    reasons = {f"select_{name}" for name in ("chosen_row", "rejected_row", "chosen_value", "rejected_value", "reason")}
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "task"} | reasons


def test_no_pair_without_the_difference(select):
    code, _, said = select(PAIRS, "--pairs", "--min-difference", "4.1")
    assert code == 2
    assert "1 no difference of at least 4.1" in said


def test_the_rejected_one_can_be_wrong(select):
    rows = [*PAIRS, scored("wrong", 0.9, 10, correct=0), scored("wrong, D 3", 0.7, 10, correct=False), scored("cut", 0.1, 10)]
    rows[-1] |= {"correct": False, "complete": False}
    _, pairs, _ = select(rows, "--pairs", "--rejected", "wrong", "--per-prompt", "9")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("D 0", "wrong, D 3"), ("D 0", "wrong")]
    assert pairs[0]["select_reason"].endswith("rejected: redundant_tokens 3, wrong")
    _, pairs, _ = select(rows, "--pairs", "--rejected", "wrong", "--per-prompt", "9", "--min-difference", "2")
    assert [pair["rejected"] for pair in pairs] == ["wrong, D 3"]


IDS = {"long": [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 3], "short": [5, 6, 7, 5, 3]}
DETAILED = [detailed(name, ids, [False] * (len(ids) - 1) + [True]) for name, ids in IDS.items()]


@pytest.mark.parametrize(("flags", "positions"), [([], 4), (["--length-adjusted", "3"], 3), (["--length-adjusted", "6"], 6)])
def test_r_is_compared_at_one_length(select, flags, positions):
    # At its own length the long one looks more redundant than the short one, which has used up less of its vocabulary.
    assert DETAILED[0]["reward"] < DETAILED[1]["reward"]
    _, rows, _ = select(DETAILED, "--by", "r", "--per-prompt", "2", *flags)
    expected = {name: rarefied_redundancy(torch.tensor(ids[:-1]), positions) for name, ids in IDS.items()}
    assert {row["completion"]: row["select_value"] for row in rows} == expected
    assert [row["completion"] for row in rows] == sorted(expected, key=lambda name: -expected[name])
    assert f"at {positions} unprotected tokens" in rows[0]["select_reason"]
    assert not {"token_ids", "logprobs", "protected"} & set(rows[0])


@pytest.mark.parametrize("flags", [[], ["--length-adjusted", "6"]])
def test_r_of_ngrams_is_of_ngrams_at_another_length_too(select, flags):
    """Of the long one's pairs 5 6, 6 7, 7 8, 8 9, 9 10 come twice; of the short one's none does."""
    _, rows, _ = select(DETAILED, "--by", "r", "--per-prompt", "2", *flags, config={"reward_ngram": 2})
    positions = 6 if flags else 4
    places = {"long": [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5], "short": [0, 1, 2, 3]}
    expected = {name: rarefied_redundancy(torch.tensor(ids), positions) for name, ids in places.items()}
    assert expected["long"] < expected["short"] == 1
    assert {row["completion"]: row["select_value"] for row in rows} == expected


def test_r_at_the_length_of_the_scoring_is_taken_as_it_is(select):
    _, rows, _ = select(THREE, "--by", "r", config={"length_adjusted": 10})
    assert rows[0]["select_value"] == 0.967
    assert rows[0]["select_reason"] == "r 0.967 at 10 unprotected tokens, number 1 of 3 right ones"


def test_redundant_tokens_of_an_adjusted_file_come_from_its_details(select):
    adjusted = [{**row, "reward": 0.123} for row in DETAILED]
    _, rows, _ = select(adjusted, "--per-prompt", "2", config={"length_adjusted": 3})
    assert [row["select_value"] for row in rows] == pytest.approx(
        [
            (len(ids) - 1) * (1 - rarefied_redundancy(torch.tensor(ids[:-1]), len(ids) - 1))
            for ids in (IDS["short"], IDS["long"])
        ]
    )


@pytest.mark.parametrize(
    ("rows", "flags", "config", "message"),
    [
        (THREE, ["--by", "r"], {}, "score with --details or with --length-adjusted N"),
        (
            THREE,
            ["--by", "r", "--length-adjusted", "5"],
            {"length_adjusted": 6},
            "score with --details, or leave the option out",
        ),
        (
            THREE,
            [],
            {"length_adjusted": 6},
            "does not tell the redundant tokens; use --by r, or score without --length-adjusted",
        ),
        (THREE, ["--length-adjusted", "5"], {}, "--length-adjusted is for --by r"),
        (THREE, ["--by", "r", "--length-adjusted", "1"], {}, "must be at least 2"),
        (THREE, ["--correct-column", "right"], {}, "no row has a column 'right'"),
        (THREE, ["--correct-column", "reward"], {}, "does not say what is right"),
        (THREE, ["--prompt-column", "problem"], {}, "no row has a column 'problem'"),
        (THREE, ["--min-difference", "1"], {}, "give --pairs, too"),
        (THREE, ["--rejected", "wrong"], {}, "give --pairs, too"),
        (THREE, ["--pairs", "--min-difference", "nan"], {}, "must be a finite number"),
        (THREE, ["--pairs", "--rejected", "wrong", "--all-right"], {}, "leave one out"),
        (THREE, ["--per-prompt", "0"], {}, "must be at least 1 row"),
        (THREE, ["--prefix", "x_"], {}, "lacks one of the columns x_reward"),
        ([{"prompt": "a", "completion": "b"}], [], {}, "entra score writes them"),
        ([], [], {}, "has no rows"),
        ([scored("a", 1.0, 5, correct=False)], [], {}, "nothing to write"),
        ([scored("a", 1.0, 5), scored("b", 1.0, 5, prompt=[{"role": "user", "content": "c"}])], [], {}, "select them apart"),
    ],
)
def test_refuses_with_the_remedy_and_writes_nothing(select, tmp_path, rows, flags, config, message):
    code, _, said = select(rows, *flags, config=config)
    assert code == 2
    assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.jsonl", "scores.jsonl.meta.json"]


def test_without_a_record_it_says_what_it_takes_r_for(select):
    code, _, said = select(THREE, record=False)
    assert code == 0
    assert "says how it was scored; r is taken for that of all unprotected tokens" in said


def test_an_unfinished_run_is_named(select, tmp_path):
    select(THREE)
    record = json.loads((tmp_path / "scores.jsonl.meta.json").read_text())
    (tmp_path / "scores.jsonl.meta.json").write_text(json.dumps({**record, "input": {"rows": 5}}))
    code, _, said = select(THREE, record=False)
    assert code == 0
    assert "entra score has not finished: 3 of 5 rows" in said


def test_all_right_needs_no_column(select):
    rows = [{name: value for name, value in row.items() if name != "correct"} for row in THREE]
    assert select(rows)[0] == 2
    assert select(rows, "--all-right")[1][0]["completion"] == "clean"


def test_a_prefix_and_other_names_are_found_or_named(select):
    scores = ("reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens")
    names = {"prompt": "problem", "completion": "answer", "correct": "reward", **{name: f"entra_{name}" for name in scores}}
    rows = [{names.get(name, name): value for name, value in row.items()} for row in THREE]
    flags = ["--prompt-column", "problem", "--completion-column", "answer", "--correct-column", "reward"]
    _, kept, _ = select(rows, *flags)
    assert kept[0]["prompt"] == "1+1="
    assert kept[0]["completion"] == "clean"
    assert not {"problem", "answer"} & set(kept[0])


CHAT = [{"role": "user", "content": "1+1="}]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (CHAT, "2", [{"role": "assistant", "content": "2"}]),
        (CHAT, [{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "2"}]),
        ("1+1=", [{"role": "assistant", "content": "2"}], "2"),
    ],
)
def test_prompt_and_completion_have_the_form_that_trl_needs(select, prompt, completion, expected):
    _, rows, _ = select([scored(completion, 1.0, 5, prompt=prompt)])
    assert (rows[0]["prompt"], rows[0]["completion"]) == (prompt, expected)


def test_columns_that_trl_would_take_for_something_else_are_left_out_and_named(select):
    _, rows, said = select([scored("2", 1.0, 5, text="1", messages=[], chosen="x", note="kept")])
    assert not {"text", "messages", "chosen"} & set(rows[0])
    assert rows[0]["note"] == "kept"
    assert "TRL takes it for something else: text, messages, chosen" in said


def test_parquet_holds_the_same_rows(select, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'entra-reward[train]'")
    rows = [*THREE, scored("4", 1.0, 5, prompt="2+2=", note="not in every row")]
    _, lines, _ = select(rows)
    assert select(rows, output="out.parquet")[0] == 0
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert list(loaded) == lines
    assert lines[1]["note"] == "not in every row"


def test_columns_of_parquet_without_a_common_type_hold_json_and_are_named(select, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'entra-reward[train]'")
    rows = [scored("2", 1.0, 5, mixed=1), scored("4", 1.0, 5, prompt="2+2=", mixed="text")]
    code, _, said = select(rows, output="out.parquet")
    assert code == 0
    assert "columns without a common type hold JSON: mixed" in said
    assert not list(tmp_path.glob("*.part"))
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")
    assert list(loaded["mixed"]) == ["1", '"text"']


def test_reads_and_writes_packed_files_and_pipes(select, tmp_path):
    _, rows, _ = select(THREE)
    assert select(THREE, output="out.jsonl.gz")[0] == 0
    assert [json.loads(line) for line in gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()).splitlines()] == rows
    command = [sys.executable, "-m", "entra", "select", "-", "-o", "-"]
    piped = subprocess.run(
        command, input=(tmp_path / "scores.jsonl").read_bytes(), capture_output=True, check=True, cwd=tmp_path
    )
    assert [json.loads(line) for line in piped.stdout.splitlines()] == rows
    assert not list(tmp_path.glob("-*"))


def test_generations_of_openr1_are_selected_by_the_columns_that_were_scored(model, tmp_path):
    pytest.importorskip("datasets", reason="needs datasets: pip install 'entra-reward[train]'")
    generations = ["7. wait, 7. wait, it is 7.", "it is 7", "it is 8, not 7"]
    row = {"problem": "3+4=", "generations": generations, "correctness_math_verify": [True, True, False]}
    (tmp_path / "openr1.jsonl").write_text(json.dumps(row) + "\n")
    scores, output = str(tmp_path / "scores.parquet"), tmp_path / "out.jsonl"
    assert main(["score", str(tmp_path / "openr1.jsonl"), "--model", str(model), "-o", scores]) == 0
    assert main(["select", scores, "-o", str(output), "--correct-column", "correctness_math_verify"]) == 0
    (kept,) = map(json.loads, output.read_text().splitlines())
    assert (kept["prompt"], kept["completion"], kept["generation_index"]) == ("3+4=", "it is 7", 1)
    assert "generations" not in kept


def test_only_what_it_wrote_is_replaced(select, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    code, _, said = select(THREE)
    assert code == 2
    assert "entra select did not write it" in said
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.meta.json").write_text("{}")
    assert select(THREE)[0] == 2
    assert (tmp_path / "out.jsonl.meta.json").read_text() == "{}"
    (tmp_path / "out.jsonl.meta.json").unlink()
    assert len(select(THREE)[1]) == 1
    assert len(select(THREE, "--per-prompt", "2")[1]) == 2
    assert select(THREE, output="scores.jsonl")[0] == 2


def test_text_that_only_json_can_hold_comes_out_as_it_went_in(select):
    _, rows, _ = select([scored("é \ud800 \u2028", 1.0, 5)])
    assert rows[0]["completion"] == "é \ud800 \u2028"


def test_selecting_by_redundant_tokens_loads_no_torch(select, tmp_path):
    select(THREE)
    code = f"""
import sys
from entra.cli import main
assert main(["select", {str(tmp_path / "scores.jsonl")!r}, "-o", {str(tmp_path / "again.jsonl")!r}]) == 0
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    build("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture(params=["text", "chat"])
def scores(request, model, tmp_path):
    """Two prompts with three completions each, scored by a tiny model."""
    rows = []
    for a in (3, 4):
        prompt = f"{a}+4="
        for text in (
            f"{a + 4}",
            f"{a}+4 is {a + 4}. so it is {a + 4}.",
            f"{a + 4}. wait, {a + 4}. wait, {a + 4}. wait, {a + 4}.",
        ):
            asked = [{"role": "user", "content": prompt}] if request.param == "chat" else prompt
            rows.append(
                {"id": len(rows), "prompt": asked, "completion": text, "correct": 1, "text": "misleading", "task": "sum"}
            )
    rows.append({**rows[0], "completion": ""})
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scores.jsonl"
    assert main(["score", str(tmp_path / "traces.jsonl"), "--model", str(model), "--output", str(output)]) == 0
    return output


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trains_a_step_on_the_result(kind, scores, model, tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")
    from datasets import load_dataset

    path = tmp_path / "selected.jsonl"
    assert main(["select", str(scores), "-o", str(path), *(["--pairs"] if kind == "DPO" else [])]) == 0
    dataset = load_dataset("json", data_files=str(path), split="train")
    assert len(dataset) == 2
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    policy = AutoModelForCausalLM.from_pretrained(model)  # DPOTrainer loads its reference from the same folder
    before = policy.lm_head.weight.clone()
    trainer = getattr(trl, f"{kind}Trainer")(model=policy, args=args, train_dataset=dataset, processing_class=build_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 1
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert not torch.equal(trainer.model.lm_head.weight, before)
    names = ["input_ids"] if kind == "SFT" else ["chosen_ids", "rejected_ids"]
    end = build_tokenizer().eos_token_id
    assert all(row[name][-1] == end for row in trainer.train_dataset for name in names)  # the model learns to stop
