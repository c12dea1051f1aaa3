r"""Whether a completion's final answer is the right one, where all that is known is the right answer's text.

Decisions taken here:

- The final answer is `entra.problems.extract_answer`'s: what stands in `<answer>` or `\boxed`, else in the last line.
- With math-verify installed, right answers that hold mathematics (a digit, a LaTeX command, an operator) are compared by it, so
  that 1/2 is 0.5. Words never are: it reads "Alice" as a product of letters. It runs no text as code: 0.9.0 was read, whose own
  parser takes the LaTeX, and sympy's, which evaluates, gets nothing but digits, operators and brackets. Other versions are not
  called.
- Without it, and for words: equal after normalisation, where numbers are equal as numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from entra.problems import extract_answer

_MATHEMATICS = re.compile(r"[\d\\^_=+*/<>]")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|boxed)\{([^{}]*)\}")
_AROUND_SIGNS = re.compile(r" ?([^\w ]) ?")
_NUMBER = re.compile(r"(?P<sign>[-+]?)(?=\.?\d)(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?")

READ_VERSION = "0.9.0"
"""The version of math-verify that was read."""


def answer_checker() -> tuple[str, Callable[[str, str], bool]]:
    """What answers are compared with, for people, and `is_right(completion, answer)`: math-verify where the version that was
    read is installed."""
    exactly = "exact match after normalisation"
    if importlib.util.find_spec("math_verify") is None:
        return exactly, exact_match
    if unread := _not_read():
        return f"{exactly}: {unread}", exact_match
    return "math-verify, exact match for answers in words", math_verify_match


def answer_reward(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """A TRL reward function: 1.0 where a completion's final answer is the one in the column `answer`, else 0.0.

    Compared by `answer_checker()`; a version of math-verify that is passed over is named in a warning.

    Args:
        completions: text or chat messages, of which the last one answers.
        answer: the right answers, text or numbers; None: not scored, None.
    """
    _, is_right = answer_checker()
    if unread := _not_read():
        warnings.warn(f"answers are compared exactly: {unread}", stacklevel=2)
    return [
        None if right is None else float(is_right(_last_text(completion), str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _not_read() -> str | None:
    """Why the math-verify that is installed is not called, with the remedy; None where it is, or where there is none."""
    if importlib.util.find_spec("math_verify") is None:
        return None
    try:
        installed = importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        installed = "of an unknown version"
    if installed == READ_VERSION:
        return None
    return (
        f"math-verify {installed} has not been read, so it may run an answer as code; pip install math-verify=={READ_VERSION}"
    )


def _last_text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"] or "") if completion else ""


def exact_match(completion: str, answer: str) -> bool:
    r"""`normalised(extract_answer(completion)) == normalised(answer)`.

    Normalising removes case, `$`, `\text{}` and the like, a full stop at the end, and white space but for single spaces between
    words. Numbers are compared as numbers: 1,000.0 is 1000. Nothing given is never right.
    """
    given = _normalised(extract_answer(completion))
    return given != "" and given == _normalised(answer)


def math_verify_match(completion: str, answer: str) -> bool:
    """`exact_match`, or math-verify says that the two are the same mathematics.

    Raises:
        ImportError: math-verify is missing.
    """
    if exact_match(completion, answer):
        return True
    if not _MATHEMATICS.search(answer):
        return False
    from math_verify import parse, verify

    given = extract_answer(completion)
    return bool(given) and bool(verify(parse(_as_latex(answer)), parse(_as_latex(given)) or parse(completion)))


def _as_latex(text: str) -> str:
    return text if "$" in text else f"${text}$"


def _normalised(text: str) -> str:
    text = _WRAPPED.sub(r"\1", text.replace("$", " ").replace("\\,", ""))
    text = _AROUND_SIGNS.sub(r"\1", " ".join(text.split())).rstrip(".").casefold()
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    # Not as a number: Python refuses to read one of thousands of digits.
    sign, whole, decimals = number["sign"], number["whole"].replace(",", "").lstrip("0"), (number["decimals"] or "").rstrip("0")
    digits = (whole or "0") + (f".{decimals}" if decimals else "")
    return digits if sign != "-" or digits == "0" else f"-{digits}"
