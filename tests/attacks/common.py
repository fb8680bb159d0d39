"""What an attack is: one hostile file or input, and what it tries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """One try.

    Attributes:
        kind: the threat, the same words for all attacks of a kind.
        name: what this one does.
        make: makes the hostile input; its arguments are those of the module that lists it.
    """

    kind: str
    name: str
    make: Callable
