"""What the columns of a file are taken for where no flag says so: one place for all commands.

Where several columns could tell, the first that is there counts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from entra.rows import Row

SCORE_COLUMNS = ("reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens")
DETAIL_COLUMNS = ("token_ids", "logprobs", "incoming", "importance", "protected")
ERROR_COLUMN = "error"
"""What `entra score` adds to a row."""

CORRECT = ("correct", "reward")
"""Say themselves whether an answer is right; `reward` only where `correct_column` says so."""
CHECKED = ("entry", "solution", "answer")
"""What an answer can be checked by: reasoning-gym's problem, a solution for TRL's accuracy_reward, the right answer."""
TOKENS = ("tokens", "completion_ids")
"""Tell how long a completion is."""
TRUNCATED = ("truncated", "finish_reason")
"""Tell whether a completion was cut off."""
PROBLEM = ("id", "prompt", "custom_id")
"""Tell which completions are of one problem; `problem_column` chooses."""
NAMES = ("id", "name")
"""What a row is called by."""
KNOWN = {*CORRECT, *CHECKED, *TOKENS, *TRUNCATED, *PROBLEM, *NAMES}


def first(names: Sequence[str], columns: Collection[str]) -> str | None:
    """The first of `names` that is a column."""
    return next((name for name in names if name in columns), None)


def key_of(value: Any) -> str:
    """A column's value as text, the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def problem_column(files: Sequence[Sequence[Row]], shared: Collection[str]) -> str | None:
    """The column whose equal values are one problem: `id` where all files have it and share one, else `prompt`, else the
    `custom_id` of a batch."""
    if "id" in shared:
        ids = [{key_of(row.columns["id"]) for row in rows if row.columns.get("id") is not None} for rows in files]
        if (set.intersection(*ids) and "custom_id" not in shared) or first(PROBLEM[1:], shared) is None:
            return "id"
    return first(PROBLEM[1:], shared)


def correct_column(files: Sequence[Sequence[Row]], shared: Collection[str]) -> str | None:
    """The column that says which completions are right. `reward` does where it holds nothing but 0 and 1: `entra score` writes
    one of that name that says nothing about correctness."""
    column = first(CORRECT, shared)
    if column == "reward":
        values = [row.columns["reward"] for rows in files for row in rows if row.columns.get("reward") is not None]
        if not all(isinstance(value, int | float) and value in (0, 1) for value in values):
            return None
    return column


def score_prefixes(columns: Collection[str]) -> list[str]:
    """What stands before the names of the columns that `entra score --details` added, once for each time."""
    prefixes = [name.removesuffix("token_ids") for name in columns if name.endswith("token_ids")]
    return [prefix for prefix in prefixes if all(prefix + name in columns for name in ("reward", *DETAIL_COLUMNS))]


def row_names(rows: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """What rows are called: by their `id`, else their `name`, where every row has one and all differ; else by number from 1.

    Args:
        rows: the columns of each; None for a row that could not be read, which goes by its number.
    """
    numbers = [f"row {i}" for i in range(1, len(rows) + 1)]
    for column in NAMES:
        names = [number if row is None else row.get(column) for row, number in zip(rows, numbers, strict=True)]
        if all(isinstance(name, str | int) for name in names) and len(set(map(str, names))) == len(names):
            return list(map(str, names))
    return numbers
