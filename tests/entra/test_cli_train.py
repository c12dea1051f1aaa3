"""`entra train`: from YAML and flags to a trained model, resumed exactly; bad input is one line before training."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.cli import main
from entra.cli.train.checkpoints import last_checkpoint, passed_over
from entra.cli.train.command import RECIPES, TrainOptions, _parse, _summary
from entra.cli.train.rewards import reward_functions
from entra.guards import Guards
from entra.problems import reasoning_gym_reward, unsafe_reasoning_gym_reward

for package in ("trl", "datasets", "accelerate"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'entra-reward[train]'")

pytestmark = pytest.mark.usefixtures("one_thread")

REWARD = """
def right(completions, solution, **columns):
    return [float(s in c) for c, s in zip(completions, solution, strict=True)]

NUMBER = 3
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a dataset of sums and a module with a reward function."""
    rows = [{"prompt": f"{i}+1=", "solution": str(i + 1)} for i in range(16)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "no_prompt.csv").write_text("question,answer\n1,2\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1"}\n{broken\n')
    (tmp_path / "sums_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def settings(model, **changes):
    return {
        "model_name_or_path": str(model),
        "dataset_name": "sums.jsonl",
        "output_dir": "out",
        "gate": "sums_reward.right",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": "1e-2",  # which YAML reads as text, too
        **changes,
    }


def train(model, *flags, **changes):
    Path("config.yaml").write_text(yaml.safe_dump(settings(model, **changes)))
    return main(["train", "--config", "config.yaml", *flags])


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def log_of(folder):
    state = json.loads((last_checkpoint(Path(folder)) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "reward" in entry]


def test_trains_and_saves(model, here, capsys):
    assert train(model, "--beta", "0.1", beta=0.2, min_length=3) == 0
    before, after = weights(model), weights("out")
    assert any(not torch.equal(before[name], after[name]) for name in after)
    logged = log_of("out")
    assert len(logged) == 2
    assert {"rewards/right/mean", "rewards/entra_reward/mean", "kl"} <= set(logged[0])
    made_with = json.loads(Path("out/entra_train.json").read_text())
    assert made_with["arguments"]["beta"] == 0.1  # a flag wins
    assert made_with["options"]["min_length"] == 3
    assert capsys.readouterr().err.splitlines()[-5].startswith("out: 2 steps, model saved")
    assert train(model, "--beta", "0.1", beta=0.2, min_length=3) == 0
    assert "out is finished: all steps are done, the model is in out/checkpoint-2" in capsys.readouterr().err


def test_problems_of_reasoning_gym_with_rloo_and_evaluation(model, here):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    changes = {
        "trainer": "rloo",
        "dataset_name": "reasoning_gym",
        "tasks": {"chain_sum": {"max_terms": 2}},
        "gate": None,
        "problems": 8,
        "eval_problems": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 4,
        "chat_template_kwargs": {"thinking": True},
        "save_strategy": "no",
    }
    assert train(model, "--attention-statistic", "lift", "--verify_every", "1", **changes) == 0
    made_with = json.loads(Path("out/entra_train.json").read_text())
    assert made_with["config"]["attention_statistic"] == "lift"
    assert made_with["config"]["chat_template_kwargs"] == {"thinking": True}


def test_two_processes(model, here):
    Path("config.yaml").write_text(yaml.safe_dump(settings(model, per_device_train_batch_size=2, ddp_backend="gloo")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "entra.cli", "train", "--config", "config.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("out: 2 steps, model saved") == 1
    assert weights("out").keys() == weights(model).keys()
    assert len(log_of("out")) == 2


# Runs the command line in a process that kills itself with SIGKILL in the third step, before its checkpoint is whole.
KILLED = """
import os, signal, sys
from transformers import TrainerState
from entra.cli import main

original = TrainerState.save_to_json

def deadly(self, path):
    if self.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, path)

