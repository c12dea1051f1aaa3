"""Neither N x N attention nor [tokens, vocabulary] logits in a scoring pass: every tensor that appears is looked at."""

import pytest
import torch
from tiny_models import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra.forward import token_signals

TOKENS, VOCABULARY = 4_096, 4_099


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = (
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if isinstance(x, torch.Tensor)
        )
        self.numel = max(self.numel, *storages, 0)
        return result


@pytest.fixture(scope="module")
def model():
    return build("qwen3", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))


def test_a_pass_of_its_own(model, ids):
    with Largest() as largest:
        token_signals(model, [ids.tolist()], [TOKENS - 8], ScoreConfig())
    # The head's weight, and the logits of a chunk of rows, are the largest.
    assert largest.numel < TOKENS * min(TOKENS, VOCABULARY) / 3


def test_the_capture_that_rides_on_a_trainers_pass(model, ids):
    def pass_over_the_backbone():
        with Largest() as largest, torch.no_grad():
            model.model(ids[None], use_cache=False)
        return largest.numel

    with capture_incoming_attention(model):
        assert pass_over_the_backbone() < TOKENS * TOKENS / 3


def test_the_check_sees_an_eager_forward(model, ids):
    with Largest() as largest, torch.no_grad():
        build("qwen3", vocab_size=VOCABULARY, attn_implementation="eager")(ids[None, :1024])
    assert largest.numel >= 1024 * VOCABULARY
