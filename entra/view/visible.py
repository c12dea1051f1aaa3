"""Text of a model where a terminal shows it: nothing in it is interpreted.

A control character could move the cursor, ring, or recolour what follows; a bidirectional one could show text in another order
than it has. Each is shown as a sign of its own instead: a control picture where there is one, else its code as in `<U+202E>`.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

NEWLINE, TAB = "↵", "⇥"
_SHOWN = {"\n": NEWLINE, "\t": TAB, "\x7f": "␡"}
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control, format (bidirectional, zero width), half of a surrogate pair, line and paragraph separators."""


@lru_cache(maxsize=65536)
def visible(text: str) -> str:
    """The text on one line, with signs for what has no shape: what a terminal shows of it, and nothing else happens."""
    if text.isprintable():
        return text
    return "".join(character if unicodedata.category(character) not in _HIDDEN else _sign(character) for character in text)


def _sign(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    code = ord(character)
    return chr(0x2400 + code) if code < 32 else f"<U+{code:04X}>"


def has_right_to_left(text: str) -> bool:
    """Whether some letters are written from right to left."""
    return not text.isascii() and any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)


def quoted(text: str) -> str:
    """A token as it is named: visible, between quotes, so that spaces can be seen."""
    return f"“{visible(text)}”"
