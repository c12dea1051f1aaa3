"""Files as they come, through `entra score`, `inspect` and `eval`; outputs in the format of their name; flags of a run."""

import csv
import gzip
import json
import math
import time
from pathlib import Path

import pytest
import torch
from test_shapes import CHOICE, OPENR1, SHAPES, SYSTEM, THINKING, THOUGHT, USER, batch_line, request_line, written
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.cli import main
from entra.cli.formats import convert
from entra.policy import load_policy
from entra.progress import progress_bar
from entra.rows import format_of, read_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    build("llama", max_position_embeddings=2048).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def score(model, *words):
    return main(["score", *map(str, words), "--model", model])


def rows_of(path):
    path = Path(path)
    return [row.columns for row in read_rows(path, path, format_of(path, path))]


GOOD = {"prompt": "add 3 and 4", "completion": "3 plus 4 is 7, so the answer is 7.", "n": 1}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_prompt_and_completion(shape, model):
    row, expected = SHAPES[shape]
    assert score(model, written("t.jsonl", [row]), "-o", "s.jsonl") == 0
    prompts, completions = zip(*expected, strict=True)
    rewards = entra.score_batch(list(prompts), list(completions), model=model)
    assert [row["reward"] for row in rows_of("s.jsonl")] == pytest.approx(rewards, rel=1e-6)
    record = json.loads(Path("s.jsonl.meta.json").read_text())["input"]
    assert set(record["taken"]) == {"prompt", "completion"}
    assert record["rows"] == len(expected)


def test_what_was_taken_is_said_once_and_recorded(model, capsys):
    written("t.jsonl", [SHAPES["question-response"][0]])
    for words in (["score", "-o", "s.jsonl"], ["inspect"], ["eval"]):
        assert main([words[0], "t.jsonl", "--model", model, *words[1:]]) == 0
        told = capsys.readouterr().err
        assert told.count("t.jsonl: prompt: the column question; completion: the column response\n") == 1
    assert json.loads(Path("s.jsonl.meta.json").read_text())["input"]["taken"] == {
        "prompt": "question",
        "completion": "response",
    }


@pytest.mark.parametrize("command", ["score", "inspect", "eval"])
def test_two_candidates_are_an_error_that_names_the_flag(command, model, capsys):
    written("t.jsonl", [{"question": "a", "response": "b b", "output": "c"}])
    words = [command, "t.jsonl", "--model", model, *(["-o", "s.jsonl"] if command == "score" else [])]
    assert main(words) == 2
    assert "response and output could both hold the completion: use --completion-column" in capsys.readouterr().err
    assert main([*words, "--completion-column", "output"]) == 0


def test_output_of_a_batch_is_scored_shown_and_compared(model, capsys):
    written("out.jsonl", [batch_line(1, [CHOICE, THINKING]), batch_line(2, [], {"code": "x", "message": "no time"})])
    written("in.jsonl", [request_line(1), request_line(2)])
    assert score(model, "out.jsonl", "in.jsonl", "-o", "s.jsonl", "--details") == 0
    rows = rows_of("s.jsonl")
    assert [row["prompt"] for row in rows] == [[SYSTEM, USER]] * 3
    assert [row.get("error") for row in rows] == [None, None, "failed request: no time"]
    rewards = entra.score_batch([[SYSTEM, USER]] * 2, ["It is 43.", THOUGHT], model=model)
    assert [row["reward"] for row in rows[:2]] == pytest.approx(rewards, rel=1e-6)
    assert main(["inspect", "s.jsonl", "-o", "page.html"]) == 0
    assert "Be short." in Path("page.html").read_text()
    written("new.jsonl", [{**batch_line(1, [CHOICE]), "id": "batch_req_7"}])
    assert main(["eval", "out.jsonl", "new.jsonl", "--json", "e.json"]) == 0
    assert "the first is row 3: failed request: no time" in capsys.readouterr().out
    found = json.loads(Path("e.json").read_text())
    assert found["read_as"]["problems"] == "custom_id"
    assert (found["base"]["completions"], found["new"]["completions"]) == (2, 1)


