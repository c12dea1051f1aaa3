"""Checkers of ours for tasks of reasoning-gym whose own scorers evaluate text as Python, or can be kept busy for ever by it.

Decisions taken here:

- Text is parsed, never evaluated: lists as JSON, arithmetic by a parser of numbers, operators and brackets. What the text comes
  from (the answer, or the problem itself, which may be a line of somebody's file) makes no difference.
- Scores are those of the task's own scorer, also the small ones for an answer in the right form. An expression in other
  notation (functions, names, factorials, powers) has the wrong form here.
- `is_bounded` refuses what would let the scorer of a task that parses run, or grow, without end: `R999999999` as a move of a
  cube, 1e999999999 as a fraction. Such an answer is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

_Checker = Callable[[str, Mapping[str, Any]], float]

_LONGEST = 10_000
"""Characters of an expression or a list; the longest that a task of reasoning-gym asks for is far shorter."""


def check(task: str, answer: str, entry: Mapping[str, Any]) -> float:
    """What `CHECKERS[task]` gives, in [0, 1]."""
    return CHECKERS[task](answer, entry)


def _n_queens(answer: str, entry: Mapping[str, Any]) -> float:
    solutions = entry["metadata"]["valid_answers"]
    return 1.0 if answer in solutions else 0.5 if _grid(answer) in solutions else 0.0


def _binary_matrix(answer: str, entry: Mapping[str, Any]) -> float:
    return 1.0 if answer == entry["answer"] else 0.1 if _grid(answer) == entry["answer"] else 0.0


def _spiral_matrix(answer: str, entry: Mapping[str, Any]) -> float:
    right, answer = entry["answer"].strip(), answer.strip()
    return 1.0 if answer == right else 0.1 if _joined(answer, " ") == right else 0.0


def _string_insertion(answer: str, entry: Mapping[str, Any]) -> float:
    return 1.0 if answer == entry["answer"] else 0.1 if _joined(answer, "") == entry["answer"] else 0.0


def _number_sorting(answer: str, entry: Mapping[str, Any]) -> float:
    given, right = (_list(text) for text in (answer, entry["answer"]))
    if given is None or right is None or len(given) != len(right):
        return 0.0
    numbers, expected = ([float(number) for number in some] for some in (given, right))
    if numbers != sorted(numbers, reverse=entry["metadata"]["direction"] != "ascending"):
        return 0.0
    return float(all(abs(number - other) <= 1 for number, other in zip(numbers, expected, strict=True)))


def _bitwise_arithmetic(answer: str, entry: Mapping[str, Any]) -> float:
    return float(int(answer, 0) == _Expression(entry["metadata"]["problem"], hexadecimal=True).value())


def _countdown(answer: str, entry: Mapping[str, Any]) -> float:
    try:
        value = float(_Expression(answer).value())
    except (ValueError, ArithmeticError):
        return 0.01
    if sorted(_integers(answer)) != sorted(entry["metadata"]["numbers"]):
        return 0.05
    target = entry["metadata"]["target"]
    return 1.0 if abs(value - target) <= 1e-6 + 1e-5 * abs(target) else 0.05  # numpy.isclose, as the task's scorer


def _puzzle24(answer: str, entry: Mapping[str, Any]) -> float:
    try:
        value = int(_Expression(answer).value())
    except (ValueError, ArithmeticError):
        return 0.01
    numbers = _integers(answer)
    return 1.0 if value == 24 and len(numbers) == 4 and all(1 <= number <= 10 for number in numbers) else 0.01


CHECKERS: dict[str, _Checker] = {
    "binary_matrix": _binary_matrix,
    "bitwise_arithmetic": _bitwise_arithmetic,
    "countdown": _countdown,
    "n_queens": _n_queens,
    "number_sorting": _number_sorting,
    "puzzle24": _puzzle24,
    "spiral_matrix": _spiral_matrix,
    "string_insertion": _string_insertion,
}
"""By task."""


def _list(text: str) -> list[Any] | None:
    """A list or tuple, as JSON or as Python writes it; None where it is something else."""
    if len(text) > _LONGEST:
        return None
    try:
        value = json.loads(re.sub(r",\s*\]", "]", text.translate(str.maketrans("()'", '[]"'))))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _grid(text: str) -> str | None:
    rows = _list(text)
    if rows is None or not all(isinstance(row, list) for row in rows):
        return None
    return "\n".join(" ".join(map(str, row)) for row in rows)


def _joined(text: str, between: str) -> str | None:
    items = _list(text)
    return None if items is None else between.join(map(str, items))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b", text)]


_Number = Fraction | int
_TOKEN = re.compile(r"\s*(?:(0[xX][0-9a-fA-F]+)|(\d+\.?\d*|\.\d+)|(<<|>>|//|[-+*/()]))", re.ASCII)
_DEEPEST = 50
"""Brackets and signs within each other."""
_WIDEST = 100_000
"""Bits of a number that is shifted or multiplied."""


class _Expression:
    """Numbers, + - * / and brackets, in exact arithmetic; with `hexadecimal` whole numbers, and << and >> for /.

    Raises:
        ValueError: anything else; also one that is too long or too deep.
        ZeroDivisionError: a division by 0.
    """

    def __init__(self, text: str, hexadecimal: bool = False) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"the expression has {len(text):,} characters; at most {_LONGEST:,} are read")
        self._hexadecimal = hexadecimal
        self._tokens: list[str] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise ValueError(f"character {at + 1} is no number, operator or bracket")
            self._tokens.append(token[1] or token[2] or token[3])
            at = token.end()
        self._tokens.append("")

    def value(self) -> _Number:
        """The number that the whole of it amounts to."""
        value = self._shifts(0)
        if self._tokens != [""]:
            raise ValueError(f"{self._tokens[0]!r} is not expected")
        return value

    def _shifts(self, depth: int) -> _Number:
        value = self._sum(depth)
        while self._hexadecimal and self._tokens[0] in ("<<", ">>"):
            left, by = self._tokens.pop(0) == "<<", self._sum(depth)
            whole, steps = int(value), int(by)
            if not 0 <= steps <= _WIDEST or whole.bit_length() > _WIDEST:
                raise ValueError(f"a shift by {steps} is out of range")
            value = whole << steps if left else whole >> steps
        return value

    def _sum(self, depth: int) -> _Number:
        value = self._product(depth)
        while self._tokens[0] in ("+", "-"):
            value = value + self._product(depth) if self._tokens.pop(0) == "+" else value - self._product(depth)
        return value

    def _product(self, depth: int) -> _Number:
        value = self._factor(depth)
        while self._tokens[0] in (("*",) if self._hexadecimal else ("*", "/")):
            times, other = self._tokens.pop(0) == "*", self._factor(depth)
            if max(number.numerator.bit_length() for number in (value, other)) > _WIDEST:
                raise ValueError("a number is too large to multiply")
            value = value * other if times else Fraction(value) / other
        return value

    def _factor(self, depth: int) -> _Number:
        token = self._tokens.pop(0)
        if depth > _DEEPEST:
            raise ValueError(f"brackets stand deeper than {_DEEPEST} within each other")
        if token in ("+", "-"):
            value = self._factor(depth + 1)
            return value if token == "+" else -value
        if token == "(":
            value = self._shifts(depth + 1)
            if self._tokens.pop(0) != ")":
                raise ValueError("a bracket is not closed")
            return value
        if self._hexadecimal:
            return int(token, 0)
        if token.isdigit() and token.startswith("0") and token.strip("0"):
            raise ValueError(f"{token} has leading zeros")
        return Fraction(token)


def is_bounded(task: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether the task's own scorer, one that parses, comes to an end soon and in little memory with these."""
    guard = _GUARDS.get(task)
    return guard is None or guard(answer, entry)


