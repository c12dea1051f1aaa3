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
CASE = {"operation": "linear_token_logprobs", "case": "8192 x 4096 x 131072"}
TAKEN = {"ms": 10.0, "peak_bytes": 1, "logits_bytes": 100}
folder = pathlib.Path(sys.argv[-1])
folder.mkdir()
content = {"device": "device", "date": "today", "cuda": "13.0", "records": [{**CASE, **TAKEN, "name": sys.argv[1]}]}
(folder / "device.json").write_text(json.dumps(content))
"""


def part(name, code, *words, seconds=30.0, **options):
    return gpu.Part(name=name, seconds=seconds, command=gpu.python("-c", code, *words), **options)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE", 0.5)

    def main(parts, *words):
        monkeypatch.setattr(gpu, "all_parts", lambda rehearse: {each.name: each for each in parts})
        monkeypatch.setitem(gpu.CALLS, "first", (7, tuple(each.name for each in parts)))
        monkeypatch.setitem(gpu.CALLS, "again", (3, tuple(each.name for each in parts[:2])))
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
    log = (tmp_path / "log.txt").read_text()
    assert log.endswith("=== passes\ndone\n")
    child = int(log.partition("=== hangs\n")[2].split()[0])
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)


def test_all_parts_pass(run):
    assert run([part("passes", "")])[0] == 0


def test_again_begins_with_what_did_not_pass(run, tmp_path):
    """The first call ends in its third part, as where the lease is over."""
    passes = [part(name, "") for name in ("smoke", "tests", "sizes", "ncu", "rest")]
    fails = part("tests", "raise SystemExit(3)")
    assert run([passes[0], fails, *passes[2:]], "--parts", "smoke", "tests", "ncu")[0] == 1

    def again(parts, *words):
        before = len((tmp_path / "summary.txt").read_text().splitlines())
        return [line.partition(",")[0] for line in run(parts, "--call", "again", *words)[1][before:]]

    assert again(passes, "--parts", "rest") == ["rest: passed"]
    mended = ["tests: passed", "sizes: passed", "smoke: passed"]
    assert again(passes) == mended
    assert again(passes) == ["smoke: passed", "tests: passed"]
    (tmp_path / "summary.txt").unlink()
    assert gpu.unfinished(tmp_path) == []


def test_records_of_all_parts_are_in_one_file_of_their_device(run, tmp_path, monkeypatch, capsys):
    rendered = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **options: rendered.append(command))
    late = WRITES + "import time; time.sleep(60)"
    parts = [
        part("first", WRITES, "ours", "@records"),
        part("killed", late, "matmul", "@records", seconds=3.0),
        part("third", WRITES, "another", "@records"),
    ]
    assert run(parts)[0] == 1
    records = json.loads((tmp_path / "device.json").read_text())["records"]
    assert [record["name"] for record in records] == ["ours", "matmul", "another"]
    assert len(rendered) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"device.json", "log.txt", "summary.txt"}
    assert capsys.readouterr().out.count("| 100% of the rate, 1.0% of the memory | met |") == 1


def test_the_training_ends_in_a_table(run, tmp_path, capsys):
    """Steps that compile are not counted."""
    curve = {"step_seconds": [9.0, 9.0, 9.0, 2.0, 4.0], "entra_seconds": [9.0, 9.0, 9.0, 0.3, 0.3]}
    lines = [
        {"arm": "start", "held_out": {"correct": "0110", "tokens": [40, 60, 50, 50]}},
        {"arm": "kimi", "held_out": {"correct": "0000", "tokens": [9] * 4}, "curve": curve},
        {"arm": "kimi", "held_out": {"correct": "1110", "tokens": [10] * 4}, "curve": curve},
    ]
    write = "import pathlib, sys; (pathlib.Path(sys.argv[2]) / 'training.jsonl').write_text(sys.argv[1])"
    assert run([part("trains", write, "\n".join(map(json.dumps, lines)), "@results")])[0] == 0
    out = capsys.readouterr().out
    assert "| start | 0 |  |  | 0.500 | 50.0 |" in out
    assert "| kimi | 5 | 3.00 | 300.0 (10.0%) | 0.750 | 10.0 |" in out
    assert "| accuracy | not measured |" in out


def test_parts_share_a_folder_that_is_gone_afterwards(run, tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('kept'); print(sys.argv[1])"
    read = "import pathlib, sys; assert pathlib.Path(sys.argv[1]).read_text() == 'kept'"
    code, summary = run([part("writes", write, "@scratch/model"), part("reads", read, "@scratch/model")])
    assert code == 0, summary
    assert not Path((tmp_path / "log.txt").read_text().splitlines()[1]).exists()


def test_each_call_fits_into_its_share_of_a_quarter_of_an_hour():
    """Two starts of two minutes and both calls fit. A training ends before its part does."""
    parts = gpu.all_parts(rehearse=False)
    minutes = {name: limit for name, (limit, _) in gpu.CALLS.items()}
    assert minutes["first"] + minutes["again"] + 2 * 2 <= 15
    assert minutes["train"] + 2 <= 15
    for name, (limit, names) in gpu.CALLS.items():
        assert set(names) <= set(parts)
        assert parts[names[-1]].seconds < 60 * limit, name
    for name in ("sft", *gpu.train.ARMS):
        assert parts[name].command[-2] == "--seconds"
        assert float(parts[name].command[-1]) + 30 < parts[name].seconds


def test_what_is_late_is_not_run(run):
    _, summary = run([part("passes", "")], "--minutes", "0")
    assert summary == ["passes: not run: the 0 minutes are over"]


def test_a_part_that_is_none_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--parts", "smoke", "speed"])
    assert "'speed' is no part; there are accuracy, entra-banded, kimi, lengths, logprobs, machine" in capsys.readouterr().err


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
    for each in gpu.all_parts(rehearse=False).values():
        if "@records" in each.command:
            matches = Expression.compile(each.command[each.command.index("-k") + 1])
            found[each.name] = [name for name in names if matches.evaluate(lambda word, name=name, **_: word in name)]
    assert {name.rpartition("[")[2] for name in found["lengths"]} == {f"{2**power}]" for power in range(10, 16)}
    assert [name.rpartition("[")[2] for name in found["logprobs"]] == ["32768-4096-151936]"]
    assert len(found["training"]) == 2
    for operation in ("test_redundancy", "test_score_batch", "test_memory", "[65536]", "[131072]", "[8192-4096-131072]"):
        assert any(operation in name for name in found["rest"]), operation
