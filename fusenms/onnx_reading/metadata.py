"""Parses text in the metadata of a file: JSON, or Python literals as Ultralytics writes them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.safety.text import has_controls

LONGEST_LITERAL = 2**20
"""Maximum length of a literal, in characters. Python needs a few hundred bytes for each while it parses."""
DEEPEST_LITERAL = 16


def read_json(text: str, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deep, or holds a number that is not finite.
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
    """Parse a Python literal. Return None if the text is not a literal, or is too long or too deep to be parsed safely."""
    if len(text) > LONGEST_LITERAL or _depth(text) > DEEPEST_LITERAL:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _depth(text: str) -> int:
    """Nesting depth of brackets. Brackets in quotes count too."""
    deepest = depth = 0
    for char in text:
        if char in "[{(":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")}]":
            depth = max(depth - 1, 0)
    return deepest


def parse_names(text: str, limits: Limits = DEFAULT_LIMITS) -> tuple[str, ...]:
    """Parse class names: a dictionary from index to name, or a list. Return an empty tuple if the text is neither.

    Raises:
        ValueError: there are too many names, or a name is too long or holds control characters.
    """
    if len(text) > LONGEST_LITERAL:
        raise ValueError(f"class names take {len(text)} characters; expected at most {LONGEST_LITERAL}")
    found = parse_literal(text)
    if isinstance(found, Mapping):
        found = [found[i] for i in range(len(found))] if set(found) == set(range(len(found))) else ()
    return check_names(map(str, found), limits) if isinstance(found, (list, tuple)) else ()


def check_names(names: Any, limits: Limits) -> tuple[str, ...]:
    """Check class names: their number, their lengths and that each can be printed. Return them as a tuple.

    Raises:
        ValueError: there are too many names, or a name is too long or holds control characters.
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
