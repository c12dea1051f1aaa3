"""`entra score`: a file of traces in, a file of scores out; stopped anywhere, it goes on where it was.

Decisions taken here:

- Batches are planned from the row's number in the input alone. A run that goes on scores its first batch again as a whole and
  writes only the rows that are missing, so the file is the same to the byte as that of an uninterrupted run on this machine
  (other hardware rounds differently). The number of CPU threads, on which rounding depends too, is taken from the first run.
- Carried columns come out as they went in, also NaN and Infinity, which are not JSON: they are written as Python's json and
  pandas write them (`entra.rows` says why).
- A bad row's `error` is "kind: message" (`entra.cli.scoring`); the summary counts kinds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from entra import __version__
from entra.cli import CommandError, say
from entra.cli.columns import DETAIL_COLUMNS, ERROR_COLUMN, SCORE_COLUMNS
from entra.cli.fingerprint import fingerprint
from entra.cli.output import Output, check, check_output, recorded_threads
from entra.cli.scoring import (
    Scorer,
    add_scoring_flags,
    check_scoring_flags,
    config_of,
    device_name,
    kind_of,
    listed,
    load,
)
from entra.progress import progress_bar
from entra.rows import Survey, read_rows, survey
from entra.score import CompletionScores

_DESCRIPTION = """\
Score the completions in a file of traces, JSON Lines or Parquet. The output has the input's rows in the input's order, each
with its columns and: reward, tokens (of the completion), mean_logprob, mean_incoming (attention from future tokens) and
protected_tokens (how many), or error (kind and message) when the row cannot be scored. Bad rows stop nothing and leave the
exit code at 0. A run that was stopped, in whatever way, goes on when the same command is given again; OUTPUT.meta.json
records what the rows belong to, and a command with another input, model or option is refused. Files that entra score did not
write are never replaced, with --overwrite neither."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra score` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("score", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("traces", type=Path, help="the input: *.parquet, anything else is read as JSON Lines")
    parser.add_argument("--model", required=True, help='a folder, a hub name, or "smollm2"')
    parser.add_argument("--output", type=Path, required=True, help="the output, JSON Lines")
    parser.add_argument("--prefix", default="", help="put this before the names of the added columns")
    parser.add_argument("--details", action="store_true", help=f"add the tokens' {', '.join(DETAIL_COLUMNS)}")
    parser.add_argument("--overwrite", action="store_true", help="start again when the output exists")
    add_scoring_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra score` with parsed options.

    Raises:
        CommandError: what stops a run; rows that cannot be scored do not.
    """
    started = time.monotonic()
    config = config_of(options)
    source = survey(options.traces)
    _check_options(options, source)
    identity: dict[str, Any] = {
        "input": source._asdict(),
        "config": asdict(config),
        **{name: getattr(options, name) for name in ("prompt_column", "completion_column", "prefix", "details", "batch_size")},
        "versions": versions(),
    }
    if not options.overwrite:
        check(options.output, identity)  # before the model is loaded, which takes long
        threads = recorded_threads(options.output)
        if threads is not None:
            # The last digits of a CPU's sums depend on the number of threads.
            torch.set_num_threads(threads)
    policy = load(options.model)
    identity |= {"device": device_name(policy), "model_files": fingerprint(options.model)}
    summary = _Summary(options.prefix)
    facts = {"model": options.model, "threads": torch.get_num_threads()}
    with Output(options.output, identity, facts, options.overwrite) as output:
        given = (row.columns for row in read_rows(options.traces, 0))
        numbers = [options.prefix + name for name in SCORE_COLUMNS]
        for row in output.finished(given, options.prefix + ERROR_COLUMN, numbers, _added_columns(options)):
            summary.add(row)
        summary.earlier = summary.rows
        try:
            _score_missing(options, source, Scorer(options, policy, config), output, summary)
        except KeyboardInterrupt:
            raise CommandError(
                f"interrupted after {summary.rows} of {source.rows} rows; the same command goes on from there", exit_code=130
            ) from None
    say(*summary.lines(options.output, time.monotonic() - started))


def versions() -> dict[str, str]:
    """The installed versions of what scores depend on."""
    return {"entra": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}


def _check_options(options: argparse.Namespace, source: Survey) -> None:
    check_output(options.output, [options.traces])
    check_scoring_flags(options, source)
    taken = [name for name in _added_columns(options) if name in source.columns]
    if taken:
        raise CommandError(f"the input has columns that would be added: {', '.join(taken)}; use --prefix, e.g. --prefix entra_")


def _added_columns(options: argparse.Namespace) -> list[str]:
    return [options.prefix + name for name in (*SCORE_COLUMNS, *(DETAIL_COLUMNS if options.details else ()), ERROR_COLUMN)]


def _score_missing(options: argparse.Namespace, source: Survey, scorer: Scorer, output: Output, summary: _Summary) -> None:
    first = summary.rows - summary.rows % options.batch_size
    rows = read_rows(options.traces, first)
    with progress_bar(source.rows, summary.rows, "rows") as bar:
        while summary.rows < source.rows:
            batch = list(islice(rows, options.batch_size))
            scored = [
                {**row.columns, **_added(scores, options)} for row, scores in zip(batch, scorer.score(batch), strict=True)
            ][summary.rows - first :]
            if not scored:
                raise CommandError(f"{options.traces} has become shorter; it had {source.rows} rows when the run began", 1)
            output.append(scored)
            for row in scored:
                summary.add(row)
            first += options.batch_size
            if summary.errors:
                bar.set_postfix_str(f"{summary.errors.total()} errors", refresh=False)
            bar.update(len(scored))


def _added(scores: CompletionScores | str, options: argparse.Namespace) -> dict[str, Any]:
    """The columns that a row gets."""
    if isinstance(scores, str):
        return {options.prefix + ERROR_COLUMN: scores}
    values = (
        scores.reward,
        scores.logprobs.numel(),
        float(scores.logprobs.double().mean()),
        float(scores.incoming.double().mean()),
        int(scores.protected.sum()),
    )
    added: dict[str, Any] = dict(zip(SCORE_COLUMNS, values, strict=True))
    if options.details:
        added.update({name: getattr(scores, name).tolist() for name in DETAIL_COLUMNS})
    return {options.prefix + name: value for name, value in added.items()}


class _Summary:
    """What is counted over all rows of the output."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.rows = 0
        self.earlier = 0
        self.tokens = 0
        self.rewards = 0.0
        self.errors: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one row of the output."""
        self.rows += 1
        error = row.get(self._prefix + ERROR_COLUMN)
        if error is not None:
            self.errors[kind_of(error)] += 1
        else:
            self.tokens += row[self._prefix + "tokens"]
            self.rewards += row[self._prefix + "reward"]

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
