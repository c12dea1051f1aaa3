"""Ctrl-C from our first line on, while all else is imported: one line and exit code 130, whatever a library makes of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")

# Libraries that are being imported lose a KeyboardInterrupt, or make another error of it.
RUN = """
import os, signal, sys, time

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                raise ImportError("the library lost it") from None

module = sys.argv.pop(1)
sys.meta_path.insert(0, Import())
from entra.start import main
sys.exit(main())
"""
# Says when `entra.start` has begun, and goes on.
SAYING = """
import os, sys

class Import:
    def find_spec(self, name, path=None, target=None):
        if name == "entra.cli":
            os.write(1, b"x")

sys.meta_path.insert(0, Import())
from entra.start import main
sys.exit(main())
"""
GROUPED = {"prompt": "p", "completion": "c", "correct": 1}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("entra.cli", ["--help"]),
        ("argparse", ["score", "rows", "--model", "m", "--output", "o"]),
        ("entra.commands", ["demo"]),
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


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.3])
def test_interrupted_in_the_first_second_is_quiet(delay, tmp_path):
    """It was a traceback until the first import of a command, 0.15 s later."""
    command = [sys.executable, "-c", SAYING, "score", "rows", "--model", "m", "--output", "o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as running:
        assert running.stdout.read(1) == "x"
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert (running.returncode, told) == (130, "\nentra: interrupted\n")


def test_before_the_first_line_next_to_nothing_is_imported():
    """Until then Ctrl-C is a traceback."""
    code = "import re, sys; before = {*sys.modules}; import entra.start; print(*sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light = {"__future__", "signal", "warnings", "importlib", "importlib._bootstrap", "importlib._bootstrap_external"}
    assert {*done.stdout.split()} <= light | {"entra", "entra.name_clash", "entra.start"}
