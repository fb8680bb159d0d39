"""`DetectorActor`: one process of a job. It holds an open detector, reads what it is given, and gives rows."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from fusenms._version import __version__
from fusenms.cluster.dataset import PARQUET, VIDEO, beside, is_remote, open_filesystem
from fusenms.cluster.rows import values_of, worker_schema
from fusenms.errors import InputError, SourceError, first_line
from fusenms.limits import Limits
from fusenms.runtime import Detector
from fusenms.runtime.ahead import work_ahead
from fusenms.runtime.call import CallFields
from fusenms.runtime.video import Video
from fusenms.safety.text import printable

FETCHING = 8
"""Threads that fetch images of an object store."""
ROWS_AT_ONCE = 16
"""Of a Parquet file, whose images are in memory together."""
_NOTHING = b""
"""Takes the place of an image that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every actor of a job does.

    Attributes:
        sha256: of the model's file.
        version: of fusenms.
        settings: of each call of the detector.
        column: of Parquet files, the one with the images.
        every: of videos, every n-th frame.
        batch_size: most images in one run.
        cpus: CPUs of an actor, which is the number of its threads.
        custom_ops: paths of custom-op libraries on every node.
        limits: on files, images and runs.
    """

    sha256: str
    version: str = __version__
    settings: CallFields
    column: str
    every: int
    batch_size: int
    cpus: int
    custom_ops: tuple[str, ...]
    limits: Limits


def open_detector(model: Any, job: Job) -> Detector:
    """Open a detector from the bytes of its file.

    Raises:
        SourceError: the bytes are not those that the job was started with, or fusenms has another version here.
        FusenmsError: the file cannot be opened here.
    """
    if job.version != __version__:
        raise SourceError(
            f"found fusenms {__version__} on a node, and {printable(job.version)} where the job was started; install one version everywhere"
        )
    if hashlib.sha256(model).hexdigest() != job.sha256:
        raise SourceError("the model that a node received is not the one that the job was started with")
    with tempfile.TemporaryDirectory(prefix="fusenms-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        return Detector(
            path, batch_size=job.batch_size, threads=job.cpus, custom_ops=job.custom_ops, limits=job.limits
        )  # fmt: skip


@dataclass(slots=True)
class _Entry:
    """An image to be detected: the start of its row, and what the detector takes, or why it cannot be read; None: its video has ended."""

    values: dict[str, Any]
    content: Any


class DetectorActor:
    """Detects in tables of items, a table of rows for each batch."""

    def __init__(self, job: Job, model: list[Any]) -> None:
        """Open the model.

        Args:
            model: a reference to the bytes of the file in the object store, in a list.
        """
        import ray

        context = ray.get_runtime_context()
        self._from = {"_actor": context.get_actor_id() or "", "_node": context.get_node_id()}
        self._job = job
        self._detect = open_detector(ray.get(model[0]), job)

    def __call__(self, table: Any) -> Iterator[Any]:
        """Rows of the items in a table, whose column ``items`` has a list of them for each task."""
        import pyarrow as pa

        rows: list[dict[str, Any]] = []
        for row in self._rows([item for task in table["items"].to_pylist() for item in task]):
            rows.append(row | self._from)
            if len(rows) >= self._job.batch_size:
                yield pa.Table.from_pylist(rows, worker_schema())
                rows = []
        if rows or not table.num_rows:
            yield pa.Table.from_pylist(rows, worker_schema())

    def _rows(self, items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of all items. Images after each other share batches, whatever they come from."""
        waiting: deque[_Entry] = deque()

        def contents() -> Iterator[Any]:
            for entry in self._opened(self._entries(items)):
                waiting.append(entry)
                yield _NOTHING if isinstance(entry.content, (InputError, NoneType)) else entry.content

        readers = max(1, self._job.cpus)
        for found in self._detect.stream(contents(), readers=readers, **self._job.settings):
            entry = waiting.popleft()
            if entry.content is None:
                yield entry.values | {"_ended": True}
            elif isinstance(entry.content, InputError):
                yield entry.values | {"error": str(entry.content)}
            elif isinstance(found, InputError):
                yield entry.values | {"error": str(found)}
            else:
                yield entry.values | values_of(found)

    def _opened(self, entries: Iterable[_Entry]) -> Iterator[_Entry]:
        """Entries with images of object stores fetched."""
        return work_ahead(entries, self._fetched, 2 * max(FETCHING, self._job.batch_size), FETCHING)

    def _fetched(self, entry: _Entry) -> _Entry:
        if isinstance(entry.content, str) and is_remote(entry.content):
            try:
                entry.content = _read(entry.content, self._job.limits.max_image_file_bytes)
            except InputError as error:
                entry.content = error
        return entry

    def _entries(self, items: list[dict[str, Any]]) -> Iterator[_Entry]:
        for item in items:
            if item["kind"] == VIDEO:
                yield from self._frames(item)
            elif item["kind"] == PARQUET:
                yield from self._parquet_rows(item)
            else:
                yield _Entry({"image": item["path"]}, item["path"])

    def _frames(self, item: dict[str, Any]) -> Iterator[_Entry]:
        done, values = set(item["done"]), {"image": item["path"]}
        try:
            with _local(item["path"], self._job.limits.max_file_bytes) as path:
                video = Video(path, self._job.limits)
                try:
                    for frame in video.frames(self._job.every):
                        if frame.number not in done:
                            yield _Entry(values | {"frame": frame.number, "seconds": frame.seconds}, frame.image)
                finally:
                    video.close()
        except InputError as error:  # after the frames that it gave
            yield _Entry(values, error)
            return
        yield _Entry(values, None)

    def _parquet_rows(self, item: dict[str, Any]) -> Iterator[_Entry]:
        from pyarrow import ArrowException, parquet

        path, done = item["path"], set(item["done"])
        number, last = item["first"], item["first"] + item["rows"]
        try:
            files, inner = open_filesystem(path)
            with parquet.ParquetFile(files.open_input_file(inner)) as file:
                groups = [item["group"]] if item["group"] >= 0 else None
                for batch in file.iter_batches(ROWS_AT_ONCE, groups, [self._job.column]):
                    for value in batch.column(0):
                        if number not in done:
                            yield _Entry({"image": path, "row": number}, _content(path, value.as_py()))
                        number += 1
        except (ArrowException, OSError, InputError) as error:
            problem = InputError(f"{printable(path)}: cannot be read ({first_line(error)})")
            if item["group"] < 0:
                yield _Entry({"image": path}, problem)
                return
            for row in range(number, last):
                if row not in done:
                    yield _Entry({"image": path, "row": row}, problem)


