"""The torch backend: blocked PyTorch with bounded memory, for CPU and CUDA, with or without Triton.

`redundancy` needs a device with float64, which MPS is not; the others run on any device of torch's.
"""

from .._torch.attention import incoming_attention, sampled_incoming_attention
from .._torch.copies import copies, first_places
from .._torch.logprobs import linear_token_logprobs, token_logprobs
from .._torch.redundancy import redundancy

__all__ = [
    "copies",
    "first_places",
    "incoming_attention",
    "linear_token_logprobs",
    "redundancy",
    "sampled_incoming_attention",
    "token_logprobs",
]
