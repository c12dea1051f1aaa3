"""From a measurement to the page: records, targets, tables and plots, on made-up numbers."""

import json

import pytest
import torch

from benchmarks.speed import peers, render, targets
from benchmarks.speed.compare import NO_TIME, compare
from benchmarks.speed.results import Results
from entra_kernels import incoming_attention, linear_token_logprobs


def content(cuda="12.8", **milliseconds):
    """Results at N = 32,768 and half of it, twice as fast there; names as keywords with _ for every other sign."""
    names = {
        "ours": "ours",
        "given_lse": "ours, given LSE",
        "sdpa": "SDPA forward, cudnn",
        "colreduce": "flash-colreduce",
        "alone": "flash backward alone, given forward",
    }
    records = [
        {
            "operation": "incoming_attention",
            "case": f"N = {tokens}",
            "name": names[name],
            "sweep": "tokens",
            "tokens": tokens,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            **({"skipped": ms} if isinstance(ms, str) else {"ms": ms * tokens / 32_768, "of_matmul_bound": 0.5}),
        }
        for tokens in (32_768, 16_384)
        for name, ms in milliseconds.items()
    ]
    bounds = {"matmul_flops": 7e14, "exps": 4e12, "copied_bytes": 4e12}
    facts = {"device": "A GPU", "cuda": cuda, "threads": 1, "python": "3.12", "torch": "2.11", "packages": {"triton": "3.6"}}
    return {**facts, "command": "pytest", "date": "today", "sizes": "full", "bounds": bounds, "records": records}


def verdict(results, words):
    (found,) = [verdict for verdict in targets.verdicts(results) if words in verdict.target]
    return found


class TestTargets:
    @pytest.mark.parametrize(("ms", "met"), [(7.0, True), (7.01, False)])
    def test_a_time(self, ms, met):
        assert verdict(content(given_lse=ms), "column pass").met is met

    @pytest.mark.parametrize(("ours", "met"), [(13.0, True), (13.1, False)])
    def test_one_forward_of_the_same_run(self, ours, met):
        assert verdict(content(ours=ours, sdpa=13.0), "one attention forward").met is met

    @pytest.mark.parametrize(("ours", "met"), [(10.0, True), (10.1, False)])
    def test_flash_colreduce(self, ours, met):
        assert verdict(content(ours=ours, colreduce=40.0), "flash-colreduce").met is met

    @pytest.mark.parametrize(("alone", "met"), [(7.0, False), (7.2, True)])
    def test_what_is_given_something_is_compared_with_ours_given_lse(self, alone, met):
        assert verdict(content(ours=14.0, given_lse=7.1, alone=alone), "every peer").met is met

    def test_one_length_is_enough_to_miss(self):
        results = content(ours=10.0, colreduce=40.0)
        results["records"][-1]["ms"] = 4.9  # flash-colreduce at 16,384 tokens, where ours takes 5
        assert verdict(results, "every peer").met is False

    def test_memory_is_held_at_every_length(self):
        results = content()
        for tokens, peak in ((1024, 5), (2048, 11)):
            results["records"].append(
                {"operation": "memory", "case": f"N = {tokens}", "name": "ours", "peak_bytes": peak, "allowed_bytes": 10}
            )
        assert verdict(results, "extra memory")[1:] == ("at most 110% of that (N = 2048)", False)

    def test_not_measured_says_why(self):
        found = verdict(content(ours=10.0, colreduce="it is not installed"), "flash-colreduce")
        assert found.met is None
        assert found.measured == "it is not installed"

    def test_a_cpu_has_its_own(self):
        assert {verdict.target for verdict in targets.verdicts(content(cuda=None))} == set(targets.ON_CPU)


