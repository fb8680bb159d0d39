"""Reads the zip archive that `torch.save` writes, within limits: the pickle and the storages, as bytes.

All entries are checked before any is read: compression methods, encryption, overlaps, sizes. Only the standard library is used.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

from fusenms.errors import SourceError
from fusenms.limits import MIB, Limits
from fusenms.safety.files import open_regular

SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = 30  # bytes of an entry's local header, without its name
_BYTES_OF_AN_ENTRY = 1024  # maximum average size of an entry in the directory
_ALLOWANCE = 16 * MIB  # every archive may inflate to this size, so that small ones pass
_CHUNK = MIB
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """A checkpoint's archive, open for reading. Use it in a ``with`` statement.

    Attributes:
        path: path of the file.
        limits: bounds on the archive.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        """Open and check the archive.

        Raises:
            SourceError: the file is missing or too large, or is a TorchScript archive.
            ValueError: the archive is damaged, or exceeds a limit. Errors of `zipfile` pass unchanged.
        """
        self.path, self.limits = path, limits
        self._file = open_regular(path, limits.max_file_bytes)
        try:
            self._zip = zipfile.ZipFile(_Capped(self._file, limits.max_archive_entries * _BYTES_OF_AN_ENTRY))
            self._entries = self._checked()
            self._root = self._find_root()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pickle(self) -> bytes:
        """The pickle of the object tree."""
        return self._read(f"{self._root}data.pkl", self.limits.max_pickle_bytes)

    def storage(self, key: str, size: int) -> bytes:
        """The bytes of one storage.

        Args:
            key: name of the storage in the pickle.
            size: expected size, in bytes.

        Raises:
            ValueError: the storage is missing, or has another size.
        """
        name = f"{self._root}data/{key}"
        found = self._entries[name].file_size if name in self._entries else None
        if found != size:
            raise ValueError(f"storage {key[:40]!r} has {found} bytes; expected {size}, the size in the pickle")
        return self._read(name, size)

    def _read(self, name: str, most: int) -> bytes:
        entry = self._entries[name]
        if entry.file_size > most:
            raise ValueError(f"{name[:80]!r} has {entry.file_size} bytes; expected at most {most}")
        data = bytearray()
        with self._zip.open(entry) as file:
            while chunk := file.read(_CHUNK):  # in chunks, because one read would inflate all data at once
                data += chunk
        if len(data) != entry.file_size:
            raise ValueError(
                f"{name[:80]!r} inflates to {len(data)} bytes; expected {entry.file_size}, the size in its header"
            )
        return bytes(data)

    def _checked(self) -> dict[str, zipfile.ZipInfo]:
        entries = self._zip.infolist()
        if len(entries) > self.limits.max_archive_entries:
            raise ValueError(f"it has {len(entries)} entries; expected at most {self.limits.max_archive_entries}")
        for entry in entries:
            if entry.flag_bits & 0x1:
                raise ValueError(f"entry {entry.filename[:80]!r} is encrypted")
            if entry.compress_type not in _METHODS:
                raise ValueError(f"entry {entry.filename[:80]!r} is compressed by method {entry.compress_type}")
        by_name = {entry.filename: entry for entry in entries}
        if len(by_name) != len(entries):
            raise ValueError("two of its entries have the same name")
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise ValueError(f"entry {entry.filename[:80]!r} overlaps another one")
            end = entry.header_offset + _LOCAL_HEADER + len(entry.filename.encode()) + entry.compress_size
        size = self._file.seek(0, io.SEEK_END)
        inflated, most = sum(entry.file_size for entry in entries), self.limits.max_inflation * size + _ALLOWANCE
        if end > size or inflated > most:
            raise ValueError(f"its entries inflate to {inflated} bytes; expected at most {most} for a file of {size}")
        return by_name

    def _find_root(self) -> str:
        """The prefix of `data.pkl`: the name of the archive and a slash."""
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise ValueError(f"it has {len(roots)} entries */data.pkl; expected one")
        (root,) = roots
        if f"{root}constants.pkl" in self._entries:
            raise SourceError(
                f"{self.path}: is a TorchScript archive, which is code; expected a checkpoint that torch.save wrote. "
                "Export it to .onnx where you trust it, and pass the .onnx file"
            )
        if f"{root}byteorder" in self._entries and self._read(f"{root}byteorder", 16) != b"little":
            raise ValueError("its byte order is not little-endian")
        return root


class _Capped(io.RawIOBase):
    """A file that bounds the size of a single read. `zipfile` reads the directory of an archive in one piece."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most

    def read(self, size: int = -1, /) -> bytes:
        if size > self._most:
            raise ValueError(f"its directory has {size} bytes; expected at most {self._most}")
        return self._file.read(self._most if size < 0 else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
