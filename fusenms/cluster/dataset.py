"""What a data set names: images, videos and rows of Parquet files, in folders, patterns, lists and object stores."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fusenms.errors import InputError, first_line
from fusenms.limits import Limits
from fusenms.runtime import images, video
from fusenms.safety.text import printable

IMAGE, VIDEO, PARQUET = "image", "video", "parquet"
LISTS = (".txt", ".lst")
FILES = (*images.SUFFIXES, *video.SUFFIXES, ".parquet")


@dataclass(frozen=True, slots=True)
class Item:
    """What one actor reads: an image, a video, or a row group of a Parquet file.

    Attributes:
        path: absolute path, or address in an object store.
        kind: ``image``, ``video`` or ``parquet``.
        group: number of the row group; -1 if the file cannot be read, which the actor then says.
        first: number of its first row in the file.
        rows: number of rows; of an image or a video 1.
    """

    path: str
    kind: str
    group: int = -1
    first: int = 0
    rows: int = 1


def is_remote(path: str) -> bool:
    """Whether a path is an address, as ``s3://bucket/folder``."""
    return re.match(r"[A-Za-z][\w+.-]+://", path) is not None


def _split(path: str) -> tuple[str, str]:
    """A path without the options of an address, as ``?region=eu-west-1``, and these. A question mark alone belongs to a pattern."""
    found = re.search(r"\?\w+=[^?]*$", path) if is_remote(path) else None
    return (path[: found.start()], found[0]) if found else (path, "")


def _name(path: str) -> str:
    return _split(path)[0].lower()


def open_filesystem(path: str) -> tuple[Any, str]:
    """The file system of a path, and the path within it.

    Raises:
        InputError: pyarrow knows no such file system, or cannot reach it.
    """
    from pyarrow import ArrowException, fs

    try:
        return fs.FileSystem.from_uri(path) if is_remote(path) else (fs.LocalFileSystem(), os.path.abspath(path))
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{printable(path)}: cannot be opened ({first_line(error)}); expected a local path, or an address that pyarrow knows, "
            "as s3://bucket/folder"
        ) from error


def items_of(arguments: Sequence[str], column: str, limits: Limits) -> list[Item]:
    """Everything that a data set names, in order, each once.

    1. A folder gives its images, videos and Parquet files, sorted by name.
    2. A pattern, as ``photos/**/*.jpg``, gives the files that fit, sorted.
    3. A ``.txt`` or ``.lst`` gives a path in each line, relative to its folder; ``#`` starts a comment.
    4. All else is a video or a Parquet file by its suffix, or an image.

    Raises:
        InputError: a folder or a list names nothing, a pattern fits nothing, or a Parquet file has no such column.
    """
    paths = dict.fromkeys(path for argument in arguments for path in _paths(argument, limits))
    found = [item for path in paths for item in _items(path, column)]
    if not found:
        raise InputError("found no rows in the Parquet files; expected images")
    return found


def _paths(argument: str, limits: Limits) -> Iterator[str]:
    shown, files = printable(argument), _Files(argument)
    info = files.info()
    if info is None and glob.has_magic(argument):
        matching = files.matching()
        if not matching:
            raise InputError(f"{shown}: no file fits this pattern; expected images, videos or Parquet files")
        yield from matching
    elif info is not None and info.type.name == "Directory":
        inside = [path for path in files.inside(recursive=False) if _name(path).endswith(FILES)]
        if not inside:
            raise InputError(f"{shown}: has no images, videos or Parquet files; expected {', '.join(FILES)}")
        yield from inside
    elif _name(argument).endswith(LISTS):
        yield from files.listed(limits)
    else:
        yield argument if is_remote(argument) else os.path.abspath(argument)


