"""Opens and writes files. Only regular files within a size limit are read. Writes are atomic."""

from __future__ import annotations

import errno
import hashlib
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
except ImportError:  # Windows needs no locks: an open file cannot be removed there
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.fusenms-[0-9a-f]{16}\.tmp")
"""Pattern of temporary file names. It identifies the files that killed runs left behind."""
_NONBLOCK, _BINARY, _NOFOLLOW = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_NOFOLLOW"))


def open_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    A FIFO, a device or a socket is refused without blocking.

    Args:
        max_bytes: size limit.
        error: class of the error to raise.

    Raises:
        FusenmsError: the file is missing, unreadable, not a regular file, or too large. The error is of the class ``error``.
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
            raise error(f"{shown}: is not a regular file (a pipe, a device or a socket); expected a file")
        if status.st_size > max_bytes:
            raise error(f"{shown}: has {status.st_size} bytes; expected at most {max_bytes}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int, *, error: type[FusenmsError] = SourceError) -> bytes:
    """Read a regular file. Arguments and errors are those of `open_regular`."""
    with open_regular(path, max_bytes, error=error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1)  # a bound, because memory for it is allocated at once
        except OSError as problem:
            raise error(f"{printable(path)}: cannot be read ({problem.strerror or problem})") from problem
        except MemoryError as problem:
            raise error(f"{printable(path)}: cannot be read (not enough memory)") from problem
    if len(data) != size:
        raise error(
            f"{printable(path)}: changed while it was read, from {size} to {len(data)} bytes or more; read it again"
        )
    return data


def sha256(path: Path, max_bytes: int) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        SourceError: it cannot be read, or is too large.
    """
    digest = hashlib.sha256()
    with open_regular(path, max_bytes) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. False for an invalid path (too long, or with a NUL)."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def make_folder(folder: Path) -> None:
    """Make a folder for results, unless it exists.

    Raises:
        SourceError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{printable(folder)}: the folder cannot be made ({_reason(error)}); choose another output folder"
        ) from error


def check_writable(path: Path, source: Path | None = None) -> None:
    """Check that `write_atomically` can write a path, and that the output does not overwrite its own source.

    Raises:
        SourceError: the path cannot be written, is not a regular file, or is ``source``.
    """
    shown = printable(path)
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise SourceError(f"{shown}: is a directory; expected a file to write")
        if target.is_symlink():
            raise SourceError(f"{shown}: is a link to itself; choose another output path")
        if target.exists() and not target.is_file():
            raise SourceError(f"{shown}: is not a regular file; choose another output path")
        if source is not None and target.exists() and source.exists() and target.samefile(source):
            raise SourceError(f"{shown}: is the input file, which would be overwritten; choose another output path")
        folder = target.parent
        if not folder.is_dir():
            raise SourceError(
                f"{shown}: cannot be written, the folder {printable(path.parent)} does not exist; make it first"
            )
        if not os.access(target if target.exists() else folder, os.W_OK):
            raise SourceError(f"{shown}: cannot be written (no permission); choose another output path")
    except (OSError, ValueError) as error:
        raise SourceError(f"{shown}: cannot be written ({_reason(error)}); choose another output path") from error


def copy_beside(source: Path, target: Path) -> bool:
    """Copy a file to where another file expects it, whole or not at all. Return whether there was anything to do: not if it is there.

    Raises:
        SourceError: another file has that name, or the file cannot be copied.
    """
    if target.exists():
        if target.samefile(source):
            return False
        raise SourceError(
            f"{printable(target)}: is there already, and {printable(source)} would replace it; choose another folder"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.copy")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SourceError(f"{printable(target)}: cannot be written ({error.strerror or error})") from error
    return True


def write_atomically(path: Path, data: bytes) -> Path:
    """Write ``data`` to ``path`` atomically, and synchronize it with the disk.

    A symbolic link stays a link, and an existing file keeps its mode.

    Raises:
        SourceError: the path cannot be written. An existing file is not changed.
    """
    return write_together({path: data})[0]


def write_together(files: Mapping[Path, bytes]) -> list[Path]:
    """Write several files together: all of them or none. Return their paths.

    1. Remove the temporary files that killed runs left in the folders.
    2. Write each file under a temporary name, locked, and synchronize it with the disk.
    3. Rename the files to their final names, in order. If a rename fails, the earlier ones are undone.
    4. Synchronize the folders with the disk.

    A run that is killed before step 3 leaves only temporary files, which the next run removes. If several runs write the same file at
    the same time, the file of the last run remains, complete. A run that is killed between two renames leaves the first files new and
    the last ones old. Therefore put a file that is checked against the others last.

    Raises:
        SourceError: a path cannot be written. Existing files are not changed.
    """
    for path in files:
        check_writable(path)
    writers: list[_Temporary] = []
    folders: set[Path] = set()
    path = next(iter(files))
    try:
        try:
            for path, data in files.items():
                target = Path(os.path.realpath(path))
                if target.parent not in folders:
                    folders.add(target.parent)
                    remove_leftovers(target.parent)
                writers.append(_Temporary(target))
                writers[-1].write(data)
            for writer in writers:
                writer.put(keep_old=writer is not writers[-1])
        except BaseException:
            for writer in reversed(writers):
                writer.take_back()
            raise
        for folder in folders:
            _synchronize_folder(folder)
    except (OSError, ValueError) as error:
        raise SourceError(f"{printable(path)}: cannot be written ({_reason(error)})") from error
    finally:
        for writer in writers:
            writer.close()
    return list(files)


def write_folder(folder: Path, files: Mapping[str, bytes], source: Path) -> list[Path]:
    """Write files into a folder together, by their paths in it. Return their paths.

    Folders that do not exist are made. Files of the same names are replaced, all of them or none; others stay.

    Raises:
        SourceError: a folder cannot be made, a file cannot be written, or one is ``source``. Folders that were made are removed again.
    """
    places = {folder.joinpath(*name.split("/")): data for name, data in files.items()}
    made: list[Path] = []
    try:
        for parent in dict.fromkeys(path.parent for path in places):
            missing = [each for each in (parent, *parent.parents) if not is_folder(each)]
            make_folder(parent)
            made += reversed(missing)
        for place in places:
            check_writable(place, source)
        return write_together(places)
    except BaseException:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()
        raise


class _Temporary:
    """A file that is written under a temporary name and then renamed. A lock shows that its writer is still running."""

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
        """Rename the file to its target. With ``keep_old``, `take_back` can restore the previous file."""
        if keep_old and self.target.exists():
            self._old, self._old_file = _locked(self.target.parent, lambda path: _link(self.target, path))
        if fcntl is None:
            self._file.close()
        os.replace(self._path, self.target)
        self._put = True

    def take_back(self) -> None:
        """Undo `put`: restore the previous file, or remove the new one. Does nothing if `put` was not called."""
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
    """Remove the temporary files that killed runs left in a folder. Return their paths.

    Files of running processes are locked, and remain.
    """
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
    """Make a temporary file and lock it. If another process removes it before it is locked, make a new one."""
    while True:
        path = folder / f".fusenms-{secrets.token_hex(8)}.tmp"
        file = make(path)
        if fcntl is not None:
            with suppress(OSError):  # without locks in the file system, other processes cannot clean up either
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
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync does not flush the cache of the disk
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _synchronize_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk, if the system supports it."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # a folder can be writable but not readable
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
