"""`import entra` stays light: proved in fresh processes, because this one has everything loaded."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "triton", "trl", "matplotlib", "datasets", "rich")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", ["entra", "entra_kernels"])
def test_importing_loads_nothing_heavy(package):
    loaded = python(f"import sys, {package}; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_importing_takes_at_most_a_fifth_of_a_second_more_than_torch():
    code = "import time, torch; start = time.perf_counter(); import entra; print(time.perf_counter() - start)"
    # The best of three: a busy machine can only make an import slower.
    assert min(float(python(code)) for _ in range(3)) < 0.2


def test_kernels_know_nothing_of_entra():
    assert python("import sys, entra_kernels; print('entra' in sys.modules)").strip() == "False"
