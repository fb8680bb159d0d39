"""What the subcommands share: lines of steps, and progress on the terminal."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusenms.safety.text import printable, printable_lines
from fusenms.verification.checks import Progress


class Steps:
    """Prints one line a step, or collects them for ``--json``."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.values: dict[str, Any] = {}

    def line(self, step: str, text: str) -> None:
        """Print a step, on one line; what is not visible in the text is escaped."""
        if not self._as_json:
            print(f"{step:<9} {printable(text)}", flush=True)

    def lines(self, step: str, text: str) -> None:
        """Print a step with a text of several lines; all but the first are indented."""
        if not self._as_json:
            print(f"{step:<9} {printable_lines(text)}", flush=True)

    def finish(self, **values: Any) -> None:
        """Print the collected values, where JSON was asked for."""
        self.values |= values
        if self._as_json:
            print(json.dumps(_finite(self.values), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """A value as JSON can say it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """A progress bar on standard error while it is a terminal; else nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bar

    def update(what: str, done: int, total: int) -> None:
        bar.update(task, description=escape(f"{title}: {printable(what)}"), completed=done, total=total)

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield update


def size_argument(text: str) -> int | tuple[int, int]:
    """Parse ``640`` or ``480x640`` (height x width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected one side (640) or HEIGHTxWIDTH (480x640)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
