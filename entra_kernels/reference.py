"""The specification: every operation as docs/method.md writes it, in plain PyTorch.

No speed, no cleverness. Runs in the inputs' precision but at least in float32; tests call it in float64 and hold the other
backends to it. Where sequences lie is in `_spans.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import accumulation_dtype, check_number, check_softcap, check_window
from ._sampling import SampledRows
from ._spans import Spans, packed_bounds


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What `incoming_attention` takes besides q, k and the sequences. Checked here, and given to every backend whole.

    Tensors have the padded layout. Fields are also the last arguments of the custom ops, whose schemas are made from them
    (`_custom_ops.py`).
    """

    scale: float
    """Factor on q @ k.T."""
    sliding_window: int | None = None
    """W: key i is visible to query j iff j - W < i <= j."""
    softcap: float | None = None
    """c turns each scaled score s into c * tanh(s / c); 0 becomes None, for none."""
    sinks: Tensor | None = None
    """[H] logits that only add to the softmax denominator."""
    lse: Tensor | None = None
    """[B, H, N] natural-log row log-sum-exp of the scores, sinks included, where it is known."""
    row_weights: Tensor | None = None
    """[B, N] weight w_j of each query."""
    per_head: bool = False
    """Every query head by itself instead of the mean over heads."""
    normalize: bool = True
    """Divide the sums over queries by their number."""

    def __post_init__(self) -> None:
        checked = {
            "scale": check_number("scale", self.scale, "finite; None for head_dim ** -0.5"),
            "sliding_window": check_window(self.sliding_window),
            "softcap": check_softcap(self.softcap),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.lse is not None and self.sinks is not None:
            raise ValueError("sinks and lse were both given; lse already holds the sinks' share, so pass one of them")


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """A [H, N, N] of one sequence, A[h, j, i] from query j to key i: `softmax(scale * q @ k.T + causal_mask)`.

    q is [H, N, D], k [Hkv, N, D], sinks [H], lse [H, N]. Rows sum to 1, or to less by the share of a sink.
    """
    heads, tokens, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[0], dim=0)
    scores = scale * (q @ k.transpose(1, 2))  # [H, N, N]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(tokens, device=q.device)[:, None]
    key = torch.arange(tokens, device=q.device)[None, :]
    visible = key <= query
    if sliding_window is not None:
        visible &= query - sliding_window < key
    scores = scores.masked_fill(~visible, -math.inf)
    if lse is None:
        lse = torch.logsumexp(scores, dim=-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
    return torch.exp(scores - lse[..., None]).masked_fill(~visible, 0.0)  # else an lse that is not finite makes NaN there too


def future_queries(tokens: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[N] int64: how many queries j > i can see key i: N - i for i counted from 1, at most W - 1 with a window."""
    count = torch.arange(tokens - 1, -1, -1, device=device)
    return count if sliding_window is None else count.clamp(max=sliding_window - 1)


def _future_attention(q: Tensor, k: Tensor, options: AttentionOptions, element: int, span: slice) -> Tensor:
    """A [H, n, n] for j > i, else 0, of the sequence in `span` of a batch element."""
    dtype = accumulation_dtype(q.dtype)
    attention = attention_probabilities(
        q[element, :, span].to(dtype),
        k[element, :, span].to(dtype),
        scale=options.scale,
        sliding_window=options.sliding_window,
        softcap=options.softcap,
        sinks=options.sinks,
        lse=None if options.lse is None else options.lse[element, :, span].to(dtype),
    )
    return attention.tril(-1)


def incoming_attention(q: Tensor, k: Tensor, spans: Spans, options: AttentionOptions) -> Tensor:
    """mu_i = sum_{j>i} w_j A_ji / (N - i), mean over heads (docs/method.md, "Incoming attention")."""
    dtype = accumulation_dtype(q.dtype)
    batch, heads, tokens, _ = q.shape
    incoming = q.new_zeros(batch, heads, tokens, dtype=dtype)
    for element, first, count in spans:
        span = slice(first, first + count)
        future = _future_attention(q, k, options, element, span)
        if options.row_weights is not None:
            future = future * options.row_weights[element, span].to(dtype)[:, None]
        incoming[element, :, span] = future.sum(dim=1)
        if options.normalize:
            incoming[element, :, span] /= future_queries(count, options.sliding_window, q.device).clamp(min=1)
    if options.per_head:
        return incoming
    # Head by head: `mean` adds in an order that depends on a token's place among the tokens.
    total = torch.zeros_like(incoming[:, 0])
    for head in range(heads):
        total += incoming[:, head]
    return total / heads


def sampled_incoming_attention(
    q: Tensor, k: Tensor, spans: Spans, sample: SampledRows, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """mu_i from a sample of the rows, and its standard error (docs/method.md, "Sampling")."""
    dtype = accumulation_dtype(q.dtype)
    estimate = q.new_zeros(q.shape[0], q.shape[2], dtype=dtype)
    error = torch.zeros_like(estimate)
    for sequence, (element, first, count) in enumerate(spans):
        if count == 0:
            continue
        span = slice(first, first + count)
        future = _future_attention(q, k, options, element, span).mean(dim=0)  # [n, n]
        if options.row_weights is not None:
            future = future * options.row_weights[element, span].to(dtype)[:, None]
        sampled = min(count, sample.rows.shape[1])
        rows = future[sample.rows[sequence, :sampled]]  # [m, n]
        pairs = sampled // 2
        difference = rows[0 : 2 * pairs : 2] - rows[1 : 2 * pairs : 2]
        sums = (sample.weights[sequence, :sampled].to(dtype)[:, None] * rows).sum(dim=0)
        variance = (sample.spread[sequence, :pairs].to(dtype)[:, None] * difference**2).sum(dim=0)
        divisor = future_queries(count, options.sliding_window, q.device).clamp(min=1) if options.normalize else 1
        estimate[element, span] = sums / divisor
        error[element, span] = variance.sqrt() / divisor
    return estimate, error


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """log P of each target (docs/method.md, "Log-probability")."""
    logits = logits.to(accumulation_dtype(logits.dtype)) / temperature
    inside = (targets >= 0) & (targets < logits.shape[-1])
    picked = torch.log_softmax(logits, dim=-1).gather(-1, targets.long().where(inside, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(~inside, math.nan)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
) -> list[Tensor]:
    """log P of each target from the head's input and, if wanted, the entropy (docs/method.md, "Log-probability")."""
    dtype = accumulation_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = token_logprobs(logits, targets, temperature=temperature)
    if not entropy:
        return [logprobs]
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return [logprobs, torch.special.entr(probabilities).sum(dim=-1)]  # entr(p) = -p log p, and 0 at p = 0


def protected_count(tokens: int, protect_fraction: float) -> int:
    """k = floor(tau * n + 1e-9): the 1e-9 makes 0.2 * 5 protect 1 token whatever float64 rounding does."""
    return math.floor(protect_fraction * tokens + 1e-9)


class RedundancyOptions(NamedTuple):
    """What `redundancy` takes besides the tokens; every backend gets it whole."""

    attention_weight: float
    """lambda."""
    protect_fraction: float
    """tau, in [0, 1]."""
    degenerate_reward: float
    """The reward where at most one token is left."""


def first_places(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Where the n-gram that ends at each token ended first in its sequence (docs/method.md, "Entropy of n-grams")."""
    places = torch.full_like(token_ids, -1, dtype=torch.int64)
    starts, lengths = packed_bounds(cu_seqlens, token_ids.shape[0])
    for first, count in zip(starts.tolist(), lengths.tolist(), strict=True):
        ids = token_ids[first : first + count].tolist()
        seen: dict[tuple[int, ...], int] = {}
        for i in range(count):
            # At the start it is shorter than n, and so it equals no other.
            places[first + i] = seen.setdefault(tuple(ids[max(i + 1 - ngram, 0) : i + 1]), i)
    return places


def copies(token_ids: Tensor, cu_seqlens: Tensor, *, ngram: int) -> Tensor:
    """Whether each token ends an n-gram that its sequence had before (docs/method.md, "Copies")."""
    places = first_places(token_ids, cu_seqlens, ngram=ngram)
    copied = torch.zeros_like(token_ids, dtype=torch.bool)
    starts, lengths = packed_bounds(cu_seqlens, token_ids.shape[0])
    for first, count in zip(starts.tolist(), lengths.tolist(), strict=True):
        span = slice(first, first + count)
        copied[span] = places[span] < torch.arange(count, device=token_ids.device)
    return copied


def redundancy(
    logprobs: Tensor,
    incoming: Tensor,
    token_ids: Tensor,
    cu_seqlens: Tensor,
    protect_last: Tensor | None,
    options: RedundancyOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """I = l + lambda * mu, the top k protected, r = H / log M over the rest (docs/method.md, "Reward")."""
    dtype = accumulation_dtype(torch.promote_types(logprobs.dtype, incoming.dtype))
    importance = logprobs.to(dtype) + options.attention_weight * incoming.to(dtype)
    protected = torch.zeros_like(importance, dtype=torch.bool)
    rewards = []
    starts, lengths = packed_bounds(cu_seqlens, logprobs.shape[0])
    for first, count in zip(starts.tolist(), lengths.tolist(), strict=True):
        span = slice(first, first + count)
        if not importance[span].isfinite().all():
            rewards.append(math.nan)
            continue
        k = protected_count(count, options.protect_fraction)
        # A stable sort leaves equal importances in the order of their index, so ties go to the lower one.
        order = importance[span].sort(descending=True, stable=True).indices
        if protect_last is not None:
            last = protect_last[span][order]
            order = torch.cat([order[~last], order[last]])
        protected[first + order[:k]] = True
        remaining = token_ids[span][~protected[span]]
        m = remaining.numel()
        if m <= 1:
            rewards.append(options.degenerate_reward)
            continue
        frequency = remaining.unique(return_counts=True)[1].to(torch.float64) / m
        entropy = -(frequency * frequency.log()).sum().item()
        rewards.append(min(max(entropy / math.log(m), 0.0), 1.0))
    return torch.tensor(rewards, dtype=dtype, device=importance.device), importance, protected
