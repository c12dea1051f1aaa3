"""The Triton backend: fused kernels for CUDA and ROCm; on a CPU they run in Triton's interpreter, for tests."""

from .attention import incoming_attention
from .copies import copies, first_places
from .logprobs import linear_token_logprobs, token_logprobs
from .redundancy import redundancy
from .sampled import sampled_incoming_attention

__all__ = [
    "copies",
    "first_places",
    "incoming_attention",
    "linear_token_logprobs",
    "redundancy",
    "sampled_incoming_attention",
    "token_logprobs",
]
