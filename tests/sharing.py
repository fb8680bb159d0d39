"""What takes long and always gives the same is made once in a run of the tests: one worker makes it, the others read it."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


folder: Path
"""Temporary, of this run; the same in every worker of pytest-xdist."""


def start(factory: pytest.TempPathFactory) -> None:
    global folder
    own = factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(key: str, make: Callable[[], T]) -> T:
    """What `make` gives, from the file of this key where there is one; each call gives a copy of its own."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(pickle.dumps(make()))
            part.rename(path)
    return pickle.loads(path.read_bytes())


def digest(path: Path) -> str:
    """Of a file, or of the names and contents of a directory."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(path).as_posix() for file in files]
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return repr(list(zip(names, parts, strict=True)))
