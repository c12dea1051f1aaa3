"""What became of each completion in a file: right or wrong, how many tokens, cut off or not; and of which problem it is.

Decisions taken here:

- All files of a comparison are read the same way. A column counts only where every file has it, so tokens of one are never
  compared with words of another.
- The column `correct` says what is right. Without it the column `reward` does, but only where it holds nothing but 0 and 1:
  `entra score` writes a reward of that name that says nothing about correctness. Without both, reasoning-gym's scorer decides
  (column `entry`, as `entra.problems.load_problems` writes it), else a comparison with the column `answer` (`entra.grading`).
- A row that lacks what its file is read by is bad: it is counted and left out, as a whole. So is one whose task of
  reasoning-gym runs answers as code, unless that is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entra.cli import CommandError, one_line
from entra.cli.columns import KNOWN, TOKENS, TRUNCATED, correct_column, first, key_of, problem_column
from entra.cli.scoring import load_tokenizer_of
from entra.encode import Encoder, as_ids, completion_text
from entra.progress import progress_bar
from entra.rows import Row, is_finite, read_rows, survey
from entra.scorer_process import ProcessError

_WORDS = "counted instead of tokens, for which there is no column tokens or completion_ids, and no --model"


class Outcome(NamedTuple):
    """What became of one completion."""

    problem: str
    """Equal for completions of one problem, within a file and between files."""
    right: bool | None
    """None where nothing tells."""
    tokens: int
    truncated: bool | None


class Outcomes(NamedTuple):
    """One file."""

    path: Path
    outcomes: list[Outcome]
    errors: dict[int, str]
    """What is wrong with a row, by its number from 1."""


class Reading(NamedTuple):
    """Files, and how they were read, in sentences for people."""

    files: list[Outcomes]
    pair_on: str | None
    right: str | None
    tokens: str
    unit: str
    """tokens, or words where tokens cannot be counted."""
    truncated: str | None
    notes: list[str]


class _BadRow(Exception):
    """The message is "kind: what is wrong"."""


Getter = Callable[[Mapping[str, Any]], Any]


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how files are read."""
    parser.add_argument("--completion-column", default="completion", help="text, chat messages or ids (default: %(default)s)")
    parser.add_argument(
        "--pair-on",
        metavar="COLUMN",
        help="rows with equal values are of the same problem (default: id where all files have it and share one, else prompt)",
    )
    parser.add_argument(
        "--correct-column",
        metavar="COLUMN",
        help="right where it is true or at least 1 (default: correct; else reward, where it is 0 or 1 everywhere; else "
        "reasoning-gym's scorer for the column entry; else a comparison with the column answer)",
    )
    parser.add_argument(
        "--tokens-column",
        metavar="COLUMN",
        help="the number of tokens (default: tokens; else the length of completion_ids; else --model's tokenizer; else words)",
    )
    parser.add_argument("--model", help='whose tokenizer counts the tokens: a folder, a hub name, or "smollm2"')
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="completions of at least so many tokens were cut off (default: the column truncated, else finish_reason)",
    )
    parser.add_argument(
        "--run-answers-as-code",
        action="store_true",
        help="score tasks of reasoning-gym whose scorers run the answer as Python code, too: who wrote the file then chooses "
        "what runs here, in a child process with limits that are no sandbox (default: such rows are bad rows)",
    )


