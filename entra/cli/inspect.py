"""`entra inspect`: a file of traces as a page for the browser, or in the terminal.

Decisions taken here:

- What `entra score --details` wrote is shown as it is: nothing is scored again and no weights are loaded. The tokenizer is that
  of the model on record beside the file, or of `--model`; the method's options are those on record, or the command line's.
- A report is made again when it is asked for again, so an existing one is replaced; no other file is. Its name must end in
  .html.
- A row is named by its `id`, else its `name`, where every row that could be read has one and all differ; else by its number,
  from 1. A bad row is in the report with what is wrong, and stops nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from entra import __version__
from entra.cli import CommandError
from entra.cli.columns import DETAIL_COLUMNS, ERROR_COLUMN, SCORE_COLUMNS, row_names, score_prefixes
from entra.cli.output import check_destination, recorded
from entra.cli.scoring import (
    INPUT,
    Scorer,
    add_scoring_flags,
    check_scoring_flags,
    config_of,
    device_name,
    kind_of,
    listed,
    load_as,
    load_tokenizer_of,
    tell,
)
from entra.config import ScoreConfig
from entra.encode import as_ids
from entra.progress import progress_bar
from entra.rows import Row, is_finite
from entra.score import CompletionScores
from entra.shapes import REQUEST
from entra.source import Source
from entra.traces import load_traces
from entra.view.marked import marks_of
from entra.view.page import is_page
from entra.view.trace import Trace, pieces_of

_DESCRIPTION = """\
Show which tokens of a completion carry the reasoning and which repeat: a self-contained page for the browser, or with
--terminal in the terminal. Traces are scored as by entra score, with the same options; a file that entra score --details wrote
is shown without scoring again. Without a file, the traces that ship with entra are shown. Rows that cannot be scored are
listed with what is wrong."""

_DEFAULT_OUTPUT = Path("report.html")
_SHIPPED = "the traces that ship with entra"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra inspect` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("inspect", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("traces", type=Path, nargs="*", help=f"{INPUT}; left out: the shipped traces")
    parser.add_argument(
        "--model",
        help='a folder, a hub name, or "smollm2", which is the default for the shipped traces; for scored files only its '
        "tokenizer is loaded (default: the one they were scored with)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="HTML",
        help=f"the page; replaced when entra inspect wrote it (default: {_DEFAULT_OUTPUT}, none with --terminal)",
    )
    parser.add_argument("--terminal", action="store_true", help="show the traces here; plain text when this is no terminal")
    parser.add_argument("--prefix", help="what stands before the names of entra score's columns (default: found)")
    parser.add_argument(
        "--marks",
        action="append",
        default=[],
        metavar="COLUMN",
        help="show a column of the input as marks on the completion: a list of {start, end, label} by its characters, or one "
        "character's number; may be given more than once",
    )
    add_scoring_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra inspect` with parsed options.

    Raises:
        CommandError: what stops it; rows that cannot be scored do not.
    """
    config = config_of(options)
    options.marks = list(dict.fromkeys(options.marks))
    output = options.output or (None if options.terminal else _DEFAULT_OUTPUT)
    if options.limit is not None and options.limit < 1:
        raise CommandError(f"--limit {options.limit} must be at least 1 row")
    source = _files(options) if options.traces else _shipped(options.limit)
    _check_options(options, output, source)
    if not source.rows:
        raise CommandError(f"{source.title} has no rows; give a file with one JSON object a line")
    prefix = _prefix_of_scores(options, source.columns)
    _check_marks(options.marks, source.columns)
    tell(options, *source.lines)
    if prefix is None:
        check_scoring_flags(options)
        shown = _scored_now(options, config, source)
    else:
        shown = _scored_before(options, config, prefix, source)
    errors = Counter(kind_of(trace.error) for trace in shown.traces if trace.error is not None)
    facts = {**shown.facts, "entra": __version__}
    if output is not None:
        _write(output, shown, source.title, facts)
    found = "1 trace" if source.rows == 1 else f"{source.rows:,} traces"
    if errors:
        found += f", {errors.total():,} of them with an error ({listed(errors)})"
    tell(options, f"{output or source.title}: {found}", *_told_of_marks(options.marks, shown.traces))
    if options.terminal:
        from entra.view import terminal

        terminal.show(shown.traces, title=source.title, facts=facts, interactive=_interactive())
    if errors.total() == len(shown.traces):
        first = shown.traces[0]
        raise CommandError(f"no row could be scored; the first is {first.name}: {first.error}")


