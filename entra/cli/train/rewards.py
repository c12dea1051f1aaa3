"""Names of reward functions on the command line -> the functions, checked against the dataset before anything is trained."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from entra.cli import CommandError, one_line
from entra.cli.columns import CHECKED, first
from entra.config import ScoreConfig, nearest_of
from entra.grading import answer_reward
from entra.guards import Guards
from entra.problems import reasoning_gym_reward, unsafe_reasoning_gym_reward
from entra.reward import EntraReward

RewardFunction = Callable[..., Any]

# Those that `trl grpo` knows by name, in the module that it takes them from.
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
_NAMES = ("entra", "reasoning_gym", "answer", *_TRL_REWARDS)

# What a trainer passes beside the dataset's columns.
_FROM_TRAINER = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def reward_functions(
    names: Sequence[str] | None,
    gate: str | None,
    columns: Sequence[str] | None,
    config: ScoreConfig,
    guards: Guards,
    *,
    run_answers_as_code: bool = False,
) -> list[RewardFunction]:
    """The reward functions of a run.

    Args:
        names: as on the command line. None: the gate, if there is one, and "entra".
        gate: name of the gate of "entra", or "none". None: what fits the dataset.
        columns: of the dataset. None: not known (streamed).
        config: of "entra".
        guards: of "entra".
        run_answers_as_code: whether "reasoning_gym" scores tasks that do.

    Raises:
        CommandError: an unknown name, a column that a function needs and the dataset lacks, no gate that fits, or an option
            outside its range.
    """
    if gate == "entra":
        raise CommandError("--gate entra: a reward cannot be its own gate; name what says which completions are right")
    if names is None or "entra" in names:
        gate = _default_gate(columns) if gate is None else gate
    if names is None:
        names = ["entra"] if gate in (None, "none") else [str(gate), "entra"]
    functions: list[RewardFunction] = []
    gated = gate not in (None, "none") and "entra" in names
    allowed = _function(str(gate), columns, run_answers_as_code) if gated else None
    for name in names:
        if name != "entra":
            # The gate itself, so that a trainer sees that it is asked twice.
            same = allowed if name == gate else None
            functions.append(_function(name, columns, run_answers_as_code) if same is None else same)
            continue
        try:
            functions.append(EntraReward(config=config, gate=allowed, **vars(guards)))
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
    return functions


def _default_gate(columns: Sequence[str] | None) -> str:
    checked = first(CHECKED, columns or ())
    if checked is not None:
        return {"entry": "reasoning_gym", "solution": "accuracy_reward", "answer": "answer"}[checked]
    raise CommandError(
        "no gate fits the dataset, and concise wrong answers must not be paid for. With --gate package.module.function, name a "
        "reward function that says which completions are right. Or add a column 'answer' with what is right. "
        "--gate none pays for wrong answers, too"
    )


def _function(name: str, columns: Sequence[str] | None, run_answers_as_code: bool) -> RewardFunction:
    if name == "reasoning_gym":
        function: Any = unsafe_reasoning_gym_reward if run_answers_as_code else reasoning_gym_reward
    elif name == "answer":
        function = answer_reward
    elif name in _TRL_REWARDS:
        function = _trl_reward(name)
    elif "." in name:
        function = _imported(name)
    else:
        raise CommandError(
            f"unknown reward function {name!r}; give a path (package.module.function) or a name: {nearest_of(name, _NAMES)}"
        )
    if columns is not None:
        needed = [n for n in _required(function) if n not in columns and n not in _FROM_TRAINER]
        if needed:
            raise CommandError(f"reward function {name} needs the column {needed[0]!r}; the dataset has {', '.join(columns)}")
    return function


def _trl_reward(name: str) -> RewardFunction:
    import trl.rewards

    if name.endswith("accuracy_reward") and importlib.util.find_spec("math_verify") is None:
        raise CommandError(f"{name} needs math-verify: pip install math-verify")
    found = getattr(trl.rewards, name)
    # The numbers of `trl grpo`.
    return found(max_completion_len=1280, soft_punish_cache=256) if name.startswith("get_") else found


def _imported(path: str) -> RewardFunction:
    """The object at a dotted path; the working directory counts, as with `trl grpo`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"cannot import the reward function {path}: {one_line(error)}") from error
    if not callable(function) or inspect.isclass(function):
        raise CommandError(f"{path} is a {type(function).__name__}, not a reward function or a callable object")
    return function


def _required(function: RewardFunction) -> list[str]:
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty]
