"""The built distribution, installed without extras into an environment of its own and used from another folder: `make smoke`.

python tests/smoke.py build/dist
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import tiny_models
import tiny_tokenizer
import torch

import entra
import entra_kernels

CLONE = Path(__file__).resolve().parents[1]
TRITON = "import torch, entra_kernels; q = torch.ones(1, 1, 4, 16); entra_kernels.incoming_attention(q, q, backend='triton')"
TRACES = [
    {"prompt": "add 3 and 4", "completion": "3 plus 4 is 7, so the answer is 7."},
    {"prompt": "add 3 and 4", "completion": "It is 7. It is 7. It is 7. It is 7."},
]


def check_files() -> None:
    """What is installed is the wheel, with everything in it that is no Python."""
    for package in (entra, entra_kernels):
        folder = Path(package.__file__).parent
        assert CLONE / folder.name != folder, f"{folder} is the clone, not the wheel"
        assert (folder / "py.typed").is_file()
        left_out = {path.relative_to(CLONE) for path in (CLONE / folder.name).rglob("*") if path.is_file()}
        left_out -= {path.relative_to(folder.parent) for path in folder.rglob("*")}
        assert all("__pycache__" in path.parts for path in left_out), f"not in the wheel: {left_out}"
    installed = {path.parts[0] for path in importlib.metadata.files("entra-reward") or ()}
    others = {name for name in installed - {"entra", "entra_kernels", ".."} if not name.endswith(".dist-info")}
    assert not others, f"no part of the product, but in the wheel: {others}"


def check_metadata() -> None:
    """What a package index shows."""
    metadata = importlib.metadata.metadata("entra-reward")
    assert metadata["Version"] == entra.__version__ == entra_kernels.__version__
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(metadata.get_all("Classifier"))
    description = metadata["Description"] or metadata.get_payload()
    assert "pip install" in description
    relative = re.findall(r"\]\((?!https://)[^)]*\)", description)
    assert not relative, f"a package index cannot show or follow {relative}"


def check_sdist(folder: Path) -> None:
    """Sources and tests, no raw results."""
    (archive,) = folder.glob("entra_reward-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    assert {"pyproject.toml", "tests/smoke.py", "docs/method.md", "entra/recipes/smollm2-reasoning-gym.yaml"} <= set(names)
    assert not [name for name in names if name.startswith("benchmarks/results/")]


def check_use(folder: Path) -> None:
    """A model out of a folder scores a file, and a page shows it; what needs an extra names it."""
    tiny_models.build("qwen3").save_pretrained(folder / "model")
    tiny_tokenizer.build_tokenizer().save_pretrained(folder / "model")
    (folder / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in TRACES))
    script = str(Path(sys.executable).with_name("entra"))
    run(folder, script, "score", "traces.jsonl", "--model", "model", "--output", "scores.jsonl", "--details")
    rewards = [json.loads(line)["reward"] for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert 1 > rewards[0] > rewards[1] > 0, rewards
    run(folder, script, "inspect", "scores.jsonl", "-o", "report.html")
    assert "<html" in (folder / "report.html").read_text()
    assert run(folder, script, "--version") == run(folder, sys.executable, "-m", "entra", "--version")
    for module, use, hint in (
        ("trl", "import entra; entra.EntraGRPOTrainer", "'entra-reward[train]'"),
        ("triton", TRITON,
         "'entra-reward[triton]'"),
    ):  # fmt: skip
        if importlib.util.find_spec(module) is None:
            done = subprocess.run([sys.executable, "-c", use], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 1
            assert hint in done.stderr, done.stderr


def run(folder: Path, *command: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


if __name__ == "__main__":
    check_files()
    check_metadata()
    check_sdist(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as name:
        check_use(Path(name))
    print(f"entra-reward {entra.__version__} out of its wheel works, on torch {torch.__version__}")
