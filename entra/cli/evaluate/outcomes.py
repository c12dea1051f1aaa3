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
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entra.cli import CommandError, one_line
from entra.cli.columns import KNOWN, TOKENS, TRUNCATED, correct_column, first, key_of, problem_column
from entra.cli.scoring import add_quiet, load_tokenizer_of, tell
from entra.encode import Encoder, as_ids, completion_text
from entra.progress import progress_bar
from entra.rows import Row, is_finite
from entra.scorer_process import ProcessError
from entra.source import Source

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


Getter = Callable[[Row], Any]


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how files are read."""
    parser.add_argument("--prompt-column", metavar="COLUMN", help="text, chat messages or ids (default: found)")
    parser.add_argument("--completion-column", metavar="COLUMN", help="the same, or a list of them (default: found)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each file")
    add_quiet(parser)
    parser.add_argument(
        "--pair-on",
        metavar="COLUMN",
        help="rows with equal values are of the same problem (default: id where all files have it and share one, else prompt, "
        "else custom_id)",
    )
    parser.add_argument(
        "--correct-column",
        metavar="COLUMN",
        help="right where it is true or at least 1 (default: correct; else reward, where it is 0 or 1 everywhere). "
        "Without either: reasoning-gym's scorer for the column entry; else a comparison with the column answer",
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
        help="score also tasks of reasoning-gym whose scorers run the answer as Python code. Who wrote the file then chooses "
        "what runs here, in a child process with limits that are no sandbox (default: such rows are bad rows)",
    )


def read_outcomes(options: argparse.Namespace, paths: Sequence[Path]) -> Reading:
    """The outcomes in all files.

    Raises:
        CommandError: a file that cannot be read, a column that is named and not there, a package that is missing.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise CommandError(f"--max-tokens {options.max_tokens} must be at least 1 token")
    sources = [
        Source(
            [path],
            prompt=options.prompt_column,
            completion=options.completion_column,
            limit=options.limit,
            required=False,
        )
        for path in paths
    ]
    for path, source in zip(paths, sources, strict=True):
        if not source.rows:
            raise CommandError(f"{path} has no rows; give a file with one JSON object a line")
    tell(options, *(line for source in sources for line in source.lines()))
    columns = [[*source.columns, *source.has_prompt()] for source in sources]
    shared = [name for name in dict.fromkeys(columns[0]) if all(name in found for found in columns)]
    for flag, name in (
        ("--pair-on", options.pair_on),
        ("--correct-column", options.correct_column),
        ("--tokens-column", options.tokens_column),
    ):
        if name is not None and name not in shared:
            raise CommandError(f"{flag} {name}: not a column of every file; these are: {', '.join(shared) or 'none'}")
    kept = {options.pair_on, options.correct_column, options.tokens_column} | KNOWN
    files = [[_kept(row, kept) for row in source.read()] for source in sources]

    notes: list[str] = []
    tokenizer = load_tokenizer_of(options.model) if options.model is not None else None
    text_of = _text_getter(tokenizer)
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
    with progress_bar(sum(map(len, files)), 0, "rows", options.quiet) as bar:
        for path, rows in zip(paths, files, strict=True):
            outcomes, errors = [], {}
            for number, row in enumerate(rows, start=1):
                try:
                    if row.malformed is not None:
                        raise _BadRow(f"malformed: {row.malformed}")
                    problem = str(number) if pair_on is None else key_of(_field(row.columns, pair_on))
                    count = tokens_of(row)
                    cut = count >= options.max_tokens if options.max_tokens is not None else is_truncated(row)
                    outcomes.append(Outcome(problem, is_right(row), count, cut))
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


def _kept(row: Row, names: Container[str | None]) -> Row:
    """A row with these columns alone; its prompt is one of them, whatever its column was called."""
    columns = {name: value for name, value in row.columns.items() if name in names}
    if row.prompt is not None:
        columns.setdefault("prompt", row.prompt)
    return row._replace(columns=columns, prompt=None)


def _completion(row: Row) -> Any:
    if row.completion is None:
        raise _BadRow(row.fault or "missing field: no completion")
    return row.completion


def _text_getter(tokenizer: Any) -> Getter:
    def text_of(row: Row) -> str:
        value = _completion(row)
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
        return f"where the column {column} is true or at least 1", lambda row: _number(row, column) >= 1
    checked = first(("entry", "answer"), shared)
    if checked == "entry":
        from entra.problems import UnsafeScorerError, reasoning_gym_reward, unsafe_reasoning_gym_reward

        reward = unsafe_reasoning_gym_reward if options.run_answers_as_code else reasoning_gym_reward

        def gym(row: Row) -> bool:
            text, entry = text_of(row), _field(row.columns, "entry")
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
            lambda row: check(text_of(row), str(_field(row.columns, "answer"))),
        )
    notes.append("nothing tells which completions are right; give a column correct, entry or answer, or use --correct-column")
    return None, lambda row: None


def _tokens_getter(options: argparse.Namespace, shared: Sequence[str], text_of: Getter, tokenizer: Any) -> tuple[str, Getter]:
    """Where the number of tokens comes from, in words, and a row's."""
    column = options.tokens_column or first(TOKENS, shared)
    if column is not None and (column != "completion_ids" or options.tokens_column is not None):

        def count(row: Row) -> int:
            value = _number(row, column)
            if value < 0 or value != int(value):
                raise _BadRow(f"malformed: {column}={value!r} must be a number of tokens")
            return int(value)

        return f"the column {column}", count
    if column is not None:

        def length(row: Row) -> int:
            ids = as_ids(_field(row.columns, "completion_ids"))
            if ids is None:
                raise _BadRow("malformed: completion_ids must be a list of token ids")
            return len(ids)

        return "the length of the column completion_ids", length
    if tokenizer is not None:
        encoder = Encoder(tokenizer, None, {})

        def encoded(row: Row) -> int:
            try:
                return len(encoder.encode_completion(_completion(row)))
            except TypeError as error:
                raise _BadRow(f"not text: {error}") from error
            except ValueError as error:
                raise _BadRow(f"cannot be tokenised: {error}") from error

        return f"of the tokenizer of {options.model}, without trailing EOS", encoded
    return _WORDS, lambda row: len(text_of(row).split())


def _truncated_getter(options: argparse.Namespace, shared: Sequence[str]) -> tuple[str | None, Getter]:
    """Where it comes from which completions were cut off, in words, and a row's."""
    if options.max_tokens is not None:
        return f"completions of at least {options.max_tokens:,} tokens", lambda row: None
    column = first(TRUNCATED, shared)
    if column == "truncated":
        return "where the column truncated is true", lambda row: _number(row, "truncated") >= 1
    if column == "finish_reason":
        return "where the column finish_reason is length", lambda row: _field(row.columns, "finish_reason") == "length"
    return None, lambda row: None


def _number(row: Row, name: str) -> float:
    value = _field(row.columns, name)
    if isinstance(value, str):  # of CSV, which has no numbers
        value = _written(value)
    if not is_finite(value):
        raise _BadRow(f"malformed: {name}={value!r} must be a number, true or false")
    return value


def _written(text: str) -> Any:
    """A number, true or false that is written as text; the text where it is none."""
    lower = text.strip().lower()
    if lower in ("true", "false"):
        return lower == "true"
    try:
        return float(lower)
    except ValueError:
        return text