TrainerState.save_to_json = deadly
main(sys.argv[1:])
"""


def test_killed_and_resumed_gives_the_same_model(model, here, capsys):
    command = ["--max_steps", "4", "--save_steps", "1"]
    assert train(model, *command, output_dir="whole") == 0
    Path("config.yaml").write_text(yaml.safe_dump(settings(model)))
    arguments = ["train", "--config", "config.yaml", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (here / "out/checkpoint-3").is_dir()
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "going on from out/checkpoint-2" in told
    assert "out/checkpoint-3 was not written to its end (no trainer_state.json that can be read) and is passed over" in told
    whole, resumed = weights("whole"), weights("out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [entry["reward"] for entry in log_of("whole")] == [entry["reward"] for entry in log_of("out")]

    assert main([*arguments, "--max_steps", "5", "--logging_steps", "2"]) == 0  # what only ends or watches a run may change
    assert main([*arguments, "--max_steps", "6", "--beta", "0.1"]) == 2
    assert "out has checkpoint-5 of a run with arguments.beta=0.0, now it is 0.1; use another" in capsys.readouterr().err
    assert main([*arguments, "--resume_from_checkpoint", "false"]) == 2
    assert main([*arguments, "--resume_from_checkpoint", "nowhere"]) == 2
    Path("out/entra_train.json").unlink()
    assert main([*arguments, "--max_steps", "6"]) == 2
    assert main([*arguments, "--max_steps", "6", "--resume_from_checkpoint", "true"]) == 0


@pytest.mark.parametrize(
    ("whole", "last", "over"),
    [([], None, [10, 30]), ([10], 10, [30]), ([10, 20], 20, [30]), ([30], 30, [])],
    ids=["none", "an-earlier-one", "two", "the-last-one"],
)
def test_checkpoints_that_are_passed_over_are_those_after_the_last_whole_one(whole, last, over, tmp_path):
    for steps in {10, 30, *whole}:
        (tmp_path / f"checkpoint-{steps}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for steps in whole:
        (tmp_path / f"checkpoint-{steps}/trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == (None if last is None else tmp_path / f"checkpoint-{last}")
    assert passed_over(tmp_path) == [tmp_path / f"checkpoint-{steps}" for steps in over]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"reward_funcs": ["acuracy_reward"]}, "unknown reward function 'acuracy_reward'", id="reward-name"),
        pytest.param({"gate": "entra"}, "--gate entra: a reward cannot be its own gate", id="its-own-gate"),
        pytest.param({"gate": "sums_reward.wrong"}, "cannot import the reward function sums_reward.wrong", id="import"),
        pytest.param({"gate": "sums_reward.NUMBER"}, "sums_reward.NUMBER is a int, not a reward function", id="no-function"),
        pytest.param(
            {"gate": "reasoning_gym"}, "reasoning_gym needs the column 'entry'; the dataset has prompt, s", id="column"
        ),
        pytest.param({"dataset_name": "a.jsonl"}, "cannot read the dataset a.jsonl: No such file", id="no-file"),
        pytest.param({"dataset_name": "no_prompt.csv"}, "no column 'prompt', only question, answer", id="no-prompt"),
        pytest.param({"dataset_name": "broken.jsonl"}, "cannot read the dataset broken.jsonl: ", id="broken"),
        pytest.param({"dataset_name": None}, "no dataset; give --dataset_name with a hub name", id="no-dataset"),
        pytest.param({"dataset_name": "reasoning_gym"}, "name tasks of reasoning-gym", id="no-tasks"),
        pytest.param({"tasks": ["chain_sum"]}, "--tasks are of the dataset reasoning_gym", id="tasks-of-a-file"),
        pytest.param({"dataset_train_split": "sums"}, "no split 'sums'; it has train: use --dataset_train_split", id="split"),
        pytest.param({"eval_strategy": "steps"}, "no split 'test'; it has train: use --dataset_test_split", id="test-split"),
        pytest.param({"reward_weights": [0.0, 0.0]}, "reward_weights=[0.0, 0.0] are all zero", id="weights"),
        pytest.param({"group_gate": 0.5, "gate": "none"}, "group_gate=0.5 needs a gate", id="group-gate"),
        pytest.param({"min_length": 2.5}, "min_length=2.5 must be a whole number", id="type-in-yaml"),
        pytest.param({"protect_fraction": 2}, "protect_fraction=2 must be in [0, 1]", id="range"),
        pytest.param({"num_generations": 1}, "at least 2 generations", id="group-of-one"),
        pytest.param({"model_name_or_path": "nowhere"}, "cannot load --model_name_or_path nowhere: ", id="model"),
        pytest.param({"dtype": "float16"}, "the weights are float16", id="float16"),
        pytest.param({"trainer": "ppo"}, "--trainer ppo must be one of grpo, rloo", id="trainer"),
        pytest.param({"bta": 0.1}, "config.yaml has an unknown option 'bta'; did you mean 'beta'?", id="unknown-in-yaml"),
    ],
)
def test_bad_input_is_one_line(changes, message, model, here, capsys):
    given = {name: value for name, value in settings(model, **changes).items() if value is not None}
    Path("config.yaml").write_text(yaml.safe_dump(given))
    assert main(["train", "--config", "config.yaml"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("entra train: ")
    assert message in last
    assert not Path("out/entra_train.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"dataset_name": "code.jsonl", "gate": "reasoning_gym"}, "'simple_integration' runs the answer", id="file"
        ),
        pytest.param(
            {"dataset_name": "code.jsonl", "gate": None}, "'simple_integration' runs the answer", id="gate-by-default"
        ),
        pytest.param({"dataset_name": "reasoning_gym", "tasks": ["simple_integration"]}, "runs the answer", id="tasks"),
        pytest.param({"dataset_name": "foreign.jsonl", "gate": "reasoning_gym"}, "row 1 of the dataset: entry", id="foreign"),
    ],
)
def test_problems_whose_answers_run_as_code_are_refused_before_training(changes, message, model, here, capsys):
    """Answers are text of the policy; the scorer of such a task evaluated them in the trainer's process."""
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    entry = json.dumps({"answer": "", "metadata": {"source_dataset": "simple_integration"}})
    Path("code.jsonl").write_text(json.dumps({"prompt": "1", "entry": entry}) + "\n")
    Path("foreign.jsonl").write_text(json.dumps({"prompt": "1", "entry": "{}"}) + "\n")
    test_bad_input_is_one_line(changes, message, model, here, capsys)
    command = ["--reward_funcs", "reasoning_gym", "--run_answers_as_code", "true"]
    assert _reward_functions(command) == [unsafe_reasoning_gym_reward]
    assert _reward_functions(command[:2]) == [reasoning_gym_reward]


