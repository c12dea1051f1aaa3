"""Verifiable problems from reasoning-gym: a dataset for TRL, and the reward that checks answers with the task's own scorer.

Decisions taken here:

- A row carries the whole reasoning-gym entry as JSON, because scorers look at the question and the metadata. The structure of
  the metadata differs from task to task and fits no common Arrow type. A task whose scorer does not accept its own answer after
  that (tuples become lists) is refused when the dataset is made.
- All problems of a dataset are different, so that a split of it has none on both sides. Two datasets with neighbouring seeds
  would share most of theirs, because reasoning-gym draws problem i from `seed + i`.
- The instruction stands in the user's message: not every chat template knows a system role.
- Some of reasoning-gym's scorers evaluate text as Python: the answer, which comes from the policy, or the problem, which may
  come from somebody's file. Only scorers that were read and found to parse are called in this process, and only those of the
  version that was read. For most of the others there is a checker of ours that parses (`entra.answer_checkers`). What is left
  is refused, but for `unsafe_reasoning_gym_reward`, which runs it in a child process (`entra.scorer_process`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entra import answer_checkers, scorer_process

if TYPE_CHECKING:
    from datasets import Dataset

INSTRUCTION = "Think step by step. Then give the final answer, and nothing else, between <answer> and </answer>."

_DRAWS = 20
"""How often to draw for each problem that is asked for before giving up on finding a new one."""

_MISSING = "these problems need reasoning-gym: pip install 'entra-reward[reasoning]'"

READ_VERSION = "0.1.25"
"""The version of reasoning-gym whose scorers were read, one by one."""

PARSING = frozenset(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation boxnet caesar_cipher
    calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation complex_arithmetic count_bits
    count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships
    figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams
    gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting
    letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid needle_haystack
    number_filtering number_format number_sequence palindrome_generation palindrome_partitioning path_star
    polynomial_equations pool_matrix power_function prime_factorization products propositional_logic quantum_lock
    ransom_note rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering
    shortest_path simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting
    string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal
    word_sorting zebra_puzzles
    """.split()  # noqa: SIM905
)
"""Tasks of that version whose scorers compare, parse and count, and evaluate no text: neither the answer nor the problem."""

EVALUATING = frozenset(
    {
        *answer_checkers.CHECKERS,  # by eval() of the answer or of the problem, or by sympy, whose parser calls it
        "composite",  # any other task's
        "intermediate_integration",
        "polynomial_multiplication",
        "simple_integration",
    }
)
"""Tasks of that version whose scorers evaluate text as Python."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_LEAD = re.compile(r"^.*\banswer\b.*?(?:\bis\b:?|:|=)", re.IGNORECASE)


def load_problems(
    tasks: Sequence[str] | Mapping[str, Mapping[str, Any]],
    size: int,
    *,
    seed: int = 0,
    chat: bool = True,
    run_answers_as_code: bool = False,
) -> Dataset:
    """`size` different problems, the tasks taking turns, as a dataset that `trl.GRPOTrainer` takes as it is.

    The columns are

    - `prompt`: chat messages, or text without `chat`;
    - `task`;
    - `answer`: text, for people and other rewards; None if there is more than one;
    - `entry`: the problem as reasoning-gym made it, in JSON, for `reasoning_gym_reward`.

    The same arguments give the same rows with the same version of reasoning-gym.

    Args:
        tasks: names of reasoning-gym's tasks, or a mapping of names to their options, such as {"chain_sum": {"max_terms": 3}}.
        size: how many problems altogether, at least 1.
        seed: another one gives other problems. Two seeds may share problems; to hold some out, split one dataset.
        chat: chat messages, for models with a chat template. False: text.
        run_answers_as_code: also tasks whose scorers evaluate the answer as Python, for `unsafe_reasoning_gym_reward`.

    Raises:
        ImportError: reasoning-gym or datasets is missing. The message says how to install it.
        ValueError: a task is unknown, does not have such options, has too few different problems, or cannot be checked. Or its
            scorer runs answers as code. Or the size is below 1.
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
    columns = [_rows(task, options[task] or {}, share, seed, chat, run_answers_as_code) for task in options]
    rows = [row for turn in zip(*columns, strict=True) for row in turn][:size]
    return Dataset.from_list(rows)


def reasoning_gym_reward(completions: Sequence[Any], entry: Sequence[str], **columns: Any) -> list[float]:
    """A TRL reward function: each completion's `extract_answer`, scored as its task's own scorer does.

    From 0 to 1, where 1 is right. Many tasks give a little for an answer in the right form, or for a right answer with text
    around it. No answer gets 0. An answer on which a scorer stumbles gets 0 too (some raise on text that is no number).
    Nothing in an answer or an entry runs as code.

    Args:
        completions: text or chat messages.
        entry: the column of that name of `load_problems`.

    Raises:
        ImportError: reasoning-gym is missing. The message says how to install it.
        UnsafeScorerError: a task that can only be scored by running text as code. It is a ValueError.
    """
    return [_score(extract_answer(_text(c)), json.loads(e)) for c, e in zip(completions, entry, strict=True)]


