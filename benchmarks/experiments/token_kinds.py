"""What kind of thing a token is: number, operator, connective, reflection word, other word, or punctuation and space.

English and plain lists: a reader can check every decision, and nothing is learned.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("number", "operator", "connective", "reflection", "word", "punctuation")
"""In which every token has one."""

REFLECTION = (
    r"wait|hmm+|hm|again|maybe|perhaps|actually|really|sure|wrong|mistakes?|alternatively|anyway|once\s+more|let\s+me|hold\s+on"
    r"|go(?:ing)?\s+back|in\s+other\s+words|(?:put\s+)?another\s+way|(?:double[-\s]|re-?)?check(?:s|ed|ing)?"
    r"|(?:re-?)?verif(?:y|ies|ied|ying)|confirm(?:s|ed|ing)?|restat(?:e|es|ed|ing)|reconsider(?:s|ed|ing)?|rethink(?:s|ing)?"
)
"""Words and phrases of looking back or doubting, as a regular expression."""

CONNECTIVES = (
    "so|then|therefore|thus|hence|because|since|but|however|and|or|if|although|though|while|whereas|unless|when|now|next|finally"
    "|also|consequently|otherwise|instead|yet"
)
"""Words that join steps or clauses."""

_NUMBER = r"\d+(?:[.,]\d+)*"
_MINUS = "-\N{MINUS SIGN}"
_SYMBOL = rf"\*\*|//|[=!<>]=|[{_MINUS}\N{{MULTIPLICATION SIGN}}+*/=<>^%÷·≤≥≠≈±√]"
_LETTER = r"\b[B-HJ-Zb-z]\b"  # neither the article nor the pronoun
_GAP = r"[ \t]*"
_OPERAND = rf"[(\[{{]*{_GAP}[{_MINUS}]?{_GAP}(?:{_NUMBER}|{_LETTER})%?{_GAP}[)\]}}]*"
# At least one operator between operands, on one line, and at least one number: "x = 5" and "(5 * 3) = 15", not "a / b".
_FORMULA = re.compile(rf"{_OPERAND}(?:{_GAP}(?:{_SYMBOL}){_GAP}{_OPERAND})+")
_WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)*"  # noqa: RUF001 - the apostrophe of printed text
_LEXEME = re.compile(
    rf"(?P<reflection>\b(?:{REFLECTION})\b)|(?P<connective>\b(?:{CONNECTIVES})\b)|(?P<number>{_NUMBER})|(?P<word>{_WORD})"
    rf"|(?P<symbol>{_SYMBOL})|(?P<space>\s+)|(?P<punctuation>.)",
    re.IGNORECASE | re.DOTALL,
)


class TokenKind(NamedTuple):
    """One of `KINDS`, and whether the token stands in a formula, whatever its kind."""

    kind: str
    in_formula: bool


def kinds_of(pieces: Sequence[str]) -> list[TokenKind]:
    """The kind of each token of a text, decided by the first character of the token that is no space.

    - number: digits, with decimal point and thousands separator (`9.25`); number words are words.
    - operator: `+ - * / = < > ^ % ×` and their like with a number, a bracket or a single letter on one side, spaces apart. A
      hyphen in a word and a bullet before one are punctuation.
    - reflection: `REFLECTION`, also when a word is several tokens or a phrase several words. Comes before connective and word.
    - connective: `CONNECTIVES`.
    - word: any other word, names and number words too.
    - punctuation: everything else, brackets and tokens of space alone too.

    A formula is a run of operands on one line with operators between them, such as all of `15 / 1 = 15`. Operands are numbers
    or single letters but a and I, perhaps signed or in brackets; at least one is a number. The kind of a token in a formula is
    still number or operator: `in_formula` says that it stands in one.

    Args:
        pieces: the text that each token adds; joined they are the whole text.
    """
    text = "".join(pieces)
    starts, kinds = [], []
    for match in _LEXEME.finditer(text):
        starts.append(match.start())
        kinds.append(_kind(match, text))
    formulas = [match.span() for match in _FORMULA.finditer(text) if re.search(r"\d", match.group())]
    formula_starts = [first for first, _ in formulas]
    result = []
    position = 0
    for piece in pieces:
        first = position + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
        position += len(piece)
        lexeme = bisect_right(starts, first) - 1
        formula = bisect_right(formula_starts, first) - 1
        inside = formula >= 0 and first < formulas[formula][1]
        result.append(TokenKind(kinds[lexeme] if kinds else "punctuation", inside))
    return result


def _kind(match: re.Match[str], text: str) -> str:
    kind = str(match.lastgroup)
    if kind == "symbol":
        before = text[: match.start()].rstrip(" \t")
        after = text[match.end() :].lstrip(" \t")
        operand_before = re.search(rf"(?:\d|[)\]}}]|{_LETTER})\Z", before) is not None
        operand_after = re.match(rf"\d|[(\[{{]|{_LETTER}", after) is not None
        return "operator" if operand_before or operand_after else "punctuation"
    return "punctuation" if kind == "space" else kind