class TestPage:
    def test_tables(self, tmp_path):
        (tmp_path / "a-gpu.json").write_text(json.dumps(content(ours=13.0, sdpa=12.0, colreduce="it is not installed")))
        (tmp_path / "of-another-command.json").write_text('{"records": [{"case": "a"}]}')
        page = render.render(tmp_path, tmp_path / "README.md")
        assert "| ms at N = | 16,384 | 32,768 |" in page
        assert "| ours | 6.5 | 13 |" in page
        assert "| SDPA forward, cudnn | 6 | 12 |" in page
        assert "| N = 32768 | SDPA forward, cudnn | 12 | 50% | 0.923 |" in page
        assert "- flash-colreduce (N = 32768; N = 16384): it is not installed" in page
        assert "both passes, at most 14 ms | 13 ms | met |" in page
        assert "at most one attention forward (the fastest of the run) | 1.08 times | **missed** |" in page

    def test_plots(self, tmp_path):
        pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'entra-reward[plot]'")
        (tmp_path / "a-gpu.json").write_text(json.dumps(content(ours=13.0, sdpa=12.0)))
        page = render.render(tmp_path, tmp_path / "README.md")
        for kind in ("time", "bound"):
            assert f"](a-gpu-{kind}.svg)" in page
            assert "SDPA forward, cudnn" in (tmp_path / f"a-gpu-{kind}.svg").read_text()

    def test_the_rest_of_the_readme_stays(self):
        text = f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n"
        once = render.between_markers(text, "new")
        assert once == f"before\n{render.BEGIN}\n\nnew\n{render.END}\nafter\n"
        assert render.between_markers(once, "new") == once
        with pytest.raises(SystemExit, match="put them back"):
            render.between_markers("nothing here", "new")

    def test_the_readme_has_the_markers(self):
        text = render.README.read_text()
        assert render.between_markers(text, "new") != text
        assert "<!-- static counts: begin -->" in text


class TestRecords:
    @pytest.fixture
    def results(self, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.speed.results.bounds", lambda: Bounds())
        return Results(tmp_path, None)

    def test_what_does_not_work_is_recorded_and_the_rest_is_timed(self, results):
        def fails():
            raise NotImplementedError("no kernel\nfor this device")

        runs = {"ours": lambda: 1.0, "right": lambda: 1.01, "wrong": lambda: 2.0, "fails": fails, "absent": "needs CUDA"}
        records = compare(results, "op", "case", runs, check=lambda name, result: abs(result - 1) / 0.5, rounds=2, tokens=3)
        assert {name: record.get("skipped") for name, record in records.items()} == {
            "ours": None,
            "right": None,
            "wrong": "wrong result: 2 times the allowed error",
            "fails": "NotImplementedError: no kernel",
            "absent": "needs CUDA",
        }
        assert records["right"]["ms"] >= 0
        assert records["right"]["tokens"] == 3
        saved = json.loads(results.path.read_text())
        assert saved["records"] == list(results.records)
        assert len(saved["records"]) == 5

    def test_nan_is_wrong(self, results):
        records = compare(results, "op", "case", {"peer": lambda: 0.0}, check=lambda name, result: float("nan"))
        assert records["peer"]["skipped"].startswith("wrong result")

    def test_ours_must_work(self, results):
        with pytest.raises(AssertionError, match="op, case, ours: wrong result: 2 times the allowed error"):
            compare(results, "op", "case", {"ours": lambda: 0.0}, check=lambda name, result: 2.0)

    def test_after_the_time_given_nothing_starts(self, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.speed.results.bounds", lambda: Bounds())
        records = compare(Results(tmp_path, 0.0), "op", "case", {"ours": lambda: pytest.fail("it started")})
        assert records["ours"]["skipped"] == NO_TIME


class Bounds:
    def _asdict(self):
        return {}


class TestPeers:
    """On shapes that a CPU does at once; those that need CUDA are checked before each of their timings."""

    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        q, k = (torch.randn(1, heads, 150, 32) for heads in (4, 2))
        return q, k, peers.row_lse(q, k), incoming_attention(q, k, backend="reference", normalize=False)[0]

    def test_they_give_column_sums(self, attention):
        q, k, lse, expected = attention
        for name in ("eager", "chunked eager", "flash backward"):
            sums = expected + (peers.diagonal(q, k, lse) if name in peers.WITH_DIAGONAL else 0)
            assert peers.error_of_allowed(peers.attention_peers(q, k, lse)[name](), sums, torch.float32) <= 1, name

    def test_chunks_smaller_than_the_sequence(self, attention, monkeypatch):
        q, k, _, expected = attention
        monkeypatch.setattr(peers, "SLICE", 4 * 150 * 16)
        assert peers.error_of_allowed(peers.chunked_eager(q, k), expected, torch.float32) <= 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_diagonal_too_much_or_a_wrong_scale_is_seen(self, attention, dtype):
        q, k, lse, expected = attention
        assert peers.error_of_allowed(expected + peers.diagonal(q, k, lse), expected, dtype) > 1
        assert peers.error_of_allowed(peers.eager(1.1 * q, k), expected, dtype) > 1

    def test_log_probs(self):
        torch.manual_seed(0)
        hidden, weight, targets_ = torch.randn(50, 16), torch.randn(70, 16), torch.randint(70, (50,))
        expected = linear_token_logprobs(hidden, weight, targets_, backend="reference")
        for name in ("plain", "chunked torch"):
            torch.testing.assert_close(peers.logprob_peers(hidden, weight, targets_)[name](), expected, rtol=1e-5, atol=1e-5)