def _reward_functions(command):
    options = _parse(["--model_name_or_path", "m", "--output_dir", "o", *command]).options
    return reward_functions(
        options.reward_funcs, None, ["entry"], entra.ScoreConfig(), Guards(), run_answers_as_code=options.run_answers_as_code
    )


def test_model_of_somebody_else_is_not_replaced(model, here, capsys):
    """The trained model's files would take the place of those of the folder."""
    shutil.copytree(model, here / "mine")
    before = {path.name: path.read_bytes() for path in (here / "mine").iterdir()}
    Path("out").mkdir()
    Path("out/entra_train.json").write_text('{"mine": 1}')
    for changes, message in [
        ({"model_name_or_path": "mine", "output_dir": "mine"}, "--output_dir mine is the model that is trained; choose"),
        ({"output_dir": "mine"}, "mine/config.json exists, and entra train did not write it; use another --output_dir"),
        ({}, "out/entra_train.json exists, and entra train did not write it"),
        ({"output_dir": "other"}, "cannot read --config pipe: it is a pipe or a device"),
    ]:
        command = ["train", "--config", "config.yaml"]
        Path("config.yaml").write_text(yaml.safe_dump(settings(model, **changes)))
        if "pipe" in message:
            os.mkfifo("pipe")
            command[-1] = "pipe"
        assert main(command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (here / "mine").iterdir()} == before


# What makes a recipe small: each step is its own generation of two completions of a tiny model.
SMALL = (
    *("--bf16", "false", "--num_generations", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--steps_per_generation", "2", "--max_completion_length", "16", "--problems", "8", "--eval_strategy", "no"),
    *("--logging_steps", "1"),
)


def test_a_recipe_goes_on_although_its_output_folder_has_its_name(model, here, capsys):
    """The folder was taken for the config."""
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    command = ["train", "--config", "smollm2-reasoning-gym", "--model_name_or_path", str(model), *SMALL, "--save_steps", "1"]
    assert main([*command, "--max_steps", "1"]) == 0
    assert Path("smollm2-reasoning-gym").is_dir()
    capsys.readouterr()
    assert main([*command, "--max_steps", "2"]) == 0
    assert "going on from smollm2-reasoning-gym/checkpoint-1" in capsys.readouterr().err
    assert len(log_of("smollm2-reasoning-gym")) == 2


def test_the_documented_smoke_command_shows_entra_at_work(model, here):
    """It scored nothing: every completion was cut off, and skip_truncated left none."""
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("entra train --config smollm2-reasoning-gym ")]
    assert main([*line.split()[1:], "--model_name_or_path", str(model), "--save_steps", "1"]) == 0
    for entry in log_of("smollm2-reasoning-gym"):
        assert 0 < entry["rewards/entra_reward/mean"] <= 1
        assert entry["entra_reward/score"] > 0
        assert entry["entra/verify/incoming"] < 1e-3


