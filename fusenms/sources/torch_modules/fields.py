"""Checks for attribute values of layers in a checkpoint. Each is a function that returns the value or raises ValueError."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fusenms.limits import Limits

Field = Callable[[Any, Limits], Any]


def flag(value: Any, _: Limits) -> bool:
    """True or false."""
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ValueError(f"is {shown(value)}; expected true or false")
    return bool(value)


def no(value: Any, _: Limits) -> bool:
    """False or None. True would change the computation of the layer in a way that fusenms does not support."""
    if value is not False and value is not None:
        raise ValueError(f"is {shown(value)}; expected false")
    return False


def whole(value: Any, least: int, most: int) -> int:
    """An integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"is {shown(value)}; expected a whole number from {least} to {most}")
    return value


def repeats(value: Any, limits: Limits) -> int:
    """A number of repetitions, 0 included."""
    return whole(value, 0, limits.max_repeats)


def channels(value: Any, limits: Limits) -> int:
    """A number of channels, heads or classes."""
    return whole(value, 1, limits.max_channels)


def index(value: Any, limits: Limits) -> int:
    """A position, from the start or, if negative, from the end."""
    return whole(value, -limits.max_modules, limits.max_modules)


def indices(value: Any, limits: Limits) -> list[int]:
    """A list of positions."""
    if not isinstance(value, (list, tuple)) or len(value) > limits.max_modules:
        raise ValueError(f"is {shown(value)}; expected a list of whole numbers")
    return [index(item, limits) for item in value]


def index_or_indices(value: Any, limits: Limits) -> int | list[int]:
    """A position or a list of positions."""
    return indices(value, limits) if isinstance(value, (list, tuple)) else index(value, limits)


def several_channels(value: Any, limits: Limits) -> list[int]:
    """A list of numbers of channels."""
    return [channels(item, limits) for item in indices(value, limits)]


def real(value: Any, _: Limits) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"is {shown(value)}; expected a finite number")
    return float(value)


def vector(value: Any, _: Limits) -> Any:
    """A short tensor. The rebuilder makes it, because it can read storages."""
    return value


def shown(value: Any) -> str:
    """A value as text, for messages. Containers are shown by type only, because they can be recursive."""
    if isinstance(value, str):
        return repr(value[:60])
    return str(value) if isinstance(value, (bool, int, float, type(None))) else f"a {type(value).__name__}"
