"""Inputs of `incoming_attention` in every layout, for the tests of it and of its sampled form."""

from __future__ import annotations

import math

import pytest
import torch

SLACK = 16 * torch.finfo(torch.float32).eps
BACKENDS = ("reference", "torch", "triton")
# Triton's interpreter multiplies bfloat16 wrongly, so on a CPU there is float16.
TARGETS = [
    pytest.param(("cpu", torch.float32), id="cpu-fp32"),
    pytest.param(("cpu", torch.float16), id="cpu-fp16"),
    pytest.param(("cuda", torch.float32), id="gpu-fp32", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), id="gpu-fp16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16), id="gpu-bf16", marks=pytest.mark.gpu),
]
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    device,
    dtype,
    *,
    lengths=(67, 40),
    heads=4,
    kv_heads=2,
    head_dim=32,
    layout="right",
    strides="contiguous",
    given_lse=False,
    sinks=False,
    row_weights=False,
    **options,
):
    """q, k and keyword arguments. NaN outside the sequences, also behind the last one of a packed batch."""
    batch, tokens = (1, sum(lengths) + 3) if layout == "packed" else (len(lengths), max(lengths, default=0) + 3)
    starts = [(0 if layout == "right" else tokens - n if layout == "left" else 2) for n in lengths]
    if layout == "packed":
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
    inside = torch.zeros(batch, tokens, dtype=torch.bool)
    for i, (first, count) in enumerate(zip(starts, lengths, strict=True)):
        inside[i if batch > 1 else 0, first : first + count] = True
    if strides == "expanded":
        inside = inside.all(dim=0, keepdim=True).expand(batch, -1)

    def embed(values):
        if strides == "expanded":
            values = values[:1].expand_as(values)
        values = values.masked_fill(~inside[:, None, :, None], math.nan).to(dtype).to(device)
        if strides == "heads inside":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if strides == "every second":
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), math.nan)
            wide[..., ::2] = values
            return wide[..., ::2]
        if strides == "expanded":
            return values[:1].expand_as(values)
        return values

    q = embed(random(batch, heads, tokens, head_dim, seed=1))
    k = embed(random(batch, kv_heads, tokens, head_dim, seed=2))
    arguments = dict(options)
    if sinks:
        arguments["sinks"] = random(heads, seed=3).to(dtype).to(device)
    if row_weights:
        weights = random(batch, tokens, seed=4).masked_fill(~inside, math.nan)
        arguments["row_weights"] = weights.to(torch.float32).to(device)
    if given_lse:
        # Not the true one: what is given must be used as it is.
        lse = (4 + random(batch, heads, tokens, seed=5)).masked_fill(~inside[:, None], math.nan)
        arguments["lse"] = lse.to(torch.float32).to(device)
    if layout == "packed":
        q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        for name in ("lse", "row_weights"):
            if name in arguments:
                arguments[name] = arguments[name][0]
        bounds = torch.tensor([*starts, sum(lengths)], dtype=torch.int32)
        arguments["cu_seqlens"] = bounds.to(device)
    else:
        arguments["start"] = torch.tensor(starts, dtype=torch.int64).to(device)
        arguments["length"] = torch.tensor(lengths, dtype=torch.int64).to(device)
    return q, k, arguments


def in_dtype(arguments, dtype):
    """The floating-point arguments in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
