"""Prompts that several completions share: each runs once, and the completions run behind its keys and values.

Decisions taken here:

- Rows of a call whose prompts are equal are one group. G completions of n tokens after a prompt of P cost P + G n tokens
  instead of G (P + n). The hidden state of the prompt's last token gives the log P of every completion's first one.
- The prompts of a call share forwards, and so do the completions behind them, whichever prompt they have. Where those are of
  unequal length, the shorter ones have pads before them, a mask leaves the pads out, and each row is told its positions.
- Each layer puts the prompt's keys in front of its own for the length of its attention call and keeps nothing. So a forward
  holds its rows' keys of one layer at a time, and those of the prompts that ran together, once, of all layers.
- A prompt runs once where that saves work: a forward more costs as much as some tokens, and attention behind a cache may need
  a mask.
- Nothing is guessed about a model: where it is not known that a cache changes no number, its rows run whole, and
  `why_whole` says why.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from entra.capture import attention_layers
from entra.config import ScoreConfig
from entra.packing import is_flash
from entra.rope import RopeGroups, attends_by_position

# Layers that see all earlier tokens, or a window of them.
_CACHED_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})

# What makes transformers' SDPA take fewer key-value heads than query heads beside a mask, too.
_GROUPED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"

_LEAST_SHARE = 1 / 16
"""A prompt runs once where at least this share of its group's tokens is saved."""


def least_saved(device: torch.device) -> int:
    """How many tokens a call must save at least: as many as cost no less than a forward more.

    `python -m benchmarks.shared_prompts` measures it on a CPU; small models need more. On a GPU it was not measured: a forward
    of 2,048 tokens is taken for one that hardly keeps it busy.
    """
    return 128 if device.type == "cpu" else 2_048


def most_pads(device: torch.device) -> int:
    """How many pads a row gets at most to save a forward; as for `least_saved`."""
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
    """Groups of rows, as indices, whose prompts are worth a forward of their own.

    Args:
        rows: token ids.
        last: how many of each row are its completion. Rows of 0 are in no group.
        rope: of the model. A prompt that has another RoPE alone than in its row is in no group.
        device: the model's.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for r, (row, n) in enumerate(zip(rows, last, strict=True)):
        if n and rope.of(len(row) - n) == rope.of(len(row)):
            groups.setdefault(tuple(row[: len(row) - n]), []).append(r)
    saved = {prompt: (len(members) - 1) * len(prompt) for prompt, members in groups.items()}
    worth = {
        prompt: members
        for prompt, members in groups.items()
        if saved[prompt] and saved[prompt] >= _LEAST_SHARE * sum(len(rows[r]) for r in members)
    }
    return list(worth.values()) if sum(saved[prompt] for prompt in worth) >= least_saved(device) else []


def takes_positions(model: Any) -> bool:
    """Whether the forward of a causal LM, or of the one inside PEFT, takes `position_ids`."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(causal_lm.forward).parameters


def may_mix_prompts(model: Any) -> bool:
    """Whether completions may run in one forward behind prompts of unequal lengths: each row must be told its positions, and
    nothing in the model may count them by itself (Ministral 3 in transformers 5.3)."""
    return takes_positions(model) and not attends_by_position(model)


@contextmanager
def heads_not_repeated(device: torch.device) -> Iterator[None]:
    """Have transformers' SDPA hand over keys and values as they are, on machines without a GPU.

    Behind a cache there is a mask, and with a mask it repeats them for the query heads, as CUDA's kernels want it. A CPU's
    kernel needs no copies. transformers 5.21 and older make them all the same.
    """
    if device.type != "cpu" or torch.accelerator.is_available() or _GROUPED_HEADS in os.environ:
        yield
        return
    os.environ[_GROUPED_HEADS] = "1"
    try:
        yield
    finally:
        os.environ.pop(_GROUPED_HEADS, None)


def tokens_together(budget: int) -> int:
    """How many padded tokens of prompts run in one forward at most, one prompt aside.

    Their keys and values stay, of all layers: 0.3 GB for 2,048 tokens of Qwen3-8B in bfloat16.
    """
    return min(budget, max(1_024, budget // 8))


class Prompts:
    """Keys and values of prompts that ran in one forward, for as many forwards of completions as there are.

    Args:
        cache: what the model filled, [B, H, P, D] in each layer, padded on the right. RuntimeError where it is empty.
        lengths: how many tokens each prompt has.
        takes_positions: whether the model takes `position_ids`.
    """

    def __init__(self, cache: DynamicCache, lengths: list[int], takes_positions: bool = True) -> None:
        self.lengths = lengths
        self._takes_positions = takes_positions
        self._cache = cache
        if {layer.get_seq_length() for layer in cache.layers if layer.is_initialized} != {max(lengths)}:
            raise RuntimeError("the model leaves the cache that it is given empty; pass share_prompts=False in ScoreConfig")

    def behind(self, prompts: list[int], length: Tensor, device: torch.device) -> dict[str, Any]:
        """The model's arguments, ids aside, for one forward of rows of `length` tokens, each behind the prompt of that index.

        Their keys go behind the prompt's, and are not kept. Shorter prompts have pads before them. The pads behind a row stay
        at its last position: no position is larger than if the rows ran whole. Positions are told wherever the model takes
        them: left to itself, Qwen2.5-VL adds what it remembers of an earlier image.
        """
        distinct = sorted(set(prompts))
        longest = max(self.lengths[i] for i in distinct)
        rows = torch.tensor([distinct.index(i) for i in prompts], device=device)
        pads = {i: longest - self.lengths[i] for i in distinct}
        cache = DynamicCache()
        cache.layers = [_Behind(layer, pads, longest, rows) for layer in self._cache.layers]
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        before = torch.tensor([self.lengths[i] for i in prompts])[:, None]
        positions = torch.arange(-longest, int(length.max())) + before
        if any(pads.values()):
            arguments["attention_mask"] = (positions >= 0).long().to(device)
        if self._takes_positions:
            arguments["position_ids"] = positions[:, longest:].minimum(before + length[:, None] - 1).to(device)
        return arguments


class _Behind(DynamicLayer):
    """One layer of a cache of prompts [B, H, P, D], for one forward.

    Args:
        prompts: the layer that holds them.
        pads: how many go before each of those that are used, by index.
        tokens: of the longest one.
        rows: int [B], each row's place among those that are used.
    """

    def __init__(self, prompts: DynamicLayer, pads: dict[int, int], tokens: int, rows: Tensor) -> None:
        super().__init__()
        self.__dict__.update(prompts.__dict__)
        self._pads, self._rows = pads, rows
        self._before = self._tokens = tokens if prompts.is_initialized else 0

    def get_seq_length(self) -> int:
        """Tokens of a row up to now, with its pads."""
        return self._tokens

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, P + n, D] of this forward's n tokens and those before them."""
        self._tokens = self._before + keys.shape[2]
        return torch.cat([self._of_rows(self.keys), keys], dim=2), torch.cat([self._of_rows(self.values), values], dim=2)

    def _of_rows(self, prompts: Tensor) -> Tensor:
        """What each row has before it, [B, H, P, D]; a view where it is the same for all."""
        if len(self._pads) == 1:
            (only,) = self._pads
            return prompts[only : only + 1, :, : self._before].expand(len(self._rows), -1, -1, -1)
        used = [
            nn.functional.pad(prompts[i : i + 1, :, : self._before - pads], (0, 0, pads, 0)) for i, pads in self._pads.items()
        ]
        return torch.cat(used)[self._rows.to(prompts.device)]
