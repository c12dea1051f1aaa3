"""What make targets leave behind. Python is a stand-in that makes an environment whose tests fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
STAND_IN = """#!/bin/sh
echo "$@" >> calls
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> calls; test "$2" != pytest\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""


@pytest.fixture
def make(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    command = ["make", "-f", MAKEFILE, f"PYTHON={stand_in}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    return lambda *words: subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True)


def test_an_environment_of_other_versions_is_removed_when_its_tests_fail(make, tmp_path):
    assert make("test-versions-newest").returncode != 0
    assert "pytest tests" in (tmp_path / "calls").read_text()
    assert not (tmp_path / ".venv-versions").exists()


def test_environments_of_other_versions_are_made_one_after_the_other_from_the_index_that_is_named(make, tmp_path):
    make("-j3", "-k", "test-versions", "TORCH_INDEX=https://index.example")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["venv", "pip", "pip", "pip", "pip", "pytest"] * 3
    assert sum("--extra-index-url https://index.example" in call for call in calls) == 3
