"""Every block of code in README runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build
from tiny_tokenizer import build_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [
    [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
]
FILES = {
    "traces.jsonl": '{"prompt": "What is 2 + 2?", "completion": "It is 4. It is 4."}\n',
    "base.jsonl": '{"id": 1, "completion": "It is 4. It is 4.\\nThe answer is 4.", "answer": "4"}\n',
    "new.jsonl": '{"id": 1, "completion": "The answer is 4.", "answer": "4"}\n',
}


def test_there_are_blocks_of_both_kinds_and_no_others():
    assert len(PYTHON) >= 3
    assert len(SHELL) >= 3
    assert all(SHELL)
    assert len(re.findall(r"^```\w", README, re.MULTILINE)) == README.count("```python") + README.count("```bash")


@pytest.mark.smollm2
@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_block(code, tmp_path):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    if "trainer_of" in names:
        train_a_step(names["trainer_of"], tmp_path)


def train_a_step(trainer_of, folder):
    """What README's function makes trains; on a tiny model out of a folder, as users have it."""
    from datasets import Dataset

    build("qwen3").save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")

    def accuracy_reward(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    options = {"max_steps": 1, "max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
    quiet = {"output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    dataset = Dataset.from_list([{"prompt": "1+1="}, {"prompt": "1+2="}])
    trainer = trainer_of(str(folder / "model"), dataset, accuracy_reward, **options, **quiet)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.smollm2
@pytest.mark.parametrize("commands", SHELL, ids=lambda commands: commands[0])
def test_shell_commands(commands, tmp_path):
    """Those of one block, one after the other in one folder."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for words in map(shlex.split, commands):
        if words[0] == "make":  # this test is part of make test; that the target exists and its recipe parses must do
            subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            continue
        if words[0] == "pip":  # test_package.py checks the names in it, and `make smoke` installs a wheel
            continue
        if words[:2] == ["python", "-m"]:  # what is in the repository only
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        assert words[0] == "entra"
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, env=environment)
        for flag in {"-o", "--output"} & set(words):
            assert "reward" in (tmp_path / words[words.index(flag) + 1]).read_text()


def test_pictures_exist():
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 0