def test_generations_of_a_problem_count_together_in_eval():
    written("t.jsonl", [OPENR1])
    assert main(["eval", "t.jsonl", "--correct-column", "correctness_math_verify", "--json", "e.json", "--quiet"]) == 0
    found = json.loads(Path("e.json").read_text())
    assert (found["base"]["problems"], found["base"]["completions"]) == (1, 2)
    assert found["base"]["accuracy"]["estimate"] == 0.5


def test_numbers_in_csv_are_numbers_in_eval():
    Path("t.csv").write_text("id,correct,tokens\n1,True,12\n2,0,8.0\n3,maybe,8\n")
    assert main(["eval", "t.csv", "--json", "e.json", "--quiet"]) == 0
    found = json.loads(Path("e.json").read_text())["base"]
    assert (found["accuracy"]["estimate"], found["tokens_mean"]["estimate"]) == (0.5, 10)
    assert [row["row"] for row in found["bad_rows"]] == [3]


def test_no_file_runs_code(model, tmp_path):
    """Code in a row, in a name, beside a file and in formats that could hold some is text, or not read."""
    code = "__import__('os').system('touch executed')"
    written("runs/a.jsonl", [{**GOOD, "prompt": code, "n": f"{{{{{code}}}}}"}])
    written("runs/loader.py", [code])
    Path("runs/runs.py").write_text(code)
    Path("runs/b.csv").write_text(f'prompt,completion,n\n"=cmd|{code}","{code}",!!python/object/apply:os.system\n')
    Path("runs/c.pkl").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    assert score(model, "runs", "-o", "s.parquet") == 0
    assert main(["inspect", "runs", "--model", model]) == 0
    assert main(["eval", "runs"]) == 0
    assert len(rows_of("s.parquet")) == 2
    assert not (tmp_path / "executed").exists()
    assert score(model, "runs/c.pkl", "-o", "t.jsonl") == 2


FORMATS = ["s.jsonl.gz", "s.jsonl.zst", "s.parquet", "s.json", "s.csv"]


@pytest.mark.parametrize("name", FORMATS)
def test_output_is_what_its_name_says(name, model, capsys, monkeypatch):
    rows = [GOOD, {**GOOD, "prompt": "é", "n": 2}, {"prompt": "add", "completion": None, "n": 3}]
    written("t.jsonl", rows)
    assert score(model, "t.jsonl", "-o", "plain.jsonl") == 0
    plain = rows_of("plain.jsonl")
    calls, original = [], entra.score_batch

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("entra.cli.scoring.score_batch", interrupted)
        assert score(model, "t.jsonl", "-o", name, "--batch-size", 1) == 130
    assert not Path(name).exists()
    assert Path(f"{name}.part").read_text().count("\n") == 1
    assert score(model, "t.jsonl", "-o", name, "--batch-size", 1) == 0
    assert "3 rows, 1 of them from earlier runs" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        ["t.jsonl", "plain.jsonl", "plain.jsonl.meta.json", name, f"{name}.meta.json"]
    )
    starts = {"s.json": b"[\n{", "s.csv": b"prompt,completion,n,reward", "s.parquet": b"PAR1", "s.jsonl.gz": b"\x1f\x8b"}
    written_bytes = Path(name).read_bytes()
    assert written_bytes.startswith(starts.get(name, b"\x28\xb5\x2f\xfd"))
    found = [{key: value for key, value in row.items() if value is not None} for row in rows_of(name)]
    assert len(found) == 3
    for row, expected in zip(found, plain, strict=True):
        expected = {key: value for key, value in expected.items() if value is not None}
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            close = isinstance(value, float)
            assert float(row[key]) == pytest.approx(value, rel=1e-6) if close else str(row[key]) == str(value)
    # Once more: nothing is scored; another option is refused; a file that somebody else put there, too.
    monkeypatch.setattr("entra.cli.scoring.score_batch", None)
    capsys.readouterr()
    assert score(model, "t.jsonl", "-o", name, "--batch-size", 1) == 0
    assert "3 rows, 3 of them from earlier runs" in capsys.readouterr().err
    assert score(model, "t.jsonl", "-o", name, "--batch-size", 2) == 2
    assert "batch_size=1, now it is 2" in capsys.readouterr().err
    assert Path(name).read_bytes() == written_bytes
    fewer = rows_of("plain.jsonl")[:2]
    changed = {"s.json": json.dumps(fewer).encode(), "s.csv": b"".join(written_bytes.splitlines(keepends=True)[:3])}
    changed["s.jsonl.gz"] = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in fewer))
    if name in changed:
        Path(name).write_bytes(changed[name])
        assert score(model, "t.jsonl", "-o", name, "--batch-size", 1) == 2
        assert f"{name} is not as entra score left it; restore it" in capsys.readouterr().err
    Path(name).write_text("mine")
    for options in ([], ["--overwrite"]):
        assert score(model, "t.jsonl", "-o", name, "--batch-size", 1, *options) == 2
    assert Path(name).read_text() == "mine"


