"""Every kernel once on small shapes, for compute-sanitizer, under which the test suite would take hours.

`make gpu-test` runs it. Results are compared with the reference, so that a launch which did nothing is seen.
"""

from __future__ import annotations

import torch

from entra_kernels import incoming_attention, linear_token_logprobs, redundancy, token_logprobs
from entra_kernels._triton.logprobs import linear_token_logprobs as triton_logprobs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Both sides take the same inputs and compute in float32. One query more or less would be an error of some 3e-3.
TOLERANCE = 2e-4


def check(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        result.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
    print(f"{name}: agrees with the reference", flush=True)


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float16, 80), (torch.float32, 64)):
        q, k = (torch.randn(2, heads, 300, head_dim, device=device, dtype=dtype) for heads in (4, 2))
        scores = (q.float() @ k.float().repeat_interleave(2, dim=1).mT) * head_dim**-0.5
        lse = scores.masked_fill(torch.ones(300, 300, device=device).triu(1).bool(), -torch.inf).logsumexp(-1)
        weights = torch.rand(2, 300, device=device)
        for options in (
            {},
            {"lse": lse},
            {"per_head": True},
            {"start": torch.tensor([0, 40], device=device), "length": torch.tensor([260, 257], device=device)},
            {"sliding_window": 70, "softcap": 5.0, "sinks": torch.randn(4, device=device), "row_weights": weights},
        ):
            arguments = {"normalize": False, **options}
            name = f"incoming_attention {dtype} D = {head_dim} {', '.join(options) or 'plain'}"
            expected = incoming_attention(q, k, backend="reference", **arguments)
            check(name, incoming_attention(q, k, backend="triton", **arguments), expected, TOLERANCE)
        for options in (
            {},
            {"lse": lse},
            {"sliding_window": 70, "softcap": 5.0, "sinks": torch.randn(4, device=device), "row_weights": weights},
        ):
            arguments = {"normalize": False, "sample_rows": 150, **options}
            results = [incoming_attention(q, k, backend=backend, **arguments) for backend in ("triton", "reference")]
            for field, result, expected in zip(results[0]._fields, *results, strict=True):
                name = f"incoming_attention {dtype} D = {head_dim} sampled {', '.join(options) or 'plain'}, {field}"
                check(name, result, expected, TOLERANCE)
        packed = {"cu_seqlens": torch.tensor([0, 1, 130, 300], device=device), "normalize": False}
        rows = [x[0].transpose(0, 1) for x in (q, k)]
        expected = incoming_attention(*rows, backend="reference", **packed)
        check(
            f"incoming_attention {dtype} D = {head_dim} packed",
            incoming_attention(*rows, backend="triton", **packed),
            expected,
            TOLERANCE,
        )

    for dtype in DTYPES:
        hidden, weight = (torch.randn(n, 96, device=device, dtype=dtype) / 4 for n in (150, 3001))
        targets = torch.randint(3001, (150,), device=device)
        for options in ({}, {"softcap": 30.0, "bias": torch.randn(3001, device=device, dtype=dtype), "logit_scale": 0.5}):
            expected = linear_token_logprobs(hidden, weight, targets, backend="reference", **options)
            result = linear_token_logprobs(hidden, weight, targets, backend="triton", **options)
            check(f"linear_token_logprobs {dtype} {', '.join(options) or 'plain'}", result, expected, TOLERANCE)
        every = {"bias": None, "logit_scale": 1.0, "softcap": None, "temperature": 1.0, "entropy": True}
        expected = linear_token_logprobs(hidden, weight, targets, backend="reference", return_entropy=True)
        for way in ("fused", "chunked"):
            for result, exact in zip(triton_logprobs(hidden, weight, targets, way=way, **every), expected, strict=True):
                check(f"linear_token_logprobs {dtype} {way} with entropy", result, exact, TOLERANCE)
        logits = hidden @ weight.T
        expected = token_logprobs(logits, targets, backend="reference")
        check(f"token_logprobs {dtype}", token_logprobs(logits, targets, backend="triton"), expected, TOLERANCE)

    bounds = torch.tensor([0, 0, 5, 1500, 4000], device=device)
    ids = torch.randint(60, (4000,), device=device)
    inputs = (torch.randn(4000, device=device), torch.rand(4000, device=device), ids, bounds)
    result, expected = (redundancy(*inputs, backend=backend) for backend in ("triton", "reference"))
    check("redundancy, reward", result.reward, expected.reward, 1e-5)
    check("redundancy, protected", result.protected, expected.protected, 0.0)


if __name__ == "__main__":
    main()
