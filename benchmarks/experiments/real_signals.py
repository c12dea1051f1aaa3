"""What one model says of every token of a real trace: log P, and what each token receives from later ones, in several ways.

An attention function of ours computes the layer's output by SDPA, as the model would. Besides, it sums the columns of the
probabilities, a block of queries at a time. So one forward gives most of it. The gradient takes one backward.

Decisions taken here:

- N tokens of prompt and completion; results are for the n completion tokens. Later queries are those with j > i.
- *mu* is the last layer's mean over heads and over the N - i later queries, as `entra.score_batch` computes it; a test
  holds the two together. *mu_all* is the mean of the same over all layers.
- *far* leaves out the nearest later queries, 8, 32 or 128 of them. It is 0 where no others are left.
- *value* weighs each head's attention by the norm of the value that it fetches.
- *gradient* is the derivative of the completion's log-likelihood by a gate on key i, in all layers and heads at once. The
  gate's logarithm is added to every score of that key. The token's own query sees the gate too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

NEAREST = (8, 32, 128)
"""Later queries that `far_8`, `far` and `far_128` leave out."""
_BLOCK = 256  # queries at a time
_NAME = "entra_real_traces"


Array = NDArray[np.float64]


class Signals(NamedTuple):
    """Of the n tokens of a completion; float64 [n] each. The last four are all NaN where they were not asked for."""

    logprobs: Array
    """log P(x_i | x_<i), natural log."""
    mean: Array
    """mu."""
    lift: Array
    """mu with each query's attention as a multiple of its uniform share."""
    far: Array
    """mu without the nearest 32 queries."""
    value: Array
    """Attention times the norm of the value, the mean over heads and later queries."""
    mean_all: Array
    """mu, the mean of all layers."""
    far_8: Array
    """mu without the nearest 8 queries."""
    far_128: Array
    """mu without the nearest 128 queries."""
    gradient: Array
    """Of the completion's log-likelihood by the logarithm of a gate on key i, in nats."""


class _Columns(NamedTuple):
    """Sums over later queries of one layer's probabilities, the mean over heads: float32 [N] each, `far` [3, N]."""

    total: Tensor
    lifted: Tensor
    far: Tensor
    value: Tensor


def cached(
    folder: Path,
    name: str,
    model: Any,
    prompt_ids: list[int],
    token_ids: list[int],
    *,
    all_layers: bool = False,
    windows: bool = False,
    gradient: bool = False,
) -> Signals:
    """The signals, kept in `folder` under a hash of the model's name and the tokens, so that a run that was stopped goes on.

    Further windows and the gradient have files of their own: a run that asks for them later measures nothing else again. Those
    that an earlier run left are used in any case.

    Args:
        folder: of the files; it is made where it is missing.
        name: of the model.
        model: a transformers causal LM in eval mode and float32 whose layers all attend to every earlier token.
        prompt_ids: at least one token.
        token_ids: of the completion, at least one.
        all_layers: whether to look at more than the last one, which about doubles the time.
        windows: whether to measure `far_8` and `far_128`, which takes one more forward.
        gradient: whether to measure it, which takes a forward and a backward.
    """
    ids, count = torch.tensor([prompt_ids + token_ids], device=model.device), len(token_ids)
    asked = [name, prompt_ids, token_ids, all_layers]
    found = {
        **dict.fromkeys(Signals._fields, np.full(count, np.nan)),
        **_kept(folder, [*asked, False, 32], lambda: _forward(model, ids, count, all_layers)),
        **_kept(folder, [*asked, "gradient"], (lambda: {"gradient": _gradient(model, ids, count)}) if gradient else None),
        **_kept(folder, [*asked, "windows"], (lambda: _windows(model, ids, count)) if windows else None),
    }
    return Signals(**found)


def _kept(folder: Path, asked: list[Any], measure: Callable[[], dict[str, Any]] | None) -> dict[str, Any]:
    """The arrays of an earlier run that asked the same, or else those of `measure`, where there is one."""
    path = folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return dict(stored)
    if measure is None:
        return {}
    found = measure()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **found)
    partial.rename(path)
    return found


