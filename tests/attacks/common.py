"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attack:
    """A hostile input: the kind of hole that it looks for, its name, and what makes it."""

    kind: str
    name: str
    make: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"
