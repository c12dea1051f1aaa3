"""Scorers of reasoning-gym that evaluate text as Python, in a process of their own that has little to break.

Decisions taken here:

- This file is also the program that the process runs. It imports nothing of entra, torch or transformers.
- The process starts with an empty environment, isolated from the working directory, and stays for the next answer. It forks
  for every answer, so that none sees or changes another's score. Each fork is limited before it sees the answer: 10 seconds,
  2 GiB, no bytes written to files, no further file, socket or process. What scorers need is loaded before. Where it would have
  root's rights it has nobody's. Where it is root or the system lets it make namespaces, it has an empty file system and no
  network.
- That limits what code can break. It is no sandbox: it runs on the same kernel, and where there are no namespaces it can still
  delete what its user may delete.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

SECONDS = 10.0
MEMORY = 2 * 2**30
_START_SECONDS = 120
"""Loading reasoning-gym and sympy takes seconds; on a busy machine more."""


class ProcessError(RuntimeError):
    """The process cannot be started, or has ended; the message says why."""


def score(task: str, answer: str, entry: Mapping[str, Any]) -> float:
    """What the task's own scorer gives, in [0, 1]; 0 where it raises, runs out of time or memory, or gives no number.

    Raises:
        ProcessError: the system cannot limit a process, reasoning-gym cannot be loaded or does not have the task, or the
            process was ended from outside.
    """
    with _LOCK:
        child = _CHILDREN.get(os.getpid())
        if child is None:
            _CHILDREN.clear()  # of the process that this one was forked from
            child = _CHILDREN[os.getpid()] = _start()
        request = json.dumps({"task": task, "answer": answer, "entry": entry})
        try:
            _write(child.requests, request)
            reply = _read(child.replies, SECONDS + 5)
        except (OSError, EOFError, TimeoutError) as error:
            stop()
            raise ProcessError(f"the process that scores task {task!r} ended too early: {error}") from error
    if "error" in reply:
        raise ProcessError(f"task {task!r} cannot be scored: {reply['error']}")
    return float(reply["score"])


def stop() -> None:
    """End the process; the next call of `score` starts another."""
    child = _CHILDREN.pop(os.getpid(), None)
    if child is not None:
        child.process.kill()
        child.process.wait()
        for stream in (child.requests, child.replies):
            with contextlib.suppress(OSError):
                stream.close()
        child.folder.cleanup()


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: IO[bytes]
    folder: tempfile.TemporaryDirectory[str]


_CHILDREN: dict[int, _Child] = {}
"""By the id of the process that started it: at most one."""
_LOCK = threading.Lock()
atexit.register(stop)


def _start() -> _Child:
    if not hasattr(os, "fork") or sys.platform == "win32":
        raise ProcessError("this system cannot limit a process; run answers as code on Linux or macOS")
    folder = tempfile.TemporaryDirectory(prefix="entra-scorer-")
    process = subprocess.Popen(
        # -I: neither PYTHON* variables nor the working directory nor the user's packages; -B: nothing is written
        [sys.executable, "-I", "-B", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder.name,
        env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    child = _Child(process, process.stdin, process.stdout, folder)
    _CHILDREN[os.getpid()] = child
    try:
        _write(child.requests, json.dumps({"path": [str(Path(entry).resolve()) for entry in sys.path if entry]}))
        reply = _read(child.replies, _START_SECONDS)
    except (OSError, EOFError, TimeoutError) as error:
        stop()
        raise ProcessError(f"the process that scores such tasks did not start: {error}") from error
    if "error" in reply:
        stop()
        raise ProcessError(f"the process that scores such tasks did not start: {reply['error']}")
    return child


def _write(stream: IO[bytes], line: str) -> None:
    stream.write(line.encode("ascii") + b"\n")
    stream.flush()


def _read(stream: IO[bytes], seconds: float) -> dict[str, Any]:
    """One line of JSON; the other side writes whole lines."""
    if not select.select([stream], [], [], seconds)[0]:
        raise TimeoutError(f"no answer in {seconds} seconds")
    line = stream.readline()
    if not line:
        raise EOFError("it closed its output")
    return dict(json.loads(line))


def _serve() -> None:
    """The program: requests as lines on the standard input, replies on the standard output."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    try:
        for folder in json.loads(requests.readline())["path"]:
            if folder not in sys.path:
                sys.path.append(folder)
        leave_network = _load()
    except Exception as error:
        _write(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    _write(replies, json.dumps({}))
    import reasoning_gym

    scorers: dict[str, Callable[[str, Any], float]] = {}
    for line in requests:
        request = json.loads(line)
        task = request["task"]
        try:
            if task not in scorers:
                scorers[task] = reasoning_gym.get_score_answer_fn(task)
        except Exception as error:
            _write(replies, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            continue
        found = _in_fork(lambda: scorers[task](request["answer"], request["entry"]), leave_network)  # noqa: B023
        _write(replies, json.dumps(found))


def _load() -> Callable[[], None]:
    """Import all that a scorer may import later, since nothing can be opened then; what leaves the network."""
    import ctypes
    import importlib
    import pkgutil
    import resource  # noqa: F401

    import reasoning_gym  # noqa: F401
    import sympy  # type: ignore[import-untyped]

    for module in pkgutil.walk_packages(sympy.__path__, "sympy.", onerror=lambda name: None):
        if not _left_out(module.name):
            with contextlib.suppress(Exception):  # parts for packages that are not installed
                importlib.import_module(module.name)
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_network = 0x10000000, 0x40000000

    def leave_network() -> None:
        if sys.platform == "linux":
            libc.unshare(new_network if os.geteuid() == 0 else new_user | new_network)

    return leave_network


def _left_out(module: str) -> bool:
    parts = module.split(".")
    return any(part in ("tests", "benchmarks", "testing", "_antlr", "conftest", "pyglet", "plotting") for part in parts)


def _in_fork(work: Callable[[], float], leave_network: Callable[[], None]) -> dict[str, Any]:
    """The reply with what `work` gives in a process that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, leave_network, writing)
    os.close(writing)
    text = os.read(reading, 256) if select.select([reading], [], [], SECONDS)[0] else b""
    os.close(reading)
    for kill in (os.killpg, os.kill):  # the child may not lead its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if text.startswith(_FAULT):
        return {"error": text.removeprefix(_FAULT).decode(errors="replace")}
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    return {"score": min(max(found, 0.0), 1.0) if math.isfinite(found) else 0.0}


_FAULT = b"fault: "


def _work(work: Callable[[], float], leave_network: Callable[[], None], writing: int) -> NoReturn:
    """Limit this process, work, write the number into the pipe, end."""
    found = b"0.0"
    try:
        try:
            _limit(writing, leave_network)
        except Exception as error:
            found = _FAULT + f"its process cannot be limited: {error}".encode()
        else:
            missing = _Missing()
            sys.meta_path.insert(0, missing)
            with contextlib.suppress(Exception):
                found = repr(float(work())).encode()
            if missing.first is not None:
                found = _FAULT + f"its scorer needs {missing.first}, which was not loaded".encode()
    finally:
        with contextlib.suppress(BaseException):
            os.write(_RESULT, found)
        os._exit(0)


_RESULT = 3
"""The number of the pipe in the limited process."""


def _limit(writing: int, leave_network: Callable[[], None]) -> None:
    """Leave this process nothing but the standard streams, which lead nowhere, and the pipe."""
    import resource

    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(writing, _RESULT)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(_RESULT + 1, 1024)
    leave_network()
    with contextlib.suppress(OSError):  # the right to it comes with root or a namespace
        os.chroot(".")  # the empty folder that the process was started in
        os.chdir("/")
    for name, most in {"AS": MEMORY, "CPU": math.ceil(SECONDS), "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 0}.items():
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is not None:
            try:
                resource.setrlimit(limit, (most, most))
            except (OSError, ValueError):
                if sys.platform == "linux":  # macOS has limits that it lets nobody set
                    raise
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


_NOBODY = 65534


class _Missing:
    """Notes the first module of the scorers' libraries that is imported too late: it fails, and the score would be wrong."""

    first: str | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if self.first is None and name.partition(".")[0] in ("sympy", "mpmath", "numpy", "reasoning_gym"):
            self.first = name


if __name__ == "__main__":
    _serve()
