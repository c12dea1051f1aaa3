"""`entra serve` before it listens: what it refuses. What it answers: tests/engines/test_serve.py."""

import sys

from entra.cli import main
from entra.cli.serve import TOKEN, is_loopback


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "no/such"]) == 1
    assert capsys.readouterr().err == "entra serve: uvicorn is not installed; pip install 'entra-reward[serve]'\n"


def test_only_this_machine_reaches_a_loopback_address():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "localhost.example.org", "")))
    assert TOKEN == "ENTRA_SERVE_TOKEN"
