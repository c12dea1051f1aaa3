"""A gate is called once for each batch, however many ask: it may be a judge or a sandbox, slow, dear, or never the same twice.

`EntraReward` asks through `called_once`; ENTRA's trainers open a batch around their reward functions and ask through it too
for those that are gates as well. An asynchronous gate is awaited where TRL awaits asynchronous rewards: on the trainer's event
loop. So a client that it keeps open stays on one loop. Without a trainer's loop the gate gets one of ours.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]
    result: Any


_CALLS: ContextVar[list[_Call] | None] = ContextVar("entra_gate_calls", default=None)


@contextmanager
def one_batch() -> Iterator[None]:
    """Inside, `called_once` remembers what it was told."""
    token = _CALLS.set([])
    try:
        yield
    finally:
        _CALLS.reset(token)


def called_once(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """`function(**arguments)`, awaited where it is asynchronous; inside `one_batch` what the same call, with the very same
    arguments, has given before."""
    calls = _CALLS.get()
    for call in calls or ():
        if call.function == function and _identical(call.arguments, arguments):
            return call.result
    result = function(**arguments)
    if inspect.isawaitable(result):
        result = _awaited(result, getattr(getattr(arguments.get("log_metric"), "__self__", None), "async_loop", None))
    if calls is not None:
        calls.append(_Call(function, arguments, result))
    return result


def _identical(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return some.keys() == others.keys() and all(some[name] is others[name] for name in some)


def _awaited(awaitable: Any, loop: asyncio.AbstractEventLoop | None) -> Any:
    async def wait() -> Any:
        return await awaitable

    loop = _own_loop(os.getpid()) if loop is None else loop
    if _running_loop() is loop:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError(
            "the reward was called on the event loop that must run its asynchronous gate, so the loop would wait for itself; "
            "call the reward with asyncio.to_thread"
        )
    return asyncio.run_coroutine_threadsafe(wait(), loop).result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@functools.cache
def _own_loop(process: int) -> asyncio.AbstractEventLoop:
    """Of this process (threads do not survive a fork), in a daemon thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="entra-gates", daemon=True).start()
    return loop
