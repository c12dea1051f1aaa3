"""The command that times launch sizes, in the interpreter, where its times mean nothing but its checks do."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off: a GPU is there"),
    pytest.mark.usefixtures("quick_interpreter"),
]
SHIPPED = Path(__file__).parents[3] / "entra_kernels/_triton/launch.json"
SMALL = ["--tokens", "70", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--dtype", "fp16", "--rounds", "1"]


@pytest.fixture
def tune():
    return importlib.import_module("benchmarks.static.tune")


def test_candidates_fit_and_hold_the_size_in_use(tune):
    launch = importlib.import_module("entra_kernels._triton.launch")
    for chip in (launch.HOPPER, launch.Chip("gfx942", 64 * 1024)):
        for head_dim in (16, 128, 256):
            current = launch.attention_launch(head_dim, 4, 2, chip, options=False)
            sizes = tune.candidates(current, 2, chip)
            assert sizes[0] == current
            assert len(set(sizes)) == len(sizes) > 5
            tiles = {s: s.resident + (s.ring.stages if s.ring else s.num_stages) * s.streamed for s in sizes}
            assert all(tiles[s] * s.depth * 2 <= chip.shared_memory for s in sizes[1:])
            assert (current.ring is not None) == (current._replace(ring=None) in sizes[1:])
            assert all(s.resident % s.streamed == 0 for s in sizes)


@pytest.mark.parametrize(
    ("head_dim", "ring", "plain"),
    [
        (64, (128, 4, False), None),
        (128, (128, 4, False), (256, 64, 8, 2, 128)),
        (256, (64, 3, True), None),
    ],
)
def test_the_first_12_hold_what_an_h100_was_fastest_with(tune, head_dim, ring, plain):
    """benchmarks/results/h100-launch-sizes.txt, wherever the order starts."""
    launch = importlib.import_module("entra_kernels._triton.launch")
    winner = launch.attention_launch(head_dim, 4, 2, launch.HOPPER, options=False)
    assert (winner.streamed, *winner.ring) == ring
    first = tune.candidates(winner._replace(ring=launch.Ring(3, False)), 2, launch.HOPPER)[1:13]
    assert winner in first
    keys = [(size.resident, size.streamed, size.num_warps, size.num_stages, size.max_registers) for size in first]
    assert plain is None or plain in keys
    for size in tune.candidates(winner, 2, launch.HOPPER)[:12]:
        assert tune.taken(size, 2, launch.HOPPER) <= launch.HOPPER.shared_memory
    a100 = launch.Chip("sm_80", 163 * 1024)
    in_use = launch.attention_launch(head_dim, 4, 2, a100, options=False)
    assert all(tune.taken(size, 2, a100) <= a100.shared_memory for size in tune.candidates(in_use, 2, a100)[:12])


def test_the_model_prefers_what_hides_waits(tune):
    """More stages than one, two programs to an SM rather than one, and less traffic, all else the same."""
    launch = importlib.import_module("entra_kernels._triton.launch")
    size = launch.AttentionLaunch(256, 64, 128, 8, 2, 128, 2)
    cost = tune.clocks(size, 2, launch.HOPPER)
    for worse in ({"num_stages": 1}, {"max_registers": None}, {"resident": 64, "streamed": 64}, {"resident": 128}):
        assert cost < tune.clocks(size._replace(**worse), 2, launch.HOPPER)


@pytest.mark.parametrize("variant", ["plain", "window", "softcap"])
def test_command(tune, variant, capsys, tmp_path):
    file = tmp_path / "launch.json"
    file.write_text(importlib.import_module("entra_kernels._triton.launch").TABLE.read_text())
    assert tune.main([*SMALL, "--variant", variant, "--most", "3", "--write", str(file)]) == 0
    entry = json.loads(file.read_text())["attention"][0]
    assert (entry["chip"], entry["head_dim"], entry["options"]) == ("sm_90", 16, variant != "plain")
    assert entry["measured"]["device"] == "Triton's interpreter, whose times mean nothing"
    assert entry["size"]["depth"] == 16
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert sum("in use" in row for row in rows) == 1
    assert "wrong" not in out
    times = [float(row.split("|")[6]) for row in rows[2:]]
    assert times == sorted(times)


@pytest.fixture
def other_table(monkeypatch, tmp_path):
    """Gives launch sizes out of another table."""
    launch, logprobs = (importlib.import_module(f"entra_kernels._triton.{name}") for name in ("launch", "logprobs"))
    caches = [cached.cache_clear for cached in (launch._table, launch.attention_launch, logprobs.tiling)]

    def write(text):
        monkeypatch.setattr(launch, "TABLE", tmp_path / "launch.json")
        launch.TABLE.write_text(text)
        for clear in caches:
            clear()

    yield write
    monkeypatch.undo()
    for clear in caches:
        clear()


def test_head_sizes_and_rates_are_written_and_used(tune, other_table, monkeypatch, capsys, tmp_path):
    launch, logprobs = (importlib.import_module(f"entra_kernels._triton.{name}") for name in ("launch", "logprobs"))
    chip, text, file = launch.HOPPER, SHIPPED.read_text(), tmp_path / "launch.json"
    other_table(text)
    fast = tune.head_candidates(tune.tiling(2, chip), 2, chip)[1]
    times = iter([3.0, 2.0, 4.0, 0.5, 0.25, 0.125])  # three sizes, then products, a copy and launches
    monkeypatch.setattr(tune, "milliseconds", lambda *_: next(times))
    small = ["--tokens", "40", "--channels", "64", "--vocabulary", "1100", "--dtype", "fp16", "--most", "3"]
    assert tune.main([*small, "--log-probs", "--write", str(file)]) == 0
    once = file.read_text()
    assert {kind: len(found) for kind, found in json.loads(once).items()} == {
        kind: len(found) for kind, found in json.loads(text).items()
    }
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [(row[4], row[6]) for row in rows] == [(" 2.000 ", "  "), (" 3.000 ", " in use "), (" 4.000 ", "  ")]
    other_table(once)
    assert logprobs.tiling(2, chip) == fast
    assert logprobs.tiling(4, chip) != fast
    rates = next(launch.entries("rates", chip))
    flops = 2 * 40 * 64 * 1100
    assert rates["product_tflops"] == pytest.approx(flops / 0.5e9, rel=5e-3)
    assert rates["fused_tflops"] == pytest.approx(flops / 2e9, rel=5e-3)
    assert rates["copy_tb_per_s"] == pytest.approx(2 * 64 * 40 * 64 / 0.25e9, rel=5e-3)
    assert rates["launch_us"] == 1.25
    assert rates["measured"]["device"] == "Triton's interpreter, whose times mean nothing"


def test_a_wrong_head_size_is_named(tune, monkeypatch):
    hidden, weight, targets = torch.randn(5, 16), torch.randn(30, 16), torch.arange(5)
    good = tune.Tiling(64, 64, 32, 4, 2)
    wrong, impossible = good._replace(rows=128), good._replace(depth=24)  # not a power of two
    fused = tune.logprobs._fused

    def sabotaged(*arguments):
        fused(*arguments)
        if tune.logprobs.tiling(4, None) == wrong:
            arguments[4][0, 0, 3] += 1.0

    monkeypatch.setattr(tune.logprobs, "_fused", sabotaged)
    found = list(tune.head_trials(hidden, weight, targets, [good, wrong, impossible], rounds=1))
    assert [trial.reason.partition(":")[0] for trial in found] == ["", "wrong result", "InterpreterError"]
    assert "| 128 x 64 x 32 | 4 | 2 | | | wrong result |" in tune.head_table(found, 1e9)


def test_the_fastest_size_is_written_and_used(tune, other_table):
    launch = importlib.import_module("entra_kernels._triton.launch")
    text = SHIPPED.read_text()
    assert tune.as_text(json.loads(text)) == text
    a100, measured = launch.Chip("sm_80", 163 * 1024), {"device": "A100", "date": "2026-12-01", "triton": "3.7.1"}
    before = {d: launch.attention_launch(d, 4, 2, a100, options=False) for d in (64, 128)}
    slow, fast = before[128], before[128]._replace(num_stages=2, max_registers=64)
    found = [tune.Trial(slow, 1.0, 3.0), tune.Trial(fast, 1.1, 2.0), tune.Trial(slow._replace(streamed=32), None, None)]
    key = {"chip": "sm_80", "element_size": 2, "head_dim": 128, "options": False}
    once = tune.with_fastest(text, found, key, measured)
    assert tune.with_fastest(once, found, key, measured) == once
    assert len(json.loads(once)["attention"]) == len(json.loads(text)["attention"]) + 1
    other_table(once)
    assert launch.attention_launch(128, 4, 2, a100, options=False) == fast
    assert launch.attention_launch(64, 4, 2, a100, options=False) == before[64]
    assert launch.attention_launch(128, 4, 2, a100, options=True) != fast


def test_wrong_and_impossible_sizes_are_named(tune, monkeypatch):
    launch = importlib.import_module("entra_kernels._triton.launch")
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 1, 70, 16)
    good = launch.AttentionLaunch(64, 32, 16, 4, 1, None, 1)
    wrong, impossible = good._replace(num_stages=2), good._replace(num_stages=3)
    run = tune.attention._launch

    def sabotaged(q, k, spans, out, size, options):
        if size == impossible:
            raise RuntimeError("out of resource: shared memory")
        run(q, k, spans, out, size, options)
        if size == wrong:
            out[0, 0, 3] = float("nan")

    monkeypatch.setattr(tune.attention, "_launch", sabotaged)
    found = list(tune.trials(q, k, [good, wrong, impossible], "plain", rounds=1))
    assert [trial.reason for trial in found] == ["", "wrong result", "RuntimeError: out of resource: shared memory"]
    assert "| wrong result |" in tune.table(found, good, 1e9)


def test_refusals(tune, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tune.main([*SMALL, "--kv-heads", "3"])
    assert "--heads 2 must be a multiple of --kv-heads 3" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        tune.main(SMALL)
    assert "no GPU is visible to torch" in capsys.readouterr().err
