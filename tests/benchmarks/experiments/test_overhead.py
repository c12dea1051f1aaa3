"""The overhead experiment: what is timed as eager attention computes what ENTRA computes; limits and sizes are kept."""

import argparse

import pytest
import torch

from benchmarks.experiments import overhead, results
from benchmarks.experiments.__main__ import main

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", [overhead.EAGER, overhead.EAGER_LAST])
def test_eager_attention_by_hand_gives_what_entra_gives(method):
    model, eager = overhead.build(overhead.Shape(128, 2), "cpu", vocab_size=300)
    ids = torch.randint(10, 300, (1, 96), generator=torch.Generator().manual_seed(0))
    measured = overhead.functions(model, eager, ids)
    scores = measured[overhead.ENTRA]()
    logprobs, incoming = measured[method]()
    # q and k are normalised to length 8, so a score is a sum of 64 products and at most 64 / 8. Its error is at most
    # 64 eps * 8, and that is the relative error of a probability.
    torch.testing.assert_close(scores.incoming[0], incoming, rtol=2 * 64 * EPS * 8, atol=0)
    # Logits are sums of 128 products of a hidden state of length sqrt(128) and a row of some 0.02 * sqrt(128).
    torch.testing.assert_close(scores.logprobs[0], logprobs, rtol=0, atol=2 * 128 * EPS * 0.02 * 128)
    assert incoming.std() > 0.1 * incoming.mean()


@pytest.mark.parametrize("method", overhead.METHODS)
def test_only_the_eager_ones_run_eager_attention(method, monkeypatch):
    """Counted by the calls of the fused operation, one per layer."""
    model, eager = overhead.build(overhead.Shape(128, 2), "cpu", vocab_size=300)
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    overhead.functions(model, eager, torch.randint(10, 300, (1, 96)))[method]()
    assert len(calls) == (0 if method in (overhead.EAGER, overhead.EAGER_LAST) else 2)


def test_limits_leave_out_and_redraw_gives_the_same_page(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--device", "cpu", "--models", "64x1", "128x1", "--lengths", "80", "160", "--rounds", "2"]
    # 128 x 1 has 4.3 M parameters: at 160 tokens it is beyond the limit of work; 3 matrices of 160 x 160 need 0.0003 GiB
    assert main(["overhead", *words, "--work-limit", "5e8", "--memory-limit", "2e-4", "--output", str(out)]) == 0
    written = (out / "overhead.md").read_text()
    result = results.read(out / "overhead.json")
    assert [(row["model"], row["tokens"]) for row in result.rows[::4]] == [("64x1", 80), ("64x1", 160), ("128x1", 80)]
    by = {(row["model"], row["tokens"], row["method"]): row for row in result.rows}
    assert by["64x1", 80, overhead.EAGER]["seconds"] > 0
    assert by["64x1", 160, overhead.EAGER]["left_out"] == "its attention needs some 0.0 GiB"
    assert "| left out |" in written
    assert "Not measured: attention of more than 0.0002 GiB; sizes of more than 0.5 billion parameters times tokens." in written
    forward, entra = by["64x1", 160, overhead.FORWARD], by["64x1", 160, overhead.ENTRA]
    ratio = next(row for row in result.summary["compared"] if (row["tokens"], row["method"]) == (160, overhead.ENTRA))
    assert ratio["time"] == pytest.approx(entra["seconds"] / forward["seconds"], abs=1e-3)
    capsys.readouterr()
    again = ["--redraw", str(out / "overhead.json"), "--output", str(tmp_path / "again")]
    assert main(["overhead", *again]) == 0
    assert (tmp_path / "again" / "overhead.md").read_text() == written == capsys.readouterr().out


@pytest.mark.parametrize("shape", ["512", "100x2", "64x0"])
def test_a_shape_that_is_none_is_refused(shape):
    options = argparse.Namespace(device="cpu", models=[shape], lengths=[64], rounds=1, memory_limit=None, work_limit=None)
    with pytest.raises(ValueError, match=f"models='{shape}' must be HIDDENxLAYERS"):
        overhead.run(options)
