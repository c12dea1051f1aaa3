"""The experiment `proxy` on a tiny model, and its statistics on tokens whose answer is known."""

from __future__ import annotations

import csv
import json
import random

import pytest
import tiny_models
import torch
from tiny_tokenizer import build_tokenizer

from benchmarks.experiments import proxy
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.influence import Replay, bidirectional, leave_one_out, likely_alternatives
from entra.encode import Encoder
from entra.traces import load_traces


def token_rows(problems=4, tokens=20, kinds=("concise", "overthinking")):
    """mu is leave-one-out's order but for the sign, log P the Bayes gain's; lift and the rest are noise."""
    noise = random.Random(0)
    rows = []
    for trace, (problem, kind) in enumerate((p, k) for p in range(problems) for k in kinds):
        for position in range(tokens):
            row = {name: noise.gauss(0, 1) for name in ("lift", "mu_middle", "lift_middle", "mu_all", "lift_all", "random")}
            loo, gain = noise.gauss(0, 1), noise.gauss(0, 1)
            rows.append(
                row
                | {"problem": f"p{problem}", "kind": kind, "trace": trace, "position": 50 + position, "token": "x"}
                | {"later": tokens - position, "loo": loo, "loo_absolute": abs(loo), "mu": -(loo**3)}
                | {"gain": gain, "logprob": gain - 3, "bayes": 2 * gain - 3, "bayes_lower": 2 * gain - 3.5, "tail": 0.1}
                | {"alternatives": 4}
            )
    return rows


def test_statistics_find_what_is_known():
    summary = proxy.summarise(token_rows(), 0.2)
    assert (summary["problems"], summary["completions"], summary["tokens"]) == (4, 8, 160)
    assert summary["spearman"]["loo"]["mu"] == [-1.0, -1.0, -1.0]
    assert summary["spearman"]["gain"]["logprob"] == [1.0, 1.0, 1.0]
    assert summary["overlap"]["bayes"]["logprob"] == [1.0, 1.0, 1.0]
    assert summary["overlap"]["loo"]["mu"] == [0.0, 0.0, 0.0]
    assert summary["targets"]["bayes"]["gain"] == [1.0, 1.0, 1.0]
    assert summary["bounds"]["spearman"] == [1.0, 1.0, 1.0]
    assert summary["bounds"]["width_median"] == pytest.approx(0.5)
    assert summary["spearman_by_kind"]["concise"]["loo"]["mu"] == [-1.0, -1.0, -1.0]
    assert summary["partial"]["position"]["loo"]["mu"][0] < -0.99
    low, high = summary["spearman"]["loo"]["random"][1:]
    assert low < 0 < high
    # log P is the gain's own order: nothing is left of it for mu to add.
    assert summary["partial"]["position and log P"]["gain"]["mu"] == [0.0, 0.0, 0.0]


def test_position_is_taken_out():
    rows = token_rows()
    for row in rows:
        noise = random.Random(row["loo"])
        row["loo"], row["mu"] = (-row["position"] + noise.gauss(0, 2) for _ in range(2))
    summary = proxy.summarise(rows, 0.2)
    assert summary["spearman"]["loo"]["mu"][0] > 0.8
    assert summary["spearman"]["loo"]["early"][0] > 0.8
    assert summary["spearman"]["loo"]["late"][0] == -summary["spearman"]["loo"]["early"][0]
    assert abs(summary["partial"]["position"]["loo"]["mu"][0]) < 0.25


def test_short_completions_stay_out_and_are_counted():
    rows = token_rows()
    kept = [row for row in rows if row["trace"] != 3 or row["position"] < 59]
    summary = proxy.summarise(kept, 0.2)
    assert (summary["completions"], summary["too_short"], summary["tokens"]) == (7, 1, 140)
    with pytest.raises(ValueError, match="fewer than 2 problems"):
        proxy.summarise(token_rows(problems=1), 0.2)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_the_command_measures_and_draws_again(model_folder, tmp_path, capsys):
    flags = ["proxy", "--limit", "2", "--max-tokens", "14", "--alternatives", "3", "--kinds", "concise"]
    assert main([*flags, "--model", str(model_folder), "--output", str(tmp_path / "first")]) == 0
    shown = capsys.readouterr()
    assert "tokens to run, about" in shown.err
    result = json.loads((tmp_path / "first" / "proxy.json").read_text())
    with (tmp_path / "first" / "proxy.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"]) == 2 * (14 - 2)

    problem = load_traces()[0]
    model, tokenizer = tiny_models.build("llama"), build_tokenizer()
    row = Encoder(tokenizer, model, {}).encode(
        [{"role": "user", "content": problem.prompt}], problem.completion("concise").text
    )
    ids = row.prompt + row.completion
    replay = Replay(model, ids, len(ids) - 14)
    expected = leave_one_out(replay)
    both = bidirectional(replay, likely_alternatives(replay, 0.02, 3))
    own = [row for row in result["rows"] if row["problem"] == problem.id]
    assert [row["position"] for row in own] == list(range(len(ids) - 14, len(ids) - 2))
    assert "".join(row["token"] for row in own) == problem.completion("concise").text[-14:-2]
    for name, values in (("loo", expected.total), ("bayes", both.value), ("bayes_lower", both.lower)):
        torch.testing.assert_close(torch.tensor([row[name] for row in own]), values[:-2].float(), atol=2e-4, rtol=2e-5)
    gains = torch.tensor([row["bayes"] - row["logprob"] for row in own])
    torch.testing.assert_close(torch.tensor([row["gain"] for row in own]), gains, atol=1e-3, rtol=0)

    again = ["proxy", "--redraw", str(tmp_path / "first" / "proxy.json"), "--output", str(tmp_path / "second")]
    assert main(again) == 0
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert files == {path.name for path in (tmp_path / "second").iterdir()}
    assert {"proxy.md", "proxy-spearman.svg", "proxy-overlap.svg", "proxy-tokens.svg", "proxy-layers.svg"} <= files
    for name in sorted(name for name in files if not name.endswith(".png")):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert f"2 problems, of each the last 14 but two; model {model_folder}" in shown.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "8"], "--max-tokens 8 must be at least 12"),
        (["--alternatives", "0"], "--alternatives 0 must be at least 1"),
        (["--tail", "1"], "--tail 1.0 must be in"),
        (["--top", "0.05"], "--top 0.05 must be in"),
        (["--limit", "1"], "intervals are over problems: raise --limit"),
        (["--kinds", "terse"], "name other --kinds"),
    ],
)
def test_bad_flags_say_what_to_do_before_a_model_is_loaded(flags, message, tmp_path, capsys):
    assert main(["proxy", "--model", "none", *flags, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