def unsafe_reasoning_gym_reward(completions: Sequence[Any], entry: Sequence[str], **columns: Any) -> list[float]:
    """`reasoning_gym_reward` that also scores tasks whose scorers evaluate text as Python: **answers run as code.**

    Each such answer runs in a process with an empty environment, for 10 seconds in 2 GiB. The process cannot write to files,
    and has no network where the system allows that. This limits what an answer can break, but it is no sandbox. Score only
    what you trust, or run it in a container that holds nothing of value.

    Raises:
        ImportError: reasoning-gym is missing. The message says how to install it.
        UnsafeScorerError: a task that the installed reasoning-gym does not have.
        RuntimeError: the process cannot be started, or ended too early. The message says why.
    """
    return [
        _score(extract_answer(_text(c)), json.loads(e), run_answers_as_code=True)
        for c, e in zip(completions, entry, strict=True)
    ]


class UnsafeScorerError(ValueError):
    """A task whose answers cannot be scored without running text as code."""


def check_task(task: str, *, run_answers_as_code: bool = False) -> None:
    """Refuse a task of reasoning-gym that can only be scored by running text as code.

    Raises:
        ImportError: reasoning-gym is missing.
        UnsafeScorerError: such a task; or, with `run_answers_as_code`, one that reasoning-gym does not have.
    """
    if task in answer_checkers.CHECKERS or _parses(task):
        return
    known = task != "composite" and task in _reasoning_gym().factory.DATASETS
    if known and run_answers_as_code:
        return
    installed = _installed()
    if not known:
        raise UnsafeScorerError(f"reasoning-gym {installed} has no problems of a task {task!r}; leave them out")
    if installed != READ_VERSION:
        raise UnsafeScorerError(
            f"the scorers of reasoning-gym {installed} have not been read. That of task {task!r} may run text as code; "
            f"pip install reasoning-gym=={READ_VERSION}"
        )
    raise UnsafeScorerError(
        f"the scorer of task {task!r} runs the answer, or the problem, as Python code. Leave its problems out, or let it run "
        "in a child process with limits. These allow it: unsafe_reasoning_gym_reward, load_problems(run_answers_as_code=True), "
        "entra eval --run-answers-as-code, entra train --run_answers_as_code true"
    )


def _parses(task: str) -> bool:
    """Whether the task's own scorer was read and found to parse."""
    return task in PARSING and _installed() == READ_VERSION


@functools.cache
def _installed() -> str:
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(_MISSING) from None


def extract_answer(completion: str) -> str:
    r"""The final answer in a completion: what stands in the last `<answer>...</answer>`.

    Without one, what stands in the last `\boxed{...}`. Without that, the last line that is not empty, without a full stop; if
    it has "answer is", "answer:" or "answer =", what follows. That is what scores a model that has not learnt the format yet.
    """
    for pattern in (_TAGGED, _BOXED):
        found = pattern.findall(completion)
        if found:
            return str(found[-1]).strip()
    lines = completion.strip().splitlines()
    return _LEAD.sub("", lines[-1]).lstrip(" \t*$").rstrip(" \t*$.") if lines else ""


def _rows(
    task: str, options: Mapping[str, Any], count: int, seed: int, chat: bool, run_answers_as_code: bool
) -> list[dict[str, Any]]:
    """`count` different problems of one task."""
    draws = _DRAWS * count
    source = _create(task, {**options, "seed": seed, "size": draws})
    check_task(task, run_answers_as_code=run_answers_as_code)
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
    entry = json.loads(first["entry"])
    if isinstance(first["answer"], str) and _score(first["answer"], entry, run_answers_as_code=run_answers_as_code) != 1:
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


def _score(answer: str, entry: dict[str, Any], *, run_answers_as_code: bool = False) -> float:
    task = entry["metadata"]["source_dataset"]
    if not isinstance(task, str):
        raise ValueError(f"source_dataset={task!r} must be the name of a task")
    check_task(task, run_answers_as_code=run_answers_as_code)
    if not answer:
        return 0.0
    if task in answer_checkers.CHECKERS:
        scorer: Callable[[str, dict[str, Any]], float] = functools.partial(answer_checkers.check, task)
    elif not _parses(task):
        return scorer_process.score(task, answer, entry)
    else:
        scorer = _scorer(task)
    try:
        return min(max(float(scorer(answer, entry)), 0.0), 1.0) if answer_checkers.is_bounded(task, answer, entry) else 0.0
    except Exception:  # of int(), json.loads() or numpy, on text from the policy; an answer that cannot be read is not right
        return 0.0


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(message["content"]) for message in completion)


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError(_MISSING) from None
    return reasoning_gym
