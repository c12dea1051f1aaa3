"""What of a batch reaches a row through its positions: which rows may share a forward, so that each is as it is alone.

Most RoPE is a function of the position, and attention sees differences of positions only. LongRoPE takes its long factors for
all rows once one is longer than `original_max_position_embeddings` (and PhiMoE another scale). Dynamic NTK stretches its
frequencies to the longest row beyond `max_position_embeddings`, and keeps them for later forwards. The config names both.

Pads before a row shift its positions. That changes nothing where attention sees differences only. It does change learned
positions, and the few models that do more with a position than RoPE. We found these by running each causal model of
transformers 5.23 that can be built small, with and without pads. Before 5.15 recurrent layers (Qwen3-Next) read the
pads of a row that is alone in its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LONG = ("longrope", "su")  # the second is Phi-3's first name for it

# RoPE, but not alone: a norm with weights after it (Hunyuan), attention scaled by the position (Beam, Llama 4; Ministral 3 and
# Mistral 4 say so among their RoPE parameters).
_ABSOLUTE_MODELS = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "beam", "llama4_text"})
_ABSOLUTE_PARAMETER = "llama_4_scaling_beta"


class RopeGroups:
    """Which lengths have the same RoPE in a model.

    Args:
        model: a transformers causal LM.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self._limits: set[int] = set()
        self._stretched_from: int | None = None
        for parameters in _parameters(config):
            kind = str(parameters.get("rope_type", parameters.get("type")))
            if kind in _LONG or "long_mscale" in parameters:
                limit = parameters.get("original_max_position_embeddings")
                self._limits.add(
                    int(limit or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
                )
            elif "dynamic" in kind:
                self._stretched_from = int(config.max_position_embeddings)

    def of(self, length: int) -> tuple[int, int]:
        """Rows with the same value, padded to the longest of them, are each as they are alone. It grows with the length."""
        stretched = self._stretched_from is not None and length > self._stretched_from
        return sum(length > limit for limit in self._limits), length if stretched else 0

    @property
    def differ(self) -> bool:
        """Whether there is more than one group."""
        return bool(self._limits) or self._stretched_from is not None

    def other(self, lengths: Tensor, longest: Tensor) -> Tensor:
        """bool, shaped as `lengths`: whether `of` differs from that of `longest`, a number; waits for no device."""
        other = torch.zeros_like(lengths, dtype=torch.bool)
        for limit in self._limits:
            other |= (lengths > limit) != (longest > limit)
        if self._stretched_from is not None:
            other |= (lengths != longest) & (torch.maximum(lengths, longest) > self._stretched_from)
        return other


def sees_left_pads(model: Any) -> bool:
    """Whether a row's numbers may change with the pads before it; models without RoPE are taken for such."""
    config = model.config.get_text_config(decoder=True)
    parameters = _parameters(config)
    return (
        not parameters
        or attends_by_position(model)
        or (_reads_pads_of_one_row() and any(isinstance(module, nn.Conv1d) for module in model.modules()))
    )


def attends_by_position(model: Any) -> bool:
    """Whether attention does more with a position than RoPE. Some such models count pads, whatever position_ids say."""
    config = model.config.get_text_config(decoder=True)
    return config.model_type in _ABSOLUTE_MODELS or any(one.get(_ABSOLUTE_PARAMETER) is not None for one in _parameters(config))


def transformers_version() -> tuple[int, int]:
    """Major and minor version of the transformers that is installed."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _reads_pads_of_one_row() -> bool:
    """Whether this transformers masks pads in recurrent layers, all of which hold a convolution, only with several rows."""
    return transformers_version() < (5, 15)


def has_seen_longer(model: nn.Module) -> bool:
    """Whether dynamic RoPE of the model holds frequencies that are not those of a short row."""
    return any(
        not torch.equal(frequencies, original.to(frequencies.device))
        for module in _dynamic(model)
        for frequencies, original in _frequencies(module).values()
    )


@contextmanager
def forgetful_rope(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields what makes dynamic RoPE forget the rows that it has seen; afterwards it remembers what it did before."""
    modules = _dynamic(model)
    before = [(dict(vars(module)), dict(module._buffers)) for module in modules]

    def forget() -> None:
        for module in modules:
            for name, (frequencies, original) in _frequencies(module).items():
                setattr(module, name, original.to(frequencies.device).clone())
            for name in _longest(module):
                setattr(module, name, module.original_max_seq_len)

    try:
        yield forget
    finally:
        for module, (attributes, buffers) in zip(modules, before, strict=True):
            for name in _longest(module):
                vars(module).pop(name)
            vars(module).update(attributes)
            module._buffers.update(buffers)


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of the model's layers: one dict, or one per type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [value for value in (given, *given.values()) if isinstance(value, dict) and value]


def _dynamic(model: nn.Module) -> list[Any]:
    """The modules with a dynamic RoPE."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if any("dynamic" in str(one) for one in (kind.values() if isinstance(kind, dict) else (kind,))):
            found.append(module)
    return found


def _frequencies(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Present and original frequencies by the name of the former, one pair or one per type of layer."""
    pairs = {}
    for name, frequencies in module._buffers.items():
        original = getattr(module, name.removesuffix("inv_freq") + "original_inv_freq", None)
        if name.endswith("inv_freq") and frequencies is not None and isinstance(original, Tensor):
            pairs[name] = (frequencies, original)
    return pairs


def _longest(module: nn.Module) -> list[str]:
    """The names under which a module keeps the length of the longest row."""
    return [name for name in vars(module) if name.endswith("max_seq_len_cached")]
