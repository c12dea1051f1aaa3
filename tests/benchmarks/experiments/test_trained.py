"""Training-time experiments: options and kinds reach the training, runs are reused only where they are the same."""

import argparse
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
pytest.importorskip("trl", reason="needs TRL: pip install 'entra-reward[train]'")

from benchmarks.comparisons import paired_difference
from benchmarks.evidence import run as evidence_run
from benchmarks.evidence.__main__ import main as evidence_main
from benchmarks.evidence.model import build_model, build_tokenizer
from benchmarks.evidence.problems import KINDS
from benchmarks.experiments import results, train_lambda, train_threshold, trained, transfer
from benchmarks.experiments.__main__ import main as experiments_main
from entra import ScoreConfig

FACTS = {"parameters": 1, "final_loss": 0.5, "steps": 2, "traces": 64, "seed": 0, "versions": {"torch": "2"}}
SIZES = {"steps": 3, "prompts_per_step": 2, "held_out": 8}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "sft.json").write_text(json.dumps(FACTS))
    return tmp_path


def record(config, seed, tokens):
    """What a run writes, without running."""
    rng = random.Random(seed)
    curves = ("accuracy", "tokens", "reward", "within_group_std", "reward_length_correlation")
    return {
        "sft": FACTS,
        "config": config,
        "command": "one",
        "curve": {name: [rng.random() for _ in range(SIZES["steps"])] for name in curves},
        "held_out": {
            "correct": "".join(rng.choice("01") for _ in range(SIZES["held_out"])),
            "finished": "1" * SIZES["held_out"],
            "tokens": [tokens + rng.randrange(9) for _ in range(SIZES["held_out"])],
            "sft_logprob": [-rng.random() for _ in range(SIZES["held_out"])],
            "kinds": [KINDS[i % 4] for i in range(SIZES["held_out"])],
            "examples": [],
        },
    }


@pytest.fixture
def asked(monkeypatch):
    """The runs that are asked for; each writes a record instead of training."""
    runs = []

    def make(missing, sft):
        for run in missing:
            if run.into.exists():
                continue
            runs.append(run)
            options = {name: value for name, value in run.flags.items() if name not in (*SIZES, "kinds")}
            config = evidence_run.recorded(
                SIZES["steps"],
                SIZES["prompts_per_step"],
                score_config=ScoreConfig(**options),
                kinds=run.flags.get("kinds", KINDS),
            )
            run.into.parent.mkdir(exist_ok=True)
            run.into.write_text(json.dumps(record(config, len(runs), 90 - 10 * len(runs))))
        return 0

    monkeypatch.setattr(trained, "make_missing", make)
    return runs


def options(module, folder, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    sizes = [text for name, size in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(size))]
    places = [text for name in ("sft", "runs", "evidence") for text in (f"--{name}", str(folder / name))]
    return parser.parse_args([*words, *sizes, *places])


def test_options_and_kinds_reach_the_training(folder, monkeypatch):
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden=32, layers=1).save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    given = {}

    class Trainer:
        curve = {"tokens": [1.0, 1.0]}  # noqa: RUF012

        def __init__(self, **arguments):
            given.update(arguments)

        def train(self):
            """The model stays as it is."""

    monkeypatch.setattr(evidence_run, "_recording_trainer", lambda: Trainer)
    monkeypatch.setattr("benchmarks.evidence.evaluate.MAX_NEW_TOKENS", 4)
    into = folder / "run.json"
    words = ["--steps", "2", "--prompts-per-step", "4", "--held-out", "8", "--sft", str(folder / "sft"), "--into", str(into)]
    flags = ["--protect-fraction", "0.5", "--attention-weight", "100", "--kinds", "sum", "sort"]
    assert evidence_main(["one", "entra-gated", "0", *flags, *words]) == 0
    assert given["reward_funcs"][1].config == ScoreConfig(protect_fraction=0.5, attention_weight=100.0)
    assert given["train_dataset"]["kind"] == ["sum", "sort"] * 4
    written = json.loads(into.read_text())
    assert written["config"]["score"] == {"protect_fraction": 0.5, "attention_weight": 100.0}
    assert written["config"]["kinds"] == ["sum", "sort"]
    assert written["held_out"]["kinds"] == list(KINDS) * 2


