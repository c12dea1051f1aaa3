"""The rewards that are compared: each arm is a list of TRL reward functions and their weights.

Accuracy has the weight 1 in every arm, and every arm that pays for conciseness pays at most `WEIGHT` for it on top. The cosine
reward is accuracy and length in one, as published.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.evidence.evaluate import MAX_NEW_TOKENS
from benchmarks.evidence.model import EOS_ID
from benchmarks.evidence.problems import Problem, correct
from entra.config import ScoreConfig
from entra.guards import gated, group_gated
from entra.reward import EntraReward
from entra.score import score_batch

Reward = Callable[..., Sequence[float | None]]

WEIGHT = 0.5
GROUP_GATE = 0.8
HALVE_AT = 10.0
DEAD_BAND = 0.1

ARMS = {
    "accuracy": "accuracy only",
    "entra-additive": "ENTRA, additive",
    "entra-gated": "ENTRA, gated, r",
    "entra-total": "ENTRA, gated, redundant tokens (`halve_at`)",
    "entra-banded": "ENTRA, gated, redundant tokens, `dead_band`",
    "repetition": "repetition penalty (TRL)",
    "cosine": "cosine length reward",
    "overlong": "soft overlong punishment (TRL)",
    "kimi": "Kimi-style length penalty",
    "all-tokens": "gated entropy over all tokens (tau = 0)",
    "random-protected": "gated, random tokens protected",
    "lambda-0": "gated ENTRA, lambda = 0",
}


def rewards_of(arm: str, seed: int, config: ScoreConfig | None = None) -> tuple[list[Reward], list[float]]:
    """Reward functions and weights of one arm.

    Args:
        arm: a key of `ARMS`.
        seed: of the random protected set.
        config: of the scores of the arms that have one; None: the defaults.

    Raises:
        ValueError: no such arm.
    """
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    config = ScoreConfig() if config is None else config

    def gated_entra(config: ScoreConfig, **options: Any) -> list[Reward]:
        return [accuracy, EntraReward(config=config, gate=accuracy, group_gate=GROUP_GATE, **options)]

    makers: dict[str, Callable[[], list[Reward]]] = {
        "accuracy": lambda: [accuracy],
        "entra-additive": lambda: [accuracy, score_batch if config == ScoreConfig() else EntraReward(config=config)],
        "entra-gated": lambda: gated_entra(config),
        "entra-total": lambda: gated_entra(config, halve_at=HALVE_AT),
        "entra-banded": lambda: gated_entra(config, halve_at=HALVE_AT, dead_band=DEAD_BAND),
        "repetition": lambda: [accuracy, get_repetition_penalty_reward()],
        "cosine": lambda: [cosine],
        "overlong": lambda: [accuracy, get_soft_overlong_punishment(MAX_NEW_TOKENS, MAX_NEW_TOKENS // 2)],
        "kimi": lambda: [accuracy, kimi],
        "all-tokens": lambda: gated_entra(replace(config, protect_fraction=0.0)),
        "random-protected": lambda: [accuracy, RandomlyProtected(seed, config)],
        "lambda-0": lambda: gated_entra(replace(config, attention_weight=0.0)),
    }
    if arm not in makers:
        raise ValueError(f"arm={arm!r} must be one of {', '.join(makers)}")
    functions = makers[arm]()
    return functions, [1.0, WEIGHT][: len(functions)]


def accuracy(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    kind: Sequence[str],
    answer: Sequence[str],
    entry: Sequence[str],
    **columns: Any,
) -> list[float]:
    """1.0 for a completion that has ended with the right answer, else 0.0. Needs the dataset's columns."""
    return [
        float(list(ids[-1:]) == [EOS_ID] and correct(Problem(k, p, a, e), text))
        for p, text, ids, k, a, e in zip(prompts, completions, completion_ids, kind, answer, entry, strict=True)
    ]


def cosine(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    """The reward of trl.rewards.get_cosine_scaled_reward with its default values, over our checker."""
    right = accuracy(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    values = []
    for ids, is_right in zip(completion_ids, right, strict=True):
        low, high = (0.5, 1.0) if is_right else (-0.5, -1.0)
        values.append(low + 0.5 * (high - low) * (1 + math.cos(min(len(ids) / MAX_NEW_TOKENS, 1.0) * math.pi)))
    return values


def kimi(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Kimi k1.5's length reward: 0.5 - (length - shortest) / (longest - shortest) of the group; at most 0 for wrong answers."""
    right = accuracy(prompts=prompts, completion_ids=completion_ids, **columns)
    values = [0.0] * len(prompts)
    for rows in _groups(prompts).values():
        lengths = [len(completion_ids[i]) for i in rows]
        shortest, spread = min(lengths), max(lengths) - min(lengths)
        for i in rows:
            value = 0.5 - (len(completion_ids[i]) - shortest) / spread if spread else 0.0
            values[i] = value if right[i] else min(0.0, value)
    return values


class RandomlyProtected:
    """Gated like the ENTRA arm, but which tokens are protected is drawn at random: importance is a random number
    below 0, as log-probs are."""

    __name__ = "randomly_protected"

    def __init__(self, seed: int, config: ScoreConfig) -> None:
        self.random = random.Random(seed)
        self.config = config

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Any, **columns: Any
    ) -> list[float | None]:
        noise = [[self.random.random() - 1.0 for _ in ids] for ids in completion_ids]
        zeros = [[0.0] * len(ids) for ids in completion_ids]
        rewards = score_batch(prompts, None, completion_ids, logprobs=noise, incoming=zeros, config=self.config)
        right = accuracy(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return group_gated(gated(rewards, right), right, prompts, GROUP_GATE)


def _groups(prompts: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return rows
