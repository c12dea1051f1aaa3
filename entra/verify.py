"""Is the kernels' number right, here and now? One sequence of a running training, scored again by the pure-PyTorch reference.

The kernels and the reference get the same q and k, hidden states and weights: those of one forward of the sequence's leading
tokens. The reference takes one head, or some rows of logits, at a time, so memory stays that of one N x N matrix. If the
leading tokens are the whole sequence, the numbers behind the rewards are compared too. They may come from the trainer's pass,
under its padding and in its batch.

The budgets: kernel and reference differ by float32 rounding alone. A score is a sum of D products, together at most S = scale *
max |q| * max |k|. So it is off by about sqrt(D) * eps * S, and its exponential by as much, relatively. The same goes for
log-probs, with C and the head's weights. 16 of those are allowed. A second forward of the same sequence also rounds differently
inside the model. There the mean is compared against `_FORWARD_BUDGET`: a wrong alignment moves it by its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entra.capture import OverRanks
from entra.config import ScoreConfig
from entra.forward import token_signals
from entra.rollout import Rollout
from entra_kernels import incoming_attention

LEADING_TOKENS = 2_048

_ROUNDINGS = 16 * torch.finfo(torch.float32).eps
_LOGIT_ROWS = 128  # of the reference at a time: 80 MB of float32 logits with a vocabulary of 150,000

# Two forwards of one sequence; a shift by one token gives about 1.
_FORWARD_BUDGET = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_PRECISION_BUDGET = 0.1


class Check(NamedTuple):
    """One comparison: passed when deviation <= budget."""

    name: str
    deviation: float
    budget: float


class Deviation(NamedTuple):
    """How far the kernels were off on one sequence."""

    checks: tuple[Check, ...]

    def metrics(self) -> dict[str, float]:
        """Deviations by name, for a trainer's log: `incoming` is relative, `logprobs` absolute (nats)."""
        return {check.name: check.deviation for check in self.checks}

    def breach(self) -> str | None:
        """What is wrong, in one sentence; None when all is within the budget."""
        wrong = [f"{c.name} by {c.deviation:.3g} (budget {c.budget:.3g})" for c in self.checks if not c.deviation <= c.budget]
        if not wrong:
            return None
        return (
            f"scores are off from the reference: {', '.join(wrong)}; rewards cannot be trusted. Train with "
            "ScoreConfig(backend='torch') to see whether a kernel is the cause. Report it with model, GPU and versions"
        )


def verify(rollout: Rollout, row: int, config: ScoreConfig) -> Deviation:
    """Score the leading tokens of one row again, by `config.backend` and by the reference.

    Args:
        rollout: the batch. Where ranks hold parts of its model, all of them must verify at the same time.
        row: which of its rows.
        config: statistic, head reduction and backend of the scores.

    Returns:
        The deviations with their budgets.
    """
    sequence = rollout.sequences[row]
    tokens = (sequence.prompt + sequence.completion)[:LEADING_TOKENS]
    last = len(tokens) - len(sequence.prompt)
    reference = _Reference(config)
    computed = token_signals(rollout.model, [tokens], [last if last > 0 else len(tokens) - 1], config, inspector=reference)[0]
    if computed.logprobs.numel() == 0:  # a prompt of one token without completion
        return Deviation(())
    incoming = reference.incoming[-computed.incoming.numel() :]
    if not bool(torch.isfinite(incoming).all() & torch.isfinite(reference.logprobs).all()):
        return Deviation(())  # the model's own numbers are not; such a row gets no reward either
    checks = [
        Check("incoming", _relative(computed.incoming, incoming), reference.incoming_budget),
        Check("logprobs", _largest(computed.logprobs, reference.logprobs), reference.logprob_budget),
    ]
    if last == len(sequence.completion) and last > 0 and config.ranking_scope == "completion":
        scored = rollout.signals(config)[row]
        mine = rollout.own_mask(row).to(incoming.device)
        if bool(mine.any()):
            budget = forward_budget(reference.dtype)
            l, mu = reference.logprobs[mine], incoming[mine]
            checks += [
                Check("scored_incoming", float((scored.incoming.to(mu) - mu).abs().sum() / mu.sum().clamp(min=1e-20)), budget),
                Check("scored_logprobs", float((scored.logprobs.to(l) - l).abs().mean()), budget),
            ]
    return Deviation(tuple(checks))


def forward_budget(dtype: torch.dtype) -> float:
    """What two forwards of one sequence in `dtype` may differ by, in mean |delta log P| and in sum |delta mu| / sum mu."""
    return _FORWARD_BUDGET.get(dtype, _HALF_PRECISION_BUDGET)


class _Reference:
    """The reference's own numbers, from inside the forward: `incoming` [N] and `logprobs` [n], and what rounding may do to
    them."""

    incoming: Tensor
    logprobs: Tensor
    incoming_budget: float
    logprob_budget: float
    dtype: torch.dtype

    def __init__(self, config: ScoreConfig) -> None:
        self._reduction = config.head_reduction

    def attention(self, q: Tensor, k: Tensor, options: dict[str, Any], over_ranks: OverRanks) -> None:
        """q [1, H, N, D], k [1, G, N, D] of the scored layer, and the other arguments of `incoming_attention`."""
        heads, group = q.shape[1], q.shape[1] // k.shape[1]
        total = torch.zeros(q.shape[2], dtype=torch.float32, device=q.device)
        for h in range(heads):
            sinks = options.get("sinks")
            one = incoming_attention(
                q[:, h : h + 1],
                k[:, h // group : h // group + 1],
                **{**options, "sinks": None if sinks is None else sinks[h : h + 1]},
                backend="reference",
            )[0]
            total = torch.maximum(total, one) if self._reduction == "max" else total + one / heads
        self.incoming = over_ranks(total)
        # Norms and RoPE may leave q in float32 where autocast runs the model's products in another precision.
        device = q.device.type
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
        size = options["scale"] * float(q.float().norm(dim=-1).max()) * float(k.float().norm(dim=-1).max())
        self.incoming_budget = _ROUNDINGS * (1 + math.sqrt(q.shape[-1]) * size)

    def head(
        self, logprobs_by: Callable[[str, Tensor, Tensor], Tensor], weight: Tensor | None, hidden: Tensor, ids: Tensor
    ) -> None:
        """hidden [n, C] on its way into the head, the ids [n] that it predicts, and log-probs of them by any backend."""
        parts = zip(hidden.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True)
        self.logprobs = torch.cat([logprobs_by("reference", h, i) for h, i in parts]).float()
        size = float(hidden.float().norm(dim=-1).max())
        if weight is not None:
            size *= max(float(w.float().norm(dim=-1).max()) for w in weight.split(4_096))
        self.logprob_budget = _ROUNDINGS * (1 + math.sqrt(hidden.shape[-1]) * size)


def _relative(values: Tensor, reference: Tensor) -> float:
    return float(((values - reference).abs() / reference.abs().clamp(min=1e-20)).max())


def _largest(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).abs().max())
