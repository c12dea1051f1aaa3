"""`entra serve`: a scorer that every engine can ask over HTTP, in an environment of its own."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
from dataclasses import fields
from typing import Any

from entra.cli import CommandError, one_line
from entra.cli.scoring import add_model_flags, check_device, config_of, load_as, tell
from entra.config import ScoreConfig
from entra.flags import add_flags
from entra.serve.micro_batches import Limits

TOKEN = "ENTRA_SERVE_TOKEN"
_DESCRIPTION = f"""\
Score over HTTP, for every engine that can POST: POST /score for anybody, /openrlhf and /slime in the shapes that those send,
GET /health, /ready and /metrics (Prometheus). Rows of all requests are scored together. A bad row is an error in its place.
Requests must bring the token in the environment variable {TOKEN}, where it is set. Any address but a loopback one demands it.
SIGTERM and Ctrl-C finish what is under way first."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra serve` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("serve", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--model", required=True, help='a folder, a hub name, or "smollm2"')
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--shutdown-seconds",
        type=int,
        default=120,
        help="how long a shutdown waits for what is under way (default: %(default)s)",
    )
    add_model_flags(parser)
    add_flags(parser.add_argument_group("limits"), Limits)
    add_flags(parser.add_argument_group("options of the method (entra.ScoreConfig)"), ScoreConfig)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra serve` with parsed options; returns after a clean shutdown.

    Raises:
        CommandError: a package is missing, an option is wrong, the token is missing, or the model cannot be scored.
    """
    try:
        import uvicorn

        from entra.serve.app import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi", "prometheus_client"):
            raise
        raise CommandError(f"{error.name} is not installed; pip install 'entra-reward[serve]'", 1) from error
    config, token = config_of(options), os.environ.get(TOKEN) or None
    try:
        limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    except ValueError as error:
        raise CommandError(str(error)) from error
    if token is None and not is_loopback(options.host):
        raise CommandError(f"--host {options.host} lets others in, so a token is needed; set {TOKEN}, or leave --host out")
    check_device(options)
    try:
        app = create_app(load_as(options, options.model), config, limits=limits, token=token)
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"cannot score with this model: {one_line(error)}", 1) from error
    tell(options, f"{options.model}: {'requests must bring the token' if token else 'no token is needed'}")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            access_log=False,
            log_level="warning" if options.quiet else "info",
            timeout_graceful_shutdown=options.shutdown_seconds,
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after its shutdown, which was clean
        signal.signal(number, lambda *_: None)
    server.run()
    if not server.started:
        raise CommandError(f"cannot listen at {options.host}:{options.port}: see above; name another --host or --port", 1)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
