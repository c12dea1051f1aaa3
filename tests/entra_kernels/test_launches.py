"""What every launch of a Triton kernel asks of the compiler."""

import importlib
import os

import pytest
import torch

import entra_kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off: a GPU is there")

KERNELS = {
    *("_lay_out_kernel", "_row_lse_kernel", "_column_sum_kernel", "_add_kernel"),
    *("_count_tiles_kernel", "_place_tiles_kernel", "_place_queries_kernel", "_sampled_lse_kernel", "_sampled_columns_kernel"),
    *("_row_kernel", "_head_kernel", "_stretch_kernel", "_reduce_kernel"),
    *("_importance_kernel", "_select_kernel", "_count_kernel", "_reward_kernel"),
    *("_clear_kernel", "_first_kernel", "_place_kernel"),
}
UNFUSED = {"_importance_kernel", "_select_kernel", "_reward_kernel"}
"""Two roundings are part of their result: other backends make them."""


def test_every_launch_says_whether_multiply_adds_are_fused(monkeypatch):
    """The budgets of instructions count on them, and Triton 3.10 turns them off by default."""
    from triton.runtime import interpreter

    from entra_kernels._triton import logprobs

    launched = {}
    run = interpreter.GridExecutor.__call__

    def spy(self, *arguments, **options):
        launched.setdefault(self.fn.__name__, []).append(options.get("enable_fp_fusion"))
        return run(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spy)
    q, k, weights = torch.randn(1, 2, 20, 16), torch.randn(1, 1, 20, 16), torch.ones(1, 20)
    entra_kernels.incoming_attention(q, k, row_weights=weights, backend="triton")
    entra_kernels.incoming_attention(q, k, last=3, backend="triton")
    entra_kernels.incoming_attention(q, k, sample_rows=16, backend="triton")
    targets = torch.tensor([1, 2, 3])
    entra_kernels.token_logprobs(torch.randn(3, 7), targets, backend="triton")
    for way in ("fused", "chunked"):
        logprobs.linear_token_logprobs(
            torch.randn(3, 16), torch.randn(7, 16), targets, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, way=way
        )
    for operation in (entra_kernels.copies, entra_kernels.first_places):
        operation(torch.arange(9) % 4, torch.tensor([0, 9]), ngram=2, backend="triton")
    entra_kernels.redundancy(-torch.rand(9), torch.rand(9), torch.arange(9) % 4, torch.tensor([0, 9]), backend="triton")
    assert set(launched) == KERNELS
    assert {name for name, asked in launched.items() if set(asked) != {name not in UNFUSED}} == set()


@pytest.mark.parametrize("name", ["plan", "primitives", "attention", "hopper", "sampled", "logprobs", "redundancy", "copies"])
def test_a_helper_of_a_kernel_has_at_most_12_arguments(name):
    """27 numbers in a row are not read, they are counted. What belongs together goes in a named tuple."""
    module = importlib.import_module(f"entra_kernels._triton.{name}")
    jitted = {key: value for key, value in vars(module).items() if hasattr(value, "arg_names")}
    helpers = {key: len(value.arg_names) for key, value in jitted.items() if not key.endswith("_kernel")}
    assert helpers
    assert {key: count for key, count in helpers.items() if count > 12} == {}
