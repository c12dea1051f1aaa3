"""Ctrl-C while a command is still importing: one line and exit code 130, whatever the library makes of it."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")

# Libraries that are being imported lose a KeyboardInterrupt, or make another error of it.
RUN = """
import os, signal, sys, time

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                raise ImportError("the library lost it") from None

sys.meta_path.insert(0, Import())
from entra.cli import main
sys.exit(main(sys.argv[2:]))
"""
GROUPED = {"prompt": "p", "completion": "c", "correct": 1}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("entra.cli.score", ["score", "rows", "--model", "m", "--output", "o"]),
        ("torch", ["score", "rows", "--model", "m", "--output", "o"]),
        ("transformers", ["inspect", "rows", "--model", "m"]),
        ("numpy", ["eval", "rows"]),
        ("entra.cli.select.command", ["select", "rows", "-o", "o"]),
        ("trl.import_utils", ["train", "--output_dir", "o"]),
        ("transformers", ["doctor", "--model", "m"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_interrupted_while_importing_is_quiet(module, words, tmp_path):
    if words[0] == "train":
        pytest.importorskip("trl")
    (tmp_path / "rows").write_text(json.dumps(GROUPED) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, module, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("\nentra: interrupted\n")
