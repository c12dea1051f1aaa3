"""`EntraReward`: from scores to a reward that is safe to optimise. Everything here is pure but the call to `score_batch`.

r alone can be gamed: five distinct tokens score 1, gibberish never repeats, and group-scaled advantages blow up any spread,
however small. Hence the options below; docs/method.md argues each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from entra.config import ScoreConfig
from entra.encode import Encoder
from entra.forward import unwrapped
from entra.policy import resolve_policy
from entra.score import score_batch

RewardFunction = Callable[..., Sequence[float | None]]


class EntraReward:
    """A TRL reward function: `score_batch` behind a correctness gate and guards against reward hacking.

        trainer = entra_trainer_or_trl_trainer(reward_funcs=[entra.EntraReward(gate=accuracy_reward)], ...)

    Picklable when its parts are, named, synchronous. Works in a plain `trl.GRPOTrainer` with a model of its own (a frozen
    scorer), or with the policy bound by `entra.bind_policy`.

    Args:
        model: a frozen scorer, as for `score_batch`; None: the bound policy.
        tokenizer: its tokenizer.
        config: the options of the method; None: the defaults.
        gate: any TRL reward function, such as an accuracy reward. Each reward is multiplied by what it returns (at least 0), so
            only right answers are paid for being concise; None from the gate gives None.
        min_length: completions of fewer tokens get 0, because few tokens never repeat.
        min_mean_logprob: completions whose mean log P is lower get 0, because gibberish never repeats either; None: no floor.
        dead_band: rewards of one prompt's completions that differ by less than this in all are set to their mean, so that noise
            gives no advantage. 0: off.
        skip_truncated: completions without an EOS at the end get None (not scored). Needs completion ids.
        name: how the trainer logs it.

    Raises:
        ValueError: an option outside its range.
        TypeError: a gate that cannot be called.

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
        if gate is not None and not callable(gate):
            raise TypeError(f"gate={gate!r} must be a reward function: called with prompts, completions and columns")
        if min_length < 0:
            raise ValueError(f"min_length={min_length} must be at least 0 tokens")
        if min_mean_logprob is not None and not min_mean_logprob <= 0:
            raise ValueError(f"min_mean_logprob={min_mean_logprob} must be a mean log-probability, at most 0; or None")
        if not 0 <= dead_band < math.inf:
            raise ValueError(f"dead_band={dead_band} must be at least 0 and finite; rewards lie in [0, 1]")
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
            ValueError: `skip_truncated` without completion ids, or a gate that returns another number of values.
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
            if len(allowed) != len(rewards):
                raise ValueError(
                    f"gate returned {len(allowed)} values for {len(rewards)} completions; it must return one for each"
                )
            rewards = gated(rewards, allowed)
        if self.skip_truncated:
            rewards = self._without_truncated(rewards, completion_ids)
        return dead_banded(rewards, [_group_key(prompt) for prompt in prompts], self.dead_band)

    def _without_truncated(self, rewards: list[float | None], completion_ids: Sequence[Any] | None) -> list[float | None]:
        if completion_ids is None:
            raise ValueError("skip_truncated=True needs completion_ids, whose last id tells whether the completion had ended")
        policy = resolve_policy(self.model, self.tokenizer)
        model = None if policy is None else unwrapped(policy.model)
        eos_ids = Encoder(None if policy is None else policy.tokenizer, model, {}).eos_ids
        ended = [len(ids) > 0 and int(ids[-1]) in eos_ids for ids in completion_ids]
        return [reward if end else None for reward, end in zip(rewards, ended, strict=True)]


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
