"""A scorer that any engine can ask over HTTP: `entra serve`.

Decisions taken here:

- A bad row is an error in its place, and its neighbours are scored. A bad request is refused with the rule and the remedy.
- Texts never reach a log, and neither does the token. Requests are counted, not logged.
- Engines that take nothing but numbers get one for a bad row, too: their training would stop otherwise. `/metrics` counts them.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict

from entra.config import ScoreConfig
from entra.policy import Policy
from entra.score import CompletionScores
from entra.serve.micro_batches import Limits
from entra.serve.queue import ClientGone, Fault, Server

DETAILS = ("token_ids", "logprobs", "incoming", "importance", "protected")
_OPEN = ("/health", "/ready")


class ScoreRequest(BaseModel):
    """Rows to score: completions, or their token ids. Prompts are text, chat messages or token ids, as for `score_batch`."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[Any]
    completions: list[Any] | None = None
    completion_ids: list[Any] | None = None
    options: dict[str, Any] = {}
    details: bool = False


class ScoreResponse(BaseModel):
    """One entry a row. Where `errors` holds "kind: message", the row has no reward and no details."""

    rewards: list[float | None]
    errors: list[str | None]
    details: list[dict[str, list[Any]] | None] | None = None


class OpenRLHFRequest(BaseModel):
    """What OpenRLHF sends: each query is a prompt and its response."""

    query: list[str]
    prompts: list[str]
    labels: list[Any] | None = None


class OpenRLHFResponse(BaseModel):
    """What OpenRLHF reads, one number a query."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class SlimeRequest(BaseModel):
    """What slime sends for a sample."""

    prompt: Any
    response: str
    label: Any = None


class Gate:
    """What every request passes before it is read: the token, the size of its body, the count."""

    def __init__(self, app: Any, *, server: Server, token: str | None) -> None:
        self._app, self._server = app, server
        self._secret = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size = monotonic(), 499, 0

        async def counted_send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def limited_receive() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._server.limits.max_body:
                while message.get("more_body"):  # a client that still sends would not read an answer
                    message = await receive()
                rule = f"the body has more than {self._server.limits.max_body} bytes"
                raise HTTPException(413, f"{rule}; send fewer rows at once, or start the server with a larger --max-body")
            return message

        app = self._app if scope["path"] in _OPEN or self._is_known(scope) else _UNKNOWN
        try:
            await app(scope, limited_receive, counted_send)
        finally:
            path = getattr(scope.get("route"), "path", "none")
            self._server.metrics.requests.labels(path, status).inc()
            self._server.metrics.seconds.labels(path).observe(monotonic() - started)

    def _is_known(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._secret is None or hmac.compare_digest(given, self._secret)


_UNKNOWN = JSONResponse(
    {"detail": "this server wants its token; send the header Authorization: Bearer TOKEN"}, 401, {"WWW-Authenticate": "Bearer"}
)


def create_app(
    policy: Policy, config: ScoreConfig | None = None, *, limits: Limits | None = None, token: str | None = None
) -> FastAPI:
    """An ASGI application that scores with `policy`; its thread starts and ends with the application.

    Args:
        policy: the model and its tokenizer.
        config: the options of the method that a request does not name. None: the defaults.
        limits: what it takes on. None: the defaults.
        token: what every request but those for `/health` and `/ready` must bring. None: nothing.

    Raises:
        ValueError, RuntimeError: the model cannot be scored.
    """
    server = Server(policy, config or ScoreConfig(), limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(title="ENTRA", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    app.add_middleware(Gate, server=server, token=token)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])  # without the texts
        return JSONResponse({"detail": f"{wrong}; /openapi.json has the shapes"}, 422)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.get("/health")
    def health() -> Response:
        return _state("the model fails; restart the server" if server.batches.is_broken else None)

    @app.get("/ready")
    def ready() -> Response:
        full = server.rows >= server.limits.queue_rows or server.tokens >= server.limits.queue_tokens
        return _state("the model fails" if server.batches.is_broken else "the queue is full" if full else None)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/score", response_model=ScoreResponse)
    async def score(body: ScoreRequest, request: Request) -> Response:
        given = body.completions if body.completion_ids is None else body.completion_ids
        if given is None or len(given) != len(body.prompts):
            count = "neither" if given is None else f"{len(given)}"
            rule = f"{len(body.prompts)} prompts, but {count} completions or completion_ids"
            raise HTTPException(422, f"{rule}; send one for each prompt")
        answers = await server.score(request, body.prompts, given, server.config(body.options))
        content: dict[str, Any] = {
            "rewards": [None if isinstance(answer, str) else answer.reward for answer in answers],
            "errors": [answer if isinstance(answer, str) else None for answer in answers],
        }
        if body.details:
            content["details"] = [None if isinstance(answer, str) else _details(answer) for answer in answers]
        return JSONResponse(content)

    @app.post("/openrlhf", response_model=OpenRLHFResponse)
    async def openrlhf(body: OpenRLHFRequest, request: Request) -> Response:
        if len(body.query) != len(body.prompts):
            rule = f"{len(body.query)} queries, but {len(body.prompts)} prompts"
            raise HTTPException(422, f"{rule}; send one for each query")
        responses = [
            query.removeprefix(prompt)
            if query.startswith(prompt)
            else Fault("foreign query: it does not start with its prompt")
            for query, prompt in zip(body.query, body.prompts, strict=True)
        ]
        answers = await server.score(request, body.prompts, responses, server.config({}), verbatim=True)
        rewards = server.numbers(answers)
        errors = [float(isinstance(answer, str)) for answer in answers]
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {"entra_error": errors}})

    @app.post("/slime", response_model=float)
    async def slime(body: SlimeRequest, request: Request) -> Response:
        answers = await server.score(request, [body.prompt], [body.response], server.config({}), verbatim=True)
        return JSONResponse(server.numbers(answers)[0])

    return app


def _state(fault: str | None) -> Response:
    return JSONResponse({"status": fault or "ok"}, 200 if fault is None else 503)


def _details(scores: CompletionScores) -> dict[str, list[Any]]:
    return {name: getattr(scores, name).tolist() for name in DETAILS}
