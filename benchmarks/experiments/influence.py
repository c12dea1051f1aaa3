"""How much a token matters to what comes after it, by definition instead of by proxy. Only an experiment can pay for this.

Two definitions, for token i of a sequence x_1..x_N (natural log, float32 forwards, float64 sums):

- leave-one-out: `sum_{t>=i+2} [log P(x_t | x_<t) - log P(x_t | x_<t, key i masked)]`, where no query j > i sees key i, in any
  layer. Query i still sees itself, so x_{i+1}, which position i predicts, stays out of the sum.
- bidirectional: `log P(x_i | all others) = l_i + F(x_i) - log sum_v P(v | x_<i) exp F(v)` by Bayes' rule, with the future's
  log-likelihood `F(v) = log P(x_>i | x_<i, v)`. The sum runs over the likeliest v; `Bidirectional` says what that leaves open.

Both ask the same of the model: log-probabilities of tokens that continue a shorter prefix (leave-one-out: a prefix with a hole
before the continuation). So the sequence runs once, and its key-value cache is kept. Continuations are packed one after the
other into forwards, in which a 4-D mask lets each see its prefix and itself alone. Nothing is computed for the prefix again.

transformers hands a 4-D mask to every layer as it is. A model whose layers differ in what they see (windows, linear attention)
would silently run as another model, so it is refused. Each sequence is checked, too. Its second half, packed as a continuation,
must get the log-probabilities that it had in the plain forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entra.capture import attention_layers

# In nats. A wrong mask is off by tenths, another order of the sums by less than 1e-3.
_CHECK_TOLERANCE = 5e-3


class Continuation(NamedTuple):
    """Tokens that follow x_1..x_seen, from `position` on; `position > seen` leaves a hole that nobody attends to."""

    seen: int
    position: int
    """0-based position of the first token."""
    token_ids: Sequence[int]
    """The first is given, the others get log-probabilities."""

    @property
    def cost(self) -> int:
        """Tokens that the model runs: all but the last, which predicts nothing that is asked for."""
        return max(len(self.token_ids) - 1, 0)


class Replay:
    """A sequence of N tokens that has run once, and from which continuations run without repeating the prefix.

    Args:
        model: a transformers causal LM in eval mode and float32 whose layers all attend to every earlier token.
        token_ids: the sequence, prompt first.
        first: how many of them are prompt, at least 1. The other n = N - first are measured.
        budget: tokens of one packed forward. A longer continuation runs alone.
        on_tokens: is called with the number of tokens after each forward.

    Raises:
        ValueError: a model of another precision, or with layers of another kind; no prompt.
        RuntimeError: the model does not honour the mask.
    """

    def __init__(
        self,
        model: Any,
        token_ids: Sequence[int],
        first: int,
        *,
        budget: int = 512,
        on_tokens: Callable[[int], object] = lambda tokens: None,
    ) -> None:
        _check_model(model)
        if not 1 <= first <= len(token_ids):
            raise ValueError(f"first={first} must be from 1 to the {len(token_ids)} tokens of the sequence; give a prompt")
        self.token_ids = list(token_ids)
        self.first = first
        self._model = model
        self._budget = budget
        self._on_tokens = on_tokens
        ids = torch.tensor([self.token_ids], device=model.device)
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=True)
        self._cache = output.past_key_values
        self.distribution: Tensor = output.logits[0, first - 1 : -1].double().log_softmax(dim=-1).cpu()
        """log P(v | x_<i) of each looked-at token i, float64 [n, V]."""
        self.logprobs = self.distribution.gather(1, ids[0, first:, None].cpu())[:, 0]
        """l of each looked-at token, float64 [n]."""
        self._check()

    def score(self, continuations: Iterable[Continuation]) -> list[Tensor]:
        """Log-probabilities of each continuation's tokens but the first, given what it sees; float64 [len - 1] each."""
        results: list[Tensor] = []
        batch: list[Continuation] = []
        for continuation in continuations:
            if batch and cost(batch) + continuation.cost > self._budget:
                results += self._forward(batch)
                self._on_tokens(cost(batch))
                batch = []
            batch.append(continuation)
        results += self._forward(batch)
        self._on_tokens(cost(batch))
        return results

    def _forward(self, batch: Sequence[Continuation]) -> list[Tensor]:
        costs = [continuation.cost for continuation in batch]
        total = sum(costs)
        if total == 0:
            return [torch.zeros(0, dtype=torch.float64) for _ in batch]
        device = self._model.device
        ids = torch.tensor([token for c in batch for token in c.token_ids[:-1]], device=device)
        targets = torch.tensor([token for c in batch for token in c.token_ids[1:]], device=device)
        positions = torch.cat([torch.arange(c.position, c.position + c.cost) for c in batch]).to(device)
        owner = torch.arange(len(batch)).repeat_interleave(torch.tensor(costs)).to(device)
        seen = torch.tensor([c.seen for c in batch], device=device)[owner]
        query = torch.arange(total, device=device)
        prefix = torch.arange(len(self.token_ids), device=device) < seen[:, None]
        own = (owner[:, None] == owner) & (query <= query[:, None])
        visible = torch.cat([prefix, own], dim=1)  # [total, N + total]
        mask = torch.zeros(visible.shape, device=device).masked_fill(~visible, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=mask[None, None],
                past_key_values=self._cache,
                use_cache=True,
            ).logits[0]
        self._cache.crop(-total)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return list(logprobs.double().cpu().split(costs))

    def _check(self) -> None:
        """The sequence's second half, behind another continuation in one forward, gets the log-probs that it had."""
        half = (self.first + len(self.token_ids)) // 2
        rest = self.token_ids[half:]
        if len(rest) < 2:
            return
        again = self._forward([Continuation(half, half, rest[::-1]), Continuation(half, half, rest)])[1]
        error = float((again - self.logprobs[half + 1 - self.first :]).abs().max())
        if not error < _CHECK_TOLERANCE:
            raise RuntimeError(
                f"a continuation that changes nothing changed a log-probability by {error:.2g} (at most {_CHECK_TOLERANCE}): "
                f"the model does not honour a 4-D mask with attn_implementation={self._model.config._attn_implementation!r}; "
                'load it with "sdpa" or "eager"'
            )


