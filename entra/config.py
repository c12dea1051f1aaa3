"""`ScoreConfig`: every choice of the method, named and recorded with each result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Statistic = Literal["mean", "lift"]
HeadReduction = Literal["mean", "max"]
RankingScope = Literal["completion", "sequence"]
Backend = Literal["auto", "reference", "torch", "triton"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How a completion is scored. Frozen, keyword-only, checks itself; the defaults are docs/method.md's.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    attention_weight: float = 2.0
    """lambda in I = log P + lambda * mu. The paper used 2 for MATH and 1e-4 elsewhere. 0 ranks by log P alone."""

    protect_fraction: float = 0.2
    """tau: the share of the completion's tokens, those of highest importance, that the reward does not look at. In [0, 1]."""

    attention_statistic: Statistic = "mean"
    """"mean": mean attention from future tokens. "lift": each query's attention as a multiple of its uniform share, which
    removes the position bias (mean attention falls with the position by itself). Our option; the paper's is "mean"."""

    head_reduction: HeadReduction = "mean"
    """How the query heads of the layer become one number. Our choice; the paper's summary does not fix it."""

    ranking_scope: RankingScope = "completion"
    """"completion": prompt tokens attend and are attended to, but only completion tokens are ranked and counted. "sequence":
    the prompt's tokens too, all but the first, which has no log P. Our choice; the paper's summary does not fix it."""

    degenerate_reward: float = 0.0
    """The reward when at most one token is left unprotected, where entropy over log M is undefined. 0 is the worst reward:
    a one-token answer must not be the best one."""

    length_adjusted: int | None = None
    """Report the expected reward of this many unprotected positions drawn at random (rarefaction) instead of the reward of all
    of them, which falls with the length by itself. At least 2. Completions with fewer positions are taken as they are."""

    token_budget: int | None = None
    """Padded tokens in one forward: memory and speed, results do not depend on it. None: 16,384 on a GPU, 1,024 on a CPU, where
    large batches gain nothing and padding costs as much as tokens."""

    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `apply_chat_template` for chat prompts, e.g. {"enable_thinking": False}."""

    backend: Backend = "auto"
    """The kernels' backend: "auto" is Triton on CUDA and ROCm, else torch."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.attention_weight):
            raise ValueError(f"attention_weight={self.attention_weight} must be finite; the paper used 2.0 and 1e-4")
        if not 0.0 <= self.protect_fraction <= 1.0:
            raise ValueError(f"protect_fraction={self.protect_fraction} must be in [0, 1]; 0.2 protects the top 20 %")
        for name, kind in (
            ("attention_statistic", Statistic),
            ("head_reduction", HeadReduction),
            ("ranking_scope", RankingScope),
            ("backend", Backend),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, get_args(kind)))}")
        if not math.isfinite(self.degenerate_reward):
            raise ValueError(f"degenerate_reward={self.degenerate_reward} must be finite")
        if self.length_adjusted is not None and self.length_adjusted < 2:
            raise ValueError(f"length_adjusted={self.length_adjusted} must be at least 2 positions, or None for no adjustment")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget={self.token_budget} must be at least 1 token, or None")
