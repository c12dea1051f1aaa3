"""Command-line flags from a config dataclass: one for each field, with the docstring under the field as its help."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
from collections.abc import Container
from dataclasses import fields
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints


def add_flags(group: Any, config: type, *, leave_out: Container[str] = (), underscores: bool = False) -> None:
    """Add `--field-name` to a parser or a group of one for every field of the dataclass `config`.

    Args:
        group: what has `add_argument`.
        config: a dataclass whose fields have defaults.
        leave_out: fields that get no flag.
        underscores: take `--field_name` too, and first, as TRL's commands do.
    """
    hints, docs, defaults = get_type_hints(config), _field_docs(config), config()
    for field in fields(config):
        if field.name in leave_out:
            continue
        names = dict.fromkeys(("--" + field.name, "--" + field.name.replace("_", "-")))
        group.add_argument(
            *(names if underscores else list(names)[-1:]),
            default=getattr(defaults, field.name),
            help=docs.get(field.name, "").replace("%", "%%") + " (default: %(default)s)",
            **_kind(hints[field.name]),
        )


def _field_docs(config: type) -> dict[str, str]:
    """The docstring under each field; none of them where Python runs without source files."""
    try:
        (definition,) = ast.parse(inspect.getsource(config)).body
    except OSError:
        return {}
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    docs = {}
    for statement, after in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(after, ast.Expr):
            docs[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse must know to read a field of this type."""
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    if get_args(hint)[:1] == (list[str],) or hint == list[str]:
        return {"nargs": "+", "metavar": "NAME"}
    for plain in (int, float, str):
        if hint in (plain, plain | None):
            return {"type": plain, "metavar": plain.__name__.upper()}
    return {"type": _json_object, "metavar": "JSON"}


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"enable_thinking": false}}')
    return value