def test_each_value_is_a_run_of_its_own_and_the_default_has_no_flag(folder, asked):
    train_threshold.run(options(train_threshold, folder, "--values", "0", "0.2", "0.5"))
    assert [run.words for run in asked] == [
        ["base", 0],
        ["one", "all-tokens", 0],
        ["one", "entra-gated", 0],
        ["one", "entra-gated", 0],
    ]
    assert [run.flags.get("protect_fraction") for run in asked] == [None, None, None, 0.5]
    assert len({run.into for run in asked}) == 4


def test_finished_runs_are_kept_and_runs_of_other_settings_refused(folder, asked):
    train_lambda.run(options(train_lambda, folder))
    assert len(asked) == 4
    train_lambda.run(options(train_lambda, folder))
    assert len(asked) == 4
    path = folder / "runs" / "lambda-0-seed0.json"
    other = json.loads(path.read_text())
    other["config"]["learning_rate"] = 1.0
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"lambda-0-seed0.json is of another SFT model or of other settings; choose another"):
        train_lambda.run(options(train_lambda, folder))


@pytest.mark.parametrize("same", [True, False])
def test_an_evidence_run_serves_only_when_it_started_from_the_same_model(folder, asked, same):
    (folder / "evidence").mkdir()
    config = evidence_run.recorded(SIZES["steps"], SIZES["prompts_per_step"])
    old = {name: value for name, value in config.items() if name not in ("score", "kinds", "halve_at")}
    base = record({}, 1, 80)
    base["sft"] = FACTS if same else {**FACTS, "final_loss": 0.4}
    run = record(old, 2, 40)
    del run["sft"]
    (folder / "evidence" / "sft-seed0.json").write_text(json.dumps(base))
    (folder / "evidence" / "entra-gated-seed0.json").write_text(json.dumps(run))
    result = train_lambda.run(options(train_lambda, folder))
    sources = [result.summary["runs"][label]["from"] for label in (trained.SFT, "lambda = 0", "lambda = 2", "lambda = 100")]
    assert sources == ([trained.EVIDENCE, trained.HERE, trained.EVIDENCE, trained.HERE] if same else [trained.HERE] * 4)
    assert len(asked) == (2 if same else 4)


def test_comparisons_are_paired_by_problem_and_restricted_to_the_kinds(folder, asked):
    result = transfer.run(options(transfer, folder))
    label = result.settings["labels"][1]
    held_out = result.summary["held_out"]
    rest = [i for i in range(8) if KINDS[i % 4] in ("guess", "reverse")]
    against = trained.compare(result, label, trained.SFT, result.settings["untrained_kinds"])
    tokens, before = ([held_out[name]["tokens"][i] for i in rest] for name in (label, trained.SFT))
    assert against.tokens_difference == paired_difference(tokens, before)
    assert against.change.mean == pytest.approx(sum(tokens) / sum(before) - 1)
    assert against.problems == 4
    flags = {run.into.name: run.flags.get("kinds") for run in asked}
    assert flags["entra-banded-sum-sort-seed0.json"] == ["sum", "sort"]
    assert flags["entra-banded-seed0.json"] is None


def test_transfer_needs_a_kind_to_transfer_to(folder, asked):
    with pytest.raises(ValueError, match="leaves no kind to transfer to"):
        transfer.run(options(transfer, folder, "--trained-kinds", *KINDS))


@pytest.mark.parametrize("module", [train_threshold, transfer])
def test_drawn_again_from_the_json_alone(folder, asked, module, capsys):
    result = module.run(options(module, folder))
    written = results.write(result, folder / "out", module.tables(result), module.figures(result))
    path = folder / "out" / f"{result.name}.json"
    assert experiments_main([result.name, "--redraw", str(path), "--output", str(folder / "again")]) == 0
    assert (folder / "again" / f"{result.name}.md").read_text() == written == capsys.readouterr().out
    svg = f"{result.name}.svg"
    assert Path(folder, "again", svg).read_bytes() == Path(folder, "out", svg).read_bytes()
    assert "nan" not in written
