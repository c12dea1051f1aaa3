"""Column statistics of attention and token log-probabilities, without the matrices that hold them.

| operation | what it returns |
|---|---|
| `incoming_attention` | the mean attention that each token receives from future tokens, without N x N memory |
| `token_logprobs` | log P of given tokens, from logits |
| `linear_token_logprobs` | log P of given tokens and the entropy, from hidden states, without `[tokens, vocabulary]` memory |
| `copies` | which tokens end an n-gram that their sequence had before |
| `first_places` | where each token's n-gram ended first in its sequence |
| `redundancy` | importance, protected tokens and the ENTRA reward of each sequence |

Each runs on three backends: `reference` (the specification), `torch` (CPU, CUDA) and `triton` (CUDA, ROCm).
`entra_kernels` needs torch alone; Triton is imported at the first call that uses it.
"""

from ._attention import SampledAttention, incoming_attention
from ._copies import copies, first_places
from ._logprobs import LogprobsAndEntropy, linear_token_logprobs, token_logprobs
from ._redundancy import Redundancy, redundancy

__all__ = [
    "LogprobsAndEntropy",
    "Redundancy",
    "SampledAttention",
    "copies",
    "first_places",
    "incoming_attention",
    "linear_token_logprobs",
    "redundancy",
    "token_logprobs",
]
__version__ = "0.2.0"
