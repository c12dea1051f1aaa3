"""What the kernels are meant to reach, and whether a file of results shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Content = dict[str, Any]


class Verdict(NamedTuple):
    target: str
    measured: str
    met: bool | None
    """None: not measured; `measured` then says why."""


class NotMeasured(Exception):
    pass


def find(content: Content, operation: str, case: str, name: str, field: str = "ms") -> float:
    """A field of one record, the latest if there are several."""
    for record in reversed(content["records"]):
        if (record["operation"], record["case"], record["name"]) == (operation, case, name):
            if field in record:
                return float(record[field])
            raise NotMeasured(record.get("skipped", f"{name} has no {field}"))
    raise NotMeasured(f"no record of {name} in {case}")


def cases(content: Content, operation: str, **fields: Any) -> list[str]:
    """Cases of an operation whose records have these fields, in the order of the file."""
    return list(
        dict.fromkeys(
            record["case"]
            for record in content["records"]
            if record["operation"] == operation and all(record.get(key) == value for key, value in fields.items())
        )
    )


def _at_most(value: float, limit: float, unit: str) -> tuple[str, bool]:
    return f"{value:.3g} {unit}".strip(), value <= limit


def _at_least(value: float, limit: float, unit: str) -> tuple[str, bool]:
    return f"{value:.3g} {unit}".strip(), value >= limit


def fastest_forward(content: Content, case: str) -> float:
    times = [
        record["ms"]
        for record in content["records"]
        if record["operation"] == "incoming_attention"
        and record["case"] == case
        and record["name"].startswith("SDPA")
        and "ms" in record
    ]
    if not times:
        raise NotMeasured("no attention forward worked")
    return min(times)


def _against_every_peer(content: Content) -> tuple[str, bool]:
    """The smallest lead over a peer. Peers that are given the LSE are compared with ours given LSE."""
    leads = []
    measured = cases(content, "incoming_attention", sweep="tokens")
    for case in measured:
        for record in content["records"]:
            name = record["name"]
            if (record["operation"], record["case"]) != ("incoming_attention", case) or "ms" not in record:
                continue
            if name.startswith(("ours", "SDPA")):
                continue
            ours = find(content, "incoming_attention", case, "ours, given LSE" if "given" in name else "ours")
            leads.append((record["ms"] / ours, name, case))
    if not leads:
        raise NotMeasured("no peer worked")
    lead, name, case = min(leads)
    return f"at least {lead:.3g} times faster ({name}, {case}; {len(measured)} lengths)", lead > 1


def _memory(content: Content) -> tuple[str, bool]:
    shares = [
        (record["peak_bytes"] / record["allowed_bytes"], record["case"])
        for record in content["records"]
        if "allowed_bytes" in record and "peak_bytes" in record
    ]
    if not shares:
        raise NotMeasured("no record of memory")
    share, case = max(shares)
    return f"at most {share:.0%} of that ({case})", share <= 1


def _of_matmul(content: Content) -> tuple[str, bool]:
    operation, case = "linear_token_logprobs", "8192 x 4096 x 131072"
    rate = find(content, operation, case, "matmul") / find(content, operation, case, "ours")
    memory = find(content, operation, case, "ours", "peak_bytes") / find(content, operation, case, "ours", "logits_bytes")
    return f"{rate:.0%} of the rate, {memory:.1%} of the memory", rate >= 0.9 and memory < 0.05


def _as_plain(content: Content) -> tuple[str, bool]:
    operation, case = "linear_token_logprobs", "1024 x 576 x 49152"
    time, memory = (
        find(content, operation, case, "ours", field) / find(content, operation, case, "plain", field)
        for field in ("ms", "peak_bytes")
    )
    return f"{time:.2f} of the time, {memory:.3f} of the memory", time <= 1 and memory <= 1 / 20


def _faster_than_eager(content: Content) -> tuple[str, bool]:
    found = cases(content, "incoming_attention", sweep="tokens")
    leads = [
        find(content, "incoming_attention", case, "eager") / find(content, "incoming_attention", case, "ours") for case in found
    ]
    if not leads:
        raise NotMeasured("no record")
    return f"{min(leads):.3g} to {max(leads):.3g} times", min(leads) >= 3.5


def _score_batch(case: str, limit: float) -> Callable[[Content], tuple[str, bool]]:
    return lambda content: _at_most(
        find(content, "score_batch", case, "ours") / find(content, "score_batch", case, "bare forward"), limit, "times"
    )


def _riding(content: Content) -> tuple[str, bool]:
    share = find(content, "training step", "TRL makes a log-prob pass", "ours, riding: what ENTRA adds", "share_of_step")
    return f"{share:.2%}", share < 0.02


def _own_pass(content: Content) -> tuple[str, bool]:
    operation, case = "training step", "TRL's defaults, no pass"
    ours = find(content, operation, case, "ours, the pass alone")
    bare, with_logprobs = (
        ours / find(content, operation, case, name) for name in ("one no-grad forward", "TRL's no-grad log-prob pass")
    )
    return f"{with_logprobs:.3g} times, {bare:.3g} times a forward that yields no log-probs", with_logprobs <= 1


_TRAINING: dict[str, Callable[[Content], tuple[str, bool]]] = {
    "training, riding on TRL's pass: under 2 % of a step": _riding,
    "training, a pass of its own: at most one no-grad log-prob pass of TRL's": _own_pass,
}


def _attention(name: str, content: Content, tokens: int) -> float:
    return find(content, "incoming_attention", f"N = {tokens}", name)


ON_GPU: dict[str, Callable[[Content], tuple[str, bool]]] = {
    "N = 32,768: column pass with LSE given, at most 7 ms": lambda c: _at_most(
        _attention("ours, given LSE", c, 32_768), 7, "ms"
    ),
    "N = 32,768: both passes, at most 14 ms": lambda c: _at_most(_attention("ours", c, 32_768), 14, "ms"),
    "N = 32,768: both passes, at most one attention forward (the fastest of the run)": lambda c: _at_most(
        _attention("ours", c, 32_768) / fastest_forward(c, "N = 32768"), 1, "times"
    ),
    "N = 32,768: at least 4 times faster than flash-colreduce": lambda c: _at_least(
        _attention("flash-colreduce", c, 32_768) / _attention("ours", c, 32_768), 4, "times"
    ),
    "faster than every peer that yields column sums, at every N": _against_every_peer,
    "extra memory at most 4 N (H + 2 Hkv) bytes + 16 MiB, at any N": _memory,
    "log-probs, 8,192 x 4,096 x 131,072: 90 % of the bare matmul's rate, under 5 % of the logits' memory": _of_matmul,
    "epilogue, 64 sequences of 16,384 tokens: under 150 us": lambda c: _at_most(
        find(c, "redundancy", "64 sequences of 16384 tokens", "ours") * 1e3, 150, "us"
    ),
    "score_batch, shape of Qwen3-8B, 16,384 tokens: at most 1.02 of the bare forward": _score_batch(
        "qwen3, 16384 tokens", 1.02
    ),
    **_TRAINING,
}
"""Set for one H200 in bfloat16."""

ON_CPU: dict[str, Callable[[Content], tuple[str, bool]]] = {
    "at least 3.5 times faster than eager attention, at every N": _faster_than_eager,
    "N = 4,096: at most 1.5 of one attention forward": lambda c: _at_most(
        _attention("ours", c, 4096) / fastest_forward(c, "N = 4096"), 1.5, "times"
    ),
    "N = 4,096: with LSE given, at most one attention forward": lambda c: _at_most(
        _attention("ours, given LSE", c, 4096) / fastest_forward(c, "N = 4096"), 1, "times"
    ),
    "log-probs: no slower than matmul, log_softmax and gather, in at most 1/20 of the memory": _as_plain,
    "score_batch, SmolLM2, 2,048 tokens: at most 1.05 of the bare forward": _score_batch("smollm2, 2048 tokens", 1.05),
    **_TRAINING,
}


def verdicts(content: Content) -> Iterator[Verdict]:
    """Each target for the kind of device that was measured."""
    for target, measure in (ON_CPU if content["cuda"] is None else ON_GPU).items():
        try:
            measured, met = measure(content)
        except NotMeasured as error:
            yield Verdict(target, str(error), None)
        else:
            yield Verdict(target, measured, met)
