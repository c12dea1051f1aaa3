"""What the command line prints: no escape sequence of a file, a column or an argument reaches the terminal."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
from tiny_models import build
from tiny_tokenizer import build_tokenizer

from entra.cli import main, say

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202e\udc9b\n"
GOOD = {"prompt": "add 3 and 4", "completion": "3 plus 4 is 7", "correct": 1, EVIL: 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    build("llama", max_position_embeddings=2048).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(name, *rows):
    with open(name, "w", encoding="ascii") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def printed(capsys, *words):
    """All that a command prints, after a look at what stands in it."""
    with contextlib.suppress(SystemExit):
        main(words)
    captured = capsys.readouterr()
    bars = r"\r[^\r\n]*\d+%\|[^\r\n]*|\r[^\r\n]*\d+% \|[^\r\n]*"  # go back to the start of their line
    text = captured.out + re.sub(bars, "", captured.err)
    hidden = [c for c in text if not c.isprintable() and c != "\n"]
    assert not hidden, (words, hidden)
    return text


@pytest.mark.parametrize(
    "words",
    [
        ["score", EVIL, "--model", "m", "--output", "o"],
        ["score", "rows", "--model", EVIL, "--output", "o"],
        ["score", "rows", "--model", "m", "--output", f"no/{EVIL}/o"],
        ["score", "rows", "--model", "m", "--output", "o", "--prompt-column", EVIL],
        ["score", "scored", "--model", "m", "--output", "o"],
        ["score", "rows", "--model", "m", "--output", "o", "--prefix", EVIL, "--protect-fraction", EVIL],
        ["score", "rows", "--model", "m", "--output", EVIL[:-1]],
        ["score", "rows", "--model", "m", "--output", "o", f"--{EVIL}"],
        ["score", "rows", "--model", "m", "--output", "o", EVIL],
        ["score", "rows", "--model", "m", "--output", "o", f"--overwrite={EVIL}"],
        ["score", EVIL + "*", "--model", "m", "--output", "o"],
        ["score", "rows", "--model", "m", "--output", "o", "--device", EVIL],
        ["score", "rows", "--model", "m", "--output", "o", "--revision", EVIL],
        ["score", "rows", "--model", "m", "--output", f"{EVIL}.csv.gz"],
        ["score", "rows", "--model", "m", "--output", "o", "--completion-column", EVIL],
        ["score", f"folder{EVIL[:-1]}", "--model", "m", "--output", "o.csv"],
        ["score", f"folder{EVIL[:-1]}", "--model", "m", "--output", "o.parquet"],
        ["score", "table.csv", "--model", "m", "--output", "o.parquet"],
        ["eval", EVIL],
        ["eval", "rows", "--pair-on", EVIL],
        ["eval", "rows", "--model", EVIL],
        ["eval", "rows", "--json", f"no/{EVIL}/o"],
        ["eval", "errors"],
        ["eval", "tasks"],
        ["select", EVIL, "-o", "o.jsonl"],
        ["select", "rows", "-o", "o.jsonl"],
        ["select", "recorded", "-o", f"no/{EVIL}.jsonl"],
        ["select", "recorded", "-o", EVIL],
        ["select", "selectable", "-o", "o.jsonl"],
        ["select", "selectable", "-o", "o.jsonl", "--correct-column", EVIL],
        ["inspect", EVIL],
        ["inspect", "rows", "--model", EVIL],
        ["inspect", "rows", "-o", EVIL],
        ["inspect", "rows", "--prefix", EVIL],
        ["inspect", "recorded"],
        ["demo", "--problem", EVIL],
        ["demo", "--svg", f"no/{EVIL}"],
        ["doctor", "--model", EVIL],
        ["doctor", "--model", "m", f"--{EVIL}"],
        ["experiment", EVIL],
        [EVIL],
        ["train", "--config", EVIL],
        ["train", "--config", "evil.yaml", "--output_dir", "o", "--model_name_or_path", "m"],
        ["train", "--output_dir", "o", "--model_name_or_path", "m", f"--{EVIL}"],
        ["train", "--output_dir", "o", "--model_name_or_path", "m", "--do_train", EVIL],
        ["train", "--output_dir", "o", "--model_name_or_path", EVIL],
    ],
    ids=lambda words: ascii(" ".join(words))[:60],
)
def test_escape_sequences_do_not_reach_the_terminal(words, model, capsys):
    if words[0] in ("train", "doctor"):
        pytest.importorskip("trl", reason="needs trl: pip install 'entra-reward[train]'")
    if words[0] == "eval" and words[1] == "tasks":
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    Path("m").symlink_to(model)
    write_rows("rows", GOOD)
    write_rows("scored", {**GOOD, "reward": 1})
    write_rows("errors", GOOD, {**GOOD, "correct": EVIL}, "{" + EVIL[:-1].encode("unicode_escape").decode())
    entry = json.dumps({"answer": "", "metadata": {"source_dataset": EVIL}})
    write_rows("tasks", {"prompt": "a", "completion": "b", "entry": entry}, {"prompt": "c", "completion": "d", "entry": EVIL})
    record = {"versions": {"entra": "1"}, "input": {}, "model": EVIL, "config": {}}
    columns = {name: [1] for name in ("token_ids", "logprobs", "incoming", "importance", "protected")}
    write_rows("recorded", {**GOOD, **columns, "reward": 1})
    Path("recorded.meta.json").write_text(json.dumps(record))
    folder = Path(f"folder{EVIL[:-1]}".replace("/", ""))
    folder.mkdir()
    write_rows(folder / f"{EVIL[:-1]}.jsonl", GOOD, {**GOOD, EVIL: [1, EVIL]})
    write_rows(folder / f"{EVIL[:-1]}.json", "{")
    table = f'"prompt","completion","{EVIL[:-1]}"\n"a","{EVIL[:-1]}",1\n'
    Path("table.csv").write_text(table, encoding="utf-8", errors="replace")
    numbers = dict.fromkeys(("reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens"), 1)
    write_rows("selectable", {**GOOD, **numbers}, {**GOOD, "error": EVIL})
    Path("evil.yaml").write_text(json.dumps({EVIL: 1}))
    assert printed(capsys, *words)


@pytest.mark.parametrize("words", [["importance", "--model", "m", "--unknown"], ["--help"], []])
def test_experiment_names_the_command_that_replaces_it(words, capsys):
    assert main(["experiment", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = words[0] if words[1:] else "NAME"
    assert line.startswith("entra experiment: experiments are in the repository")
    assert f"python -m benchmarks.experiments {name} with the same flags" in line


def test_names_of_files_that_work_are_shown_as_signs(model, capsys):
    name = "rows\x1b[31m"
    write_rows(name, GOOD, {**GOOD, "completion": 7})
    assert "rows␛[31m" in printed(capsys, "eval", name, "--json", "n\x1b.json")
    assert "o␛[1m: 2 rows" in printed(capsys, "score", name, "--model", str(model), "--output", "o\x1b[1m")
    Path("o\x1b[1m").write_text(Path("o\x1b[1m").read_text().replace('"error": "not text: ', '"error": "\\u001b[31m: '))
    again = printed(capsys, "score", name, "--model", str(model), "--output", "o\x1b[1m")
    assert "errors       1 (1 ␛[31m)" in again
    assert "p␛.html: 2 traces" in printed(capsys, "inspect", name, "--model", str(model), "-o", "p\x1b.html")


def test_signs_that_a_stream_has_not_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("a\x1b\n·é", file=stream)
    stream.seek(0)
    assert stream.read() == "a\\u241b\\u21b5\\xb7\\xe9" + os.linesep


def test_a_name_clash_is_printed_as_signs(capsys, monkeypatch):
    monkeypatch.setattr("entra.cli.name_clash", lambda: f"the distribution entra {EVIL} is another project")
    monkeypatch.delattr("entra.__all__")
    assert "the distribution entra ␛]0;title" in printed(capsys, "demo")
