"""`EntraReward`: from scores to a reward that is safe to optimise.

r alone can be gamed: five distinct tokens score 1, gibberish never repeats, and group-scaled advantages blow up any spread,
however small. Hence the options below; docs/method.md argues each.

Under a trainer with several processes the rows of all of them are put together before groups are looked at, because a prompt's
completions may be spread over ranks. Rows of one prompt, by its value, are one group: a reward function is told no more than
that, so two rows of a dataset with the same prompt count as one.
"""

from __future__ import annotations

import inspect
import math
import os
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from entra.config import FLOAT32_MAX, ScoreConfig, check_integer, check_number, names_unknown_options
from entra.encode import Encoder, completion_text, prompt_value
from entra.forward import unwrapped
from entra.gates import called_once
from entra.policy import bound_rollout, check_scorer, resolve_policy
from entra.score import Scores, score_batch

RewardFunction = Callable[..., Sequence[float | None]]


@names_unknown_options
class EntraReward:
    """A TRL reward function: `score_batch` behind a correctness gate and guards against reward hacking.

        trainer = trl.GRPOTrainer(reward_funcs=[entra.EntraReward(model=frozen, tokenizer=tok, gate=accuracy_reward)], ...)

    It is picklable if its parts are. A frozen scorer scores if you pass one as `model`. Otherwise the live policy scores: in
    `entra.EntraGRPOTrainer`, or in any trainer if `entra.bind_policy` is around `trainer.train()`.

    Args:
        model: a frozen scorer, as for `score_batch`. None: the live policy. With a tokenizer the scorer reads the text, because
            the policy's ids may mean something else to it. Without one it scores the ids that the trainer gives. TRL's trainers
            give no ids of prompts. Without a tokenizer you need prompts that are ids, or ENTRA's trainers, which know them.
        tokenizer: the scorer's tokenizer.
        config: the options of the method. None: the defaults.
        gate: any TRL reward function, such as an accuracy reward. It multiplies each reward by what it returns, at least 0, so
            only right answers are paid for being concise. None from the gate gives None. An asynchronous gate is awaited. In
            ENTRA's trainers a gate that is also a reward, or the gate of another, is called once for each batch.
        min_length: completions of fewer tokens get 0, because few tokens never repeat.
        min_mean_logprob: completions whose mean log P is lower get 0, because gibberish never repeats either. None: no floor.
        halve_at: h in tokens. The reward is then 1 / (1 + D / h) instead of r. D = M (1 - r) is how many of the M unprotected
            tokens are redundant. D is a total; r is a mean, which new words that say nothing raise. None: r.
        group_gate: the share of a prompt's completions that must be right, in [0, 1]. If fewer are, they all get 0: brevity
            pays only where the policy can afford it. The share is the mean of the gate's values, cut to 0..1. 0: off. Needs a
            gate.
        dead_band: if the rewards of one prompt's completions lie closer together than this, all are set to their mean, so that
            noise gives no advantage. 0: off.
        skip_truncated: completions without an EOS at the end get None (not scored). Needs completion ids, and a scorer with the
            policy's EOS.
        name: the name under which the trainer logs it.

    Raises:
        ValueError: an option outside its range, or a model that cannot be found or scored.
        TypeError: an option of another type, or an unknown one (the message names the nearest right one).
        RuntimeError: a model without a language-model head.

    Source: docs/method.md, "The reward as an objective".
    """

    def __init__(
        self,
        *,
        model: Any | None = None,
        tokenizer: Any | None = None,
        config: ScoreConfig | None = None,
        gate: RewardFunction | None = None,
        halve_at: float | None = None,
        group_gate: float = 0.0,
        min_length: int = 0,
        min_mean_logprob: float | None = None,
        dead_band: float = 0.0,
        skip_truncated: bool = False,
        name: str = "entra_reward",
    ) -> None:
        if gate is not None and (not callable(gate) or isinstance(gate, torch.nn.Module) or inspect.isclass(gate)):
            raise TypeError(f"gate={gate!r} must be a reward function: called with prompts, completions and columns")
        if config is not None and not isinstance(config, ScoreConfig):
            raise TypeError(f"config={config!r} must be an entra.ScoreConfig, not {type(config).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} must be text, under which the trainer logs the reward")
        if halve_at is not None:
            check_number("halve_at", halve_at, 1e-6, FLOAT32_MAX, "it is a number of redundant tokens")
            if config is not None and (config.ranking_scope != "completion" or config.length_adjusted is not None):
                raise ValueError(
                    f"halve_at={halve_at} counts the redundant tokens of the completion as it is; it does not go with "
                    f"ranking_scope={config.ranking_scope!r} or length_adjusted={config.length_adjusted}"
                )
        check_number("group_gate", group_gate, 0.0, 1.0, "it is a share of a prompt's completions")
        if group_gate > 0 and gate is None:
            raise ValueError(f"group_gate={group_gate} needs a gate that tells which completions are right; pass gate=...")
        if min_length is None:
            raise TypeError("min_length=None must be a whole number of tokens; 0 for no minimum")
        check_integer("min_length", min_length, 0, "tokens")
        if min_mean_logprob is not None:
            check_number("min_mean_logprob", min_mean_logprob, -FLOAT32_MAX, 0.0, "it is a mean log-probability")
        check_number("dead_band", dead_band, 0.0, FLOAT32_MAX, "rewards lie in 0 to 1")
        if model is not None:
            check_scorer(model)
        self.model = model
        self.tokenizer = tokenizer
        self.config = ScoreConfig() if config is None else config
        self.gate = gate
        self.halve_at = halve_at
        self.group_gate = group_gate
        self.min_length = min_length
        self.min_mean_logprob = min_mean_logprob
        self.dead_band = dead_band
        self.skip_truncated = skip_truncated
        self.__name__ = name

    def __call__(
        self,
        /,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion, or None for those that are not scored. `columns` go to the gate.

        Under TRL it logs under its name, as metrics and as columns of the completions table:

        - `score`: r before gate and guards;
        - `redundant_tokens`: M (1 - r);
        - `protected_share`;
        - `incoming`: mean incoming attention of a token.

        As metrics only:

        - `group_std`: the standard deviation of the rewards of one prompt, mean over prompts;
        - `length_correlation`: of reward and tokens;
        - `stopped/gate`, `stopped/group_gate`, `stopped/min_length`, `stopped/min_mean_logprob`, `stopped/dead_band`, for each
          guard that is on: the share of the scored completions that it stops (the dead band: levels), whatever the others do.

        Raises:
            ValueError: `skip_truncated` without completion ids or EOS id, a gate that does not return one finite number or
                None for each completion, or another reward of the same name in the trainer.
        """
        trainer = _trainer(columns)
        check_names(getattr(trainer, "reward_func_names", ()))
        scored_prompts, scored_ids = self._read(prompts, completions, completion_ids)
        scores = score_batch(
            scored_prompts,
            completions,
            scored_ids,
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.config,
            details=True,
        )
        mean_logprobs = [float(l.mean()) if l.numel() else -math.inf for l in scores.logprobs]
        lengths = [ids.numel() for ids in scores.token_ids]
        redundant = [_redundant_tokens(r, protected) for r, protected in zip(scores.rewards, scores.protected, strict=True)]
        values = scores.rewards
        if self.halve_at is not None:
            degenerate = self.config.degenerate_reward
            values = [
                degenerate if d is None and r is not None else halved(d, self.halve_at)
                for r, d in zip(values, redundant, strict=True)
            ]
        rewards = guarded(values, lengths, mean_logprobs, self.min_length, self.min_mean_logprob)
        allowed: list[float | None] = [1.0] * len(rewards)
        if self.gate is not None:
            arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
            allowed = _checked_gate(called_once(self.gate, **arguments), len(rewards))
            rewards = gated(rewards, allowed)
        if self.skip_truncated:
            rewards = self._without_truncated(rewards, completion_ids)
        mine, rows = _from_all_ranks(
            list(map(_Row, map(prompt_value, prompts), lengths, mean_logprobs, allowed, rewards)), "trainer_state" in columns
        )
        groups, gate = [row.group for row in rows], [row.gate for row in rows]
        open_rewards = group_gated([row.reward for row in rows], gate, groups, self.group_gate)
        rewards = dead_banded(open_rewards, groups, self.dead_band)
        stopped = self._stopped(rows, open_rewards)
        self._log(scores, redundant, rewards, rows, stopped, columns.get("log_metric"), columns.get("log_extra"))
        return rewards[mine]

    def _stopped(self, rows: Sequence[_Row], open_rewards: Sequence[float | None]) -> dict[str, float]:
        """By guard that is on: the share of the scored completions that it stops. `open_rewards` go into the dead band."""
        groups, gate = [row.group for row in rows], [row.gate for row in rows]
        floor = -math.inf if self.min_mean_logprob is None else self.min_mean_logprob
        found = {
            "gate": [row.gate is not None and row.gate <= 0 for row in rows] if self.gate is not None else None,
            "group_gate": _below_share(gate, groups, self.group_gate) if self.group_gate > 0 else None,
            "min_length": [row.length < self.min_length for row in rows] if self.min_length > 0 else None,
            "min_mean_logprob": [row.mean_logprob < floor for row in rows] if self.min_mean_logprob is not None else None,
            "dead_band": _within(open_rewards, groups, self.dead_band) if self.dead_band > 0 else None,
        }
        return {
            name: statistics.fmean(hits)
            for name, stops in found.items()
            if stops is not None and (hits := [s for s, row in zip(stops, rows, strict=True) if row.reward is not None])
        }

    def _read(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any] | None
    ) -> tuple[Sequence[Any], Sequence[Any] | None]:
        """Prompts and completion ids as they are scored: no ids where text is read; a frozen scorer without a tokenizer takes
        the ids that the policy generated from."""
        if self._reads_text(completions):
            return prompts, None
        rollout = bound_rollout()
        if self.model is None or self._can_read() or rollout is None or not rollout.holds(prompts, completion_ids):
            return prompts, completion_ids
        return [row.prompt for row in rollout.sequences], completion_ids

    def _log(
        self,
        scores: Scores,
        redundant: Sequence[float | None],
        rewards: Sequence[float | None],
        rows: Sequence[_Row],
        stopped: dict[str, float],
        log_metric: Callable[[str, float], None] | None,
        log_extra: Callable[[str, list[float]], None] | None,
    ) -> None:
        """`scores` and `redundant` tokens of this rank's completions, `rewards`, `rows` and `stopped` of all ranks'."""
        per_completion = {
            "score": [math.nan if reward is None else reward for reward in scores.rewards],
            "redundant_tokens": [math.nan if tokens is None else tokens for tokens in redundant],
            "protected_share": [_mean(protected) for protected in scores.protected],
            "incoming": [_mean(incoming) for incoming in scores.incoming],
        }
        metrics = {name: _mean(torch.tensor(values)) for name, values in per_completion.items()}
        metrics["group_std"] = group_std(rewards, [row.group for row in rows])
        metrics["length_correlation"] = correlation(rewards, [row.length for row in rows])
        metrics |= {f"stopped/{name}": share for name, share in stopped.items()}
        if log_extra is not None:
            for name, values in per_completion.items():
                log_extra(f"{self.__name__}/{name}", values)
        if log_metric is not None:
            for name, value in metrics.items():
                if math.isfinite(value):
                    log_metric(f"{self.__name__}/{name}", value)

    def __getstate__(self) -> dict[str, Any]:
        if self.model is None and get_spawning_popen() is not None:
            raise RuntimeError(
                f"{self.__name__} has no model of its own, so it scores with the live policy, but it is being sent to another "
                "process, which has none (as TRL's async trainer does): pass model=..., use entra.EntraGRPOTrainer, or build "
                "the reward in that process"
            )
        return vars(self)

    def _can_read(self) -> bool:
        """Whether the scorer is a frozen one with a tokenizer of its own."""
        return self.model is not None and (self.tokenizer is not None or isinstance(self.model, str | os.PathLike))

    def _reads_text(self, completions: Sequence[Any] | None) -> bool:
        """Whether a scorer with a tokenizer of its own has text to read."""
        if not self._can_read():
            return False
        try:
            return completions is not None and all(completion_text(completion) is not None for completion in completions)
        except (TypeError, ValueError):  # ids, or messages of a tool
            return False

    def _without_truncated(self, rewards: list[float | None], completion_ids: Sequence[Any] | None) -> list[float | None]:
        if completion_ids is None:
            raise ValueError("skip_truncated=True needs completion_ids, whose last id tells whether the completion had ended")
        policy = resolve_policy(self.model, self.tokenizer)
        model = None if policy is None else unwrapped(policy.model)
        encoder = Encoder(None if policy is None else policy.tokenizer, model, {})
        return [reward if encoder.has_ended(ids) else None for reward, ids in zip(rewards, completion_ids, strict=True)]


def check_names(names: Sequence[str]) -> None:
    """Raises a ValueError when two reward functions of a trainer have one name: it would log the mean of the two as one."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"reward_funcs holds {names.count(name)} functions called {name!r}, whose metrics would be averaged; give them "
                "different names: entra.EntraReward(name=...), or the function's __name__"
            )


