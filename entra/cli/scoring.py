"""Scoring rows of a file: what `entra score` and `entra inspect` share.

A bad row is found on its own, before its batch is scored, so its error does not depend on its neighbours. It is
"kind: message".
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from entra.cli import CommandError, one_line
from entra.config import ScoreConfig
from entra.encode import Encoder
from entra.flags import add_flags
from entra.forward import unwrapped
from entra.policy import Policy, load_policy, load_tokenizer
from entra.rows import Row, Survey
from entra.score import CompletionScores, score_batch


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is in the file and how it is scored."""
    parser.add_argument("--prompt-column", default="prompt", help="text, chat messages or token ids (default: %(default)s)")
    parser.add_argument("--completion-column", default="completion", help="the same (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows that are scored together (default: %(default)s)")
    add_flags(parser.add_argument_group("options of the method (entra.ScoreConfig)"), ScoreConfig)


def config_of(options: argparse.Namespace) -> ScoreConfig:
    """The flags of the method; CommandError when one is out of its range."""
    try:
        return ScoreConfig(**{field.name: getattr(options, field.name) for field in fields(ScoreConfig)})
    except ValueError as error:
        raise CommandError(str(error)) from error


def check_scoring_flags(options: argparse.Namespace, source: Survey) -> None:
    """CommandError for a batch without rows, and for columns that no row has."""
    if options.batch_size < 1:
        raise CommandError(f"--batch-size {options.batch_size} must be at least 1 row")
    for option, column in (("--prompt-column", options.prompt_column), ("--completion-column", options.completion_column)):
        if source.columns and column not in source.columns:
            raise CommandError(f"no row has a column {column!r}; there are {', '.join(source.columns)}: use {option}")


def load(model: str) -> Policy:
    """The policy of that name; CommandError when there is none."""
    with _loading(model, "a folder with config, weights and tokenizer"):
        return load_policy(model)


def load_tokenizer_of(model: str, *, trust_remote_code: bool | None = None) -> Any:
    """The tokenizer of the policy of that name; CommandError when there is none."""
    with _loading(model, "a folder with a tokenizer"):
        return load_tokenizer(model, trust_remote_code=trust_remote_code)


@contextmanager
def _loading(model: str, folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and the libraries it reads files with raise what they like
        remedy = f'give {folder}, a hub name, or "smollm2"'
        raise CommandError(f"cannot load --model {model}: {one_line(error)}; {remedy}") from error


def device_name(policy: Policy) -> str:
    """What the model runs on: the name of its GPU, or "cpu"."""
    device = next(policy.model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def kind_of(error: str) -> str:
    """What comes before the colon of a row's error."""
    return error.partition(":")[0]


def listed(kinds: Mapping[str, int]) -> str:
    """How many errors there are of each kind, for people."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


class Scorer:
    """Scores a batch of rows as they come from the file."""

    def __init__(self, options: argparse.Namespace, policy: Policy, config: ScoreConfig) -> None:
        self._prompt, self._completion = options.prompt_column, options.completion_column
        self._policy = policy
        self._config = config
        model = unwrapped(policy.model)
        self._encoder = Encoder(policy.tokenizer, model, config.chat_template_kwargs)
        self._unlimited = Encoder(policy.tokenizer, model, config.chat_template_kwargs)
        self._unlimited.vocab_size = self._unlimited.context = None

    def score(self, rows: Sequence[Row]) -> list[CompletionScores | str]:
        """Each row's scores, or what is wrong with it."""
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
        scored = iter(scores)
        return [_finite(next(scored)) if fault is None else fault for fault in faults]

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


def _finite(scores: CompletionScores) -> CompletionScores | str:
    if scores.reward is None:
        return "not finite: a log-probability or attention of this row is not finite under this model"
    return scores