def _content(file: str, value: Any) -> Any:
    """What the detector takes, of a value of a Parquet column."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        return InputError("found null; expected an image")
    return beside(file, value) if isinstance(value, str) else value


def _read(path: str, most: int) -> bytes:
    """A file of an object store.

    Raises:
        InputError: it cannot be read, or is too large.
    """
    files, inner = open_filesystem(path)
    try:
        with files.open_input_file(inner) as file:
            if file.size() > most:
                raise InputError(f"{printable(path)}: has {file.size()} bytes; expected at most {most}")
            return bytes(file.read())
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read ({first_line(error)})") from error


@contextmanager
def _local(path: str, most: int) -> Iterator[Path]:
    """A file as a local one: one of an object store is copied, while it is in use."""
    if not is_remote(path):
        yield Path(path)
        return
    files, inner = open_filesystem(path)
    with tempfile.TemporaryDirectory(prefix="fusenms-") as folder:
        copy = Path(folder) / os.path.basename(inner)
        try:
            size = files.get_file_info(inner).size
            if size is not None and size > most:
                raise InputError(f"{printable(path)}: has {size} bytes; expected at most {most}")
            with files.open_input_stream(inner) as source, copy.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        except OSError as error:
            raise InputError(f"{printable(path)}: cannot be read ({first_line(error)})") from error
        yield copy
