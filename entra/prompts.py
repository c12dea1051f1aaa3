"""Prompts that several completions share: each runs once, and the completions run behind its keys and values.

Decisions taken here:

- Rows of a call whose prompts are equal are one group. G completions of n tokens after a prompt of P cost P + G n tokens
  instead of G (P + n). The hidden state of the prompt's last token gives the log P of every completion's first one.
- Each layer puts the prompt's keys in front of its own for the length of its attention call and keeps nothing. So a forward
  holds its rows' keys of one layer at a time, and the prompt's, once, of all layers.
- A prompt runs once where that saves work: a forward more costs as much as some tokens, and attention behind a cache may need
  a mask.
- Nothing is guessed about a model: where it is not known that a cache changes no number, its rows run whole, and
  `why_whole` says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from entra.capture import attention_layers
from entra.config import ScoreConfig
from entra.packing import is_flash
from entra.rope import RopeGroups

# Layers that see all earlier tokens, or a window of them.
_CACHED_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})

_LEAST_SHARE = 1 / 16
"""A prompt runs once where at least this share of its group's tokens is saved."""


def tokens_of_a_forward(device: torch.device) -> int:
    """How many tokens cost as much as a forward more: so many must be saved at least, and no more are padded to save a forward.

    On a CPU a forward of SmolLM2 costs about 20 tokens. On a GPU it was not measured: a forward of 2,048 tokens is taken for
    one that hardly keeps it busy.
    """
    return 32 if device.type == "cpu" else 2_048


def why_whole(model: Any, config: ScoreConfig) -> str | None:
    """Why rows run whole, in words; None where their prompts may run once.

    Args:
        model: a transformers causal LM without wrappers.
        config: `share_prompts` and `ranking_scope` are used.
    """
    if not config.share_prompts:
        return "share_prompts=False"
    if config.ranking_scope == "sequence":
        return "ranking_scope='sequence' ranks the prompt's tokens, too"
    depth, layers = model.config.get_text_config(decoder=True).num_hidden_layers, attention_layers(model)
    if len(layers) != depth:
        return f"{len(layers)} of the model's {depth} layers are attention, and the others keep a state"
    kinds = sorted({kind for _, _, kind in layers} - _CACHED_LAYERS)
    if kinds:
        return f"the model has layers of type {', '.join(kinds)}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "the model has convolutions, which keep a state"
    if any("past_key_values" not in inspect.signature(module.forward).parameters for _, module, _ in layers):
        return "the model's attention takes no past_key_values"
    implementation = layers[0][1].config._attn_implementation or "eager"
    if not (implementation in ("sdpa", "eager", "flex_attention") or is_flash(implementation)):
        return f"what the attention function {implementation!r} makes of a cache is not known"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return "the model is compiled, and would be again for prompts of another length"
    return None


def shared_prompts(
    rows: Sequence[Sequence[int]], last: Sequence[int], rope: RopeGroups, device: torch.device
) -> list[list[int]]:
    """Groups of rows, as indices, whose prompt is worth a forward of its own.

    Args:
        rows: token ids.
        last: how many of each row are its completion. Rows of 0 are in no group.
        rope: of the model. A prompt that has another RoPE alone than in its row is in no group.
        device: the model's.
    """
    least = tokens_of_a_forward(device)
    groups: dict[tuple[int, ...], list[int]] = {}
    for r, (row, n) in enumerate(zip(rows, last, strict=True)):
        if n and rope.of(len(row) - n) == rope.of(len(row)):
            groups.setdefault(tuple(row[: len(row) - n]), []).append(r)
    return [
        members
        for prompt, members in groups.items()
        if (len(members) - 1) * len(prompt) >= max(least, _LEAST_SHARE * sum(len(rows[r]) for r in members))
    ]


class Prompt:
    """One prompt's keys and values, for as many forwards of completions as there are.

    Args:
        tokens: how many the prompt has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.cache = DynamicCache()
        """For the model's forward of the prompt, which fills it."""

    def behind(self) -> DynamicCache:
        """A cache for one forward of completions. Their keys go behind the prompt's, and are not kept.

        RuntimeError where the model did not fill the cache that it was given.
        """
        behind = DynamicCache()
        behind.layers = [_Behind(layer) for layer in self.cache.layers]
        if {layer.get_seq_length() for layer in behind.layers if layer.is_initialized} != {self.tokens}:
            raise RuntimeError("the model leaves the cache that it is given empty; pass share_prompts=False in ScoreConfig")
        return behind


class _Behind(DynamicLayer):
    """One layer of a cache that holds a prompt [1, H, P, D], for one forward of B rows."""

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(prompt.__dict__)
        self._tokens = prompt.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens of a row up to now."""
        return int(self._tokens)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, P + n, D] of this forward's n tokens and those before them."""
        keys, values = _joined(self.keys, keys), _joined(self.values, values)
        self._tokens = keys.shape[2]
        return keys, values


def _joined(prompt: Tensor, new: Tensor) -> Tensor:
    return torch.cat([prompt.expand(len(new), -1, -1, -1), new], dim=2)