def _trainer(columns: dict[str, Any]) -> Any | None:
    """The trainer of TRL's that calls: all that it tells of itself is the owner of the function that logs."""
    return getattr(columns.get("log_metric"), "__self__", None)


def _checked_gate(values: Any, count: int) -> list[float | None]:
    """The gate's values, one finite number or None for each completion: a list, an array or a tensor."""
    rule = "it must return a list with one number or None for each"
    if isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise ValueError(f"gate returned {values!r} for {count} completions; {rule}")
    if len(values) != count:
        raise ValueError(f"gate returned {len(values)} values for {count} completions; {rule}")
    checked: list[float | None] = []
    for i, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise ValueError(f"gate returned {value!r} for row {i}; it must be a finite number, or None for not scored")
        checked.append(number)
    return checked


def guarded(
    rewards: Sequence[float | None],
    lengths: Sequence[int],
    mean_logprobs: Sequence[float],
    min_length: int,
    min_mean_logprob: float | None,
) -> list[float | None]:
    """`reward` where the completion is long enough and probable enough, else 0.0; None stays None."""
    floor = -math.inf if min_mean_logprob is None else min_mean_logprob
    return [
        None if reward is None else reward if length >= min_length and mean >= floor else 0.0
        for reward, length, mean in zip(rewards, lengths, mean_logprobs, strict=True)
    ]


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
    for indices in _members(groups).values() if share > 0 else ():
        values = [min(max(value, 0.0), 1.0) for i in indices if (value := gate[i]) is not None]
        for i in indices:
            below[i] = not values or sum(values) / len(values) < share
    return below


