"""The completions of each prompt in a file that `entra score` wrote, with the value that they are compared by.

Decisions taken here:

- Completions belong together where their prompts are equal.
- What is cut off, what has an error, and what nobody knows to be right stays out. So does a text that its prompt had before.
- r falls with the length by itself, so it counts only at a fixed length. That is the length of the scoring, that of
  `--length-adjusted`, or the fewest unprotected tokens of a prompt's completions.
- A completion with at most one unprotected token has neither r nor D. It stays out, or a one-token answer would be the best.
- Prompt and completion come as TRL needs them: both text, or both messages. The text is the one that was scored.
"""

from __future__ import annotations

import argparse
import math
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from entra.cli import CommandError
from entra.cli.columns import DETAIL_COLUMNS, ERROR_COLUMN, SCORE_COLUMNS
from entra.cli.output import recorded
from entra.encode import as_ids, completion_text, prompt_value
from entra.rows import Row, is_finite
from entra.source import Source

OWN = "select_"
"""How the names of the columns begin that say why a row was selected."""


class Completion(NamedTuple):
    """A completion that can be chosen or rejected."""

    row: int
    """Its number in the input, from 1."""
    prompt: Any
    completion: Any
    right: bool
    tokens: int
    value: float
    """What it is compared by: r in [0, 1], redundant tokens, or tokens. NaN until `positions` is known."""
    positions: int | None
    """Unprotected tokens that r was computed for; None where the value is no r."""
    unprotected: array[int]
    """Token ids from which r is still to be computed; else empty."""
    columns: dict[str, Any]
    """All others of the row."""


class Input(NamedTuple):
    """What is known of the file before its rows are read."""

    prefix: str
    """Stands before the names of the columns of `entra score`."""
    taken: dict[str, Any]
    """The columns of prompt and completion."""
    adjusted: int | None
    """The number of positions that r was computed for; None: all, as far as anybody knows."""
    ngram: int
    """n of the n-grams that r counts, as far as anybody knows."""
    details: bool
    """Whether the columns of `entra score --details` are there."""
    notes: list[str]


class _LeftOutError(Exception):
    """Why a row is neither chosen nor rejected, in words that are counted."""


