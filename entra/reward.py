"""`EntraReward`: from scores to a reward that is safe to optimise. Everything here is pure but the call to `score_batch`.

r alone can be gamed: five distinct tokens score 1, gibberish never repeats, and group-scaled advantages blow up any spread,
however small. Hence the options below; docs/method.md argues each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from entra.config import FLOAT32_MAX, ScoreConfig, check_integer, check_number, names_unknown_options
from entra.encode import Encoder
from entra.forward import unwrapped
from entra.policy import resolve_policy
from entra.score import score_batch

RewardFunction = Callable[..., Sequence[float | None]]


@names_unknown_options
class EntraReward:
    """A TRL reward function: `score_batch` behind a correctness gate and guards against reward hacking.

        trainer = trl.GRPOTrainer(reward_funcs=[entra.EntraReward(model=frozen, tokenizer=tok, gate=accuracy_reward)], ...)

    Picklable when its parts are, named, synchronous. Scores with a model of its own (a frozen scorer), or with the live policy
    when `entra.bind_policy` is around `trainer.train()`.

    Args:
        model: a frozen scorer, as for `score_batch`; None: the bound policy.
        tokenizer: its tokenizer.
        config: the options of the method; None: the defaults.
        gate: any TRL reward function, such as an accuracy reward. Each reward is multiplied by what it returns (at least 0), so
            only right answers are paid for being concise; None from the gate gives None. Must not be async.
        min_length: completions of fewer tokens get 0, because few tokens never repeat.
        min_mean_logprob: completions whose mean log P is lower get 0, because gibberish never repeats either; None: no floor.
        dead_band: rewards of one prompt's completions that differ by less than this in all are set to their mean, so that noise
            gives no advantage. 0: off.
        skip_truncated: completions without an EOS at the end get None (not scored). Needs completion ids.
        name: how the trainer logs it.

    Raises:
        ValueError: an option outside its range.
        TypeError: an option of another type, or an unknown one (the nearest right one is named).

    Source: docs/method.md, "The reward as an objective".
    """

    def __init__(
        self,
        *,
        model: Any | None = None,
        tokenizer: Any | None = None,
        config: ScoreConfig | None = None,
        gate: RewardFunction | None = None,
        min_length: int = 0,
        min_mean_logprob: float | None = None,
        dead_band: float = 0.0,
        skip_truncated: bool = False,
        name: str = "entra_reward",
    ) -> None:
        if gate is not None and (not callable(gate) or inspect.iscoroutinefunction(gate)):
            raise TypeError(
                f"gate={gate!r} must be a synchronous reward function: called with prompts, completions and columns"
            )
        if config is not None and not isinstance(config, ScoreConfig):
            raise TypeError(f"config={config!r} must be an entra.ScoreConfig, not {type(config).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} must be text, under which the trainer logs the reward")
        check_integer("min_length", min_length, 0, "tokens")
        if min_mean_logprob is not None:
            check_number("min_mean_logprob", min_mean_logprob, -FLOAT32_MAX, 0.0, "it is a mean log-probability")
        check_number("dead_band", dead_band, 0.0, FLOAT32_MAX, "rewards lie in 0 to 1")
        self.model = model
        self.tokenizer = tokenizer
        self.config = ScoreConfig() if config is None else config
        self.gate = gate
        self.min_length = min_length
        self.min_mean_logprob = min_mean_logprob
        self.dead_band = dead_band
        self.skip_truncated = skip_truncated
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion, or None for those that are not scored. `columns` go to the gate.

        Raises:
            ValueError: `skip_truncated` without completion ids or EOS id, or a gate that does not return one finite number or
                None for each completion.
        """
        scores = score_batch(
            prompts,
            completions,
            completion_ids,
            model=self.model,
            tokenizer=self.tokenizer,
            config=self.config,
            details=True,
        )
        mean_logprobs = [float(l.mean()) if l.numel() else -math.inf for l in scores.logprobs]
        lengths = [ids.numel() for ids in scores.token_ids]
        rewards = guarded(scores.rewards, lengths, mean_logprobs, self.min_length, self.min_mean_logprob)
        if self.gate is not None:
            allowed = self.gate(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            rewards = gated(rewards, _checked_gate(allowed, len(rewards)))
        if self.skip_truncated:
            rewards = self._without_truncated(rewards, completion_ids)
        return dead_banded(rewards, [_group_key(prompt) for prompt in prompts], self.dead_band)

    def _without_truncated(self, rewards: list[float | None], completion_ids: Sequence[Any] | None) -> list[float | None]:
        if completion_ids is None:
            raise ValueError("skip_truncated=True needs completion_ids, whose last id tells whether the completion had ended")
        policy = resolve_policy(self.model, self.tokenizer)
        model = None if policy is None else unwrapped(policy.model)
        encoder = Encoder(None if policy is None else policy.tokenizer, model, {})
        return [reward if encoder.has_ended(ids) else None for reward, ids in zip(rewards, completion_ids, strict=True)]


def _checked_gate(values: Any, count: int) -> list[float | None]:
    """The gate's values, one finite number or None for each completion."""
    if not isinstance(values, Sequence) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
        raise ValueError(f"gate returned {got} for {count} completions; it must return a list with one number or None for each")
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"gate returned {value!r} for row {i}; it must be a finite number, or None for not scored")
    return list(values)


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


def gated(rewards: Sequence[float | None], gate: Sequence[float | None]) -> list[float | None]:
    """`reward * max(gate, 0)`: a negative gate counts as 0, since a negative product would pay for redundancy."""
    return [
        None if reward is None or allowed is None else reward * max(float(allowed), 0.0)
        for reward, allowed in zip(rewards, gate, strict=True)
    ]


def dead_banded(rewards: Sequence[float | None], groups: Sequence[Hashable], width: float) -> list[float | None]:
    """Rewards of one group that lie within less than `width` become their mean: no spread, no advantage."""
    result = list(rewards)
    if width == 0:
        return result
    members: dict[Hashable, list[int]] = {}
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if reward is not None:
            members.setdefault(group, []).append(i)
    for indices in members.values():
        values = [value for i in indices if (value := rewards[i]) is not None]
        if max(values) - min(values) < width:
            for i in indices:
                result[i] = sum(values) / len(values)
    return result


def _group_key(prompt: Any) -> Hashable:
    """Completions of the same prompt are one group."""
    return prompt if isinstance(prompt, str) else repr(prompt)
