"""`entra score`: a file of traces in, a file of scores out; stopped anywhere, it goes on where it was.

Decisions taken here:

- Batches are planned from the row's number in the input alone. A run that goes on scores its first batch again as a whole and
  writes only the rows that are missing, so the file is the same to the byte as that of an uninterrupted run on this machine
  (other hardware rounds differently). The number of CPU threads, on which rounding depends too, is taken from the first run.
- Carried columns come out as they went in, also NaN and Infinity, which are not JSON: they are written as Python's json and
  pandas write them (`entra.cli.rows` says why).
- A bad row is found on its own, before its batch is scored, so its error does not depend on its neighbours. Its `error` is
  "kind: message"; the summary counts kinds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from entra import __version__
from entra.cli import CommandError, one_line
from entra.cli.flags import add_flags
from entra.cli.output import Output, check, recorded
from entra.cli.rows import Row, Survey, read_rows, survey
from entra.config import ScoreConfig
from entra.encode import Encoder
from entra.forward import unwrapped
from entra.policy import Policy, load_policy
from entra.progress import progress_bar
from entra.score import Scores, score_batch

SCORE_COLUMNS = ("reward", "tokens", "mean_logprob", "mean_incoming", "protected_tokens")
DETAIL_COLUMNS = ("token_ids", "logprobs", "incoming", "importance", "protected")
ERROR_COLUMN = "error"

_DESCRIPTION = """\
Score the completions in a file of traces, JSON Lines or Parquet. The output has the input's rows in the input's order, each
with its columns and: reward, tokens (of the completion), mean_logprob, mean_incoming (attention from future tokens) and
protected_tokens (how many), or error (kind and message) when the row cannot be scored. Bad rows stop nothing and leave the
exit code at 0. A run that was stopped, in whatever way, goes on when the same command is given again; OUTPUT.meta.json
records what the rows belong to, and a command with another input, model or option is refused."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra score` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "score", help="score a file of traces", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("traces", type=Path, help="the input: *.parquet, anything else is read as JSON Lines")
    parser.add_argument("--model", required=True, help='a folder, a hub name, or "smollm2"')
    parser.add_argument("--output", type=Path, required=True, help="the output, JSON Lines")
    parser.add_argument("--prompt-column", default="prompt", help="text, chat messages or token ids (default: %(default)s)")
    parser.add_argument("--completion-column", default="completion", help="the same (default: %(default)s)")
    parser.add_argument("--prefix", default="", help="put this before the names of the added columns")
    parser.add_argument("--details", action="store_true", help=f"add the tokens' {', '.join(DETAIL_COLUMNS)}")
    parser.add_argument("--batch-size", type=int, default=16, help="rows that are scored, then written (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start again when the output exists")
    add_flags(parser.add_argument_group("options of the method (entra.ScoreConfig)"), ScoreConfig)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra score` with parsed options.

    Raises:
        CommandError: what stops a run; rows that cannot be scored do not.
    """
    started = time.monotonic()
    config = _config(options)
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
        before = recorded(options.output)
        if before is not None:
            # The last digits of a CPU's sums depend on the number of threads.
            torch.set_num_threads(int(before["threads"]))
    policy = load(options.model)
    identity |= {"device": device_name(policy), "weights": fingerprint(policy)}
    summary = _Summary(options.prefix)
    facts = {"model": options.model, "threads": torch.get_num_threads()}
    with Output(options.output, identity, facts, options.overwrite) as output:
        for row in output.finished(options.prefix + ERROR_COLUMN, [options.prefix + name for name in ("reward", "tokens")]):
            summary.add(row)
        summary.earlier = summary.rows
        try:
            _score_missing(options, source, _Scorer(options, policy, config), output, summary)
        except KeyboardInterrupt:
            raise CommandError(
                f"interrupted after {summary.rows} of {source.rows} rows; the same command goes on from there", exit_code=130
            ) from None
    print(summary.text(options.output, time.monotonic() - started), file=sys.stderr)


def versions() -> dict[str, str]:
    """The installed versions of what scores depend on."""
    return {"entra": __version__, **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}


def load(model: str) -> Policy:
    """The policy of that name; CommandError when there is none."""
    try:
        return load_policy(model)
    except Exception as error:  # transformers and the libraries it reads files with raise what they like
        raise CommandError(
            f"cannot load --model {model}: {one_line(error)}; "
            'give a folder with config, weights and tokenizer, a hub name, or "smollm2"'
        ) from error


def device_name(policy: Policy) -> str:
    """What the model runs on: the name of its GPU, or "cpu"."""
    device = next(policy.model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def fingerprint(policy: Policy) -> str:
    """A hash that changes when model or tokenizer do: every weight's name, shape and 64 of its values, and the vocabulary."""
    digest = hashlib.sha256()
    for name, weight in policy.model.state_dict().items():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        values = weight.reshape(-1)
        digest.update(values[:: max(1, values.numel() // 64)].double().cpu().numpy().tobytes())
    tokenizer = policy.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else None
    digest.update(repr((vocabulary, template)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _config(options: argparse.Namespace) -> ScoreConfig:
    try:
        return ScoreConfig(**{field.name: getattr(options, field.name) for field in fields(ScoreConfig)})
    except ValueError as error:
        raise CommandError(str(error)) from error


def _check_options(options: argparse.Namespace, source: Survey) -> None:
    if options.batch_size < 1:
        raise CommandError(f"--batch-size {options.batch_size} must be at least 1 row")
    if os.path.exists(options.output):  # Path.exists raises when the name is too long
        if not options.output.is_file():
            raise CommandError(f"cannot write --output {options.output}: it is no ordinary file; name one")
        if options.output.samefile(options.traces):
            raise CommandError(f"--output {options.output} is the input; choose another file")
    elif not os.path.isdir(options.output.parent):
        raise CommandError(f"cannot write --output {options.output}: there is no folder {options.output.parent}; make it first")
    for option, column in (("--prompt-column", options.prompt_column), ("--completion-column", options.completion_column)):
        if source.columns and column not in source.columns:
            raise CommandError(f"no row has a column {column!r}; there are {', '.join(source.columns)}: use {option}")
    added = [options.prefix + name for name in (*SCORE_COLUMNS, *(DETAIL_COLUMNS if options.details else ()), ERROR_COLUMN)]
    taken = [name for name in added if name in source.columns]
    if taken:
        raise CommandError(f"the input has columns that would be added: {', '.join(taken)}; use --prefix, e.g. --prefix entra_")


def _score_missing(options: argparse.Namespace, source: Survey, scorer: _Scorer, output: Output, summary: _Summary) -> None:
    first = summary.rows - summary.rows % options.batch_size
    rows = read_rows(options.traces, first)
    with progress_bar(source.rows, summary.rows, "rows") as bar:
        while summary.rows < source.rows:
            scored = scorer.score(list(islice(rows, options.batch_size)))[summary.rows - first :]
            if not scored:
                raise CommandError(f"{options.traces} has become shorter; it had {source.rows} rows when the run began", 1)
            output.append(scored)
            for row in scored:
                summary.add(row)
            first += options.batch_size
            if summary.errors:
                bar.set_postfix_str(f"{summary.errors.total()} errors", refresh=False)
            bar.update(len(scored))


class _Scorer:
    """Scores a batch of rows as they come from the file."""

    def __init__(self, options: argparse.Namespace, policy: Policy, config: ScoreConfig) -> None:
        self._prompt, self._completion = options.prompt_column, options.completion_column
        self._prefix: str = options.prefix
        self._details: bool = options.details
        self._policy = policy
        self._config = config
        model = unwrapped(policy.model)
        self._encoder = Encoder(policy.tokenizer, model, config.chat_template_kwargs)
        self._unlimited = Encoder(policy.tokenizer, model, config.chat_template_kwargs)
        self._unlimited.vocab_size = self._unlimited.context = None

    def score(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Each row's columns with its scores, or with what is wrong with it."""
        faults = [self._fault(row) for row in rows]
        good = [row.columns for row, fault in zip(rows, faults, strict=True) if fault is None]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # rows that are not finite: they get an error
                scores = score_batch(
                    [columns[self._prompt] for columns in good],
                    [columns[self._completion] for columns in good],
                    model=self._policy.model,
                    tokenizer=self._policy.tokenizer,
                    config=self._config,
                    details=True,
                )
        except torch.OutOfMemoryError as error:
            raise CommandError(f"out of memory; use a smaller --token-budget ({one_line(error)})", 1) from error
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"cannot score with this model: {one_line(error)}", 1) from error
        result, i = [], 0
        for row, fault in zip(rows, faults, strict=True):
            if fault is not None:
                added: dict[str, Any] = {ERROR_COLUMN: fault}
            else:
                added = self._added(scores, i)
                i += 1
            result.append({**row.columns, **{self._prefix + name: value for name, value in added.items()}})
        return result

    def _added(self, scores: Scores, i: int) -> dict[str, Any]:
        if scores.rewards[i] is None:
            return {ERROR_COLUMN: "not finite: a log-probability or attention of this row is not finite under this model"}
        values = (
            scores.rewards[i],
            scores.logprobs[i].numel(),
            float(scores.logprobs[i].double().mean()),
            float(scores.incoming[i].double().mean()),
            int(scores.protected[i].sum()),
        )
        added: dict[str, Any] = dict(zip(SCORE_COLUMNS, values, strict=True))
        if self._details:
            added.update({name: getattr(scores, name)[i].tolist() for name in DETAIL_COLUMNS})
        return added

    def _fault(self, row: Row) -> str | None:
        if row.malformed is not None:
            return f"malformed: {row.malformed}"
        for column in (self._prompt, self._completion):
            if row.columns.get(column) is None:
                return f"missing field: {column} is {'null' if column in row.columns else 'not there'}"
        prompt, completion = row.columns[self._prompt], row.columns[self._completion]
        try:
            encoded = self._encoder.encode(prompt, completion)
        except TypeError as error:
            return f"not text: {error}"
        except ValueError as error:
            return f"{self._limit(prompt, completion)}: {error}"
        return None if encoded.completion else "empty completion: it has no tokens but EOS and pads"

    def _limit(self, prompt: Any, completion: Any) -> str:
        """Which of the model's limits a row breaks, or that it has no token ids at all."""
        try:
            encoded = self._unlimited.encode(prompt, completion)
        except ValueError:
            return "cannot be tokenised"
        size = self._encoder.vocab_size
        inside = size is None or all(0 <= i < size for ids in encoded for i in ids)
        return "longer than the context" if inside else "outside the vocabulary"


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
            self.errors[error.partition(":")[0]] += 1
        else:
            self.tokens += row[self._prefix + "tokens"]
            self.rewards += row[self._prefix + "reward"]

    def text(self, path: Path, seconds: float) -> str:
        """The summary in a few lines."""
        good = self.rows - self.errors.total()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.errors.items()))
        lines = [
            f"{path}: {self.rows:,} rows" + (f", {self.earlier:,} of them from earlier runs" if self.earlier else ""),
            f"  scored       {good:,}",
            f"  errors       {self.errors.total():,}" + (f" ({kinds})" if kinds else ""),
            f"  mean reward  {self.rewards / good:.4f}" if good else "  mean reward  none",
            f"  tokens       {self.tokens:,}",
            f"  time         {seconds:.1f} s, model loading included",
        ]
        return "\n".join(lines)