class LeaveOneOut(NamedTuple):
    """The effect of hiding a token from all later queries, for each of n tokens: float64 [n], in nats."""

    total: Tensor
    """Log-probability that the later tokens lose. Negative where they become likelier, 0 for the last two tokens."""
    absolute: Tensor
    """Sum of the changes' absolute values."""
    counted: Tensor
    """int64 [n]: how many later tokens are summed, N - i - 1 for i counted from 1, at least 0."""


def leave_one_out(replay: Replay) -> LeaveOneOut:
    """`sum_{t>=i+2} [log P(x_t | x_<t) - log P(x_t | x_<t, key i masked for queries j > i)]` for each looked-at token i."""
    differences = [
        plain - hidden
        for plain, hidden in zip(
            _later(replay, 2), replay.score(leave_one_out_plan(replay.token_ids, replay.first)), strict=True
        )
    ]
    return LeaveOneOut(
        torch.stack([d.sum() for d in differences]),
        torch.stack([d.abs().sum() for d in differences]),
        torch.tensor([d.numel() for d in differences]),
    )


def leave_one_out_plan(token_ids: Sequence[int], first: int) -> list[Continuation]:
    """What `leave_one_out` runs: for each token the ones after it, behind a prefix that ends before it."""
    return [Continuation(i, i + 1, token_ids[i + 1 :]) for i in range(first, len(token_ids))]


class Bidirectional(NamedTuple):
    """log P(x_i | all other tokens) of each of n tokens; float64 [n], in nats.

    The sum over the vocabulary leaves out alternatives of probability `tail` together. Their terms are positive, so the true
    value is at most `value`. How far below depends on how likely they make the future. That is at most 1, so the true value is
    at least `l_i + F(x_i) - log(sum + tail)`. This bound is useless, because sum is as small as a long text's likelihood. A
    better
    one needs an assumption: no alternative that was left out makes the future likelier than the best one that was run. Then the
    true value is at least `lower`.
    """

    value: Tensor
    """From the alternatives that were run: an upper bound."""
    lower: Tensor
    """`l_i + F(x_i) - log(sum + tail * exp max F)`: a lower bound under the condition above."""
    tail: Tensor
    """P(v | x_<i), summed over the v that were left out, in [0, 1)."""
    alternatives: Tensor
    """int64 [n]: how many v != x_i were run."""


