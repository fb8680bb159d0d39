"""Text in the metadata of a file, read as values: JSON, or literals of Python as Ultralytics writes them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.safety.text import has_controls

LONGEST_LITERAL = 2**20
"""Characters of a literal; Python takes some hundred bytes for each while it reads it."""
DEEPEST_LITERAL = 16


def read_json(text: str, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, is nested too deep, or holds a number that is not finite.
    """
    if _depth(text) > limits.max_nesting:
        raise ValueError(f"JSON is nested more than {limits.max_nesting} deep (max_nesting)")
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("JSON is nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON holds {name}; expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"JSON holds {text[:40]}; expected finite numbers")
    return value


def parse_literal(text: str) -> Any:
    """The value of a Python literal; None where the text is none, or is too long or too deep to be read safely."""
    if len(text) > LONGEST_LITERAL or _depth(text) > DEEPEST_LITERAL:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _depth(text: str) -> int:
    """How deep brackets are nested, those in quotes included."""
    deepest = depth = 0
    for char in text:
        if char in "[{(":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")}]":
            depth = max(depth - 1, 0)
    return deepest


def parse_names(text: str, limits: Limits = DEFAULT_LIMITS) -> tuple[str, ...]:
    """Class names from their text: a dictionary from index to name, or a list. Empty where it is neither.

    Raises:
        ValueError: there are too many, or one is too long or cannot be printed.
    """
    if len(text) > LONGEST_LITERAL:
        raise ValueError(f"class names take {len(text)} characters; expected at most {LONGEST_LITERAL}")
    found = parse_literal(text)
    if isinstance(found, Mapping):
        found = [found[i] for i in range(len(found))] if set(found) == set(range(len(found))) else ()
    return check_names(map(str, found), limits) if isinstance(found, (list, tuple)) else ()


def check_names(names: Any, limits: Limits) -> tuple[str, ...]:
    """Class names, each of which can be printed.

    Raises:
        ValueError: one is too long, or holds control characters.
    """
    checked = tuple(names)
    if len(checked) > limits.max_class_names:
        raise ValueError(f"has {len(checked)} class names; expected at most {limits.max_class_names} (max_class_names)")
    for name in checked:
        if len(name) > limits.max_name_length or has_controls(name):
            raise ValueError(
                f"has the class name {name[:40]!r} of {len(name)} characters; expected at most {limits.max_name_length} (max_name_length), "
                "and no control characters"
            )
    return checked