def open_scores(options: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """The file, with prompt and completion as `entra score` took them, and its record, which is empty where there is none."""
    record: dict[str, Any] = {}
    with suppress(CommandError):
        record = recorded(options.scores) or {}
    taken = record.get("input", {}).get("taken")

    def column(kind: str) -> str | None:
        before = taken.get(kind) if isinstance(taken, dict) else None
        return getattr(options, f"{kind}_column") or (before if isinstance(before, str) else None)

    prompt, completion = column("prompt"), column("completion")
    return Source([options.scores], prompt=prompt, completion=completion, output=options.output), record


def look(options: argparse.Namespace, source: Source, record: dict[str, Any]) -> Input:
    """How the file is read.

    Raises:
        CommandError: a column is missing, or r is not known at a fixed length.
    """
    scores: Path = options.scores
    columns = source.columns
    prefix = _prefix(options, columns)
    notes = []
    config = record.get("config") if record.get("prefix") == prefix else None
    if not isinstance(config, dict):
        config = {}
        if options.by != "tokens":
            notes.append(f"nothing beside {scores} says how it was scored; r is taken for that of all unprotected tokens")
    expected = record.get("input", {}).get("rows")
    limit = record.get("limit")
    if isinstance(expected, int) and source.rows < min(expected, limit if isinstance(limit, int) else expected):
        notes.append(f"entra score has not finished: {source.rows:,} of {expected:,} rows; its command goes on")
    _check_correct_column(options, columns, prefix)
    details = all(prefix + name in columns for name in DETAIL_COLUMNS)
    adjusted = config.get("length_adjusted")
    adjusted = adjusted if isinstance(adjusted, int) else None
    if not details:
        _check_rewards(options, adjusted)
    ngram = config.get("reward_ngram", 1)
    return Input(prefix, source.taken, adjusted, ngram if isinstance(ngram, int) else 1, details, notes)


def _prefix(options: argparse.Namespace, columns: Sequence[str]) -> str:
    last = SCORE_COLUMNS[-1]
    prefixes = [name.removesuffix(last) for name in columns if name.endswith(last)]
    found = [prefix for prefix in prefixes if all(prefix + name in columns for name in SCORE_COLUMNS)]
    if options.prefix is not None:
        found = [prefix for prefix in found if prefix == options.prefix]
    if len(found) > 1:
        raise CommandError(f"the file was scored more than once; choose with --prefix, one of {', '.join(map(repr, found))}")
    if not found:
        names = ", ".join((options.prefix or "") + name for name in SCORE_COLUMNS)
        raise CommandError(f"{options.scores} lacks one of the columns {names}; entra score writes them")
    return found[0]


def _check_correct_column(options: argparse.Namespace, columns: Sequence[str], prefix: str) -> None:
    if options.all_right:
        return
    if options.correct_column not in columns:
        raise CommandError(
            f"no row has a column {options.correct_column!r} that says what is right; there are {', '.join(columns)}: use "
            "--correct-column, or --all-right if no completion is wrong"
        )
    if options.correct_column == prefix + "reward":
        raise CommandError(
            f"--correct-column {options.correct_column}: entra score wrote this column, and it does not say what is right; "
            "score with --prefix, e.g. --prefix entra_, or name another column"
        )


def _check_rewards(options: argparse.Namespace, adjusted: int | None) -> None:
    """Refuse a measure that the rewards alone do not tell."""
    scores: Path = options.scores
    if options.by == "redundant_tokens" and adjusted is not None:
        raise CommandError(
            f"{scores} was scored with --length-adjusted {adjusted}, so it does not tell the redundant tokens; use --by r, or "
            "score without --length-adjusted, or with --details"
        )
    if options.by == "r" and adjusted is None:
        raise CommandError(
            f"{scores} holds r of all unprotected tokens, which falls with the length; score with --details or with "
            "--length-adjusted N, or use --by redundant_tokens"
        )
    if options.length_adjusted not in (None, adjusted):
        raise CommandError(
            f"{scores} holds r for --length-adjusted {adjusted} alone, so it does not tell r for --length-adjusted "
            f"{options.length_adjusted}; score with --details, or leave the option out"
        )


def read(options: argparse.Namespace, source: Source, found: Input) -> tuple[list[list[Completion]], Counter[str]]:
    """The completions of each prompt, without those that stay out, and how many stay out for which reason."""
    prompts: dict[Hashable, list[Completion]] = {}
    left_out: Counter[str] = Counter()
    seen: set[tuple[Hashable, str]] = set()
    value_of = _value_getter(options, found)
    not_carried = {*found.taken.values(), *(found.prefix + name for name in (*DETAIL_COLUMNS, ERROR_COLUMN))}
    for number, row in enumerate(source.read(), start=1):
        columns = row.columns
        problem = prompt_value(row.prompt)
        group = [] if problem is None else prompts.setdefault(problem, [])
        try:
            if row.malformed is not None:
                raise _LeftOutError("malformed")
            error = columns.get(found.prefix + ERROR_COLUMN)
            if error is not None:
                raise _LeftOutError(f"error: {str(error).partition(':')[0]}")
            prompt, completion, text = _for_trl(row)
            if _cut_off(columns):
                raise _LeftOutError("not complete")
            right = True if options.all_right else _flag(columns, options.correct_column)
            if right is None:
                raise _LeftOutError("not known to be right")
            if not right and options.rejected != "wrong":
                raise _LeftOutError("wrong")
            tokens = int(_number(columns, found.prefix + "tokens"))
            value, positions, unprotected = value_of(columns)
            if (problem, text) in seen:
                raise _LeftOutError("the same text as one before")
            seen.add((problem, text))
        except _LeftOutError as reason:
            left_out[str(reason)] += 1
            continue
        others = {name: columns[name] for name in columns if name not in not_carried and not name.startswith(OWN)}
        group.append(Completion(number, prompt, completion, right, tokens, value, positions, unprotected, others))
    return [_valued(group, options.length_adjusted) for group in prompts.values()], left_out


def _for_trl(row: Row) -> tuple[Any, Any, str]:
    """Prompt and completion as both text or both messages, and the completion's text."""
    if row.fault is not None:
        raise _LeftOutError(f"error: {row.fault.partition(':')[0]}")
    prompt, completion = row.prompt, row.completion
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    chat = isinstance(prompt, list) and prompt and all(isinstance(message, Mapping) for message in prompt)
    if not chat and not isinstance(prompt, str):
        raise _LeftOutError("the prompt is not text")
    try:
        text = completion_text(completion)
    except (TypeError, ValueError):
        raise _LeftOutError("the completion is not text") from None
    return (prompt, [{"role": "assistant", "content": text}], text) if chat else (prompt, text, text)


def _cut_off(columns: Mapping[str, Any]) -> bool:
    return (
        _flag(columns, "complete") is False or _flag(columns, "truncated") is True or columns.get("finish_reason") == "length"
    )


def _flag(columns: Mapping[str, Any], name: str) -> bool | None:
    """Whether a column is true or at least 1; None where it is not there, null, or what pandas writes for null."""
    value = columns.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not is_finite(value):
        raise _LeftOutError(f"malformed: {name} is neither a number nor true or false")
    return bool(value >= 1)


def _number(columns: Mapping[str, Any], name: str) -> float:
    value: Any = columns.get(name)
    if isinstance(value, bool) or not is_finite(value):
        raise _LeftOutError(f"malformed: {name} is no number")
    return float(value)


_NONE = array("i")
_Value = tuple[float, int | None, "array[int]"]


def _value_getter(options: argparse.Namespace, found: Input) -> Callable[[Mapping[str, Any]], _Value]:
    """A row's value, the positions of r, and what it is yet to be computed from: token ids, or first places of n-grams."""
    prefix = found.prefix

    def tokens(columns: Mapping[str, Any]) -> _Value:
        return _number(columns, prefix + "tokens"), None, _NONE

    def unprotected_count(columns: Mapping[str, Any]) -> float:
        count = _number(columns, prefix + "tokens") - _number(columns, prefix + "protected_tokens")
        if count <= 1:
            raise _LeftOutError("at most one unprotected token")
        return count

    def redundant(columns: Mapping[str, Any]) -> _Value:
        return unprotected_count(columns) * (1 - _number(columns, prefix + "reward")), None, _NONE

    def adjusted(columns: Mapping[str, Any]) -> _Value:
        unprotected_count(columns)
        return _number(columns, prefix + "reward"), found.adjusted, _NONE

    def unprotected(columns: Mapping[str, Any]) -> _Value:
        ids, protected = as_ids(columns.get(prefix + "token_ids")), columns.get(prefix + "protected")
        if ids is None or not isinstance(protected, Sequence) or len(protected) != len(ids) or not _are_ids(ids):
            raise _LeftOutError("malformed: token_ids and protected do not belong together")
        counted = ids if found.ngram == 1 else _first_places(ids, found.ngram)
        kept = array("i", (i for i, is_protected in zip(counted, protected, strict=True) if not is_protected))
        if len(kept) <= 1:
            raise _LeftOutError("at most one unprotected token")
        return math.nan, None, kept

    def redundant_of_ids(columns: Mapping[str, Any]) -> _Value:
        _, _, kept = unprotected(columns)
        return len(kept) * (1 - _r(kept, len(kept))), None, _NONE

    if options.by == "tokens":
        return tokens
    if options.by == "redundant_tokens":
        return redundant if found.adjusted is None else redundant_of_ids
    return adjusted if found.adjusted is not None and options.length_adjusted in (None, found.adjusted) else unprotected


def _are_ids(ids: Sequence[int]) -> bool:
    return all(0 <= i < 2**31 for i in ids)


def _valued(group: list[Completion], positions: int | None) -> list[Completion]:
    """The completions of one prompt, each with its value: r at the length that all of them have, or at `positions`."""
    lengths = [len(one.unprotected) for one in group if one.unprotected]
    if not lengths:
        return group
    m = positions or min(lengths)
    return [one._replace(value=_r(one.unprotected, m), positions=m, unprotected=_NONE) for one in group]


def _first_places(ids: Sequence[int], ngram: int) -> list[int]:
    import torch

    from entra_kernels import first_places

    places: list[int] = first_places(torch.tensor(ids, dtype=torch.int64), torch.tensor([0, len(ids)]), ngram=ngram).tolist()
    return places


def _r(unprotected: array[int], positions: int) -> float:
    import torch

    from entra.rarefaction import rarefied_redundancy

    return rarefied_redundancy(torch.tensor(unprotected), positions)
