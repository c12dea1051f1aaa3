"""`python -m benchmarks.experiments`: what it offers, and what it prints of words that are none of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.experiments import EXPERIMENTS, measuring
from benchmarks.experiments.__main__ import main

ROOT = Path(__file__).parents[3]
EVIL = "\x1b]0;title\x07\x1b[2J\u202e\n"


def test_the_module_lists_every_experiment():
    words = [sys.executable, "-m", "benchmarks.experiments", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m benchmarks.experiments ")
    assert re.findall(r"^    ([a-z-]+)\b", done.stdout, re.MULTILINE) == list(EXPERIMENTS)


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["importance", "--trace", "t.jsonl"])
    assert stopped.value.code == 2
    assert "unknown argument --trace; did you mean --traces?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["domain", "--redraw", EVIL], ["lambda", "--traces", EVIL]])
def test_escape_sequences_in_names_do_not_reach_the_terminal(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    check_printed(capsys.readouterr().err)


@pytest.mark.parametrize("words", [["importance", f"--{EVIL}"], [EVIL]])
def test_escape_sequences_in_words_do_not_reach_the_terminal(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    check_printed(capsys.readouterr().err)


def check_printed(text):
    assert "title" in text
    assert [character for character in text if not character.isprintable() and character != "\n"] == []


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
    monkeypatch.setattr(measuring, "load_policy", None)  # found before the model is loaded
    assert main(arguments) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
