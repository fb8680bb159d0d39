"""Makes text of unknown origin safe to print: names in a file, paths, messages of other libraries."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def has_controls(text: str) -> bool:
    r"""Whether a text has control characters, line ends, lone surrogates, or marks that change the writing direction.

    >>> has_controls("a\u3000b"), has_controls("a\x1bb"), has_controls("a\u202eb")
    (False, True, True)
    """
    return any(unicodedata.category(c) in _CONTROLS or unicodedata.bidirectional(c) in _TURNS for c in text)


def printable(value: Any) -> str:
    r"""Escape all characters that are not visible, so that they cannot control a terminal.

    These are control characters (line ends included), marks that change the writing direction, lone surrogates and unusual spaces. A
    backslash is not escaped: the result is for reading, not for parsing.

    >>> printable("bus\x1b[31m\n")
    'bus\\x1b[31m\\n'
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = os.fsdecode(text) if isinstance(text, bytes) else str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def printable_lines(value: Any) -> str:
    r"""Like `printable`, for text of several lines. Line ends remain, and all lines after the first are indented by two spaces or more.

    So a line end in a name cannot start a line that looks like output of fusenms.

    >>> print(printable_lines("x: not found\nwrote y"))
    x: not found
      wrote y
    """
    first, *others = (printable(line) for line in str(value).split("\n"))
    return "\n".join((first, *(line if line.startswith("  ") or not line else f"  {line}" for line in others)))