def read_outcomes(options: argparse.Namespace, paths: Sequence[Path]) -> Reading:
    """The outcomes in all files.

    Raises:
        CommandError: a file that cannot be read, a column that is named and not there, a package that is missing.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise CommandError(f"--max-tokens {options.max_tokens} must be at least 1 token")
    surveys = [survey(path) for path in paths]
    shared = [name for name in surveys[0].columns if all(name in found.columns for found in surveys)]
    for path, found in zip(paths, surveys, strict=True):
        if not found.rows:
            raise CommandError(f"{path} has no rows; give a file with one JSON object a line")
    for flag, name in (
        ("--pair-on", options.pair_on),
        ("--correct-column", options.correct_column),
        ("--tokens-column", options.tokens_column),
    ):
        if name is not None and name not in shared:
            raise CommandError(f"{flag} {name}: not a column of every file; these are: {', '.join(shared) or 'none'}")
    named = {options.pair_on, options.correct_column, options.tokens_column, options.completion_column}
    kept = named | KNOWN
    files = [
        [Row({name: row.columns[name] for name in row.columns if name in kept}, row.malformed) for row in read_rows(path, 0)]
        for path in paths
    ]

    notes: list[str] = []
    tokenizer = load_tokenizer_of(options.model) if options.model is not None else None
    text_of = _text_getter(options.completion_column, tokenizer)
    pair_on = options.pair_on or problem_column(files, shared)
    right, is_right = _right_getter(options, files, shared, text_of, notes)
    tokens, tokens_of = _tokens_getter(options, shared, text_of, tokenizer)
    truncated, is_truncated = _truncated_getter(options, shared)
    if pair_on == "id" and "prompt" in shared:
        ids, prompts = (len({key_of(row.columns.get(name)) for rows in files for row in rows}) for name in ("id", "prompt"))
        if prompts < ids:
            notes.append(
                f"{ids:,} ids but {prompts:,} prompts: where samples of one prompt have ids of their own, use --pair-on prompt"
            )

    read = []
    with progress_bar(sum(map(len, files)), 0, "rows") as bar:
        for path, rows in zip(paths, files, strict=True):
            outcomes, errors = [], {}
            for number, row in enumerate(rows, start=1):
                try:
                    if row.malformed is not None:
                        raise _BadRow(f"malformed: {row.malformed}")
                    problem = str(number) if pair_on is None else key_of(_field(row.columns, pair_on))
                    count = tokens_of(row.columns)
                    cut = count >= options.max_tokens if options.max_tokens is not None else is_truncated(row.columns)
                    outcomes.append(Outcome(problem, is_right(row.columns), count, cut))
                except _BadRow as error:
                    errors[number] = str(error)
                bar.update(1)
            read.append(Outcomes(path, outcomes, errors))
    unit = "tokens" if tokens != _WORDS else "words"
    return Reading(read, pair_on, right, tokens, unit, truncated, notes)


def _field(columns: Mapping[str, Any], name: str) -> Any:
    value = columns.get(name)
    if value is None:
        raise _BadRow(f"missing field: {name} is {'null' if name in columns else 'not there'}")
    return value


def _text_getter(column: str, tokenizer: Any) -> Getter:
    def text_of(columns: Mapping[str, Any]) -> str:
        value = _field(columns, column)
        ids = as_ids(value)
        try:
            if ids and tokenizer is not None:
                return str(tokenizer.decode(ids, skip_special_tokens=True))
            return completion_text(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise _BadRow(f"not text: {error}") from error

    return text_of


def _right_getter(
    options: argparse.Namespace, files: Sequence[Sequence[Row]], shared: Sequence[str], text_of: Getter, notes: list[str]
) -> tuple[str | None, Getter]:
    """Where correctness comes from, in words, and a row's."""
    column = options.correct_column or correct_column(files, shared)
    if column is None and "reward" in shared:
        notes.append("the column reward is not taken for correctness: it does not hold 0 or 1 alone (--correct-column does)")
    if column is not None:
        return f"where the column {column} is true or at least 1", lambda columns: _number(columns, column) >= 1
    checked = first(("entry", "answer"), shared)
    if checked == "entry":
        from entra.problems import UnsafeScorerError, reasoning_gym_reward, unsafe_reasoning_gym_reward

        reward = unsafe_reasoning_gym_reward if options.run_answers_as_code else reasoning_gym_reward

        def gym(columns: Mapping[str, Any]) -> bool:
            text, entry = text_of(columns), _field(columns, "entry")
            try:
                return reward([text], [entry]) == [1.0]
            except ImportError as error:
                raise CommandError(
                    f"the column entry needs reasoning-gym, or use --correct-column ({one_line(error)})"
                ) from error
            except ProcessError as error:
                raise CommandError(f"--run-answers-as-code: {one_line(error)}; leave it out", 1) from error
            except UnsafeScorerError as error:
                raise _BadRow(f"not scored: {one_line(error)}") from error
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise _BadRow(f"malformed: entry is no problem of reasoning-gym: {one_line(error)}") from error

        return "where reasoning-gym's scorer gives the answer 1 (column entry)", gym
    if checked == "answer":
        from entra.grading import answer_checker

        how, check = answer_checker()
        return (
            f"where the answer equals the column answer: {how}",
            lambda columns: check(text_of(columns), str(_field(columns, "answer"))),
        )
    notes.append("nothing tells which completions are right; give a column correct, entry or answer, or use --correct-column")
    return None, lambda columns: None


def _tokens_getter(options: argparse.Namespace, shared: Sequence[str], text_of: Getter, tokenizer: Any) -> tuple[str, Getter]:
    """Where the number of tokens comes from, in words, and a row's."""
    column = options.tokens_column or first(TOKENS, shared)
    if column is not None and (column != "completion_ids" or options.tokens_column is not None):

        def count(columns: Mapping[str, Any]) -> int:
            value = _number(columns, column)
            if value < 0 or value != int(value):
                raise _BadRow(f"malformed: {column}={value!r} must be a number of tokens")
            return int(value)

        return f"the column {column}", count
    if column is not None:

        def length(columns: Mapping[str, Any]) -> int:
            ids = as_ids(_field(columns, "completion_ids"))
            if ids is None:
                raise _BadRow("malformed: completion_ids must be a list of token ids")
            return len(ids)

        return "the length of the column completion_ids", length
    if tokenizer is not None:
        encoder = Encoder(tokenizer, None, {})

        def encoded(columns: Mapping[str, Any]) -> int:
            try:
                return len(encoder.encode_completion(_field(columns, options.completion_column)))
            except TypeError as error:
                raise _BadRow(f"not text: {error}") from error
            except ValueError as error:
                raise _BadRow(f"cannot be tokenised: {error}") from error

        return f"of the tokenizer of {options.model}, without trailing EOS", encoded
    return _WORDS, lambda c: len(text_of(c).split())


def _truncated_getter(options: argparse.Namespace, shared: Sequence[str]) -> tuple[str | None, Getter]:
    """Where it comes from which completions were cut off, in words, and a row's."""
    if options.max_tokens is not None:
        return f"completions of at least {options.max_tokens:,} tokens", lambda columns: None
    column = first(TRUNCATED, shared)
    if column == "truncated":
        return "where the column truncated is true", lambda columns: _number(columns, "truncated") >= 1
    if column == "finish_reason":
        return "where the column finish_reason is length", lambda columns: _field(columns, "finish_reason") == "length"
    return None, lambda columns: None


def _number(columns: Mapping[str, Any], name: str) -> float:
    value = _field(columns, name)
    if not is_finite(value):
        raise _BadRow(f"malformed: {name}={value!r} must be a number, true or false")
    return value
