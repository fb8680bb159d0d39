"""Files are opened and written here: only regular files within a size limit are read, and files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fusenms.errors import FusenmsError, SourceError
from fusenms.safety.text import printable

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be removed there, which is what the locks are for
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.fusenms-[0-9a-f]{16}\.tmp")
"""Names of temporary files: those of runs that were killed are recognized by it."""
_NONBLOCK, _BINARY, _NOFOLLOW = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_NOFOLLOW"))


def open_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> BinaryIO:
    """Open a regular file for reading, or a link to one.

    A FIFO, a device or a socket is refused without waiting for it.

    Args:
        max_bytes: size limit.
        error: class of the error to raise.

    Raises:
        FusenmsError: of the class ``error``: the file is missing, cannot be read, is of another kind, or is too large.
    """
    shown = printable(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | _NONBLOCK | _BINARY)
    except OSError as problem:
        raise error(f"{shown}: cannot be read ({problem.strerror or problem})") from problem
    except ValueError as problem:  # a path with a NUL or a lone surrogate in it
        raise error(f"{shown}: cannot be read ({problem})") from problem
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{shown}: is a directory; expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{shown}: is no regular file (a pipe, a device or a socket); expected a file")
        if status.st_size > max_bytes:
            raise error(f"{shown}: has {status.st_size} bytes; expected at most {max_bytes}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> bytes:
    """Content of a regular file; arguments and errors are those of `open_regular`."""
    with open_regular(path, max_bytes, error=error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1)  # not more: so much memory is taken at once
        except OSError as problem:
            raise error(f"{printable(path)}: cannot be read ({problem.strerror or problem})") from problem
        except MemoryError as problem:
            raise error(f"{printable(path)}: cannot be read (not enough memory)") from problem
    if len(data) != size:
        raise error(
            f"{printable(path)}: changed while it was read, from {size} to {len(data)} bytes or more; read it again"
        )
    return data


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; false for a path that no file can have (too long, a NUL in it)."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def make_folder(folder: Path) -> None:
    """Make a folder for results, where it is not there yet.

    Raises:
        SourceError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{printable(folder)}: cannot be made a folder ({_reason(error)}); choose another with -o"
        ) from error


def check_writable(path: Path, source: Path | None = None) -> None:
    """Fail early where `write_atomically` would, and where the output would destroy its own source.

    Raises:
        SourceError: the path cannot be written, is no regular file, or is ``source``.
    """
    shown = printable(path)
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise SourceError(f"{shown}: is a directory; expected a file to write")
        if target.is_symlink():
            raise SourceError(f"{shown}: is a link to itself; choose another place with -o")
        if target.exists() and not target.is_file():
            raise SourceError(f"{shown}: is not a regular file; choose another place with -o")
        if source is not None and target.exists() and source.exists() and target.samefile(source):
            raise SourceError(f"{shown}: is the weights themselves, which would be lost; choose another place with -o")
        folder = target.parent
        if not folder.is_dir():
            raise SourceError(
                f"{shown}: cannot be written, the folder {printable(path.parent)} does not exist; make it first"
            )
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise SourceError(f"{shown}: cannot be written (no permission); choose another place with -o")
    except (OSError, ValueError) as error:
        raise SourceError(f"{shown}: cannot be written ({_reason(error)}); choose another place with -o") from error


def write_atomically(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path``, whole or not at all, and to the disk. A symbolic link stays one, and an existing file keeps its mode.

    Raises:
        SourceError: the path cannot be written; an existing file is left as it was.
    """
    return write_together({path: data})[0]


def write_together(files: Mapping[Path, bytes]) -> list[Path]:
    """Write files of one folder that belong together: all of them or none. Return their paths.

    1. Remove what killed runs left in the folder.
    2. Write each file under a temporary name, locked, and synchronize it with the disk.
    3. Rename them to their names, in order. If one cannot be renamed, those before it are put back as they were.
    4. Synchronize the folder with the disk.

    A run that is killed before step 3 leaves temporary files, which the next one removes, and nothing else. If several runs write the
    same file at once, that of the last one stays, whole. A run that is killed between two renames leaves the first file new and the last
    one as it was: put last what is checked against the others.

    Raises:
        SourceError: a path cannot be written; existing files are left as they were.
    """
    for path in files:
        check_writable(path)
    writers: list[_Temporary] = []
    path = next(iter(files))
    try:
        try:
            for path, data in files.items():
                target = Path(os.path.realpath(path))
                if not writers:
                    remove_leftovers(target.parent)
                writers.append(_Temporary(target))
                writers[-1].write(data)
            for writer in writers:
                writer.put(keep_old=writer is not writers[-1])
        except BaseException:
            for writer in reversed(writers):
                writer.take_back()
            raise
        _synchronize_folder(writers[0].target.parent)
    except (OSError, ValueError) as error:
        raise SourceError(f"{printable(path)}: cannot be written ({_reason(error)})") from error
    finally:
        for writer in writers:
            writer.close()
    return list(files)


class _Temporary:
    """One file on its way to its place. While it is written, a lock says that its writer is alive."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._path, self._file = _locked(target.parent, lambda path: _create(path))
        self._old: Path | None = None
        self._old_file: BinaryIO | None = None
        self._put = False

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        if self.target.exists() and hasattr(os, "fchmod"):
            os.fchmod(self._file.fileno(), stat.S_IMODE(self.target.stat().st_mode))
        _synchronize(self._file.fileno())

    def put(self, keep_old: bool) -> None:
        """Rename it to its place. ``keep_old``: `take_back` can then restore the file that was there."""
        if keep_old and self.target.exists():
            self._old, self._old_file = _locked(self.target.parent, lambda path: _link(self.target, path))
        if fcntl is None:
            self._file.close()
        os.replace(self._path, self.target)
        self._put = True

    def take_back(self) -> None:
        """Restore what was there before `put`; what was not put needs nothing."""
        with suppress(OSError):
            if self._put and self._old is not None:
                os.replace(self._old, self.target)
            elif self._put:
                self.target.unlink()

    def close(self) -> None:
        for path in (self._path, self._old):
            if path is not None:
                with suppress(OSError):
                    path.unlink()
        for file in (self._file, self._old_file):
            if file is not None:
                with suppress(OSError):
                    file.close()


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files of runs that were killed in a folder; return their paths. Those of running ones are locked, and stay."""
    removed: list[Path] = []
    with suppress(OSError):
        for name in os.listdir(folder):
            if TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_unlocked(folder / name)
                    removed.append(folder / name)
    return removed


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | _NOFOLLOW | _NONBLOCK | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no temporary file of ours")
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(descriptor)
    if fcntl is None:
        path.unlink()


def _locked(folder: Path, make: Callable[[Path], BinaryIO]) -> tuple[Path, BinaryIO]:
    """Make a temporary file and lock it. A cleaner may come between the two: then another one."""
    while True:
        path = folder / f".fusenms-{secrets.token_hex(8)}.tmp"
        file = make(path)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks has none for cleaners either
                fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return path, file
        file.close()


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY | _NOFOLLOW, 0o666), "r+b")


def _link(target: Path, path: Path) -> BinaryIO:
    try:
        os.link(target, path)
    except OSError:  # a file system without hard links
        shutil.copy2(target, path)
    return open(path, "rb")


def _synchronize(descriptor: int) -> None:
    """Wait until a file or folder is on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves it in the disk's own memory
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _synchronize_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # a folder that can be written but not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _synchronize(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