def dead_banded(rewards: Sequence[float | None], groups: Sequence[Hashable], width: float) -> list[float | None]:
    """Rewards of one group that lie within less than `width` become their mean: no spread, no advantage."""
    result = list(rewards)
    levelled = _within(rewards, groups, width)
    for indices in _members(groups).values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        for i in indices:
            if levelled[i] and rewards[i] is not None:
                result[i] = sum(values) / len(values)
    return result


def _within(rewards: Sequence[float | None], groups: Sequence[Hashable], width: float) -> list[bool]:
    """Whose group has rewards that differ, but all lie closer together than `width`."""
    within = [False] * len(rewards)
    for indices in _members(groups).values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        for i in indices:
            within[i] = bool(values) and 0 < max(values) - min(values) < width
    return within


def group_std(rewards: Sequence[float | None], groups: Sequence[Hashable]) -> float:
    """Mean over groups of the standard deviation of the rewards of one group, as TRL divides by it (n - 1); NaN without a
    group of two."""
    spreads = []
    for indices in _members(groups).values():
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


class _Row(NamedTuple):
    """What is known of one completion when groups are looked at."""

    group: Hashable
    length: int
    mean_logprob: float
    gate: float | None
    reward: float | None


def _from_all_ranks(rows: list[_Row], in_a_trainer: bool) -> tuple[slice, list[_Row]]:
    """The rows of all ranks where a trainer runs several, and which of them are ours."""
    if not (in_a_trainer and dist.is_available() and dist.is_initialized()):
        return slice(None), rows
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, rows)
    first = sum(len(part) for part in everybody[: dist.get_rank()])
    return slice(first, first + len(rows)), [row for part in everybody for row in part]


def _redundant_tokens(reward: float | None, protected: Tensor) -> float | None:
    """D = M (1 - r): 0 when none of the M unprotected tokens repeats, M when all are the same; None where r means nothing."""
    unprotected = int((~protected).sum())
    return None if reward is None or unprotected <= 1 else unprotected * (1.0 - reward)


def _members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return members


def _mean(values: Tensor) -> float:
    """NaN for none, and NaN values do not count."""
    return float(values.float().nanmean())
