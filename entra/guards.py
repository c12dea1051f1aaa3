"""`Guards`: what makes r safe to optimise, one field each, and what they do to the rewards of a batch.

A guard is all here: its field, its check, and one entry in `_stops` or one step in `apply`. The field's docstring is also its
flag's help. docs/method.md argues each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from entra.config import ScoreConfig, check_integer, names_unknown_options
from entra_kernels._checks import check_number


class Judged(NamedTuple):
    """What is known of one completion when the guards look at it."""

    group: Hashable
    """Equal for the completions of one prompt."""
    length: int
    """Tokens."""
    mean_logprob: float
    score: float | None
    """r; None where it is not scored."""
    redundant: float | None
    """D = M (1 - r); None where r means nothing."""
    gate: float | None
    """What the gate returned; 1 where there is none."""
    ended: bool
    """False where the completion was cut off."""


@names_unknown_options
@dataclass(frozen=True, kw_only=True)
class Guards:
    """The guards of `EntraReward`, which takes each field as a keyword. Frozen, keyword-only, checks itself. All are off.

    Raises:
        ValueError: a value outside its range. The message names the field, the value and the rule.
        TypeError: a value of another type, or an unknown option (the message names the nearest right one).
    """

    halve_at: float | None = None
    """h in tokens. The reward is then 1 / (1 + D / h) instead of r. D = M (1 - r) is how many of the M unprotected tokens are
    redundant. D is a total; r is a mean, which new words that say nothing raise. None: r."""

    group_gate: float = 0.0
    """The share of a prompt's completions that must pass the gate, in [0, 1]. If fewer do, they all get 0: brevity pays only
    where the policy can afford it. The share is the mean of the gate's values, cut to 0..1. 0: off. Needs a gate."""

    min_length: int = 0
    """Completions of fewer tokens get 0, because few tokens never repeat."""

    min_mean_logprob: float | None = None
    """Completions whose mean log P is lower get 0, because gibberish never repeats either. None: no floor."""

    dead_band: float = 0.0
    """If the rewards of one prompt's completions lie closer together than this, all are set to their mean, so that noise gives
    no advantage. 0: off."""

    skip_truncated: bool = False
    """Completions without an EOS at the end get None (not scored). Needs completion ids, and a scorer with the policy's EOS."""

    def __post_init__(self) -> None:
        if self.halve_at is not None:
            rule = "at least 1e-06 and finite; it is a number of redundant tokens"
            check_number("halve_at", self.halve_at, rule, low=1e-6)
        rule = "in [0, 1]; it is a share of a prompt's completions"
        check_number("group_gate", self.group_gate, rule, low=0.0, high=1.0)
        if self.min_length is None:
            raise TypeError("min_length=None must be a whole number of tokens; 0 for no minimum")
        check_integer("min_length", self.min_length, 0, "tokens")
        if self.min_mean_logprob is not None:
            rule = "at most 0 and finite; it is a mean log-probability"
            check_number("min_mean_logprob", self.min_mean_logprob, rule, high=0.0)
        check_number("dead_band", self.dead_band, "at least 0 and finite; rewards lie in 0 to 1", low=0.0)

    def check_with(self, config: ScoreConfig, has_gate: bool) -> None:
        """Raises a ValueError for a guard that does not go with the rest of the reward."""
        if self.halve_at is not None and (config.ranking_scope != "completion" or config.length_adjusted is not None):
            raise ValueError(
                f"halve_at={self.halve_at} counts the redundant tokens of the completion as it is; it does not go with "
                f"ranking_scope={config.ranking_scope!r} or length_adjusted={config.length_adjusted}: leave one out"
            )
        if self.group_gate > 0 and not has_gate:
            raise ValueError(f"group_gate={self.group_gate} needs a gate that tells which completions are right; pass gate=...")

    def apply(
        self, judged: Sequence[Judged], *, degenerate: float = 0.0, has_gate: bool = False
    ) -> tuple[list[float | None], dict[str, float]]:
        """The rewards of a batch, all ranks' completions together, and which share of them each guard stops.

        Args:
            judged: the completions.
            degenerate: the reward where D means nothing but the completion is scored.
            has_gate: whether there is a gate, for the shares.

        Returns:
            One reward per completion, None where it is not scored. And for each guard that is on, the share of the scored
            completions that it stops (the dead band: that it levels), whatever the others do.
        """
        groups = [one.group for one in judged]
        values = [one.score for one in judged]
        if self.halve_at is not None:
            values = [
                degenerate if one.redundant is None and one.score is not None else halved(one.redundant, self.halve_at)
                for one in judged
            ]
        values = gated(values, [one.gate for one in judged])
        values = [value if one.ended or not self.skip_truncated else None for one, value in zip(judged, values, strict=True)]
        stops = self._stops(judged)
        for hits in stops.values():
            values = [0.0 if hit and value is not None else value for hit, value in zip(hits, values, strict=True)]
        if has_gate:
            stops["gate"] = [one.gate is not None and one.gate <= 0 for one in judged]
        if self.dead_band > 0:
            stops["dead_band"] = _within(values, groups, self.dead_band)
        counted = [i for i, value in enumerate(values) if value is not None]
        shares = {name: statistics.fmean(hits[i] for i in counted) for name, hits in stops.items() if counted}
        return dead_banded(values, groups, self.dead_band), shares

    def _stops(self, judged: Sequence[Judged]) -> dict[str, list[bool]]:
        """By guard that is on and gives 0: which completions get it."""
        stops: dict[str, list[bool]] = {}
        if self.group_gate > 0:
            stops["group_gate"] = _below_share([one.gate for one in judged], [one.group for one in judged], self.group_gate)
        if self.min_length > 0:
            stops["min_length"] = [one.length < self.min_length for one in judged]
        if self.min_mean_logprob is not None:
            stops["min_mean_logprob"] = [not one.mean_logprob >= self.min_mean_logprob for one in judged]
        return stops


