"""What `make gpu` does with parts that fail, hang or are late, without a GPU."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from benchmarks.gpu import __main__ as gpu

ROOT = Path(__file__).parents[2]

HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""

WRITES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
folder.mkdir()
(folder / "device.json").write_text(json.dumps({"device": "device", "records": [{"name": sys.argv[1]}]}))
"""


def part(name, code, *words, seconds=30.0, **options):
    return gpu.Part(name=name, seconds=seconds, command=gpu.python("-c", code, *words), **options)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE", 0.5)

    def main(parts, *words):
        monkeypatch.setattr(gpu, "first_parts", lambda rehearse: parts)
        code = gpu.main([str(tmp_path), *words])
        return code, (tmp_path / "summary.txt").read_text().splitlines()

    return main


def is_alive(process):
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_part_that_fails_or_hangs_stops_no_other(run, tmp_path):
    parts = [
        part("fails", "raise SystemExit(3)"),
        part("hangs", HANGS, seconds=2.0),
        gpu.Part(name="missing", seconds=5, command=("no-such-program",)),
        part("passes", "print('done')"),
    ]
    code, summary = run(parts)
    assert code == 1
    assert [line.rpartition(",")[0] or line for line in summary] == [
        "fails: FAILED with exit code 3",
        "hangs: OUT OF TIME after 2 s",
        "missing: not run: no-such-program is not on the PATH",
        "passes: passed",
    ]
    assert (tmp_path / "passes.log").read_text() == "done\n"
    child = int((tmp_path / "hangs.log").read_text())
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)


def test_all_parts_pass(run):
    assert run([part("passes", "")])[0] == 0


def test_records_of_all_parts_are_in_one_file_of_their_device(run, tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: rendered.append(command))
    late = WRITES + "import time; time.sleep(60)"
    parts = [
        part("first", WRITES, "ours", is_benchmark=True),
        part("killed", late, "theirs", is_benchmark=True, seconds=3.0),
        part("third", WRITES, "another", is_benchmark=True),
    ]
    assert run(parts)[0] == 1
    records = json.loads((tmp_path / "device.json").read_text())["records"]
    assert [record["name"] for record in records] == ["ours", "theirs", "another"]
    assert len(rendered) == 1


def test_what_is_late_is_not_run(run):
    _, summary = run([part("passes", "")], "--minutes", "0")
    assert summary == ["passes: not run: the 0 minutes are over"]


def test_a_part_that_is_none_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--parts", "smoke", "speed"])
    assert "'speed' is no part; there are lengths, logprobs, machine, memcheck" in capsys.readouterr().err


def test_wheels_are_used_without_what_they_depend_on(run, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(SystemExit, match="fill it by: pip download --no-deps"):
        gpu.use_wheels(wheels, tmp_path / "packages")
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "answer = 42\n")
        wheel.writestr(
            "carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    code, summary = run([part("uses", "import carried; assert carried.answer == 42")], "--wheels", str(wheels))
    assert code == 0, summary


def test_every_benchmark_that_is_asked_for_is_there():
    """At the sizes of a GPU. Lengths that were never measured come before the others."""
    environment = {**os.environ, "BENCH_SIZES": "full", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names, done.stdout + done.stderr
    found = {}
    for each in gpu.first_parts(rehearse=False):
        if each.is_benchmark:
            matches = Expression.compile(each.command[each.command.index("-k") + 1])
            found[each.name] = [name for name in names if matches.evaluate(lambda word, name=name, **_: word in name)]
    assert {name.rpartition("[")[2] for name in found["lengths"]} == {f"{2**power}]" for power in range(10, 16)}
    assert [name.rpartition("[")[2] for name in found["logprobs"]] == ["32768-4096-151936]"]
    assert len(found["training"]) == 2
    for operation in ("test_redundancy", "test_score_batch", "test_memory", "[65536]", "[131072]", "[8192-4096-131072]"):
        assert any(operation in name for name in found["rest"]), operation
