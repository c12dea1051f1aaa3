"""Prompts that several completions share: each runs once, and the completions run behind its keys and values.

Decisions taken here:

- Rows of a call whose prompts are equal are one group. G completions of n tokens after a prompt of P cost P + G n tokens instead
  of G (P + n). The hidden state of the prompt's last token gives the log P of every completion's first one.
- Each layer puts the prompt's keys in front of its own for the length of its attention call and keeps nothing. So a forward
  holds no more keys than one of the whole rows does, and the prompt's, once, in all layers.
- A prompt runs once where that saves work: a forward more costs as much as some tokens, and attention behind a cache takes a mask.
- Nothing is guessed about a model: where it is not known that a cache changes no number, its rows run whole, and
  `why_whole` says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entra.capture import attention_layers
from entra.packing import is_flash
from entra.rope import RopeGroups

# Layers that see all earlier tokens, or a window of them.
_CACHED_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})

_LEAST_SHARE = 1 / 16
"""A prompt runs once where this share of the group's tokens is saved at least."""


def why_whole(model: Any) -> str | None:
    """Why rows of this model, a transformers causal LM without wrappers, run whole; None where their prompts may run once."""
    config, layers = model.config.get_text_config(decoder=True), attention_layers(model)
    if len(layers) != config.num_hidden_layers:
        return f"{len(layers)} of its {config.num_hidden_layers} layers are attention, and the others keep a state"
    kinds = sorted({kind for _, _, kind in layers} - _CACHED_LAYERS)
    if kinds:
        return f"it has layers of type {', '.join(kinds)}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "it has convolutions, which keep a state"
    if any("past_key_values" not in inspect.signature(module.forward).parameters for _, module, _ in layers):
        return "its attention takes no past_key_values"
    implementation = layers[0][1].config._attn_implementation or "eager"
    if not (implementation in ("sdpa", "eager", "flex_attention") or is_flash(implementation)):
        return f"what its attention function {implementation!r} makes of a cache is not known"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return "it is compiled, and would be compiled again for prompts of another length"
    return None


def shared_prompts(rows: Sequence[Sequence[int]], last: Sequence[int], rope: RopeGroups) -> list[list[int]]:
    """Groups of rows, as indices, whose prompt is worth a forward of its own.

    Args:
        rows: token ids.
        last: how many of each row are its completion. Rows of 0 are in no group.
        rope: of the model. A prompt that has another RoPE alone than in its row is in no group.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for r, (row, n) in enumerate(zip(rows, last, strict=True)):
        if n and rope.of(len(row) - n) == rope.of(len(row)):
            groups.setdefault(tuple(row[: len(row) - n]), []).append(r)
    return [
        members
        for prompt, members in groups.items()
        if (len(members) - 1) * len(prompt) > _LEAST_SHARE * sum(len(rows[r]) for r in members)
    ]


class Prompt:
    """One prompt's keys and values, for as many forwards of completions as there are.

    Args:
        cache: the cache that the model's forward of the prompt, of `tokens` tokens, is to fill and has filled.
    """

    def __init__(self, tokens: int) -> None:
        from transformers import DynamicCache

        self.tokens = tokens
        self.cache = DynamicCache()

    def freeze(self) -> None:
        """From now on the cache keeps nothing; RuntimeError where the model did not fill it."""
        layers = [layer for layer in self.cache.layers if layer.keys is not None]
        if not layers or any(layer.get_seq_length() != self.tokens for layer in layers):
            raise RuntimeError("the model does not keep a prompt's keys in the cache that it is given; pass share_prompts=False")
        for layer in layers:
            layer.update = partial(_behind, layer.keys, layer.values)


def _behind(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The prompt's keys and values [1, H, P, D], and those of the completions [B, H, n, D] behind them."""
    return _joined(keys, new_keys), _joined(values, new_values)


def _joined(prompt: Tensor, new: Tensor) -> Tensor:
    return torch.cat([prompt.expand(len(new), -1, -1, -1), new], dim=2)
