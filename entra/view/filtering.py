"""What is typed to narrow a list of traces."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping

from entra.view.trace import Trace

_COMPARED = re.compile(r"(reward|tokens|entropy|repeated)(<=|>=|<|>|=)(-?\d*\.?\d+)", re.IGNORECASE)
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq}


def matches(trace: Trace, numbers: Mapping[str, float], wanted: str) -> bool:
    """Whether a trace has all that is wanted.

    Args:
        numbers: the trace's reward, tokens, entropy and repeated (in %); none of them where it could not be scored.
        wanted: terms with spaces between them. `reward<0.5` and the like compare. Anything else is text to find in the trace's
            name, prompt, columns or error, in any case. `error` finds every trace that has one.
    """
    text = None
    for term in wanted.split():
        compared = _COMPARED.fullmatch(term)
        if compared is not None:
            value = numbers.get(compared[1].lower())
            if value is None or not _OPERATORS[compared[2]](value, float(compared[3])):
                return False
            continue
        if text is None:
            columns = (f"{name}: {value}" for name, value in trace.columns.items())
            error = [] if trace.error is None else [f"error: {trace.error}"]
            text = "\n".join([trace.name, trace.prompt, *columns, *error]).casefold()
        if term.casefold() not in text:
            return False
    return True
