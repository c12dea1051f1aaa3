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

from ._checks import accumulation_dtype, check_among, check_number, check_softcap, check_window
from ._sampling import SampledRows
from ._spans import Spans, packed_bounds

REDUCTIONS = ("mean", "sum", "max")
HEADS = ("mean", "query", "kv")


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
    """[B, H, Nq] natural-log row log-sum-exp of the scores, sinks included, where it is known."""
    row_weights: Tensor | None = None
    """[B, Nq] weight w_j of each query."""
    causal: bool = True
    """False: every query sees every key."""
    include_diagonal: bool = False
    """Whether a query counts for its own key."""
    reduction: str = "mean"
    """Over the queries that count for a key: REDUCTIONS."""
    heads: str = "mean"
    """One value for each of these: HEADS."""
    return_lse: bool = False
    """The row log-sum-exp beside the result."""

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
        if self.lse is not None and self.return_lse:
            raise ValueError("lse was given, and return_lse=True asks for it; drop one of them")
        check_among("reduction", self.reduction, REDUCTIONS)
        check_among("heads", self.heads, HEADS)
        if not self.causal and self.sliding_window is not None:
            raise ValueError(
                f"sliding_window={self.sliding_window} counts tokens before a query, and causal=False knows no before; drop "
                "one of them"
            )
        if not self.causal and not self.include_diagonal:
            raise ValueError("causal=False counts every query for every key, its own too; pass include_diagonal=True with it")


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    causal: bool = True,
    place: int | None = None,
) -> Tensor:
    """A [H, Nq, N] of one sequence, A[h, j, i] from query j to key i: `softmax(scale * q @ k.T + causal_mask)`.

    q is [H, Nq, D], k [Hkv, N, D], sinks [H], lse [H, Nq]. The first query stands at key `place`; None: the last one at the
    last key. Rows sum to 1, or to less by the share of a sink.
    """
    scores = attention_scores(q, k, scale=scale, sliding_window=sliding_window, softcap=softcap, causal=causal, place=place)
    if lse is None:
        lse = row_lse(scores, sinks)
    # Hidden keys again, else an lse that is not finite makes NaN there too.
    return torch.exp(scores - lse[..., None]).masked_fill(scores == -math.inf, 0.0)


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    causal: bool,
    place: int | None,
) -> Tensor:
    """What `attention_probabilities` takes the softmax of, [H, Nq, N]; -inf where the query does not see the key."""
    heads, queries, _ = q.shape
    keys = k.shape[1]
    scores = scale * (q @ k.repeat_interleave(heads // k.shape[0], dim=0).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = keys_ahead(queries, keys, place, q.device)
    hidden = (ahead > 0) & causal
    if sliding_window is not None:
        hidden |= ahead <= -sliding_window
    return scores.masked_fill(hidden, -math.inf)


def keys_ahead(queries: int, keys: int, place: int | None, device: torch.device) -> Tensor:
    """[Nq, N] int64: how many tokens after a query a key stands; 0 for the query's own."""
    place = keys - queries if place is None else place
    return torch.arange(keys, device=device)[None, :] - place - torch.arange(queries, device=device)[:, None]


def row_lse(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[H, Nq]: the log of the softmax denominators of scores [H, Nq, N], sinks [H] included."""
    lse = torch.logsumexp(scores, dim=-1)
    return lse if sinks is None else torch.logaddexp(lse, sinks[:, None].to(lse.dtype))


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


def incoming_attention(q: Tensor, k: Tensor, spans: Spans, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """mu_i = sum_{j>i} w_j A_ji / (N - i), mean over heads (docs/method.md, "Incoming attention"), or what `options` says."""
    dtype = accumulation_dtype(q.dtype)
    batch, heads, rows, _ = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    incoming = q.new_zeros(batch, heads, tokens, dtype=dtype)
    lse = q.new_full((batch, heads, rows), -math.inf, dtype=dtype) if options.return_lse else None
    for element, first, count, row, queries, place in spans.with_queries():
        if not queries or not count:
            continue
        keys, asked = slice(first, first + count), slice(row, row + queries)
        q_here, k_here = q[element, :, asked].to(dtype), k[element, :, keys].to(dtype)
        form = {name: getattr(options, name) for name in ("scale", "sliding_window", "softcap", "causal")} | {"place": place}
        given = None if options.lse is None else options.lse[element, :, asked].to(dtype)
        attention = attention_probabilities(q_here, k_here, sinks=options.sinks, lse=given, **form)
        if lse is not None:
            lse[element, :, asked] = row_lse(attention_scores(q_here, k_here, **form), options.sinks)
        if options.row_weights is not None:
            attention = attention * options.row_weights[element, asked].to(dtype)[:, None]
        ahead = keys_ahead(queries, count, place, q.device)
        counts = (ahead < 0) | ((ahead == 0) & options.include_diagonal) | (not options.causal)
        if options.sliding_window is not None:
            counts &= ahead > -options.sliding_window
        if options.reduction == "max":
            highest = attention.masked_fill(~counts, -math.inf).amax(dim=1)
            incoming[element, :, keys] = highest.masked_fill(~counts.any(dim=0), 0.0)
            continue
        incoming[element, :, keys] = attention.masked_fill(~counts, 0.0).sum(dim=1)
        if options.reduction == "mean":
            incoming[element, :, keys] /= counts.sum(dim=0).clamp(min=1)
    if options.heads == "query":
        return incoming, lse
    together = incoming.unflatten(1, (-1, heads // kv_heads if options.heads == "kv" else heads))  # [B, ., heads, N]
    # Head by head: `mean` adds in an order that depends on a token's place among the tokens.
    total = torch.zeros_like(together[:, :, 0])
    for head in range(together.shape[2]):
        total += together[:, :, head]
    total /= together.shape[2]
    return (total if options.heads == "kv" else total[:, 0]), lse


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
        divisor = future_queries(count, options.sliding_window, q.device).clamp(min=1) if options.reduction == "mean" else 1
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