def test_a_column_answer_has_a_gate_by_itself(model, here):
    """Compared as `entra eval` compares."""
    rows = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(16)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(model, gate=None, dataset_name="answers.jsonl") == 0
    logged = log_of("out")
    assert {"rewards/answer_reward/mean", "rewards/entra_reward/mean", "entra_reward/stopped/gate"} <= set(logged[0])
    made_with = json.loads(Path("out/entra_train.json").read_text())
    assert made_with["options"]["gate"] is None


def test_answers_are_compared_as_entra_eval_compares_them():
    from entra.grading import answer_reward

    chat = [{"role": "assistant", "content": "Let me see. <answer>1,000</answer>"}]
    given = ["So it is 43.", "The answer is 43.0", "<answer>44</answer>", chat, "43", []]
    right = ["43", 43, "43", 1000.0, None, "43"]
    assert answer_reward(completions=given, answer=right, prompts=given) == [0.0, 1.0, 0.0, 1.0, None, 0.0]


def test_two_rewards_of_one_name_are_refused(model, here, capsys):
    assert train(model, reward_funcs=["entra", "entra"]) == 2
    assert "reward_funcs holds 2 functions called 'entra_reward'" in capsys.readouterr().err.splitlines()[-1]


def test_no_gate_fits_the_dataset(model, here, capsys):
    Path("other.jsonl").write_text('{"prompt": "1+1=", "result": 2}\n')
    assert train(model, gate=None, dataset_name="other.jsonl") == 2
    assert "no gate fits the dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--bta", "0.1"], "unknown argument --bta; did you mean --beta?", id="unknown-flag"),
        pytest.param(["--skip_truncated", "maybe"], "'maybe' is neither true nor false", id="boolean"),
        pytest.param(["--head_reduction", "sum"], "invalid choice: 'sum'", id="choice"),
    ],
)
def test_bad_flags_are_usage_errors(flags, message, model, here, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(model, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            None, "cannot read --config config.yaml: No such file or directory; name a file, or one of smollm2-", id="none"
        ),
        pytest.param("a: [", "--config config.yaml is not YAML", id="no-yaml"),
        pytest.param("- a\n", "--config config.yaml must be a mapping", id="no-mapping"),
    ],
)
def test_bad_config_file_is_one_line(text, message, here, capsys):
    if text is not None:
        Path("config.yaml").write_text(text)
    assert main(["train", "--config", "config.yaml"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_trl_says_how_to_install_it(here, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "--config", "config.yaml"]) == 2
    assert (
        capsys.readouterr().err == "entra train: training needs trl, accelerate, datasets: pip install 'entra-reward[train]'\n"
    )


def test_interrupted_says_how_to_go_on(model, here, capsys, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(entra.EntraGRPOTrainer, "training_step", interrupted)
    assert train(model) == 130
    assert "interrupted after 0 steps; there is no checkpoint yet" in capsys.readouterr().err


def test_summary_where_no_completion_was_scored():
    """Found with the recipe: where every completion is cut off, skip_truncated leaves none to average, and None is logged."""
    logged = [{"reward": 0.5, "rewards/entra_reward/mean": value} for value in (None, 0.25)]
    text = "\n".join(_summary(SimpleNamespace(log_history=logged, global_step=2), Path("out"), 3.0))
    assert "rewards/entra_reward/mean" in text
    assert " none -> 0.25" in text


def test_help_names_every_option_of_ours(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for config in (TrainOptions, Guards, entra.ScoreConfig):
        assert all(f"--{field.name}" in text for field in fields(config))
    assert "smollm2-reasoning-gym" in text
    assert "tau: the share of the completion's tokens" in text


def test_guards_are_flags(tmp_path):
    options = {"halve_at": 5.0, "group_gate": 0.5, "min_length": 2, "min_mean_logprob": -9.0, "dead_band": 0.1}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = _parse(["--model_name_or_path", "m", "--output_dir", str(tmp_path), *flags, "--skip_truncated"])
    assert command.guards == Guards(**options, skip_truncated=True)
    assert command.settings()["options"].items() >= vars(command.guards).items()
    assert _parse(["--model_name_or_path", "m", "--output_dir", str(tmp_path)]).guards == Guards()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse_and_their_problems_exist(recipe, here, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
    from entra.problems import load_problems

    command = _parse(["--config", recipe.stem, "--bf16", "false", "--problems", "40"])
    assert len(load_problems(command.options.tasks, command.options.problems)) == 40
    assert command.options.gate == "reasoning_gym"
    assert command.guards.group_gate == 0.5
