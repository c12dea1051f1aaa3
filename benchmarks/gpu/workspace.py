"""Times the bare product, the fused head, and the chunked one by its workspace: `python -m benchmarks.gpu.workspace`.

Without a GPU in Triton's interpreter at toy size, where the times mean nothing.
"""

from __future__ import annotations

import torch

from benchmarks.static.tune import milliseconds
from entra_kernels._triton import logprobs


def main() -> None:
    toy = not torch.cuda.is_available()
    device = torch.device("cpu" if toy else "cuda")
    dtype = torch.float16 if toy else torch.bfloat16
    (tokens, channels, vocabulary), rounds = ((40, 64, 3000), 1) if toy else ((8192, 4096, 131_072), 7)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, channels, device=device).to(dtype)
    weight = (torch.randn(vocabulary, channels, device=device) * channels**-0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def head(way: str) -> object:
        return logprobs.linear_token_logprobs(
            hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, way=way
        )

    print(f"matmul: {milliseconds(lambda: hidden @ weight.T, device, rounds):.2f} ms", flush=True)
    print(f"fused: {milliseconds(lambda: head('fused'), device, rounds):.2f} ms", flush=True)
    for mib in (8, 16, 32, 48, 64, 128):
        logprobs.WORKSPACE = mib << 20
        rows, columns = logprobs.chunk(tokens, vocabulary)
        taken = milliseconds(lambda: head("chunked"), device, rounds)
        print(f"chunked, {mib} MiB, {rows} x {columns}: {taken:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