def test_overwriting_leaves_the_old_file_until_the_new_one_is_whole(model, monkeypatch):
    written("t.jsonl", [GOOD])
    assert score(model, "t.jsonl", "-o", "s.parquet") == 0
    before = Path("s.parquet").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("entra.cli.formats._write_parquet", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert score(model, "t.jsonl", "-o", "s.parquet", "--overwrite", "--protect-fraction", "0.5") == 1
    assert Path("s.parquet").read_bytes() == before
    assert score(model, "t.jsonl", "-o", "s.parquet", "--protect-fraction", "0.5") == 0
    assert Path("s.parquet").read_bytes() != before
    assert not Path("s.parquet.part").exists()


def test_columns_that_parquet_cannot_hold_are_json(model, capsys):
    values = [1, "a", {"b": [1]}, None, True, 2**70, "\ud800"]
    objects = [{}, {"x": 1}, {"y": [None, {}]}, [], [[1], ["a"]], 0.5, None]
    written("t.jsonl", [{**GOOD, "n": n, "o": o, "p": i} for i, (n, o) in enumerate(zip(values, objects, strict=True))])
    assert score(model, "t.jsonl", "-o", "s.parquet", "--details") == 0
    assert "as JSON      n, o: Parquet has one type for a column" in capsys.readouterr().err
    rows = rows_of("s.parquet")
    assert [None if row["n"] is None else json.loads(row["n"]) for row in rows] == values
    assert [None if row["o"] is None else json.loads(row["o"]) for row in rows] == objects
    assert [row["p"] for row in rows] == list(range(7))
    assert main(["inspect", "s.parquet", "-o", "page.html"]) == 0


def test_types_that_differ_from_one_row_group_to_the_next(tmp_path):
    first = [{"text": i, "wide": i, "late": [], "object": {"a": 1}, "nan": math.nan} for i in range(200)]
    second = {"text": "x", "wide": 0.5, "late": [{"a": 1}], "object": {"b": 2}, "nan": None, "new": "y"}
    written("rows", [*first, second])
    assert convert(Path("rows"), Path("s.parquet")) == ["text", "object"]
    rows = rows_of("s.parquet")
    assert [rows[i]["text"] for i in (0, 199, 200)] == ["0", "199", '"x"']
    assert [rows[i]["object"] for i in (0, 200)] == ['{"a": 1}', '{"b": 2}']
    assert [rows[i]["late"] for i in (0, 200)] == [[], [{"a": 1}]]
    assert [rows[i]["wide"] for i in (0, 199, 200)] == [0, 199, 0.5]
    assert [rows[i]["new"] for i in (0, 200)] == [None, "y"]
    assert math.isnan(rows[0]["nan"])
    for name in ("empty.parquet", "empty.csv", "empty.json", "empty.jsonl.gz"):
        assert convert(written("none", []), Path(name)) == []
        assert rows_of(name) == []


@pytest.mark.parametrize("name", ["s.parquet.gz", "s.csv.zst"])
def test_a_name_that_cannot_be_written_is_refused(name, model, capsys):
    written("t.jsonl", [GOOD])
    assert score(model, "t.jsonl", "-o", name) == 2
    assert "only JSON Lines are packed; name it *.jsonl" in capsys.readouterr().err


def test_pipes_write_formats_too(model):
    import os

    reading, writing = os.pipe()
    os.write(writing, gzip.compress(json.dumps(GOOD).encode()))
    os.close(writing)
    assert score(model, f"/dev/fd/{reading}", "-o", "s.csv", "--quiet") == 0
    os.close(reading)
    assert [path.name for path in Path().iterdir()] == ["s.csv"]
    with open("s.csv", newline="") as file:
        assert next(csv.DictReader(file))["completion"] == GOOD["completion"]


def test_limit(model, capsys):
    written("t.jsonl", [GOOD, GOOD, {**GOOD, "completion": "it is 7"}])
    assert score(model, "t.jsonl", "-o", "s.jsonl", "--limit", 2) == 0
    assert len(rows_of("s.jsonl")) == 2
    assert score(model, "t.jsonl", "-o", "s.jsonl") == 2
    assert "limit=2, now it is None" in capsys.readouterr().err
    assert main(["eval", "t.jsonl", "--limit", "1", "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["base"]["completions"] == 1


def test_model_flags_reach_the_model(model, monkeypatch, capsys):
    written("t.jsonl", [GOOD])
    assert score(model, "t.jsonl", "-o", "s.jsonl", "--dtype", "bfloat16", "--device", "cpu", "--revision", "main") == 0
    record = json.loads(Path("s.jsonl.meta.json").read_text())
    assert (record["dtype"], record["device"], record["revision"]) == ("bfloat16", "cpu", "main")
    half = load_policy(model, device="cpu", dtype="bfloat16", revision="main").model
    assert half.dtype == torch.bfloat16
    assert (
        rows_of("s.jsonl")[0]["reward"]
        == entra.score_batch([GOOD["prompt"]], [GOOD["completion"]], model=half, tokenizer=build_tokenizer())[0]
    )
    asked = []
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name, **how: asked.append(how) or 1 / 0)
    assert score(model, "t.jsonl", "-o", "x.jsonl", "--revision", "v1") == 2
    assert asked[0]["revision"] == "v1"
    assert score("smollm2", "t.jsonl", "-o", "x.jsonl", "--revision", "v1") == 2
    assert "smollm2 comes from a package and has none" in capsys.readouterr().err


def test_chat_template_for_prompts_that_are_text(model, capsys):
    written("t.jsonl", [GOOD, {**GOOD, "prompt": [USER]}])
    assert score(model, "t.jsonl", "-o", "a.jsonl") == 0
    assert "prompts that are text: as they are; --apply-chat-template puts" in capsys.readouterr().err
    assert score(model, "t.jsonl", "-o", "b.jsonl", "--apply-chat-template") == 0
    assert "prompts that are text: each is a user message" in capsys.readouterr().err
    chat = [{"role": "user", "content": GOOD["prompt"]}]
    for name, prompt in (("a.jsonl", GOOD["prompt"]), ("b.jsonl", chat)):
        scores = entra.score_batch([prompt, [USER]], [GOOD["completion"]] * 2, model=model, details=True)
        means = [float(logprobs.double().mean()) for logprobs in scores.logprobs]
        assert [row["mean_logprob"] for row in rows_of(name)] == pytest.approx(means, rel=1e-5)
    assert rows_of("a.jsonl")[0]["mean_logprob"] != rows_of("b.jsonl")[0]["mean_logprob"]
    assert score(model, "t.jsonl", "-o", "b.jsonl") == 2
    assert "apply_chat_template=True, now it is False" in capsys.readouterr().err


def test_quiet_prints_errors_alone(model, capfd):
    written("t.jsonl", [GOOD])
    written("bad.jsonl", [{**GOOD, "completion": ""}])
    assert score(model, "t.jsonl", "-o", "s.jsonl", "--quiet") == 0
    assert main(["inspect", "t.jsonl", "--model", model, "--quiet"]) == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert score(model, "bad.jsonl", "-o", "b.jsonl", "--quiet") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "entra score: no row could be scored; the first is row 1: empty completion: it has no tokens but EOS and pads"
    )


def test_page_without_any_score_exits_with_2(model, capsys):
    written("bad.jsonl", [{**GOOD, "completion": ""}])
    assert main(["inspect", "bad.jsonl", "--model", model]) == 2
    assert "no row could be scored; the first is row 1: empty completion" in capsys.readouterr().err
    assert Path("report.html").exists()


def test_progress_moves_every_second_while_nothing_is_finished(capfd):
    with progress_bar(4, 0, "rows"):
        time.sleep(2.4)
    drawn = capfd.readouterr().err.split("\r")
    assert [text for text in ("00:01<", "00:02<") if any(text in line for line in drawn)] == ["00:01<", "00:02<"]
    with progress_bar(4, 0, "rows", quiet=True) as bar:
        bar.update(1)
    assert capfd.readouterr().err == ""
