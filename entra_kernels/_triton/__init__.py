"""The Triton backend: fused kernels for CUDA and ROCm; on a CPU they run in Triton's interpreter, for tests."""

from entra_kernels._triton.attention import incoming_attention
from entra_kernels._triton.logprobs import linear_token_logprobs, token_logprobs
from entra_kernels._triton.redundancy import redundancy
from entra_kernels._triton.sampled import sampled_incoming_attention

__all__ = ["incoming_attention", "linear_token_logprobs", "redundancy", "sampled_incoming_attention", "token_logprobs"]