class _Files:
    """An argument, which names files in a file system."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self._base, self._options = _split(argument)
        self._fixed = re.split(r"[^/]*[*?\[]", self._base)[0] if glob.has_magic(self._base) else self._base
        self._files, self._inner = open_filesystem((self._fixed or ".") + self._options)

    def info(self) -> Any:
        """What there is under this very name. None: nothing."""
        from pyarrow.fs import FileType

        if glob.has_magic(self._base) and is_remote(self._base):
            return None
        try:
            path = self._inner if is_remote(self._base) else os.path.abspath(self._base)
            found = self._files.get_file_info(path)
        except (OSError, ValueError):  # reading it says why
            return None
        return None if found.type == FileType.NotFound else found

    def inside(self, recursive: bool) -> list[str]:
        """Paths of the files in a folder, sorted."""
        from pyarrow.fs import FileSelector, FileType

        try:
            found = self._files.get_file_info(
                FileSelector(self._inner.rstrip("/"), recursive=recursive, allow_not_found=True)
            )
        except OSError as error:
            raise InputError(f"{printable(self.argument)}: cannot be read ({first_line(error)})") from error
        return sorted(self._outer(each.path) for each in found if each.type == FileType.File)

    def matching(self) -> list[str]:
        if not is_remote(self._base):
            return [
                os.path.abspath(path) for path in sorted(glob.glob(self._base, recursive=True)) if os.path.isfile(path)
            ]
        from fsspec.utils import glob_translate

        fits = re.compile(glob_translate(self._base)).fullmatch
        return [path for path in self.inside("/" in self._base[len(self._fixed) :]) if fits(_split(path)[0])]

    def listed(self, limits: Limits) -> list[str]:
        shown = printable(self.argument)
        try:
            with self._files.open_input_file(self._inner) as file:
                if file.size() > limits.max_metadata_bytes:
                    raise InputError(
                        f"{shown}: has {file.size()} bytes; expected at most {limits.max_metadata_bytes} (max_metadata_bytes): "
                        "name the images in a Parquet file"
                    )
                text = file.read().decode("utf-8")
        except OSError as error:
            raise InputError(f"{shown}: cannot be read ({first_line(error)})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{shown}: is no text; expected a path in each line") from error
        lines = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
        if not lines:
            raise InputError(f"{shown}: names nothing; expected a path in each line")
        return [beside(self.argument, line) for line in lines]

    def _outer(self, inner: str) -> str:
        """The path that the user would write."""
        if not is_remote(self._base):
            return inner
        own = self._inner.rstrip("/")
        return self._fixed.rstrip("/").removesuffix(own) + inner + self._options


def beside(file: str, path: str) -> str:
    """A path that a file names, relative to the folder of the file."""
    if is_remote(path) or os.path.isabs(path):
        return path
    if not is_remote(file):
        return os.path.abspath(os.path.join(os.path.dirname(file), path))
    base, options = _split(file)
    scheme, _, place = base.partition("://")
    return f"{scheme}://{os.path.normpath(PurePosixPath(place).parent / path)}{options}"


def _items(path: str, column: str) -> Iterator[Item]:
    name = _name(path)
    if name.endswith(video.SUFFIXES):
        yield Item(path, VIDEO)
    elif name.endswith(".parquet"):
        yield from _row_groups(path, column)
    else:
        yield Item(path, IMAGE)


def _row_groups(path: str, column: str) -> Iterator[Item]:
    from pyarrow import ArrowException, parquet

    try:
        files, inner = open_filesystem(path)
        with parquet.ParquetFile(files.open_input_file(inner)) as file:
            if column not in file.schema_arrow.names:
                raise InputError(
                    f"{printable(path)}: has no column {printable(repr(column))}; it has {printable(', '.join(file.schema_arrow.names))}"
                )
            check_column(path, file.schema_arrow.field(column))
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (ArrowException, OSError):
        yield Item(path, PARQUET)
        return
    first = 0
    for group, rows in enumerate(counts):
        yield Item(path, PARQUET, group, first, rows)
        first += rows


def check_column(path: str, field: Any) -> None:
    """Refuse a column that holds no images.

    Raises:
        InputError: it has neither bytes nor paths, nor structures of ``bytes`` and ``path`` as Hugging Face writes them.
    """
    from pyarrow import types

    kinds = [field.type]
    if types.is_struct(field.type):
        kinds = [
            field.type.field(i).type
            for i in range(field.type.num_fields)
            if field.type.field(i).name in ("bytes", "path")
        ]
    fits = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    if not kinds or not all(any(fit(kind) for fit in fits) for kind in kinds):
        raise InputError(
            f"{printable(path)}: the column {printable(repr(field.name))} is {printable(str(field.type)[:100])}; expected the bytes of "
            "image files, their paths, or structures of bytes and path"
        )
