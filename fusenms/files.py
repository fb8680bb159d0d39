"""Files are opened here: regular files within a size limit, and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fusenms.errors import FusenmsError, SourceError


def open_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> BinaryIO:
    """Open a regular file for reading, or a link to one.

    A FIFO, a device or a socket is refused without waiting for it.

    Args:
        max_bytes: size limit.
        error: class of the error to raise.

    Raises:
        FusenmsError: of the class ``error``: the file is missing, cannot be read, is of another kind, or is too large.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    except ValueError as problem:  # a path with a NUL in it
        raise error(f"{str(path)!r}: cannot be read ({problem})") from problem
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{path}: is a directory; expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is no regular file (a pipe, a device or a socket); expected a file")
        if status.st_size > max_bytes:
            raise error(f"{path}: has {status.st_size} bytes; expected at most {max_bytes}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> bytes:
    """Content of a regular file; arguments and errors are those of `open_regular`."""
    with open_regular(path, max_bytes, error=error) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as problem:
            raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    if len(data) > max_bytes:
        raise error(f"{path}: grew while it was read, past {max_bytes} bytes; expected at most that")
    return data