def likely_alternatives(replay: Replay, tail: float, limit: int) -> list[list[int]]:
    """For each measured token the likeliest other tokens: until at most `tail` of probability is left, or `limit` of them.

    None for the last token, which has no future to weigh them by.
    """
    chosen = []
    for i, distribution in enumerate(replay.distribution[:-1]):
        own = replay.token_ids[replay.first + i]
        top = distribution.topk(min(limit + 1, distribution.numel()))
        left = 1 - float(replay.logprobs[i].exp())
        row: list[int] = []
        for probability, token in zip(top.values.exp().tolist(), top.indices.tolist(), strict=True):
            if left <= tail or len(row) == limit:
                break
            if token != own:
                row.append(token)
                left -= probability
        chosen.append(row)
    return [*chosen, []]


def bidirectional(replay: Replay, alternatives: Sequence[Sequence[int]]) -> Bidirectional:
    """`l_i + F(x_i) - log sum_v exp(l(v) + F(v))` for each looked-at token i, with v over x_i and its `alternatives`."""
    plan = bidirectional_plan(replay.token_ids, replay.first, alternatives)
    futures = iter([logprobs.sum() for logprobs in replay.score(plan)])
    rows = []
    for i, (chosen, later) in enumerate(zip(alternatives, _later(replay, 1), strict=True)):
        logprobs = torch.cat([replay.logprobs[i : i + 1], replay.distribution[i, list(chosen)]])
        future = torch.stack([later.sum(), *(next(futures) for _ in chosen)])
        # The last token has no future, so every alternative would count 1: nothing is left out.
        tail = (1 - logprobs.exp().sum()).clamp(min=0) if later.numel() else torch.zeros((), dtype=torch.float64)
        known = (logprobs + future).logsumexp(0) if later.numel() else torch.zeros((), dtype=torch.float64)
        own = logprobs[0] + future[0]
        rows.append((own - known, own - torch.logaddexp(known, tail.log() + future.max()), tail))
    value, lower, tails = (torch.stack(column) for column in zip(*rows, strict=True))
    return Bidirectional(value, lower, tails, torch.tensor([len(chosen) for chosen in alternatives]))


def bidirectional_plan(token_ids: Sequence[int], first: int, alternatives: Sequence[Sequence[int]]) -> list[Continuation]:
    """What `bidirectional` runs: each alternative in its token's place, followed by the text's later tokens."""
    return [
        Continuation(i, i, [token, *token_ids[i + 1 :]])
        for i, chosen in enumerate(alternatives, start=first)
        for token in chosen
    ]


def cost(plan: Iterable[Continuation]) -> int:
    """Tokens that the model runs for these continuations."""
    return sum(continuation.cost for continuation in plan)


class LayerAttention(NamedTuple):
    """Incoming attention in every layer, mean over heads: float64 [L, N], of all tokens of a sequence."""

    mean: Tensor
    """mu: `sum_{j>i} A_ji / (N - i)`."""
    lift: Tensor
    """`sum_{j>i} j * A_ji / (N - i)`."""


def layer_attention(model: Any, token_ids: Sequence[int]) -> LayerAttention:
    """Statistics of all layers out of one eager forward, which holds one layer's N x N probabilities per head at a time.

    For the last layer the same as `entra.capture_incoming_attention`, which needs no N x N and serves one layer.

    Source: docs/method.md, incoming attention.
    """
    _check_model(model)
    tokens = len(token_ids)
    queries = torch.arange(tokens - 1, -1, -1).clamp(min=1)
    weights = torch.stack([torch.ones(tokens), torch.arange(1.0, tokens + 1)]).double()  # of a query: in the mean, in the lift
    layers: list[Tensor] = []

    def reduce(module: Any, args: Any, output: Any) -> None:
        future = output[1][0].double().mean(dim=0).tril(-1)  # [N, N]
        layers.append((weights.to(future.device) @ future).cpu() / queries)

    hooks = [module.register_forward_hook(reduce) for _, module, _ in attention_layers(model)]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    mean, lift = torch.stack(layers, dim=1)
    return LayerAttention(mean, lift)


def _later(replay: Replay, after: int) -> list[Tensor]:
    """For each looked-at token i the log-probs of x_{i + after} and all later tokens, in the text as it is."""
    return [replay.logprobs[i + after :] for i in range(replay.logprobs.numel())]


def _check_model(model: Any) -> None:
    config = model.config.get_text_config(decoder=True)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    window = getattr(config, "sliding_window", None)
    if other or window is not None:
        raise ValueError(
            f"layer_types has {', '.join(other) or 'full attention only'} and sliding_window={window}; influence is measured "
            "with one mask for all layers, so every layer must attend to all earlier tokens: use a Llama or Qwen3 model, say"
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the model's weights are {model.dtype}; influence is a small difference of log-probs: use model.float()"
        )
