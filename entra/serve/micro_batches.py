"""Rows of many callers, scored together by one thread that owns the model.

Decisions taken here:

- A batch is what waits when the thread is free: rows of one config, the oldest first, up to a number of tokens. Where less
  waits, the thread waits for more, but no longer than `max_wait` after the oldest row came.
- Each row has a future of its own, so answers cannot be mixed up.
- A batch that raises is scored again row by row. So a row that makes the model fail harms no neighbour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from entra.commands import one_line
from entra.config import ScoreConfig, check_integer
from entra.encode import EncodedRow
from entra.score import CompletionScores
from entra_kernels._checks import check_number

Answer = CompletionScores | str
"""A row's scores, or "kind: message"."""

Score = Callable[[list[EncodedRow], ScoreConfig], Sequence[Answer]]

_FAILED_BATCHES = 3
"""After so many batches in a row of which nothing could be scored, the model counts as broken: CUDA does not recover."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes on."""

    max_body: int = 16 * 2**20
    """Bytes of a request's body. A larger one gets 413."""

    max_rows: int = 512
    """Rows of a request. More get 422."""

    max_tokens: int = 2**20
    """Tokens of a request, prompts and completions together. More get 422."""

    queue_rows: int = 4_096
    """Rows that are under way at the same time. A request for which there is no room gets 503 and Retry-After."""

    queue_tokens: int = 2**22
    """Tokens that are under way at the same time, likewise."""

    batch_tokens: int | None = None
    """Tokens that are scored together. None: 65,536 on a GPU and 4,096 on a CPU, four forwards of the default size."""

    bad_row_reward: float = 0.0
    """What OpenRLHF and slime get for a row that cannot be scored: they take numbers alone. 0 is the worst reward."""

    def __post_init__(self) -> None:
        for name in ("max_body", "max_rows", "max_tokens", "queue_rows", "queue_tokens", "batch_tokens"):
            check_integer(name, getattr(self, name), 1, name.partition("_")[2])
        check_number("bad_row_reward", self.bad_row_reward, "finite; rewards lie in 0 to 1")
        for unit in ("rows", "tokens"):
            most, room = getattr(self, f"max_{unit}"), getattr(self, f"queue_{unit}")
            if most > room:
                raise ValueError(f"max_{unit}={most} must be at most queue_{unit}={room}; a larger request never fits")


class Waiting(NamedTuple):
    """A row that waits for its answer."""

    row: EncodedRow
    config: ScoreConfig
    came: float
    answer: Future[Answer]


class MicroBatches:
    """The thread and what waits for it.

    Args:
        score: called by the thread alone, with rows of one config.
        batch_tokens: tokens of one batch, at most; one row always fits.
        max_wait: seconds that a row waits for others.
        observe: called by the thread after each batch, with its rows, its tokens and its seconds.
    """

    def __init__(
        self,
        score: Score,
        *,
        batch_tokens: int,
        max_wait: float = 0.02,
        observe: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        self._score, self._observe = score, observe
        self._batch_tokens, self._max_wait = batch_tokens, max_wait
        self._waiting: list[Waiting] = []
        self._closed = False
        self._failures = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="entra-scorer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return len(self._waiting)

    @property
    def is_broken(self) -> bool:
        """Whether nothing of the last batches could be scored, or the thread is gone."""
        return self._failures >= _FAILED_BATCHES or not (self._thread.is_alive() or self._closed)

    def submit(self, rows: Iterable[EncodedRow], config: ScoreConfig) -> list[Future[Answer]]:
        """Put rows into the queue; their answers come in futures.

        Raises:
            RuntimeError: after `close`.
        """
        waiting = [Waiting(row, config, time.monotonic(), Future()) for row in rows]
        with self._changed:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            self._waiting += waiting
            self._changed.notify()
        return [one.answer for one in waiting]

    def discard(self, answers: Iterable[Future[Answer]]) -> None:
        """Take out of the queue what nobody waits for any more. What is being scored stays."""
        for answer in answers:
            answer.cancel()
        with self._changed:
            self._waiting = [one for one in self._waiting if not one.answer.cancelled()]

    def close(self) -> None:
        """Score what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            batch = [one for one in batch if one.answer.set_running_or_notify_cancel()]
            if batch:
                started = time.monotonic()
                self._answer(batch)
                self._observe(len(batch), sum(map(_tokens, batch)), time.monotonic() - started)

    def _take(self) -> list[Waiting]:
        """The next batch; empty when the queue is closed and nothing waits."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                left = self._waiting[0].came + self._max_wait - time.monotonic()
                if left <= 0 or self._closed or sum(map(_tokens, self._waiting)) >= self._batch_tokens:
                    break
                self._changed.wait(left)
            batch: list[Waiting] = []
            others: list[Waiting] = []
            tokens = 0
            for one in self._waiting:
                fits = not batch or (one.config == batch[0].config and tokens + _tokens(one) <= self._batch_tokens)
                (batch if fits else others).append(one)
                tokens += _tokens(one) if fits else 0
            self._waiting = others
            return batch

    def _answer(self, batch: list[Waiting]) -> None:
        answers = self._scored(batch)
        failed = all(isinstance(answer, Exception) for answer in answers)
        self._failures = self._failures + 1 if failed else 0
        for one, answer in zip(batch, answers, strict=True):
            one.answer.set_result(f"failed: {one_line(answer)}" if isinstance(answer, Exception) else answer)

    def _scored(self, batch: list[Waiting]) -> list[Answer | Exception]:
        try:
            return list(self._score([one.row for one in batch], batch[0].config))
        except Exception as error:
            if len(batch) == 1:
                return [error.with_traceback(None)]  # whose frames would keep tensors alive
        return [answer for one in batch for answer in self._scored([one])]


def _tokens(one: Waiting) -> int:
    return len(one.row.prompt) + len(one.row.completion)
