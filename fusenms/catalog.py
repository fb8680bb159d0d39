"""The families in `models/catalog.toml`: how each is read, and which models it was tried on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusenms.errors import SourceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Family:
    """One entry of the catalog. The fields are documented at the top of the file."""

    name: str
    head: str
    weights: tuple[str, ...]
    decode: str
    suppress: bool
    checkpoints: tuple[str, ...]
    source: str
    licence: str
    tried: str
    files: tuple[str, ...]
    task: str = "detect"


def families() -> tuple[Family, ...]:
    """Return all entries in file order.

    Raises:
        SourceError: the file is missing from the installation.
    """
    here = Path(__file__).resolve().parent
    for path in (here / "_catalog.toml", here.parent / "models" / "catalog.toml"):
        if path.is_file():
            entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["family"]
            return tuple(Family(**{key: _frozen(value) for key, value in entry.items()}) for entry in entries)
    raise SourceError("the catalog of families is missing from this installation; install fusenms again")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
