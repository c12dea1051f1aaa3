"""The entry point of `entra`: from its first line on, Ctrl-C ends the process with one line and exit code 130.

So it imports next to nothing, and neither does `entra/__init__.py`. Earlier there is only Python's own start, and the script
that pip wrote.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # typing takes longer than all else here
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Handle SIGINT while nothing has been written.

    A library that is being imported may lose a KeyboardInterrupt, make another error of it, or print a traceback of its own.
    """
    os.write(2, b"\nentra: interrupted\n")
    os._exit(130)


def main() -> int:
    """Run the command line and return its exit code, as `entra.cli.main`, which takes over the handling of SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else who called has other plans
        signal.signal(signal.SIGINT, end)
    from entra.cli import main as run

    return run()
