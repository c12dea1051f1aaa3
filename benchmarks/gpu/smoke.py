"""Every kind of launch once, twice in a row, against float64: the first thing to run on a GPU.

    python -m benchmarks.gpu.smoke [--seconds 60] [--small]

It goes on after a failure and says at the end how many there were. `--small` is for compute-sanitizer, under which anything
larger takes hours. Without a GPU the kernels run in Triton's interpreter, at toy size: a rehearsal of this file.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entra_kernels import copies, first_places, incoming_attention, linear_token_logprobs, redundancy, token_logprobs
from entra_kernels._triton.logprobs import linear_token_logprobs as triton_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""The interpreter multiplies bfloat16 wrongly."""


class Check(NamedTuple):
    """What runs, what float64 says, and how far the two may be apart in parts of the largest value. The inputs' dtype does not
    matter: the inputs are the same, and products are summed in float32."""

    name: str
    run: Callable[[], Any]
    exact: Callable[[], Any]
    tolerance: float


def wide(values: dict[str, Any]) -> dict[str, Any]:
    """The same options in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def queries_and_keys(
    tokens: int, head_dim: int, dtype: torch.dtype, heads: int = 8, kv_heads: int = 2
) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(2, tokens, count, head_dim, device=DEVICE).to(dtype).transpose(1, 2) for count in (heads, kv_heads))
    return q, k


def attention(tokens: int) -> Iterator[Check]:
    """Head dims, dtypes and options: those that a model has first."""

    def check(
        name: str, head_dim: int, dtype: torch.dtype = HALF, tolerance: float = 4e-5, rows: int = tokens, **options: Any
    ) -> Check:
        q, k = queries_and_keys(tokens, head_dim, dtype)
        q = q[:, :, :rows]
        return Check(
            f"attention D={head_dim} {str(dtype).removeprefix('torch.')} {name}",
            lambda: incoming_attention(q, k, backend="triton", **options),
            lambda: incoming_attention(q.double(), k.double(), backend="reference", **wide(options)),
            tolerance,
        )

    lse = 6 + torch.rand(2, 8, tokens, device=DEVICE)
    every: dict[str, Any] = {
        "sliding_window": tokens // 5,
        "softcap": 5.0,
        "sinks": torch.randn(8, device=DEVICE),
        "row_weights": torch.rand(2, tokens, device=DEVICE),
    }
    bounds: dict[str, Any] = {
        "start": torch.tensor([0, tokens // 8], device=DEVICE),
        "length": torch.tensor([tokens - 3, tokens // 3], device=DEVICE),
    }
    for head_dim in (128, 64, 256):
        yield check("plain", head_dim)
    first_options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("given lse", {"lse": lse}),
        ("per head", {"per_head": True}),
        ("start and length", bounds),
        ("every option", every),
    )
    for name, options in first_options:
        yield check(name, 128, **options)
    yield check("given lse", 256, lse=lse)
    for head_dim in (72, 80, 512):
        yield check("plain", head_dim)
    yield check("plain", 128, torch.float16)
    yield check("plain", 64, torch.float32)
    yield check("every option", 256, **every)
    yield check("every option", 80, torch.float16, **every)
    yield check("every option", 64, torch.float32, **every)

    rows = tokens // 3
    of_rows = every | {"row_weights": torch.randn(2, rows, device=DEVICE), "include_diagonal": True, "heads": "kv"}
    general: tuple[tuple[str, dict[str, Any]], ...] = (
        ("fewer queries", {"rows": rows, "return_lse": True}),
        ("one query", {"rows": 1, "include_diagonal": True}),
        ("query_start", {"rows": rows, "query_start": torch.tensor([5, tokens // 2], device=DEVICE)} | bounds),
        ("last", {"last": 64, "reduction": "sum"}),
        ("not causal", {"rows": rows, "causal": False, "include_diagonal": True}),
        ("maximum", {"rows": rows, "reduction": "max"}),
        ("queries, every option", {"rows": rows} | of_rows),
        ("maximum, every option", {"rows": rows, "reduction": "max"} | of_rows),
    )
    for name, options in general:
        yield check(name, 128, **options)
    for head_dim, dtype in ((64, HALF), (256, HALF), (64, torch.float32)):
        for reduction in ("mean", "max"):
            yield check(f"queries, {reduction}", head_dim, dtype, rows=rows, reduction=reduction)

    for head_dim in (128, 256):
        q, k = (x[0].transpose(0, 1) for x in queries_and_keys(tokens, head_dim, HALF))
        packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 1, tokens // 3, tokens // 3, tokens - 7], device=DEVICE)}
        yield Check(
            f"attention D={head_dim} packed",
            partial(incoming_attention, q, k, backend="triton", **packed),
            partial(incoming_attention, q.double(), k.double(), backend="reference", **packed),
            4e-5,
        )
        yield check("sampled plain", head_dim, tolerance=2e-4, sample_rows=tokens // 4)
        yield check("sampled every option", head_dim, tolerance=2e-4, sample_rows=tokens // 4, **every)


def logprobs(tokens: int, channels: int, vocabulary: int) -> Iterator[Check]:
    for dtype in (HALF, torch.float32):
        hidden, weight = (torch.randn(n, channels, device=DEVICE).to(dtype) / channels**0.25 for n in (tokens, vocabulary))
        bias = torch.randn(vocabulary, device=DEVICE).to(dtype)
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        ours = partial(triton_logprobs, hidden, weight, targets, temperature=1.0, entropy=True)
        exact = partial(
            linear_token_logprobs, hidden.double(), weight.double(), targets, return_entropy=True, backend="reference"
        )
        kind = str(dtype).removeprefix("torch.")
        plain: dict[str, Any] = {"bias": None, "softcap": None, "logit_scale": 1.0}
        for name, options in (("plain", plain), ("every option", {"bias": bias, "softcap": 30.0, "logit_scale": 0.5})):
            for way in ("fused", "chunked"):
                yield Check(
                    f"head {kind} {way} {name}", partial(ours, way=way, **options), partial(exact, **wide(options)), 1e-5
                )
        logits = hidden @ weight.T
        yield Check(
            f"token_logprobs {kind}",
            partial(token_logprobs, logits, targets, backend="triton"),
            partial(token_logprobs, logits.double(), targets, backend="reference"),
            1e-5,
        )


def rewards(tokens: int) -> Iterator[Check]:
    bounds = torch.tensor([0, 0, 5, tokens // 3, tokens], device=DEVICE)
    ids = (torch.rand(tokens, device=DEVICE).pow(-0.8) * 3).long() % 49_152
    inputs = (torch.randn(tokens, device=DEVICE), torch.rand(tokens, device=DEVICE), ids, bounds)

    def reduced(backend: str) -> tuple[Tensor, Tensor]:
        result = redundancy(*inputs, backend=backend)
        return result.reward[2:], result.protected.float()  # the first two have no or few tokens

    yield Check("redundancy", lambda: reduced("triton"), lambda: reduced("reference"), 1e-6)

    def copies_last(backend: str) -> tuple[Tensor, Tensor]:
        last = copies(ids, bounds, ngram=2, backend=backend)
        return last.float(), redundancy(*inputs, protect_last=last, backend=backend).protected.float()

    yield Check("copies", lambda: copies_last("triton"), lambda: copies_last("reference"), 1e-6)

    def of_ngrams(backend: str) -> tuple[Tensor, Tensor]:
        places = first_places(ids, bounds, ngram=4, backend=backend)
        logprobs, incoming, _, _ = inputs
        return places.float(), redundancy(logprobs, incoming, places, bounds, backend=backend).reward[2:]

    yield Check("first places", lambda: of_ngrams("triton"), lambda: of_ngrams("reference"), 1e-6)


def several(result: Any) -> Sequence[Tensor]:
    return result if isinstance(result, tuple | list) else (result,)


def error(check: Check) -> float:
    """Largest error in parts of the largest value. An AssertionError where it is too large, or NaN, or two runs differ."""
    first, again, exact = check.run(), check.run(), check.exact()
    worst = 0.0
    for ours, repeated, expected in zip(
        *(x if isinstance(x, tuple | list) else (x,) for x in (first, again, exact)), strict=True
    ):
        assert ours.shape == expected.shape, f"shape {tuple(ours.shape)} instead of {tuple(expected.shape)}"
        assert torch.equal(ours, repeated), "two runs differ"
        largest = expected.double().abs().max().clamp(min=1e-300)
        found = ((ours.double() - expected.double()).abs().max() / largest).item()
        assert found <= check.tolerance, f"error {found:.3g} of the largest value, at most {check.tolerance:.3g}"
        worst = max(worst, found)
    return worst


def main(words: Sequence[str] | None = None) -> int:
    """1 when something failed, or nothing was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no check later")
    parser.add_argument("--small", action="store_true", help="for compute-sanitizer")
    arguments = parser.parse_args(words)
    toy = DEVICE == "cpu"
    tokens, head = (90, (20, 64, 1500)) if toy else (300, (150, 96, 3001)) if arguments.small else (1500, (700, 1024, 50_257))
    ids = 900 if toy else 4000 if arguments.small else 60_000

    torch.manual_seed(0)
    began = time.monotonic()
    passed, failed, late = 0, [], 0
    for check in (check for group in (attention(tokens), logprobs(*head), rewards(ids)) for check in group):
        if time.monotonic() - began > arguments.seconds:
            late += 1
            continue
        start = time.monotonic()
        try:
            found = error(check)
        except Exception as problem:  # the next one may pass, and what failed is wanted as a list
            failed.append(check.name)
            print(f"FAIL  {check.name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            if not isinstance(problem, AssertionError):
                traceback.print_exc(limit=-4)
            if "CUDA error" in str(problem):
                print("the GPU takes nothing more from this process", flush=True)
                break
        else:
            passed += 1
            print(f"ok    {check.name}: error {found:.1e}, {time.monotonic() - start:.2f} s", flush=True)
    names = f": {'; '.join(failed)}" if failed else ""
    print(f"{passed} passed, {late} not run for want of time, {len(failed)} failed{names}", flush=True)
    return int(bool(failed) or not passed)


if __name__ == "__main__":
    sys.exit(main())
