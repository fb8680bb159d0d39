"""Standard output and standard error that never make a command fail, neither by their encoding nor by a full disk."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

PLAIN = {"·": "-", "×": "x", "Δ": "delta", "…": "...", "°": " deg", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">="}
"""Replacements for characters that fusenms prints, if the encoding of the terminal lacks them."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    chars = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("unicode_escape").decode("ascii") for c in chars), error.end


class Stream:
    """A text stream that accepts every text. After a failed write, ``error`` holds the reason, and nothing more is written.

    ``stream`` is None if the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.error is None and text:
            if not text.isascii():
                text = text.encode(self.encoding, "fusenms").decode(self.encoding)
            if self._stream is None:
                self.error = OSError(errno.EBADF, "it is closed")
            else:
                self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        if self.error is None and self._stream is not None:
            self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def is_descriptor(self, number: int) -> bool:
        """Whether the stream writes to this descriptor of the process."""
        with suppress(OSError, ValueError, AttributeError):
            return self._stream is not None and self._stream.fileno() == number
        return False

    def _try(self, call: Any, *args: str) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed in this process
            self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, "it is closed")
            if self._stream in (sys.__stdout__, sys.__stderr__):
                with suppress(
                    OSError, ValueError
                ):  # otherwise Python would fail again at exit, when it flushes the buffer
                    nothing = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nothing, cast(TextIO, self._stream).fileno())
                    os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Replace standard output and standard error by `Stream` objects. Yield the output, whose ``error`` is set after a failed write."""
    codecs.register_error("fusenms", _plain)
    old = sys.stdout, sys.stderr
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = old


@contextmanager
def only_own_messages() -> Iterator[None]:
    """Drop what other packages print meanwhile, and native code on standard error; what fusenms prints on standard error stays."""
    own = os.dup(2)
    try:
        with (
            open(own, "w", encoding=sys.stderr.encoding, closefd=False) as errors,
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(errors if isinstance(sys.stderr, Stream) and sys.stderr.is_descriptor(2) else sys.stderr),
        ):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def fill_descriptors() -> None:
    """Open the descriptors 0 to 2 if the process was started without them. Otherwise a file that it opens would become its output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
