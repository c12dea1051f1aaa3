"""The command that times launch sizes, in the interpreter, where its times mean nothing but its checks do."""

import importlib
import json
import os

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off: a GPU is there"),
    pytest.mark.usefixtures("quick_interpreter"),
]
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
        assert tune.shared_bytes(size, 2) <= launch.HOPPER.shared_memory
    a100 = launch.Chip("sm_80", 163 * 1024)
    in_use = launch.attention_launch(head_dim, 4, 2, a100, options=False)
    assert all(tune.shared_bytes(size, 2) <= a100.shared_memory for size in tune.candidates(in_use, 2, a100)[:12])


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


def test_the_fastest_size_is_written_and_used(tune, monkeypatch, tmp_path):
    launch = importlib.import_module("entra_kernels._triton.launch")
    text = launch.TABLE.read_text()
    assert tune.as_text(json.loads(text)) == text
    a100, measured = launch.Chip("sm_80", 163 * 1024), {"device": "A100", "date": "2026-12-01", "triton": "3.7.1"}
    before = {d: launch.attention_launch(d, 4, 2, a100, options=False) for d in (64, 128)}
    slow, fast = before[128], before[128]._replace(num_stages=2, max_registers=64)
    found = [tune.Trial(slow, 1.0, 3.0), tune.Trial(fast, 1.1, 2.0), tune.Trial(slow._replace(streamed=32), None, None)]
    key = {"chip": "sm_80", "element_size": 2, "head_dim": 128, "options": False}
    once = tune.with_fastest(text, found, key, measured)
    assert tune.with_fastest(once, found, key, measured) == once
    assert len(json.loads(once)["attention"]) == len(json.loads(text)["attention"]) + 1
    monkeypatch.setattr(launch, "TABLE", tmp_path / "launch.json")
    launch.TABLE.write_text(once)
    for cached in (launch._table, launch.attention_launch):
        cached.cache_clear()
    try:
        assert launch.attention_launch(128, 4, 2, a100, options=False) == fast
        assert launch.attention_launch(64, 4, 2, a100, options=False) == before[64]
        assert launch.attention_launch(128, 4, 2, a100, options=True) != fast
    finally:
        monkeypatch.undo()
        for cached in (launch._table, launch.attention_launch):
            cached.cache_clear()


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
