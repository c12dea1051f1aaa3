"""What of requests is under way: bounded, counted, tokenised in one thread and scored in another.

Decisions taken here:

- Room is taken in rows before a request is tokenised, and in tokens afterwards. Where there is none: 503 and Retry-After.
- Rows whose client hung up leave the queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from entra.config import ScoreConfig
from entra.encode import EncodedRow, RowChecker
from entra.forward import check_scorable, unwrapped
from entra.policy import Policy
from entra.score import score_rows
from entra.serve.micro_batches import Answer, Limits, MicroBatches

_OF_THE_SERVER = ("token_budget", "backend")


class Fault(str):
    """In place of a completion: what is wrong with the row."""


class ClientGone(Exception):
    """The client hung up: nobody is left to answer."""


class Metrics:
    """What `/metrics` shows, in a registry of its own."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        new = {"registry": self.registry}
        self.requests = Counter("entra_requests", "Requests by path and status", ["path", "status"], **new)
        self.seconds = Histogram("entra_request_seconds", "Seconds of a request", ["path"], **new)
        self.rows = Counter("entra_rows", "Rows by outcome: scored, or the kind of their error", ["outcome"], **new)
        self.tokens = Counter("entra_tokens", "Tokens that were scored, prompts included", **new)
        sizes = [2**n for n in range(13)]
        self.batches = Histogram("entra_batch_rows", "Rows that were scored together", buckets=sizes, **new)
        self.busy = Counter("entra_busy_seconds", "Seconds in which the model was scoring", **new)
        Gauge("entra_queue_rows", "Rows under way", **new).set_function(lambda: server.rows)
        Gauge("entra_queue_tokens", "Tokens under way", **new).set_function(lambda: server.tokens)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.observe(rows)
        self.tokens.inc(tokens)
        self.busy.inc(seconds)

    def answers(self, answers: Sequence[Answer]) -> None:
        """Count rows."""
        for outcome, rows in Counts(a.partition(":")[0] if isinstance(a, str) else "scored" for a in answers).items():
            self.rows.labels(outcome).inc(rows)


class Server:
    """The queue between requests, which live in the event loop, and the thread that scores."""

    def __init__(self, policy: Policy, config: ScoreConfig, limits: Limits) -> None:
        check_scorable(policy.model)
        self._policy, self._config, self.limits = policy, config, limits
        self.rows = self.tokens = 0
        self._rate = 0.0
        self.metrics = Metrics(self)
        self._tokeniser = ThreadPoolExecutor(1, "entra-tokeniser")  # one: fast tokenizers cannot be shared
        on_cpu = next(policy.model.parameters()).device.type == "cpu"
        self.batches = MicroBatches(
            lambda rows, config: score_rows(rows, policy, config),
            batch_tokens=limits.batch_tokens or (4_096 if on_cpu else 65_536),
            observe=self._observe,
        )

    def close(self) -> None:
        """Score what waits, then stop."""
        self._tokeniser.shutdown()
        self.batches.close()

    def config(self, options: dict[str, Any]) -> ScoreConfig:
        """The server's options of the method with those of a request; HTTPException when one is wrong."""
        for name in _OF_THE_SERVER:
            if name in options:
                raise HTTPException(422, f"options holds {name!r}, which the server decides; leave it out")
        try:
            config = dataclasses.replace(self._config, **options)
        except (TypeError, ValueError) as error:
            raise HTTPException(422, f"options: {error}") from None
        if "chat_template" in config.chat_template_kwargs:
            raise HTTPException(422, "chat_template_kwargs holds 'chat_template', a program; send prompts as text or token ids")
        return config

    async def score(
        self, request: Request, prompts: list[Any], completions: list[Any], config: ScoreConfig, verbatim: bool = False
    ) -> list[Answer]:
        """The answers to one request, in its order.

        Args:
            verbatim: text prompts went through a template before: they are tokenised without special tokens.

        Raises:
            HTTPException: it is too large, or there is no room for it.
            ClientGone: the client hung up.
        """
        if len(prompts) > self.limits.max_rows:
            rule = f"{len(prompts)} rows, but a request has at most {self.limits.max_rows}"
            raise HTTPException(422, f"{rule}; send several requests, or start the server with a larger --max-rows")
        with self._room("rows", len(prompts)):
            encode = partial(self._encode, prompts, completions, config, verbatim)
            rows = await asyncio.get_running_loop().run_in_executor(self._tokeniser, encode)
            good = [row for row in rows if isinstance(row, EncodedRow)]
            tokens = sum(map(len, chain.from_iterable(good)))
            if tokens > self.limits.max_tokens:
                rule = f"{tokens} tokens, but a request has at most {self.limits.max_tokens}"
                raise HTTPException(422, f"{rule}; send fewer rows at once, or start the server with a larger --max-tokens")
            with self._room("tokens", tokens):
                scored = iter(await self._wait(request, good, config) if good else [])
        answers = [row if isinstance(row, str) else next(scored) for row in rows]
        self.metrics.answers(answers)
        return answers

    async def _wait(self, request: Request, rows: list[EncodedRow], config: ScoreConfig) -> list[Answer]:
        answers = self.batches.submit(rows, config)
        all_answers = asyncio.gather(*map(asyncio.wrap_future, answers))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            both: list[asyncio.Future[Any]] = [all_answers, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if all_answers.done():
                return all_answers.result()
            raise ClientGone
        finally:
            gone.cancel()
            if not all_answers.done():
                all_answers.cancel()
                self.batches.discard(answers)

    def _encode(
        self, prompts: list[Any], completions: list[Any], config: ScoreConfig, verbatim: bool
    ) -> list[EncodedRow | str]:
        tokenizer: Any = self._policy.tokenizer
        checker = RowChecker(tokenizer, unwrapped(self._policy.model), config.chat_template_kwargs)
        rows: list[EncodedRow | str] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                if verbatim and isinstance(prompt, str) and not isinstance(completion, Fault):
                    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            except (TypeError, ValueError) as error:
                rows.append(f"cannot be tokenised: {error}")
            else:
                rows.append(completion if isinstance(completion, Fault) else checker.encode(prompt, completion))
        return rows

    def numbers(self, answers: Sequence[Answer]) -> list[float]:
        """A reward for every row, for engines that take nothing else."""
        bad = self.limits.bad_row_reward
        return [bad if isinstance(answer, str) or answer.reward is None else answer.reward for answer in answers]

    @contextmanager
    def _room(self, unit: str, count: int) -> Iterator[None]:
        """Inside, `count` rows or tokens more are under way; HTTPException when there is no room for them."""
        under_way, most = getattr(self, unit), getattr(self.limits, f"queue_{unit}")
        if under_way + count > most:
            seconds = str(self.retry_after())
            rule = f"the queue is full: {under_way} of {most} {unit} are under way"
            raise HTTPException(503, f"{rule}; send it again in {seconds} s", {"Retry-After": seconds})
        setattr(self, unit, under_way + count)
        try:
            yield
        finally:
            setattr(self, unit, getattr(self, unit) - count)

    def retry_after(self) -> int:
        """Seconds until what is under way is scored, 1 to 60, by the speed of the last batches."""
        return min(60, max(1, math.ceil(self.tokens / self._rate))) if self._rate else 1

    def _observe(self, rows: int, tokens: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-6)
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        self.metrics.batch(rows, tokens, seconds)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
