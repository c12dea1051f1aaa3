"""The distribution: its name in every text, its neighbour of nearly the same name, what it says about itself."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import entra
import entra_kernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = [
    path
    for pattern in ("*.md", "docs/*.md", "*/**/*.py", "benchmarks/*.md", "entra/data/*.md", "Makefile", ".ci/run")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".venv") for part in path.parts)
]
INSTALL = re.compile(r"pip install[^\n]*")


def python(*arguments, path):
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONNOUSERSITE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=path)


class TestName:
    """`entra` on PyPI is another project: what was said here installed it."""

    def test_the_distribution_is_not_called_like_another_project(self):
        assert PROJECT["name"] == "entra-reward"
        assert PROJECT["scripts"] == {"entra": "entra.start:main"}

    def test_no_text_installs_the_other_project(self):
        told = {(path.name, line) for path in TEXTS for line in INSTALL.findall(path.read_text())}
        assert any("entra-reward[" in line for _, line in told)
        wrong = {(name, line) for name, line in told if re.search(r"(?<![\w./-])entra(?![\w./-])", line)}
        assert not {(name, line) for name, line in wrong if name != Path(__file__).name}

    def test_readme_installs_the_wheel_that_is_built(self):
        named = set(re.findall(r"dist/([\w.-]+\.whl)\[train\]", (ROOT / "README.md").read_text()))
        assert named == {f"entra_reward-{entra.__version__}-py3-none-any.whl"}

    def test_every_extra_that_a_text_names_exists(self):
        names = {
            name
            for path in TEXTS
            for group in re.findall(r"entra-reward\\?\[([\w,]+)\\?\]", path.read_text())
            for name in group.split(",")
        }
        assert {"train", "reasoning", "triton"} <= names <= set(PROJECT["optional-dependencies"])


class TestWhatItSaysOfItself:
    def test_both_packages_have_the_version_of_the_distribution(self):
        # It is read out of one of them; `make smoke` asks the wheel.
        assert "version" in PROJECT["dynamic"]
        assert entra.__version__ == entra_kernels.__version__

    def test_it_is_typed_and_names_no_address_that_does_not_exist(self):
        assert "Typing :: Typed" in PROJECT["classifiers"]
        assert all((ROOT / package / "py.typed").is_file() for package in ("entra", "entra_kernels"))
        assert "urls" not in PROJECT

    def test_triton_is_an_extra(self):
        # Builds of torch for CUDA and ROCm bring theirs, which the index's would overwrite; with one for the CPU it is 200 MB.
        assert not [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("triton")]
        assert PROJECT["optional-dependencies"]["triton"] == ["triton>=3.6"]

    def test_the_lowest_versions_are_those_that_are_tested(self):
        extras = PROJECT["optional-dependencies"]
        allowed = dict(
            re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
            for requirement in (*PROJECT["dependencies"], *extras["train"], *extras["triton"])
        )
        makefile = (ROOT / "Makefile").read_text()
        tested = dict(word.split("==") for word in re.search(r"^LOWEST := (.*)$", makefile, re.MULTILINE)[1].split())
        tested["torch"] = re.search(r"^SET_lowest = torch==([\d.]+)", makefile, re.MULTILINE)[1]
        for name, version in allowed.items():
            assert f"{tested[name]}.".startswith(f"{version}."), name

    def test_python_m_entra_is_entra(self):
        done = python("-m", "entra", "--help", path=ROOT)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: entra ")


OTHER = {
    "entra-0.4.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: entra\nVersion: 0.4.0\n",
    "entra-0.4.0.dist-info/RECORD": "entra/__init__.py,,\nentra-0.4.0.dist-info/METADATA,,\n",
}


@pytest.fixture
def other_project(tmp_path):
    """The other project as pip leaves it: its record, and its files among ours in one folder."""
    (tmp_path / "entra").mkdir()
    for entry in (ROOT / "entra").iterdir():
        (tmp_path / "entra" / entry.name).symlink_to(entry)
    (tmp_path / "entra_kernels").symlink_to(ROOT / "entra_kernels")
    for name, text in OTHER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


class TestOtherProject:
    def test_it_is_named_where_our_package_was_installed_last(self, other_project):
        done = python("-c", "import entra; print(entra.score_batch.__name__)", path=other_project)
        assert done.stdout.strip() == "score_batch"
        assert "RuntimeWarning: the distribution entra 0.4.0 is another project" in done.stderr
        assert "pip uninstall entra entra-reward" in done.stderr

    def test_the_command_line_stops_where_it_was_installed_last(self, other_project):
        (other_project / "entra" / "__init__.py").unlink()
        (other_project / "entra" / "__init__.py").write_text('__version__ = "0.4.0"\n')
        done = python("-m", "entra", "--version", path=other_project)
        assert done.returncode == 1
        assert done.stderr.startswith("entra: the distribution entra 0.4.0 is another project")
        assert done.stderr.count("\n") == 1

    def test_the_command_line_stops_where_no_record_of_it_is_left(self, other_project):
        (other_project / "entra" / "__init__.py").unlink()
        (other_project / "entra" / "__init__.py").touch()
        shutil.rmtree(other_project / "entra-0.4.0.dist-info")
        done = python("-m", "entra", "--version", path=other_project)
        assert done.returncode == 1
        assert done.stderr.startswith("entra: files of entra-reward are missing; run pip uninstall entra entra-reward, then")

    def test_alone_or_without_files_in_our_package_nothing_is_said(self, other_project):
        # An editable install of this project under its former name has no file there.
        (other_project / "entra-0.4.0.dist-info" / "RECORD").write_text("entra-0.4.0.dist-info/METADATA,,\n")
        done = python("-W", "error", "-c", "import entra", path=other_project)
        assert (done.returncode, done.stderr) == (0, "")
