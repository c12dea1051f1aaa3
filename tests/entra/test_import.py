"""`import entra` stays light: proved in fresh processes, because this one has everything loaded."""

import importlib
import importlib.util
import subprocess
import sys
import time

import pytest

HEAVY = ("transformers", "triton", "trl", "matplotlib", "datasets", "rich")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_entra_does_not_load_torch_and_knows_every_name():
    code = """
import entra, sys
assert "torch" not in sys.modules
assert {*entra.__all__} <= {*dir(entra)}
from entra import doctor, score_batch
import entra.diagnosis, entra.score
assert entra.doctor is doctor is entra.diagnosis.doctor
assert entra.score_batch is score_batch is entra.score.score_batch
assert entra.capture.capture_incoming_attention is entra.capture_incoming_attention
assert not hasattr(entra, "no_such_name")
"""
    python(code)


def test_the_command_line_helps_within_a_second_and_loads_only_what_it_runs():
    code = """
import sys
from entra.cli import main
try: main({words})
except SystemExit: print([name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy", "trl", "rich")
    or name.startswith("entra.cli.")])
"""
    assert python(code.format(words=["--help"])).splitlines()[-1] == "[]"
    loaded = python(code.format(words=["eval", "--help"])).splitlines()[-1]
    assert "entra.cli.evaluate.command" in loaded
    assert "entra.cli.train" not in loaded

    def seconds() -> float:
        start = time.perf_counter()
        python("from entra.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")
        return time.perf_counter() - start

    assert any(seconds() < 1.0 for _ in range(3))  # one of three: a busy machine can only be slower


@pytest.mark.parametrize("modules", [["entra"], ["entra_kernels", "entra.capture"]], ids=lambda modules: modules[0])
def test_importing_loads_nothing_heavy(modules):
    """`entra_kernels`, which loads torch, and what stands right above it share a process."""
    code = f"""
import sys
for module in {modules}:
    __import__(module)
    print([name for name in {HEAVY} if name in sys.modules])
    if module == "entra_kernels":
        assert "entra" not in sys.modules, "kernels know nothing of entra"
"""
    assert python(code).splitlines() == ["[]"] * len(modules)


def test_importing_takes_at_most_a_fifth_of_a_second_more_than_torch():
    code = "import time, torch; start = time.perf_counter(); import entra; print(time.perf_counter() - start)"
    # One of three: a busy machine can only make an import slower.
    assert any(float(python(code)) < 0.2 for _ in range(3))


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_an_engine_that_is_not_there_is_named_with_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match=r"is not installed.*pip install 'verl==0.9.1'"):
        importlib.import_module("entra.integrations.verl_scorer")
