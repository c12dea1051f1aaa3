"""The torch backend: blocked PyTorch with bounded memory, for the CPU and for any device without Triton."""

from entra_kernels._torch.attention import incoming_attention
from entra_kernels._torch.logprobs import linear_token_logprobs, token_logprobs
from entra_kernels._torch.redundancy import redundancy

__all__ = ["incoming_attention", "linear_token_logprobs", "redundancy", "token_logprobs"]