def _few_repeats(answer: str, entry: Mapping[str, Any]) -> bool:
    """Moves of a cube or of cars, with how often they are made, on a board that is not too large."""
    return (
        not re.search(r"\d{4}", answer)
        and sum(map(int, re.findall(r"\d+", answer))) <= 10_000
        and entry["metadata"].get("cube_size", 0) <= 20
        and len(entry["metadata"].get("scramble_moves", "")) <= 10_000
    )


def _few_disks(answer: str, entry: Mapping[str, Any]) -> bool:
    return max(entry["metadata"][name] for name in ("num_disks", "num_pegs")) <= 1000


def _small_exponents(answer: str, entry: Mapping[str, Any]) -> bool:
    return not any(re.search(r"[eE][-+]?[\d_]{4}", text) for text in (answer, entry["answer"]))


def _few_variables(answer: str, entry: Mapping[str, Any]) -> bool:
    """The scorer goes through all truth values of all names, of which the answer may bring new ones."""
    names = re.split(r"[\s()\u2227\u2228\u00ac\u2192\u2194]+", " ".join([answer, *entry["metadata"]["premises"]]))
    return len(set(names)) <= 12 and max(map(len, [answer, *entry["metadata"]["premises"]])) <= 300


def _known_signs(answer: str, entry: Mapping[str, Any]) -> bool:
    """The scorer prints a sign that it does not know."""
    return set(entry["metadata"]["gamestr"]) <= set("+@*X$%- \n")


def _small_buttons(answer: str, entry: Mapping[str, Any]) -> bool:
    """A button that multiplies, pressed n times, makes a number of n digits."""
    return len(re.findall(r"[A-Ca-c]", answer)) <= 1000 and all(
        abs(button["value"]) <= 1000 for button in entry["metadata"]["buttons"]
    )


def _few_commas(answer: str, entry: Mapping[str, Any]) -> bool:
    """The scorer's search for a place goes on from each comma to the end."""
    return answer.count(",") <= 5000


_GUARDS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "boxnet": _few_commas,
    "coin_flip": _small_exponents,
    "propositional_logic": _few_variables,
    "quantum_lock": _small_buttons,
    "rubiks_cube": _few_repeats,
    "rush_hour": _few_repeats,
    "sokoban": _known_signs,
    "tower_of_hanoi": _few_disks,
}