def _check_marks(names: Sequence[str], columns: Sequence[str]) -> None:
    for name in names:
        if name not in columns:
            raise CommandError(f"--marks {name}: no row has that column; there are {', '.join(columns)}")


def _told_of_marks(names: Sequence[str], traces: Sequence[Trace]) -> list[str]:
    if not names:
        return []
    marked = sum(bool(trace.marked) for trace in traces)
    left_out = [fault for trace in traces for fault in trace.left_out]
    more = (f"; {left_out[0]}" if left_out else "") + (
        f" ({len(left_out) - 1:,} more such columns of rows)" if left_out[1:] else ""
    )
    total = sum(len(trace.marked) for trace in traces)
    return [f"marks of {', '.join(names)}: {total:,} in {marked:,} of {len(traces):,} traces{more}"]


class _Input(NamedTuple):
    title: str
    rows: int
    columns: Sequence[str]
    read: Iterator[Row]
    taken: Mapping[str, Any]
    """The columns that are prompt and completion."""
    lines: Sequence[str] = ()
    """What there is to say about it."""
    paths: Sequence[Path] = ()


class _Shown(NamedTuple):
    traces: list[Trace]
    config: ScoreConfig | None
    """What the scores were made with; None where nothing says so."""
    facts: dict[str, str]


def _check_options(options: argparse.Namespace, output: Path | None, source: _Input) -> None:
    if output is not None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise CommandError(f"--output {output} must end in .html: it is a page for the browser")
        check_destination("--output", output, source.paths, is_page, "entra inspect")
    needed = "textual" if _interactive() else "rich"
    if options.terminal and importlib.util.find_spec(needed) is None:
        raise CommandError(f"--terminal needs {needed}; get it with: pip install 'entra-reward[inspect]'")


