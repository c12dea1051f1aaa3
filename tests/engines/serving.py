"""Servers and a client for the tests of engines."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn

ROOT = Path(__file__).parents[2]


class Client:
    """Asks a server on this machine, one connection a request."""

    def __init__(self, port, token=None):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def ask(self, method, path, body=None, headers=()):
        """Status, what the JSON in the body says (or the text that it is), and the headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            given = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, given, {"Content-Type": "application/json", **self._headers, **dict(headers)})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text, answer.headers

    def post(self, path, body, **how):
        """Status and what the answer says."""
        return self.ask("POST", path, body, **how)[:2]

    def get(self, path):
        """Status and what the answer says."""
        return self.ask("GET", path)[:2]

    def metric(self, name):
        """The value of a line of /metrics that begins with `name`."""
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)[1])


@contextmanager
def running(app):
    """The port of a server with `app`, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)


@contextmanager
def entra_serve(*words, log, **environment):
    """The process of `entra serve` and its port; what it prints goes into the file `log`."""
    command = [sys.executable, "-m", "entra", "serve", *map(str, words), "--port", "0"]
    with log.open("wb") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=printed, stderr=printed)
    address = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
    try:
        until(lambda: address.search(log.read_text()) or process.poll() is not None, seconds=240)
        found = address.search(log.read_text())
        assert found is not None, log.read_text()
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def until(holds, seconds=60):
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.01)
