"""A process of its own: a kernel of Triton's interpreter, which the other tests need, is neither specialised nor compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def python():
    """Runs Python with these arguments, without the interpreter, and gives what became of it."""

    def run(*arguments, **variables):
        environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, *(str(argument) for argument in arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)

    return run
