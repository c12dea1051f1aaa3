"""`entra score --engine ray` on a local cluster with real worker processes, some of which are killed: `make test-engines`."""

import inspect
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import build
from tiny_tokenizer import build_tokenizer

pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'entra-reward[ray]'")
import pyarrow as pa
import ray
from pyarrow import parquet
from ray.data._internal.datasource_v2.formats.parquet import parquet_datasource_v2
from ray.data.checkpoint import CheckpointConfig

from entra.integrations.ray_data import ROW, RayScorer

pytestmark = pytest.mark.timeout(1_200)

ROOT = Path(__file__).parents[2]
ROWS = 200
BAD = {5: None, 130: ""}
"""Completions of rows that cannot be scored."""
LIMIT = 400
"""Seconds that a run may take; on two busy cores it took some 60."""

# Batches differ from those of one process, and so does rounding: a few float32 roundings of log-probs of up to 10 nats.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and its traces in two Parquet files and one of JSON Lines."""
    folder = tmp_path_factory.mktemp("ray")
    # So many layers that a run is still under way after the first files, whatever the machine.
    build("qwen3", num_hidden_layers=16).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {
            "name": f"trace {i}",
            "prompt": f"{i}+{i}=",
            "completion": " ".join(str(draw.randrange(99)) for _ in range(80)),
            "reward": i % 2,  # so the added names get a prefix
        }
        for i in range(ROWS)
    ]
    for i, completion in BAD.items():
        rows[i]["completion"] = completion
    (folder / "traces").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows[:60]), folder / "traces/a.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[60:120]), folder / "traces/b.parquet")
    (folder / "traces/c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[120:]))
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    names = [str(folder / "traces"), "--model", str(folder / "model"), "--output", str(folder / output)]
    return [sys.executable, "-m", "entra", "score", *names, "--batch-size", "4", "--quiet", *more]


def start(folder: Path) -> subprocess.Popen:
    # Ray makes its workers nicer by 15: on a busy machine they would get next to nothing.
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    env.pop("RAY_ADDRESS", None)
    flags = ["--engine", "ray", "--workers", "2"]
    log = (folder / "log").open("ab")
    return subprocess.Popen(command(folder, "scores", *flags), env=env, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition, run: subprocess.Popen, folder: Path):
    """What `condition` yields once that is something; the run must still be under way."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert run.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)
    return found


def busy_workers(run: subprocess.Popen) -> list[int]:
    """Processes below the run that score a piece of the rows; Ray calls a worker by what it does."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:  # it has ended
            continue

    def below(pid):
        return pid == run.pid or (pid in parents and below(parents[pid]))

    return [pid for pid, name in names.items() if "MapBatches(RayScorer)).submit" in name and below(pid)]


@pytest.fixture(scope="module")
def killed(folder):
    """A folder that two runs filled, the first of which was killed, and a worker of the second.

    Returns:
        how many rows were there when the first was killed, how many when the worker was; the folder.
    """
    scores = folder / "scores"
    first = start(folder)
    try:
        wait_for(lambda: rows_of(scores), first, folder)
    finally:
        first.kill()
        first.wait()
    before = len(rows_of(scores))
    second = start(folder)
    try:
        wait_for(lambda: len(rows_of(scores)) > before, second, folder)
        os.kill(wait_for(lambda: busy_workers(second), second, folder)[0], signal.SIGKILL)
        between = len(rows_of(scores))
        assert second.wait(LIMIT) == 0, (folder / "log").read_text()
    finally:
        second.kill()
        second.wait()
    return before, between, scores


def rows_of(output: Path) -> list[dict]:
    rows = []
    for path in output.glob("*.parquet"):
        try:
            rows += parquet.read_table(path).to_pylist()
        except (pa.ArrowException, OSError):  # half a file, of a run that was killed, or one that Ray removed just now
            continue
    return rows


@pytest.fixture(scope="module")
def alone(folder):
    """The rows as one process scores them."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command(folder, "alone.jsonl"), env=env, check=True, timeout=LIMIT)
    return [json.loads(line) for line in (folder / "alone.jsonl").read_text().splitlines()]


def assert_same(got: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert got[name] == (pytest.approx(value, abs=TOLERANCE) if isinstance(value, float) else value), name


def test_every_row_is_there_once_and_as_of_one_process_whatever_was_killed(killed, alone):
    before, between, output = killed
    assert 0 < before < between < ROWS
    rows = sorted(rows_of(output), key=lambda row: row[ROW])
    assert [row[ROW] for row in rows] == list(range(ROWS))
    assert len(alone) == ROWS
    assert [row[ROW] for row in rows if row["entra_error"] is not None] == list(BAD)
    for got, expected in zip(rows, alone, strict=True):
        assert_same(got, expected)


def test_a_finished_run_is_not_done_again_and_another_option_is_refused(killed, folder, capsys):
    from entra.cli import main

    files = {path: path.stat().st_mtime_ns for path in killed[2].glob("*.parquet")}
    again = command(folder, "scores", "--engine", "ray")[3:]
    assert main(again) == 0
    assert {path: path.stat().st_mtime_ns for path in killed[2].glob("*.parquet")} == files
    assert main([*again, "--attention-weight", "1"]) == 2
    told = capsys.readouterr().err
    assert "attention_weight=2.0" in told
    assert "remove the folder" in told


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("--overwrite does not go with --engine ray", {"more": ["--overwrite"]}),
        ("writes a folder of Parquet files; name a folder", {"output": "scores.parquet"}),
        ("writes a folder of Parquet files; name a folder", {"output": "model/config.json"}),
        ("is a folder with other files", {"output": "model"}),
        ("is in --output", {"output": "traces"}),
        ("a pipe can be read only once", {"traces": "-"}),
        ("adds a column that the input has: entra_row", {"traces": "scored.jsonl"}),
        (
            "columns that would be added: x_reward; choose another --prefix",
            {"traces": "scored.jsonl", "more": ["--prefix", "x_"]},
        ),
    ],
)
def test_what_is_refused_leaves_nothing_behind(rule, change, folder, capsys, monkeypatch):
    from entra.cli import main

    row = b'{"prompt": "1+1=", "completion": "2", "x_reward": 0, "entra_row": 7}\n'
    (folder / "scored.jsonl").write_bytes(row)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(row)))
    there = set(folder.rglob("*"))
    traces = change.get("traces", "traces")
    more = ["--engine", "ray", "--output", str(folder / change.get("output", "refused")), *change.get("more", [])]
    assert main(["score", traces if traces == "-" else str(folder / traces), "--model", str(folder / "model"), *more]) == 2
    assert rule in capsys.readouterr().err
    assert set(folder.rglob("*")) == there


def test_the_class_scores_tables_of_anybody(folder, alone):
    table = parquet.read_table(folder / "traces/a.parquet").slice(0, 8)
    scored = RayScorer(str(folder / "model"), prefix="entra_", details=True)(table)
    assert scored.column_names[: table.num_columns] == table.column_names
    for got, expected in zip(scored.to_pylist(), alone, strict=False):
        assert_same(got, expected)
        if got["entra_error"] is None:
            assert len(got["entra_logprobs"]) == len(got["entra_protected"]) == got["entra_tokens"]


def test_what_is_used_of_ray_is_there():
    """Every symbol and keyword of Ray that `entra.integrations.ray_data` uses."""
    uses = {
        ray.init: ("address", "num_cpus"),
        ray.is_initialized: (),
        ray.cluster_resources: (),
        ray.data.read_parquet: ("paths", "override_num_blocks"),
        ray.data.Dataset.map_batches: ("fn_constructor_kwargs", "batch_size", "batch_format", "compute", "num_gpus"),
        ray.data.Dataset.write_parquet: ("path",),
        ray.data.ActorPoolStrategy: ("size",),
        ray.data.DataContext.get_current: (),
        CheckpointConfig: ("id_column", "checkpoint_path", "delete_checkpoint_on_success"),
    }
    for symbol, names in uses.items():
        assert set(names) <= set(inspect.signature(symbol).parameters), symbol
    context = ray.data.DataContext.get_current()
    assert hasattr(context, "checkpoint_config")
    assert hasattr(context, "enable_progress_bars")
    assert issubclass(ray.exceptions.RayTaskError, ray.exceptions.RayError)
    assert '"RAY_DATA_PARQUET_BIN_PACKING_BYTES"' in inspect.getsource(parquet_datasource_v2)
