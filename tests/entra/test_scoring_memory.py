"""Neither N x N attention nor [tokens, vocabulary] logits in a scoring pass: every tensor that appears is looked at."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra.forward import token_signals
from entra_kernels import _custom_ops

TOKENS, VOCABULARY = 4_096, 4_099


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns, inside our custom operations too."""

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

    def inside(self, backend):
        """`backend`, a module of operations, watched: a mode is off while a custom operation's body runs."""

        def watched(operation):
            def call(*args, **kwargs):
                with self:
                    return operation(*args, **kwargs)

            return call

        return SimpleNamespace(**{name: watched(value) for name, value in vars(backend).items() if callable(value)})


@pytest.fixture
def largest(monkeypatch):
    mode, original = Largest(), _custom_ops._implementation
    monkeypatch.setattr(_custom_ops, "_implementation", lambda backend, tensor: mode.inside(original(backend, tensor)))
    return mode


@pytest.fixture(scope="module")
def model():
    return build("qwen3", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))


BOUND = TOKENS * min(TOKENS, VOCABULARY) / 3


def test_a_pass_of_its_own(model, ids, largest):
    with largest:
        token_signals(model, [ids.tolist()], [TOKENS - 8], ScoreConfig())
    # The head's weight, the logits of a chunk of rows and a block of scores are the largest.
    assert largest.numel < BOUND


def test_the_capture_that_rides_on_a_trainers_pass(model, ids, largest):
    with (
        capture_incoming_attention(model, start=torch.tensor([5]), length=torch.tensor([TOKENS - 9])) as captured,
        largest,
        torch.no_grad(),
    ):
        model.model(ids[None], use_cache=False)
    assert captured.incoming.shape == (1, TOKENS)
    assert largest.numel < BOUND


def test_the_check_sees_what_the_reference_builds(model, ids, largest):
    tokens = 1_000
    with largest:
        token_signals(model, [ids[:tokens].tolist()], [tokens - 8], ScoreConfig(backend="reference"))
    assert largest.numel >= tokens * tokens
