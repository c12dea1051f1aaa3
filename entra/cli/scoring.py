"""Scoring rows of a file: what `entra score` and `entra inspect` share.

A bad row is found on its own, before its batch is scored, so its error does not depend on its neighbours. It is
"kind: message".
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from entra.cli import CommandError, one_line, say
from entra.commands import ending_at_once
from entra.config import ScoreConfig
from entra.encode import RowChecker
from entra.flags import add_flags
from entra.forward import unwrapped
from entra.policy import Policy, load_policy, load_tokenizer
from entra.rows import Row
from entra.score import CompletionScores, finite, score_batch

INPUT = "files of traces (JSON Lines, JSON, Parquet, CSV; also .gz and .zst), folders of them, patterns, or - for stdin"
"""The help of what is read."""


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is in the file and how it is scored."""
    parser.add_argument("--prompt-column", metavar="COLUMN", help="text, chat messages or token ids (default: found)")
    parser.add_argument("--completion-column", metavar="COLUMN", help="the same, or a list of them (default: found)")
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="a prompt that is text becomes a user message of the model's chat template (default: it stays as it is)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    add_model_flags(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="rows that are scored together (default: %(default)s)")
    add_flags(parser.add_argument_group("options of the method (entra.ScoreConfig)"), ScoreConfig)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the model is loaded: what `load_as` reads."""
    parser.add_argument("--device", help="where the model runs, for example cpu or cuda:1 (default: the GPU, if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (default: what it was saved in)"
    )
    parser.add_argument("--revision", help="of a model on the hub: a branch, a tag or a commit (default: the newest)")
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add the flag that leaves out what `tell` says, and progress bars."""
    parser.add_argument("--quiet", action="store_true", help="print errors alone")


def tell(options: argparse.Namespace, *lines: str) -> None:
    """Print lines for people on stderr, unless --quiet was given."""
    if not options.quiet:
        say(*lines)


def config_of(options: argparse.Namespace) -> ScoreConfig:
    """The flags of the method; CommandError when one is out of its range."""
    try:
        return ScoreConfig(**{field.name: getattr(options, field.name) for field in fields(ScoreConfig)})
    except ValueError as error:
        raise CommandError(str(error)) from error


def check_scoring_flags(options: argparse.Namespace) -> None:
    """CommandError for a batch without rows, and for a device that is not there."""
    if options.batch_size < 1:
        raise CommandError(f"--batch-size {options.batch_size} must be at least 1 row")
    check_device(options)


def check_device(options: argparse.Namespace) -> None:
    """CommandError for a device that is not there."""
    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise CommandError(f"--device {options.device} cannot be used: {one_line(error)}; name another") from error


def load(model: str, **how: Any) -> Policy:
    """The policy of that name, `how` as for `load_policy`; CommandError when there is none."""
    with _loading(model, "a folder with config, weights and tokenizer"):
        return load_policy(model, **how)


def load_as(options: argparse.Namespace, model: str) -> Policy:
    """The policy of that name as the flags say; CommandError when there is none."""
    if options.quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    how = {name: getattr(options, name) for name in ("device", "dtype", "revision")}
    return load(model, **{name: value for name, value in how.items() if value is not None})


def load_tokenizer_of(model: str, *, trust_remote_code: bool | None = None, revision: str | None = None) -> Any:
    """The tokenizer of the policy of that name; CommandError when there is none."""
    with _loading(model, "a folder with a tokenizer"):
        return load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision)


@contextmanager
def _loading(model: str, folder: str) -> Iterator[None]:
    try:
        with ending_at_once():
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

    def __init__(self, policy: Policy, config: ScoreConfig, apply_chat_template: bool = False) -> None:
        self._apply_chat_template = apply_chat_template
        if apply_chat_template and not getattr(policy.tokenizer, "chat_template", None):
            raise CommandError("--apply-chat-template: the model's tokenizer has no chat template; leave it out")
        self._policy = policy
        self._config = config
        self._checker = RowChecker(policy.tokenizer, unwrapped(policy.model), config.chat_template_kwargs)

    def lines(self, rows: Iterable[Row]) -> list[str]:
        """What becomes of prompts that are text, for people; nothing where the first prompt in `rows` is none."""
        first = next((row.prompt for row in rows if row.prompt is not None), None)
        if not isinstance(first, str) or not getattr(self._policy.tokenizer, "chat_template", None):
            return []
        if self._apply_chat_template:
            return ["prompts that are text: each is a user message of the model's chat template"]
        return ["prompts that are text: as they are; --apply-chat-template puts each into the model's chat template"]

    def score(self, rows: Sequence[Row]) -> list[CompletionScores | str]:
        """Each row's scores, or what is wrong with it."""
        faults = [self._fault(row) for row in rows]
        good = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # rows that are not finite: they get an error
                scores = score_batch(
                    [self._prompt(row) for row in good],
                    [row.completion for row in good],
                    model=self._policy.model,
                    tokenizer=self._policy.tokenizer,
                    config=self._config,
                    details=True,
                )
        except torch.OutOfMemoryError as error:
            raise CommandError(f"out of memory; use a smaller --token-budget ({one_line(error)})", 1) from error
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"cannot score with this model: {one_line(error)}", 1) from error
        scored = map(finite, scores)
        return [next(scored) if fault is None else fault for fault in faults]

    def _prompt(self, row: Row) -> Any:
        text = self._apply_chat_template and isinstance(row.prompt, str)
        return [{"role": "user", "content": row.prompt}] if text else row.prompt

    def _fault(self, row: Row) -> str | None:
        if row.malformed is not None:
            return f"malformed: {row.malformed}"
        if row.fault is not None:
            return row.fault
        encoded = self._checker.encode(self._prompt(row), row.completion)
        return encoded if isinstance(encoded, str) else None
