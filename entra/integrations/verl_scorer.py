"""verl: scores of a frozen model, from a pool of Ray actors that verl's reward loop asks.

    python -m verl.trainer.main_ppo reward.reward_manager.source=importlib reward.reward_manager.name=EntraRewardManager \\
        reward.reward_manager.module.path=pkg://entra.integrations.verl_scorer \\
        +entra.scorer.model=NAME +entra.scorer.actors=2 +entra.scorer.num_gpus=1 ...

Decisions taken here:

- verl asks for one completion at a time, so there are no groups here: `group_gate` and `dead_band` are refused.
- All reward workers of a run share one pool. Its actors have resources of their own, one model each.
- An actor waits a moment for more requests and scores what has come as one batch. A row that cannot be scored is an error in
  its place; the others are scored without it.
- Ray starts an actor that dies again and repeats the requests that it had.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from entra.config import check_integer, names_unknown_options
from entra.integrations.verl import Options
from entra.policy import load_policy, load_tokenizer
from entra_kernels._checks import check_number

try:
    import ray
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is not installed; this is for verl 0.9.1: pip install 'verl==0.9.1'") from error

_REPEATS = 5
"""How often a request is repeated whose actor died: one that kills each actor that it meets must come to an end."""


@names_unknown_options
@dataclass(frozen=True, kw_only=True)
class Pool:
    """What stands under `entra.scorer` in verl's configuration.

    Raises:
        ValueError: a value outside its range.
        TypeError: an unknown key (the message names the nearest right one), or a value of another type.
    """

    model: str
    """The frozen scorer: a folder, a hub name or "smollm2"."""

    dtype: str | None = None
    """Such as "bfloat16". None: that in which the model was saved."""

    actors: int = 1
    """How many actors there are."""

    num_gpus: float = 1.0
    """GPUs of one actor, as Ray counts them; 0.5 lets two share one. 0: a CPU scores."""

    num_cpus: float = 1.0
    """CPUs of one actor, as Ray counts them."""

    wait: float = 0.02
    """Seconds that an actor waits for more requests before it scores those that have come."""

    rows: int = 64
    """Completions of one batch, at most."""

    manager: str = "naive"
    """The reward manager of verl's that computes verl's own score."""

    def __post_init__(self) -> None:
        for name, low in (("actors", 1), ("rows", 1)):
            check_integer(f"entra.scorer.{name}", getattr(self, name), low, name)
        for name in ("num_gpus", "num_cpus", "wait"):
            check_number(f"entra.scorer.{name}", getattr(self, name), "at least 0 and finite", low=0.0)


class _Row(NamedTuple):
    """One completion: token ids, or messages and text."""

    prompt: Any
    completion: Any
    score: float


class Scorer:
    """The actor: one frozen model, which scores what comes in batches."""

    def __init__(self, options: Options, pool: Pool) -> None:
        policy = load_policy(pool.model, dtype=pool.dtype)
        self._reward = options.reward(model=policy.model, tokenizer=policy.tokenizer)
        self._pool = pool
        self._waiting: list[tuple[_Row, asyncio.Future[float | None]]] = []
        self._working: asyncio.Task[None] | None = None
        self.batches: list[int] = []

    async def score(self, row: _Row) -> float | None:
        """ENTRA's reward of a completion; None where it is not scored. Raises what `EntraReward` raises."""
        future: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._pool.wait)
            batch, self._waiting = self._waiting[: self._pool.rows], self._waiting[self._pool.rows :]
            self.batches.append(len(batch))
            results = await asyncio.to_thread(self._rewards, [row for row, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _rewards(self, rows: Sequence[_Row]) -> Sequence[float | Exception | None]:
        """One reward for each row, or what kept it from being scored."""
        try:
            return self._reward(
                prompts=[row.prompt for row in rows],
                completions=[row.completion for row in rows],
                completion_ids=None if isinstance(rows[0].completion, str) else [row.completion for row in rows],
                verl_score=[row.score for row in rows],
            )
        except Exception as error:
            return [error] if len(rows) == 1 else [self._rewards([row])[0] for row in rows]


class EntraRewardManager(RewardManagerBase):
    """A reward manager of verl's: its own score of a completion, with ENTRA's reward by a frozen scorer.

    The reward is what `EntraReward` gives, with verl's score as the gate. `Options` says how the two are added. A scorer with
    the policy's vocabulary scores the ids that were generated. Any other one reads messages and text.

    Raises:
        ValueError: a guard that needs groups, or no model under `entra.scorer`.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **others: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._options = Options.of(config)
        if "model" not in self._options.scorer:
            raise ValueError("entra.scorer.model is not there; name the frozen scorer with +entra.scorer.model=NAME")
        for guard in ("group_gate", "dead_band"):
            if self._options.guards.get(guard):
                raise ValueError(
                    f"entra.guards.{guard}={self._options.guards[guard]} needs all completions of a prompt, but verl hands its "
                    "reward managers one at a time; leave it out, or score the live policy (trainer.v1.trainer_mode=entra_sync)"
                )
        self._options.reward()  # an option that is wrong is an error here, not in an actor
        pool = Pool(**self._options.scorer)
        self._base = get_reward_manager_cls(pool.manager)(config, tokenizer, compute_score, **others)
        self._ids = load_tokenizer(pool.model).get_vocab() == tokenizer.get_vocab()
        self._actors = itertools.cycle(actors(self._options, pool))

    async def run_single(self, data: Any) -> dict[str, Any]:
        """verl's own result with ENTRA's reward in it, `entra_reward` among the extra information (NaN: not scored)."""
        result = await self._base.run_single(data)
        score = float(result["reward_score"])
        reward = await next(self._actors).score.remote(self._row(data[-1:][0], score))
        extra = {**result["reward_extra_info"], "entra_reward": math.nan if reward is None else reward}
        total = self._options.score_weight * score + self._options.weight * (reward or 0.0)
        return {**result, "reward_score": total, "reward_extra_info": extra}

    def _row(self, item: Any, score: float) -> _Row:
        prompt, response = item.batch["prompts"], item.batch["responses"]
        known = item.non_tensor_batch
        if "response_len" in known:
            prompt, response = prompt[: int(known["prompt_len"])], response[: int(known["response_len"])]
        else:
            mask = item.batch["attention_mask"].bool()
            prompt, response = prompt[mask[: len(prompt)]], response[mask[len(prompt) :]]
        if self._ids:
            return _Row(prompt.tolist(), response.tolist(), score)
        return _Row(list(known["raw_prompt"]), self.tokenizer.decode(response, skip_special_tokens=True), score)


def actors(options: Options, pool: Pool) -> list[Any]:
    """Handles of the run's scorers. Who asks first starts them; they end with the process that started them."""
    scorer = ray.remote(Scorer)
    settings = {
        "num_gpus": pool.num_gpus,
        "num_cpus": pool.num_cpus,
        "max_concurrency": 1_000,  # requests that wait cost nothing
        "max_restarts": -1,
        "max_task_retries": _REPEATS,
        "get_if_exists": True,
    }
    return [scorer.options(name=f"entra_scorer_{i}", **settings).remote(options, pool) for i in range(pool.actors)]
