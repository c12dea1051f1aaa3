"""Every block of code in README runs, and so does the Python of docs/training.md and docs/credit.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eager_reference import reduce_heads
from tiny_models import build
from tiny_tokenizer import build_tokenizer
from transformers import AutoModelForCausalLM

from entra.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON = blocks("python", README)
DIFF = blocks("diff", README)
TRAINING = blocks("python", (ROOT / "docs/training.md").read_text())
CREDIT = blocks("python", (ROOT / "docs/credit.md").read_text())
EVICTION = blocks("python", (ROOT / "docs/kv-eviction.md").read_text())
SHELL = [[line.split("#")[0].strip() for line in block.splitlines() if line.strip()] for block in blocks("bash", README)]
FILES = {
    "traces.jsonl": '{"prompt": "What is 2 + 2?", "completion": "It is 4. It is 4."}\n',
    "base.jsonl": '{"id": 1, "completion": "It is 4. It is 4.\\nThe answer is 4.", "answer": "4"}\n',
    "new.jsonl": '{"id": 1, "completion": "The answer is 4.", "answer": "4"}\n',
}


def test_readme_is_short():
    assert len(README.split()) <= 700


def test_there_are_blocks_of_three_kinds_and_no_others():
    assert len(PYTHON) >= 2
    assert len(DIFF) == 1
    assert len(SHELL) >= 3
    assert all(SHELL)
    assert len(re.findall(r"^```\w", README, re.MULTILINE)) == len(PYTHON) + len(DIFF) + len(SHELL)


@pytest.mark.smollm2
@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_block(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.fixture
def script(tmp_path):
    """What a TRL script has before it makes a trainer; the model is a tiny one out of a folder, as users have it."""
    import trl
    from datasets import Dataset

    build("qwen3").save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")

    def accuracy(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    options = {"max_steps": 1, "max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
    quiet = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    return {
        "model": str(tmp_path / "model"),
        "accuracy": accuracy,
        "args": trl.GRPOConfig(**options, **quiet),
        "dataset": Dataset.from_list([{"prompt": "1+1="}, {"prompt": "1+2="}]),
    }


def trains_a_step(code, script):
    exec(compile(code, "a page", "exec"), script)
    script["trainer"].train()
    return script["trainer"].state.global_step == 1


def test_the_diff_changes_six_lines_of_a_script_that_trains_before_and_after(script):
    (diff,) = DIFF
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    assert sum(sign in "+-" for sign, _ in lines if sign) == 6
    before, after = ("\n".join(text for sign, text in lines if sign != other) for other in "+-")
    assert trains_a_step(before, dict(script))
    assert trains_a_step(after, script)
    assert type(script["trainer"]).__name__ == "EntraGRPOTrainer"
    assert script["trainer"].reward_func_names == ["accuracy", "entra_reward"]
    assert script["trainer"].args.reward_weights == [1.0, 0.5]


@pytest.mark.smollm2
@pytest.mark.parametrize("code", TRAINING, ids=lambda code: code.splitlines()[0])
def test_python_block_of_the_page_on_training(code, script):
    if "trainer = " in code:
        assert trains_a_step(code, script)
    else:
        exec(compile(code, "docs/training.md", "exec"), script)


def test_the_capture_of_the_page_on_evicting_keys():
    """`make test-kvpress` runs the rest of the page, with a transformers that this package does not run on."""
    given = {"torch": torch, "model": build("qwen3"), "input_ids": torch.arange(3, 93)[None]}
    exec(compile(EVICTION[-1], "docs/kv-eviction.md", "exec"), given)
    assert [layer.incoming.shape for layer in given["captured"].values()] == [(1, 2, 90)] * 2


def test_the_trainer_of_the_page_on_credit_weighs_tokens(script, monkeypatch):
    import trl

    seen = []
    compute_loss = trl.GRPOTrainer._compute_loss

    def look(trainer, model, inputs):
        seen.append(inputs)
        return compute_loss(trainer, model, inputs)

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", look)
    assert trains_a_step("\n".join(CREDIT), script)
    (inputs,) = seen
    advantages, mask = inputs["advantages"], inputs["completion_mask"].bool()
    assert advantages.shape == mask.shape
    assert {bool(row[0] > 0) for row in advantages} == {True, False}
    before = AutoModelForCausalLM.from_pretrained(script["model"], attn_implementation="eager")
    for row, own, prompt, visible, completion in zip(
        advantages, mask, inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], strict=True
    ):
        ids = torch.cat([prompt[visible], completion[own]])
        matrices = before(ids[None], use_cache=False, output_attentions=True).attentions
        lift = torch.stack([reduce_heads(matrix[0].double(), None, lift=True)[[0, 3]] for matrix in matrices]).mean(dim=(0, 1))
        weights = lift[visible.sum() :].clamp(0.5, 2.0)
        assert weights.max() > 1.1 * weights.min()
        whole = row[own] / (weights if row[0] > 0 else 1 / weights)  # the completion's advantage
        torch.testing.assert_close(whole, whole[:1].expand_as(whole), rtol=1e-4, atol=0)


@pytest.mark.smollm2
@pytest.mark.parametrize("commands", SHELL, ids=lambda commands: commands[0])
def test_shell_commands(commands, tmp_path, monkeypatch):
    """Those of one block, one after the other in one folder. What needs SmolLM2 runs in this process, which has loaded it."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for words in map(shlex.split, commands):
        if words[0] == "make":  # this test is part of make test; that the target exists and its recipe parses must do
            subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            continue
        if words[0] == "pip":  # test_package.py checks the names in it, and `make smoke` installs a wheel
            continue
        assert words[0] == "entra"
        if "smollm2" in words:
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                assert main(words[1:]) == 0
        else:
            subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, env=environment)
        for flag in {"-o", "--output"} & set(words):
            assert "reward" in (tmp_path / words[words.index(flag) + 1]).read_text()


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).stat().st_size > 0 for picture in pictures)
