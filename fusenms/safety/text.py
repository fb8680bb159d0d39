"""Text of unknown origin, made fit to print: names in a file, paths, messages of other libraries."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def has_controls(text: str) -> bool:
    r"""Whether a text has control characters, line ends, lone surrogates, or marks that turn the direction of writing.

    >>> has_controls("a\u3000b"), has_controls("a\x1bb"), has_controls("a\u202eb")
    (False, True, True)
    """
    return any(unicodedata.category(c) in _CONTROLS or unicodedata.bidirectional(c) in _TURNS for c in text)


def printable(value: Any) -> str:
    r"""Text in which every character is visible. All others are escaped, so that they cannot act on a terminal.

    Escaped are control characters (line ends too), marks that turn the direction of writing, lone surrogates and unusual spaces. Nothing is
    done to a backslash: the result is to be read, not to be parsed.

    >>> printable("bus\x1b[31m\n")
    'bus\\x1b[31m\\n'
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = os.fsdecode(text) if isinstance(text, bytes) else str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def printable_lines(value: Any) -> str:
    r"""The same for text of several lines: line ends stay, and each other line is indented by at least two spaces.

    A line end in a name therefore never starts a line that looks like one of ours.

    >>> print(printable_lines("x: not found\nwrote y"))
    x: not found
      wrote y
    """
    first, *others = (printable(line) for line in str(value).split("\n"))
    return "\n".join((first, *(line if line.startswith("  ") or not line else f"  {line}" for line in others)))
