"""Output shared by the subcommands: lines for steps, and a progress bar."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from fusenms.safety.text import printable, printable_lines


class Steps:
    """Prints a line for each step, or collects values for ``--json``."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.values: dict[str, Any] = {}

    def line(self, step: str, text: str) -> None:
        """Print a step on one line. Characters that are not visible are escaped."""
        if not self._as_json:
            print(f"{step:<9} {printable(text)}", flush=True)

    def lines(self, step: str, text: str) -> None:
        """Print a step with a text of several lines. All lines after the first are indented."""
        if not self._as_json:
            print(f"{step:<9} {printable_lines(text)}", flush=True)

    def wrote(self, path: Path) -> None:
        """Print the file that was written, and finish."""
        self.line("wrote", f"{path} ({megabytes(path.stat().st_size)})")
        self.finish(file=str(path))

    def finish(self, **values: Any) -> None:
        """Print the collected values with ``--json``."""
        self.values |= values
        if self._as_json:
            print(json.dumps(_finite(self.values), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """A value for JSON, in which numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar:
    """A progress bar on standard error, if that is a terminal. It appears at the first `update`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, what: str, done: int, total: int) -> None:
        """Show the current activity, the number of steps done, and the total."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        if self._bar is None:
            console = Console(stderr=True)
            self._bar = Progress(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task(self._title)
            self._bar.start()
        text = escape(f"{self._title}: {printable(what)}")
        self._bar.update(self._task, description=text, completed=done, total=total)

    def close(self) -> None:
        """Remove the bar, so that lines can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def size_argument(text: str) -> int | tuple[int, int]:
    """Parse ``640`` or ``480x640`` (height x width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected one side (640) or HEIGHTxWIDTH (480x640)")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
