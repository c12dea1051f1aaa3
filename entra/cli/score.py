"""`entra score`: a file of traces in, a file of scores out; stopped anywhere, it goes on where it was.

Decisions taken here:

- Batches are planned from the row's number in the input alone. A run that goes on scores its first batch again as a whole and
  writes only the rows that are missing. So the file is the same to the byte as that of an uninterrupted run on this machine;
  other hardware rounds differently. The number of CPU threads, on which rounding depends too, is taken from the first run.
- Carried columns come out as they went in, also NaN and Infinity, which are not JSON: they are written as Python's json and
  pandas write them (`entra.rows` says why).
- A bad row's `error` is "kind: message" (`entra.cli.scoring`); the summary counts kinds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from entra import __version__
from entra.cli import CommandError
from entra.cli.columns import DETAIL_COLUMNS, ERROR_COLUMN, SCORE_COLUMNS
from entra.cli.fingerprint import fingerprint
from entra.cli.output import Output, Stream, check, check_output, check_stream, json_value, recorded_threads
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
    tell,
)
from entra.progress import progress_bar
from entra.rows import format_of, read_rows
from entra.score import CompletionScores
from entra.source import PIPE, Source

IDENTITY = ("prefix", "details", "batch_size", "limit", "apply_chat_template", "dtype", "revision")
"""Options that rows depend on, but for those of the method."""
_PREFIX = "entra_"
"""Stands before the names of the added columns where the input has one of them: what people have needs no flag."""
_DESCRIPTION = """\
Score the completions in files of traces, in the shapes and formats in which people have them. The output has the input's rows
in the input's order, each with its columns. Added are reward, tokens (of the completion), mean_logprob, mean_incoming
(attention from future tokens) and protected_tokens (how many). A row that cannot be scored gets error (kind and message)
instead. A row with several completions becomes one row for each. Bad rows stop nothing. They leave the exit code at 0, unless
there are no others. A run that was stopped, in whatever way, goes on when you give the same command again. OUTPUT.meta.json
records what the rows belong to, and another input, model or option is refused. Files that entra score did not write are never
replaced, not even with --overwrite."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra score` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("score", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("traces", type=Path, nargs="+", help=INPUT)
    parser.add_argument("--model", required=True, help='a folder, a hub name, or "smollm2"')
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="the output: *.jsonl.gz, *.jsonl.zst, *.parquet, *.json and *.csv are what they say, - is stdout, else JSON Lines",
    )
    parser.add_argument(
        "--prefix", help=f"put this before the names of the added columns (default: {_PREFIX} if the input has one of them)"
    )
    parser.add_argument("--details", action="store_true", help=f"add the tokens' {', '.join(DETAIL_COLUMNS)}")
    parser.add_argument("--overwrite", action="store_true", help="start again; an output that exists is replaced at the end")
    ray = parser.add_argument_group("Ray Data, for several machines or GPUs (pip install 'entra-reward[ray]')")
    ray.add_argument("--engine", choices=("ray",), help="a pool of workers; OUTPUT is then a folder of Parquet files")
    ray.add_argument("--workers", type=int, metavar="N", help="models that score at once (default: one per GPU, else 1)")
    ray.add_argument("--gpus-per-worker", type=float, metavar="F", help="may be a fraction (default: 1, without GPUs 0)")
    add_scoring_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra score` with parsed options.

    Raises:
        CommandError: what stops a run; rows that cannot be scored do not.
    """
    if options.engine == "ray":
        from entra.integrations.ray_data import score_folder

        return score_folder(options)
    if options.workers is not None or options.gpus_per_worker is not None:
        raise CommandError("--workers and --gpus-per-worker belong to --engine ray; give that, too, or leave them out")
    started = time.monotonic()
    config = config_of(options)
    source = Source(
        options.traces,
        prompt=options.prompt_column,
        completion=options.completion_column,
        limit=options.limit,
        output=options.output,
    )
    once = source.piped or options.output == PIPE
    _check_options(options, source, once)
    tell(options, *source.lines())
    identity: dict[str, Any] = {
        "input": source.record(),
        "config": asdict(config),
        **{name: getattr(options, name) for name in IDENTITY},
        "versions": versions(),
    }
    if not options.overwrite and not once:
        check(options.output, identity)  # before the model is loaded, which takes long
        threads = recorded_threads(options.output)
        if threads is not None:
            # The last digits of a CPU's sums depend on the number of threads.
            torch.set_num_threads(threads)
    policy = load_as(options, options.model)
    scorer = Scorer(policy, config, options.apply_chat_template)
    tell(options, *scorer.lines(source.read()))
    identity |= {"device": device_name(policy), "model_files": fingerprint(options.model, options.revision, options.quiet)}
    summary = Summary(options.prefix)
    facts = {"model": options.model, "threads": torch.get_num_threads()}
    if once:
        tell(options, json.dumps({**identity, **facts}, default=json_value))
    with Stream(options.output) if once else Output(options.output, identity, facts, options.overwrite) as output:
        if output.done:
            for row in read_rows(options.output, options.output, format_of(options.output, options.output)):
                summary.add(row.columns)
        elif isinstance(output, Output):
            given = (row.columns for row in source.read())
            numbers = [options.prefix + name for name in SCORE_COLUMNS]
            for columns in output.finished(given, options.prefix + ERROR_COLUMN, numbers, _added_columns(options)):
                summary.add(columns)
        summary.earlier = summary.rows
        try:
            _score_missing(options, source, scorer, output, summary)
        except KeyboardInterrupt:
            told = f"interrupted after {summary.rows} of {source.rows} rows"
            goes_on = f"; {output.going_on} from there" if isinstance(output, Output) else ""
            raise CommandError(told + goes_on, exit_code=130) from None
        mixed = output.finish()
    tell(options, *summary.lines(options.output, time.monotonic() - started))
    if mixed:
        tell(options, f"  as JSON      {', '.join(mixed)}: Parquet has one type for a column")
    summary.check()


def versions() -> dict[str, str]:
    """The installed versions of what scores depend on."""
    return {"entra": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}


def _check_options(options: argparse.Namespace, source: Source, once: bool) -> None:
    if once:
        check_stream(options.output, source.paths)
    else:
        check_output(options.output, source.paths, options.overwrite)
    check_scoring_flags(options)
    choose_prefix(options, source)


def choose_prefix(options: argparse.Namespace, source: Source) -> None:
    """Settle `options.prefix`, so that no added column has the name of one of the input.

    Raises:
        CommandError: the given prefix, or our own, does not do that.
    """
    found = options.prefix is None
    options.prefix = options.prefix or ""
    taken = [name for name in _added_columns(options) if name in source.columns]
    if found and taken:
        options.prefix = _PREFIX
        tell(options, f"the input has {', '.join(taken)}, so the names of all added columns begin with {_PREFIX}")
        taken = [name for name in _added_columns(options) if name in source.columns]
    if taken:
        raise CommandError(f"the input has columns that would be added: {', '.join(taken)}; choose another --prefix")


def _added_columns(options: argparse.Namespace) -> list[str]:
    return [options.prefix + name for name in (*SCORE_COLUMNS, *(DETAIL_COLUMNS if options.details else ()), ERROR_COLUMN)]


def _score_missing(
    options: argparse.Namespace, source: Source, scorer: Scorer, output: Output | Stream, summary: Summary
) -> None:
    first = summary.rows - summary.rows % options.batch_size
    rows = source.read(first)
    with progress_bar(source.rows, summary.rows, "rows", options.quiet) as bar:
        while summary.rows < source.rows:
            batch = list(islice(rows, options.batch_size))
            scored = [
                {**row.columns, **added_to(scores, options.prefix, options.details)}
                for row, scores in zip(batch, scorer.score(batch), strict=True)
            ][summary.rows - first :]
            output.append(scored)
            for row in scored:
                summary.add(row)
            first += options.batch_size
            if summary.errors:
                bar.set_postfix_str(f"{summary.errors.total()} errors", refresh=False)
            bar.update(len(scored))


def added_to(scores: CompletionScores | str, prefix: str, details: bool) -> dict[str, Any]:
    """The columns that a row gets."""
    if isinstance(scores, str):
        return {prefix + ERROR_COLUMN: scores}
    values = (
        scores.reward,
        scores.logprobs.numel(),
        float(scores.logprobs.double().mean()),
        float(scores.incoming.double().mean()),
        int(scores.protected.sum()),
    )
    added: dict[str, Any] = dict(zip(SCORE_COLUMNS, values, strict=True))
    if details:
        added.update({name: getattr(scores, name).tolist() for name in DETAIL_COLUMNS})
    return {prefix + name: value for name, value in added.items()}


class Summary:
    """What is counted over all rows of the output."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.rows = 0
        self.earlier = 0
        self.tokens = 0
        self.rewards = 0.0
        self.errors: Counter[str] = Counter()
        self._first: str | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of the output."""
        self.rows += 1
        error = row.get(self._prefix + ERROR_COLUMN)
        if error is not None:
            self.errors[kind_of(error)] += 1
            if self._first is None:
                self._first = f"row {self.rows}: {error}"
        else:  # as text in CSV
            self.tokens += int(row[self._prefix + "tokens"])
            self.rewards += float(row[self._prefix + "reward"])

    def check(self) -> None:
        """CommandError when there are rows and none has a score."""
        if self._first is not None and self.errors.total() == self.rows:
            raise CommandError(f"no row could be scored; the first is {self._first}")

    def lines(self, path: Path, seconds: float) -> list[str]:
        """The summary in a few lines."""
        good = self.rows - self.errors.total()
        return [
            f"{path}: {self.rows:,} rows" + (f", {self.earlier:,} of them from earlier runs" if self.earlier else ""),
            f"  scored       {good:,}",
            f"  errors       {self.errors.total():,}" + (f" ({listed(self.errors)})" if self.errors else ""),
            f"  mean reward  {self.rewards / good:.4f}" if good else "  mean reward  none",
            f"  tokens       {self.tokens:,}",
            f"  time         {seconds:.1f} s, model loading included",
        ]
