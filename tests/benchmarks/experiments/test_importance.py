"""The experiment `importance` with a tiny model: what it counts."""

import math

import torch

import entra
from benchmarks.experiments import importance, measuring, results
from benchmarks.experiments.token_kinds import KINDS


def test_importance_counts_every_token_once(folder, measured):
    rows = results.read(folder("importance") / "importance.json").rows
    scores = measuring.scored(measured.traces, entra.ScoreConfig())
    by_mu = [trace.mean.argsort(descending=True, stable=True)[: int(0.2 * len(trace.mean) + 1e-9)] for trace in measured.traces]
    for i, trace in enumerate(measured.traces):
        own = {row["token_kind"]: row for row in rows if row["trace"] == i}
        assert sum(own[kind]["tokens"] for kind in KINDS) == own["all"]["tokens"] == len(trace.token_ids)
        protected = sum(own[kind]["protected_by_importance"] for kind in KINDS)
        assert protected == own["all"]["protected_by_importance"] == int(scores.protected[i].sum())
        digits = torch.tensor([piece.isdigit() for piece in trace.pieces])
        assert own["number"]["protected_by_incoming"] == int(digits[by_mu[i]].sum())
        assert math.isclose(own["number"]["sum_logprob"], float(trace.logprobs[digits].double().sum()), abs_tol=1e-9)
    summary = results.read(folder("importance") / "importance.json").summary
    everything = summary["by_kind"]["all"]["number"]
    counted = [row for row in rows if row["token_kind"] == "number"]
    share = sum(row["protected_by_logprob"] for row in counted) / sum(row["tokens"] for row in counted)
    assert math.isclose(everything["protected_by_logprob"][0], share)


def test_marked_text_is_neither_markdown_nor_html():
    assert importance.marked(["a|b*", "<i>\n", "c"], [False, True, True]) == "a&#124;b&#42;<b>&lt;i&gt;<br>c</b>"
