"""Which fuzz targets there are: every function `fuzz_NAME(data: bytes) -> None` of a file `*_targets.py` beside this.

A target raises on a find, and on nothing else. Its seeds and the finds of earlier runs are the files in `corpus/NAME/`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
Target = Callable[[bytes], None]


def targets() -> dict[str, Target]:
    """Every target by name."""
    for folder in (HERE, HERE.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    found: dict[str, Target] = {}
    for path in sorted(HERE.glob("*_targets.py")):
        module = importlib.import_module(path.stem)
        for name, value in vars(module).items():
            if name.startswith("fuzz_") and callable(value):
                found[name.removeprefix("fuzz_")] = value
    return found


def corpus(name: str) -> list[Path]:
    """Its files, in order."""
    return sorted(path for path in (HERE / "corpus" / name).glob("*") if path.is_file())
