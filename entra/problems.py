"""Verifiable problems from reasoning-gym: a dataset for TRL, and the reward that checks answers with the task's own scorer.

Decisions taken here:

- A row carries the whole reasoning-gym entry as JSON, because scorers look at the question and the metadata, whose structure
  differs from task to task and fits no common Arrow type. A task whose scorer does not accept its own answer after that (tuples
  become lists) is refused when the dataset is made.
- All problems of a dataset are different, so that a split of it has none on both sides. reasoning-gym draws problem i from
  `seed + i`: two datasets with neighbouring seeds would share most of theirs.
- The instruction stands in the user's message: not every chat template knows a system role.
- Some of reasoning-gym's scorers evaluate the answer as Python (n_queens, spiral_matrix, binary_matrix, string_insertion) or
  parse it with sympy, which does too (countdown, puzzle24, polynomial_multiplication, the integrations). An answer is text from
  the policy: train on those in a sandbox only.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = "Think step by step. Then give the final answer, and nothing else, between <answer> and </answer>."

_DRAWS = 20
"""How often to draw for each problem that is asked for before giving up on finding a new one."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_LEAD = re.compile(r"^.*\banswer\b.*?(?:\bis\b:?|:|=)", re.IGNORECASE)


def load_problems(
    tasks: Sequence[str] | Mapping[str, Mapping[str, Any]], size: int, *, seed: int = 0, chat: bool = True
) -> Dataset:
    """`size` different problems, the tasks taking turns, as a dataset that `trl.GRPOTrainer` takes as it is.

    Columns: `prompt` (chat messages, or text without `chat`), `task`, `answer` (text, for people and other rewards; None
    where there is more than one) and `entry` (the problem as reasoning-gym made it, in JSON, for `reasoning_gym_reward`).
    The same arguments give the same rows with the same version of reasoning-gym.

    Args:
        tasks: names of reasoning-gym's tasks, or a mapping of names to their options, such as {"chain_sum": {"max_terms": 3}}.
        size: how many problems in all, at least 1.
        seed: for other problems. Two seeds may share problems; to hold some out, split one dataset.
        chat: messages for models with a chat template; False: text.

    Raises:
        ImportError: reasoning-gym or datasets is missing; the message says how to install it.
        ValueError: an unknown task, options that a task does not have, a task that has fewer different problems or cannot be
            checked, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 problem")
    if not tasks:
        raise ValueError("tasks is empty; name tasks of reasoning-gym, such as chain_sum")
    _reasoning_gym()
    try:
        from datasets import Dataset
    except ImportError:
        raise ImportError("a dataset of problems needs datasets: pip install 'entra-reward[train]'") from None
    options = tasks if isinstance(tasks, Mapping) else {task: {} for task in tasks}
    share = -(-size // len(options))
    columns = [_rows(task, options[task] or {}, share, seed, chat) for task in options]
    rows = [row for turn in zip(*columns, strict=True) for row in turn][:size]
    return Dataset.from_list(rows)


def reasoning_gym_reward(completions: Sequence[Any], entry: Sequence[str], **columns: Any) -> list[float]:
    """A TRL reward function: each completion's `extract_answer`, scored by its task's own scorer.

    Between 0 and 1: 1 is right; many tasks give a little for an answer in the right form, or for one with more around it than
    asked. No answer is worth 0, and so is one on which a scorer stumbles (some raise on text that is no number).

    Args:
        completions: text or chat messages.
        entry: the column of that name of `load_problems`.

    Raises:
        ImportError: reasoning-gym is missing; the message says how to install it.
    """
    return [_score(extract_answer(_text(c)), json.loads(e)) for c, e in zip(completions, entry, strict=True)]


def extract_answer(completion: str) -> str:
    r"""The final answer in a completion: what stands in the last `<answer>...</answer>`.

    Without one, and this is what a model that has not learnt the format yet is scored by: in the last `\boxed{...}`; else the
    last line that is not empty, from "answer is", "answer:" or "answer =" on where it has one, without a full stop.
    """
    for pattern in (_TAGGED, _BOXED):
        found = pattern.findall(completion)
        if found:
            return str(found[-1]).strip()
    lines = completion.strip().splitlines()
    return _LEAD.sub("", lines[-1]).lstrip(" \t*$").rstrip(" \t*$.") if lines else ""


def _rows(task: str, options: Mapping[str, Any], count: int, seed: int, chat: bool) -> list[dict[str, Any]]:
    """`count` different problems of one task."""
    draws = _DRAWS * count
    source = _create(task, {**options, "seed": seed, "size": draws})
    rows: dict[str, dict[str, Any]] = {}
    for i in range(draws):
        entry = source[i]
        text = entry["question"].strip() + "\n\n" + INSTRUCTION
        row = {"task": task, "answer": entry["answer"], "entry": _in_json(task, entry)}
        rows.setdefault(text, {"prompt": [{"role": "user", "content": text}] if chat else text + "\n", **row})
        if len(rows) == count:
            break
    else:
        raise ValueError(
            f"task {task!r} with {dict(options)} has only {len(rows)} different problems (in {draws:,} draws), {count:,} are "
            "needed; ask for fewer, or widen its options"
        )
    first = next(iter(rows.values()))
    if isinstance(first["answer"], str) and _score(first["answer"], json.loads(first["entry"])) != 1:
        raise ValueError(f"task {task!r} cannot be checked: its scorer does not accept its own answer after JSON; leave it out")
    return list(rows.values())


def _in_json(task: str, entry: dict[str, Any]) -> str:
    try:
        return json.dumps(entry)
    except TypeError as error:  # gsm_symbolic has fractions in its metadata
        raise ValueError(f"task {task!r} cannot be checked: its problems do not fit JSON ({error}); leave it out") from error


def _create(task: str, options: Mapping[str, Any]) -> Any:
    """reasoning-gym's dataset of that name; it reports bad options as a TypeError or AssertionError."""
    from entra.config import nearest_of

    gym = _reasoning_gym()
    known = sorted(gym.factory.DATASETS)
    if task not in known:
        raise ValueError(f"reasoning-gym has no task {task!r}; {nearest_of(task, known)}")
    try:
        return gym.create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task {task!r} does not take {dict(options)}: {error}") from error


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    score: Callable[[str, dict[str, Any]], float] = _reasoning_gym().get_score_answer_fn(task)
    return score


def _score(answer: str, entry: dict[str, Any]) -> float:
    scorer = _scorer(entry["metadata"]["source_dataset"])
    if not answer:
        return 0.0
    try:
        return min(max(float(scorer(answer, entry)), 0.0), 1.0)
    except Exception:  # of int(), json.loads() or numpy, on text from the policy; an answer that cannot be read is not right
        return 0.0


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError("these problems need reasoning-gym: pip install 'entra-reward[reasoning]'") from None
    return reasoning_gym