def halved(redundant: float | None, at: float) -> float | None:
    """`1 / (1 + redundant / at)`: 1 without redundant tokens, one half at `at` of them; None stays None."""
    return None if redundant is None else 1.0 / (1.0 + redundant / at)


def gated(rewards: Sequence[float | None], gate: Sequence[float | None]) -> list[float | None]:
    """`reward * max(gate, 0)`: a negative gate counts as 0, since a negative product would pay for redundancy."""
    return [
        None if reward is None or allowed is None else reward * max(float(allowed), 0.0)
        for reward, allowed in zip(rewards, gate, strict=True)
    ]


def group_gated(
    rewards: Sequence[float | None], gate: Sequence[float | None], groups: Sequence[Hashable], share: float
) -> list[float | None]:
    """0.0 in groups whose mean gate, cut to 0..1, is below `share`; None stays None, and a gate of None does not count."""
    closed = _below_share(gate, groups, share)
    return [0.0 if below and reward is not None else reward for reward, below in zip(rewards, closed, strict=True)]


def _below_share(gate: Sequence[float | None], groups: Sequence[Hashable], share: float) -> list[bool]:
    """Whose group has a mean gate, cut to 0..1, below `share`."""
    below = [False] * len(gate)
    for indices in members(groups).values() if share > 0 else ():
        values = [min(max(value, 0.0), 1.0) for i in indices if (value := gate[i]) is not None]
        for i in indices:
            below[i] = not values or sum(values) / len(values) < share
    return below


def dead_banded(rewards: Sequence[float | None], groups: Sequence[Hashable], width: float) -> list[float | None]:
    """Rewards of one group that lie within less than `width` become their mean: no spread, no advantage."""
    result = list(rewards)
    levelled = _within(rewards, groups, width)
    for indices in members(groups).values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        for i in indices:
            if levelled[i] and rewards[i] is not None:
                result[i] = sum(values) / len(values)
    return result


def _within(rewards: Sequence[float | None], groups: Sequence[Hashable], width: float) -> list[bool]:
    """Whose group has rewards that differ, but all lie closer together than `width`."""
    within = [False] * len(rewards)
    for indices in members(groups).values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        for i in indices:
            within[i] = bool(values) and 0 < max(values) - min(values) < width
    return within


def group_std(rewards: Sequence[float | None], groups: Sequence[Hashable]) -> float:
    """Mean over groups of the standard deviation of the rewards of one group, as TRL divides by it (n - 1); NaN without a
    group of two."""
    spreads = []
    for indices in members(groups).values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        if len(values) > 1:
            spreads.append(statistics.stdev(values))
    return statistics.fmean(spreads) if spreads else math.nan


def correlation(rewards: Sequence[float | None], lengths: Sequence[int]) -> float:
    """Pearson correlation of reward and length over what is scored, -1..1; NaN where one of them does not vary."""
    pairs = [(reward, length) for reward, length in zip(rewards, lengths, strict=True) if reward is not None]
    if len({reward for reward, _ in pairs}) < 2 or len({length for _, length in pairs}) < 2:
        return math.nan
    return statistics.correlation([reward for reward, _ in pairs], [length for _, length in pairs])


def members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Indices by group."""
    found: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return found