def _interactive() -> bool:
    streams = (sys.stdin, sys.stdout, sys.stderr)  # textual draws on the last one
    return all(stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"


def _shipped(limit: int | None) -> _Input:
    rows = []
    for problem in load_traces():
        kinds: Counter[str] = Counter()
        for completion in problem.completions:
            kinds[completion.kind] += 1
            number = "" if kinds[completion.kind] == 1 else f" {kinds[completion.kind]}"
            columns = {
                "id": f"{problem.id} · {completion.kind}{number}",
                "task": problem.task,
                "kind": completion.kind,
                "answer": problem.answer,
                "correct": completion.correct,
                "source": completion.source,
                "style": completion.style,
            }
            carried = {name: value for name, value in columns.items() if value is not None}
            rows.append(Row(carried, None, [{"role": "user", "content": problem.prompt}], completion.text))
    return _Input(_SHIPPED, len(rows[:limit]), list(rows[0].columns), iter(rows[:limit]), {})


def _files(options: argparse.Namespace) -> _Input:
    before = [_sidecar(path) for path in options.traces]
    taken = _taken_before(before)
    source = Source(
        options.traces,
        prompt=options.prompt_column or taken.get("prompt"),
        completion=options.completion_column or taken.get("completion"),
        limit=options.limit,
    )
    return _Input(source.title, source.rows, source.columns, source.read(), source.taken, source.lines(), source.paths)


def _taken_before(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns that `entra score` took for prompt and completion, where it says so and that is one each."""
    taken = [record["input"].get("taken") for record in records if record]
    if not taken or not isinstance(taken[0], dict) or any(other != taken[0] for other in taken):
        return {}
    return {name: column for name, column in taken[0].items() if isinstance(column, str) and column != REQUEST}


def _prefix_of_scores(options: argparse.Namespace, columns: Sequence[str]) -> str | None:
    """What stands before the names of the columns of `entra score --details`; None where the file has none."""
    found = [prefix for prefix in score_prefixes(columns) if options.prefix in (None, prefix)]
    if len(found) > 1:
        raise CommandError(f"the file was scored more than once; choose with --prefix, one of {', '.join(map(repr, found))}")
    if options.prefix is not None and not found:
        names = ", ".join(options.prefix + name for name in ("reward", *DETAIL_COLUMNS))
        raise CommandError(f"--prefix {options.prefix!r}: the file lacks one of the columns {names}; write it with --details")
    return found[0] if found else None


def _scored_now(options: argparse.Namespace, config: ScoreConfig, source: _Input) -> _Shown:
    model = options.model or (None if options.traces else "smollm2")
    if model is None:
        raise CommandError('--model is needed to score the traces: a folder, a hub name, or "smollm2"')
    policy = load_as(options, model)
    scorer = Scorer(policy, config, options.apply_chat_template)
    traces = _Traces(policy.tokenizer, source.taken, options.marks)
    first = list(islice(source.read, options.batch_size))
    tell(options, *scorer.lines(first))
    rows = chain(first, source.read)
    with progress_bar(source.rows, 0, "rows", options.quiet) as bar:
        while batch := list(islice(rows, options.batch_size)):
            for row, scores in zip(batch, scorer.score(batch), strict=True):
                traces.add(row, scores)
            bar.update(len(batch))
    return _Shown(traces.named(), config, {"model": model, "device": device_name(policy)})


def _scored_before(options: argparse.Namespace, config: ScoreConfig, prefix: str, source: _Input) -> _Shown:
    records = [_sidecar(path) for path in source.paths]
    before = records[0] if all(record.get("model") == records[0].get("model") for record in records) else {}
    scored_with = None
    with suppress(KeyError, TypeError, ValueError, OverflowError):  # not there, or of another version of entra
        scored_with = ScoreConfig(**before["config"])
    if config not in (ScoreConfig(), scored_with):
        raise CommandError(f"{source.title} holds scores, which the method's flags do not change; leave them out")
    model = options.model or before.get("model")
    if not isinstance(model, str):
        raise CommandError(
            f"{source.title} holds scores but nothing beside it says of which model; give --model: its tokenizer is needed"
        )
    # A name on the command line was chosen by who typed it; the one on record comes with the file, and so would its code.
    revision = options.revision or (None if options.model else before.get("revision"))
    tokenizer = load_tokenizer_of(model, trust_remote_code=None if options.model else False, revision=revision)
    traces = _Traces(tokenizer, source.taken, options.marks)
    hidden = [prefix + name for name in (*SCORE_COLUMNS, *DETAIL_COLUMNS, ERROR_COLUMN)]
    with progress_bar(source.rows, 0, "rows", options.quiet) as bar:
        for row in source.read:
            traces.add(row, _read_scores(row, prefix, scored_with), hidden)
            bar.update(1)
    facts = {"model": str(model)} | ({"device": str(before["device"])} if "device" in before else {})
    return _Shown(traces.named(), scored_with, facts)


def _sidecar(path: Path) -> dict[str, Any]:
    """What `entra score` recorded beside a file; empty where there is nothing."""
    try:
        return recorded(path) or {}
    except CommandError:
        return {}


def _read_scores(row: Row, prefix: str, config: ScoreConfig | None) -> CompletionScores | str:
    """The scores in the columns of a row that `entra score --details` wrote, or what is wrong with them."""
    if row.malformed is not None:
        return f"malformed: {row.malformed}"
    error = row.columns.get(prefix + ERROR_COLUMN)
    if error is not None:
        return str(error)
    values: dict[str, Any] = {}
    for name in ("reward", *DETAIL_COLUMNS):
        value = row.columns.get(prefix + name)
        if value is None:
            return f"missing field: {prefix + name} is {'null' if prefix + name in row.columns else 'not there'}"
        values[name] = value
    ids = as_ids(values["token_ids"])
    if ids is None or not all(0 <= i < 2**31 for i in ids):
        return f"malformed: {prefix}token_ids must be a list of token ids"
    if not ids:
        return "empty completion: it has no tokens but EOS and pads"
    if not _is_number(values["reward"]):
        return f"malformed: {prefix}reward={values['reward']!r} must be a number"
    for name in DETAIL_COLUMNS[1:]:
        value = values[name]
        rule = "true or false" if name == "protected" else "a finite number"
        right = _is_bool if name == "protected" else _is_number
        if not isinstance(value, Sequence) or len(value) != len(ids) or not all(map(right, value)):
            return f"malformed: {prefix + name} must hold {rule} for each of the {len(ids)} token_ids"
    kinds = {"token_ids": torch.int64, "protected": torch.bool}
    columns = {name: torch.tensor(values[name], dtype=kinds.get(name, torch.float32)) for name in DETAIL_COLUMNS}
    ngram = 1 if config is None else config.reward_ngram
    return CompletionScores(reward=values["reward"], **columns, reward_ngram=ngram)


_LARGEST = 2.0**127  # scores are float32


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and is_finite(value) and abs(value) < _LARGEST


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


class _Traces:
    """The traces that are shown, in the order of the rows. Scores stay tensors: there can be millions of tokens."""

    def __init__(self, tokenizer: Any, taken: Mapping[str, Any], marks: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        columns = (column for value in taken.values() for column in (value if isinstance(value, list) else [value]))
        self._taken = {column for column in columns if column != REQUEST}
        self._pieces: dict[str, str] = {}
        self._traces: list[Trace] = []
        self._malformed: set[int] = set()

    def add(self, row: Row, scores: CompletionScores | str, hidden: Iterable[str] = ()) -> None:
        """A row with its scores or what is wrong with it; its columns are carried, but for `hidden` ones."""
        if row.malformed is not None:
            self._malformed.add(len(self._traces))
        left_out = {*self._taken, *hidden, *self._marks}
        trace = Trace(
            name=f"row {len(self._traces) + 1}",
            prompt=self._prompt_text(row.prompt),
            columns={name: value for name, value in row.columns.items() if name not in left_out},
            error=scores if isinstance(scores, str) else None,
        )
        if not isinstance(scores, str):
            pieces = pieces_of(self._tokenizer, scores.token_ids.tolist())
            trace = replace(trace, pieces=[self._pieces.setdefault(piece, piece) for piece in pieces], scores=scores)
            text = _text(row.completion)
            found = [marks_of(name, row.columns.get(name), trace.pieces, text) for name in self._marks]
            marked = sorted((mark for marks, _ in found for mark in marks), key=lambda mark: (mark.start, -mark.end))
            trace = replace(trace, marked=marked, left_out=[fault for _, fault in found if fault is not None])
        self._traces.append(trace)

    def named(self) -> list[Trace]:
        """All traces, with the rows' own names where these are unique."""
        rows = [None if i in self._malformed else trace.columns for i, trace in enumerate(self._traces)]
        return [replace(trace, name=name) for trace, name in zip(self._traces, row_names(rows), strict=True)]

    def _prompt_text(self, prompt: Any) -> str:
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        ids = as_ids(prompt) if isinstance(prompt, list) and prompt else None
        if ids is not None:
            return "".join(pieces_of(self._tokenizer, ids)) if all(0 <= i < 2**31 for i in ids) else str(ids)
        messages = prompt if isinstance(prompt, list) else []
        if messages and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages):
            if len(messages) == 1:
                return str(messages[0]["content"])
            return "\n\n".join(f"{message.get('role', '')}: {message['content']}" for message in messages)
        if isinstance(prompt, str) or prompt is None:
            return prompt or ""
        return json.dumps(prompt, ensure_ascii=False, default=str)


def _text(completion: Any) -> str | None:
    """The completion's characters, to which marks belong; None where it is token ids, or of several messages."""
    messages = completion if isinstance(completion, list) else []
    if len(messages) == 1 and isinstance(messages[0], Mapping):
        completion = messages[0].get("content")
    return completion if isinstance(completion, str) else None


def _write(output: Path, shown: _Shown, title: str, facts: Mapping[str, str]) -> None:
    from entra.view.page import write_page

    try:
        write_page(shown.traces, output, title=title, config=shown.config, facts=facts)
    except OSError as error:
        raise CommandError(f"cannot write --output {output}: {error.strerror or error}; choose another", 1) from error