def _forward(model: Any, ids: Tensor, count: int, all_layers: bool) -> dict[str, Array]:
    """What one forward gives of the last `count` tokens."""
    with _attention(model, all_layers=all_layers) as layers, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    later, last = _later(ids), layers[-1]
    columns = {
        "logprobs": logits.log_softmax(-1).gather(1, ids[0, -count:, None])[:, 0],
        "mean": last.total / later.clamp(min=1),
        "lift": last.lifted / later.clamp(min=1),
        "far": last.far[NEAREST.index(32)] / (later - 32).clamp(min=1),
        "value": last.value / later.clamp(min=1),
    }
    if all_layers:
        columns["mean_all"] = torch.stack([layer.total for layer in layers]).mean(0) / later.clamp(min=1)
    return {of: column[-count:].double().numpy() for of, column in columns.items()}


def _windows(model: Any, ids: Tensor, count: int) -> dict[str, Array]:
    """Of the last `count` tokens what the two windows other than 32 give; no logits are needed."""
    with _attention(model) as layers, torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    later = _later(ids)
    return {
        f"far_{nearest}": (far / (later - nearest).clamp(min=1))[-count:].double().numpy()
        for nearest, far in zip(NEAREST, layers[-1].far, strict=True)
        if nearest != 32
    }


def _later(ids: Tensor) -> Tensor:
    """How many later queries each token has; float32 [N]."""
    return torch.arange(ids.shape[1] - 1, -1, -1.0)


@contextlib.contextmanager
def _attention(model: Any, gate: Tensor | None = None, *, all_layers: bool = False) -> Iterator[list[_Columns]]:
    """Inside, the last layer (or all) leaves its column sums in the list; a `gate` [N] is added to the keys' scores instead."""
    found: list[_Columns] = []
    last = model.config.num_hidden_layers - 1

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        if mask is not None or query.shape[0] > 1:
            raise ValueError("one unpadded row under a causal mask is all that is measured here")
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        if gate is None:
            if all_layers or module.layer_idx == last:
                found.append(_columns(query[0] * scaling, keys[0], values[0]))
        else:  # one more dimension: the gate beside each key, 1 beside each query; then zeros to a multiple of 8
            ones = torch.ones_like(query[..., :1]) / scaling
            column = gate[None, None, :, None].expand(*keys.shape[:3], 1)
            query, keys = (torch.nn.functional.pad(torch.cat(pair, -1), (0, 7)) for pair in ((query, ones), (keys, column)))
            values = torch.nn.functional.pad(values, (0, 8))
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return output[..., : value.shape[-1]].transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield found
    finally:
        model.set_attn_implementation(before)


def _columns(query: Tensor, key: Tensor, value: Tensor) -> _Columns:
    """Column sums of one layer, [H, N, D] each; the query is scaled already."""
    tokens = key.shape[1]
    total, lifted, weighted = (torch.zeros(tokens) for _ in range(3))
    far = torch.zeros(len(NEAREST), tokens)
    norms = value.norm(dim=-1)
    keys = torch.arange(tokens)
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        queries = torch.arange(start, end)[:, None]
        scores = query[:, start:end] @ key[:, :end].transpose(1, 2)
        rest = keys[None, :end]
        scores.masked_fill_(rest > queries, -torch.inf)
        probabilities = scores.softmax(-1).masked_fill_(rest >= queries, 0.0)
        mean = probabilities.mean(0)
        total[:end] += mean.sum(0)
        lifted[:end] += (mean * (queries + 1)).sum(0)
        for nearest, sums in zip(NEAREST, far, strict=True):
            sums[:end] += (mean * (queries - rest > nearest)).sum(0)
        weighted[:end] += (probabilities.sum(1) * norms[:, :end]).mean(0)
    return _Columns(total, lifted, far, weighted)


def _gradient(model: Any, ids: Tensor, count: int) -> Array:
    """Of the log-likelihood of the last `count` tokens by the gate on each of their keys; float64 [count]."""
    gate = torch.zeros(ids.shape[1], requires_grad=True)
    with _attention(model, gate):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -count - 1 : -1]
        # The logits of a long trace are larger than everything else together: a piece of them at a time.
        leaf = hidden.detach().requires_grad_()
        for piece, targets in zip(leaf.split(512), ids[0, -count:].split(512), strict=True):
            (-torch.nn.functional.cross_entropy(model.lm_head(piece), targets, reduction="sum")).backward()
        hidden.backward(leaf.grad)
    assert gate.grad is not None
    return gate.grad[-count:].double().numpy()
