"""What every command needs to talk to people: errors, safe printing, a parser. The benchmarks' commands use it too."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from entra.start import end
from entra.view.visible import visible


class CommandError(Exception):
    """What went wrong and what to do about it, for people: printed as one line, without a traceback."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """All of an error's message on one line without its full stop, or the error's type when it has none."""
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines for people, on stderr or into `file`: nothing of a name or a text in them moves the cursor or ends a line.

    All that the command line prints goes through here. What the stream's encoding lacks is escaped.
    """
    stream = sys.stderr if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        print(visible(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)


class Parser(argparse.ArgumentParser):
    """A parser whose errors can be printed, whatever was typed; its commands' parsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, exit with 2."""
        super().error(visible(message))


def refuse(unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """End with argparse's own usage error, which names the option that was probably meant."""
    wrong = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    nearest = difflib.get_close_matches(wrong, known, n=1) if wrong.startswith("-") else []
    parser.error(f"unknown argument {wrong}; " + (f"did you mean {nearest[0]}?" if nearest else "see --help"))


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process as `entra.start` says: for imports, while nothing has been written."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in (
        signal.default_int_handler,
        end,
    )
    if not ours:  # who called has other plans
        yield
        return

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(name: str, run: Callable[[argparse.Namespace], object], options: argparse.Namespace) -> int:
    """Run a command and return its exit code: 0 finished, a `CommandError`'s own after its line, 130 after Ctrl-C."""
    try:
        run(options)
    except CommandError as error:
        say(f"{name}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("", f"{name}: interrupted")
        return 130
    return 0
