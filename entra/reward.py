"""`EntraReward`: from scores to a reward that is safe to optimise.

r alone can be gamed: five distinct tokens score 1, gibberish never repeats, and group-scaled advantages blow up any spread,
however small. Hence the options below; docs/method.md argues each.

Under a trainer with several processes the rows of all of them are put together before groups are looked at, because a prompt's
completions may be spread over ranks. Rows whose prompts are equal are one group: a reward function is told no more than that.
So two rows of a dataset with the same prompt count as one.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from entra.config import ScoreConfig, names_unknown_options, takes_fields_of
from entra.encode import Encoder, completion_text, prompt_value
from entra.forward import unwrapped
from entra.gates import called_once
from entra.guards import Guards, Judged, correlation, group_std
from entra.policy import bound_rollout, check_scorer, resolve_policy
from entra.score import Scores, score_batch
from entra_kernels._checks import shown

RewardFunction = Callable[..., Sequence[float | None]]


@names_unknown_options
@takes_fields_of(Guards)
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
            only right answers are paid for being concise. None from the gate gives None. An asynchronous gate is awaited. Where
            a gate is also a reward, or the gate of another, ENTRA's trainers call it once for each batch.
        name: the name under which the trainer logs it.
        guards: the fields of `entra.guards.Guards`. They are described there.

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
        name: str = "entra_reward",
        **guards: Any,
    ) -> None:
        if gate is not None and (not callable(gate) or isinstance(gate, torch.nn.Module) or inspect.isclass(gate)):
            raise TypeError(f"gate={shown(gate)} must be a reward function: called with prompts, completions and columns")
        if config is not None and not isinstance(config, ScoreConfig):
            raise TypeError(f"config={shown(config)} must be an entra.ScoreConfig, not {type(config).__name__}")
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} must be text, under which the trainer logs the reward")
        self.model = model
        self.tokenizer = tokenizer
        self.config = ScoreConfig() if config is None else config
        self.gate = gate
        self.guards = Guards(**guards)
        self.guards.check_with(self.config, gate is not None)
        self.__name__ = name
        if model is not None:
            check_scorer(model)

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
        - `stopped/NAME` for the gate and each guard that is on: the share of the scored completions that it stops (the dead
          band: levels), whatever the others do.

        Raises:
            ValueError: `skip_truncated` finds no completion ids or no EOS id. Or the gate does not return one finite number or
                None for each completion. Or the trainer has another reward of the same name.
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
        count = len(scores.rewards)
        allowed: list[float | None] = [1.0] * count
        if self.gate is not None:
            arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
            allowed = _checked_gate(called_once(self.gate, **arguments), count)
        facts = zip(
            map(prompt_value, prompts),
            [ids.numel() for ids in scores.token_ids],
            [float(l.mean()) if l.numel() else -math.inf for l in scores.logprobs],
            scores.rewards,
            [one.redundant_tokens for one in scores],
            allowed,
            self._ended(completion_ids) if self.guards.skip_truncated else [True] * count,
            strict=True,
        )
        mine, judged = _from_all_ranks([Judged(*each) for each in facts], "trainer_state" in columns)
        rewards, stopped = self.guards.apply(judged, degenerate=self.config.degenerate_reward, has_gate=self.gate is not None)
        self._log(scores, judged, mine, rewards, stopped, columns)
        return rewards[mine]

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
        judged: Sequence[Judged],
        mine: slice,
        rewards: Sequence[float | None],
        stopped: dict[str, float],
        columns: dict[str, Any],
    ) -> None:
        """`scores` are of this rank's completions, `judged[mine]`; `rewards` and `stopped` of all ranks'."""
        log_metric, log_extra = columns.get("log_metric"), columns.get("log_extra")
        per_completion = {
            "score": [math.nan if reward is None else reward for reward in scores.rewards],
            "redundant_tokens": [math.nan if one.redundant is None else one.redundant for one in judged[mine]],
            "protected_share": [_mean(protected) for protected in scores.protected],
            "incoming": [_mean(incoming) for incoming in scores.incoming],
        }
        metrics = {name: _mean(torch.tensor(values)) for name, values in per_completion.items()}
        metrics["group_std"] = group_std(rewards, [one.group for one in judged])
        metrics["length_correlation"] = correlation(rewards, [one.length for one in judged])
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
                f"{self.__name__} has no model, so it scores with the live policy, but it is being sent to another process, "
                "which has none. TRL's async trainer does that. Pass model=..., use entra.EntraGRPOTrainer, or build the "
                "reward in that process"
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

    def _ended(self, completion_ids: Sequence[Any] | None) -> list[bool]:
        """Of each completion whether it ends with an EOS."""
        if completion_ids is None:
            raise ValueError("skip_truncated=True needs completion_ids, whose last id tells whether the completion had ended")
        policy = resolve_policy(self.model, self.tokenizer)
        model = None if policy is None else unwrapped(policy.model)
        encoder = Encoder(None if policy is None else policy.tokenizer, model, {})
        return [encoder.has_ended(ids) for ids in completion_ids]


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
        raise ValueError(f"gate returned {shown(values)} for {count} completions; {rule}")
    if len(values) != count:
        raise ValueError(f"gate returned {len(values)} values for {count} completions; {rule}")
    checked: list[float | None] = []
    for i, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise ValueError(f"gate returned {shown(value)} for row {i}; it must be a finite number, or None for not scored")
        checked.append(number)
    return checked


def _from_all_ranks(ours: list[Judged], in_a_trainer: bool) -> tuple[slice, list[Judged]]:
    """The completions of all ranks where a trainer runs several, and which of them are ours."""
    if not (in_a_trainer and dist.is_available() and dist.is_initialized()):
        return slice(None), ours
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, ours)
    before = sum(len(part) for part in parts[: dist.get_rank()])
    return slice(before, before + len(ours)), [one for part in parts for one in part]


def _mean(values: Tensor) -> float:
    """NaN for none, and NaN values do not count."""
    return float(values.float().nanmean())
