"""The output of a job: a folder of Parquet files, each written whole. What is in it is done, and is not done again.

- ``part-00000.parquet``, ... hold the rows. A part covers what its rows name; its metadata name the videos that ended in it.
- ``_fusenms.json`` says which model and settings the rows are of. Readers of Parquet skip names that begin with an underscore.
- ``_fusenms.lock``, in a local folder, is locked while a run writes.
"""

from __future__ import annotations

import io
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fusenms.cluster.dataset import PARQUET, Item, is_remote, open_filesystem
from fusenms.errors import ConfigError, InputError, SourceError, first_line
from fusenms.limits import Limits
from fusenms.onnx_reading.metadata import read_json
from fusenms.safety.files import make_folder, write_atomically
from fusenms.safety.text import printable

try:
    import fcntl
except ImportError:  # Windows, where two runs at once are found by the names of their parts
    fcntl = None  # type: ignore[assignment]

JOB, LOCK, PART = "_fusenms.json", "_fusenms.lock", re.compile(r"part-(\d{5,})\.parquet")
ENDED = b"fusenms.ended"
"""In the metadata of a part: the videos that ended in it, as a list in JSON."""


class Output:
    """A folder that a run writes, and what was done before."""

    def __init__(self, path: str, job: dict[str, Any], limits: Limits) -> None:
        """Open the folder, or make it.

        Args:
            path: local, or in an object store.
            job: model and settings, as values for JSON.

        Raises:
            SourceError: it cannot be written, is a file or a folder of something else, is in use, or a part is damaged.
            ConfigError: it has rows of another model or of other settings.
        """
        self.path, self._shown = path, printable(path)
        self._open_files = ExitStack()
        try:
            self._files, self._folder = open_filesystem(path)
        except InputError as error:
            raise SourceError(str(error)) from error
        self._done: dict[str, set[int | None]] = {}
        self._ended: set[str] = set()
        self._next = 0
        try:
            parts = self._open(job, limits)
            for name in parts:
                self._read(name)
        except OSError as error:
            self.close()
            raise SourceError(
                f"{self._shown}: cannot be written ({first_line(error)}); choose another output"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs write."""
        self._open_files.close()

    def _open(self, job: dict[str, Any], limits: Limits) -> list[str]:
        """Make or check the folder, and lock it. Return the names of its parts."""
        from pyarrow.fs import FileSelector, FileType

        if self._files.get_file_info(self._folder).type == FileType.File:
            raise SourceError(f"{self._shown}: is a file; expected a folder, which holds the Parquet files")
        if not is_remote(self.path):
            make_folder(Path(self._folder))
            self._take_lock()
        found = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        names = {each.base_name for each in found if each.type == FileType.File}
        parts = sorted(name for name in names if PART.fullmatch(name))
        if JOB in names:
            self._check(job, limits)
        elif others := sorted(name for name in names if not name.startswith((".", "_"))):
            raise SourceError(
                f"{self._shown}: has {printable(others[0])}, which no run of fusenms wrote; expected a new folder, or one to go on with"
            )
        else:
            self._put(JOB, json.dumps(job, indent=2, sort_keys=True).encode())
        self._next = 1 + max((int(name[5:-8]) for name in parts), default=-1)
        return parts

    def _take_lock(self) -> None:
        lock = self._open_files.enter_context((Path(self._folder) / LOCK).open("ab"))
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SourceError(
                    f"{self._shown}: another run writes there; wait for it, or choose another output"
                ) from error

    def _check(self, job: dict[str, Any], limits: Limits) -> None:
        with self._files.open_input_file(f"{self._folder}/{JOB}") as file:
            data = file.read(limits.max_metadata_bytes)
        try:
            old = read_json(data.decode("utf-8"), limits)
            differing = sorted(name for name in job.keys() | old.keys() if job.get(name) != old.get(name))
        except (ValueError, AttributeError, SourceError) as error:
            raise SourceError(
                f"{self._shown}: {JOB} is damaged ({first_line(error)}); choose another output"
            ) from error
        if differing:
            name = differing[0]
            before, now = (printable(json.dumps(values.get(name)))[:80] for values in (old, job))
            raise ConfigError(
                f"{self._shown}: has rows of another job: {printable(', '.join(differing))} differs ({before} there, {now} now); expected "
                "the same model and settings, or another output"
            )

    def _read(self, name: str) -> None:
        """Take what a part covers."""
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self._files.open_input_file(f"{self._folder}/{name}")) as part:
                self._ended.update(json.loads((part.schema_arrow.metadata or {}).get(ENDED, b"[]")))
                for batch in part.iter_batches(columns=["image", "row", "frame"]):
                    self._cover(batch)
        except (ArrowException, ValueError, KeyError) as error:
            raise SourceError(
                f"{self._shown}: {name} is damaged ({first_line(error)}); remove it, and what it held is done again"
            ) from error

    def _cover(self, rows: Any) -> None:
        from pyarrow import compute

        numbers = compute.coalesce(rows["row"], rows["frame"]).to_pylist()
        for path, number in zip(rows["image"].to_pylist(), numbers, strict=True):
            self._done.setdefault(path, set()).add(number)

    def left(self, item: Item) -> tuple[int, list[int]]:
        """What of an item is to be done: the number of its rows (of a video 1), and those of its rows or frames that are done."""
        if item.path in self._ended or None in self._done.get(item.path, ()):  # an image, or what failed as a whole
            return 0, []
        numbers = sorted(number for number in self._done.get(item.path, ()) if number is not None)
        if item.kind == PARQUET:
            done = [number for number in numbers if item.first <= number < item.first + item.rows]
            return item.rows - len(done), done
        return 1, numbers

    def write(self, rows: Any, ended: list[str]) -> None:
        """Write a part.

        Args:
            rows: a table of the columns of `fusenms.cluster.rows.schema`.
            ended: videos of which all frames are in this part or in earlier ones.

        Raises:
            SourceError: it cannot be written, or another run writes there.
        """
        from pyarrow import parquet
        from pyarrow.fs import FileType

        name = f"part-{self._next:05}.parquet"
        data = io.BytesIO()
        parquet.write_table(rows.replace_schema_metadata({ENDED: json.dumps(ended)}), data, compression="zstd")
        try:
            if self._files.get_file_info(f"{self._folder}/{name}").type != FileType.NotFound:
                raise SourceError(f"{self._shown}: another run has written {name}; let one run at a time write there")
            self._put(name, data.getvalue())
        except OSError as error:
            raise SourceError(f"{self._shown}: {name} cannot be written ({first_line(error)})") from error
        self._next += 1

    def _put(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all. A store shows an object when it is complete."""
        if not is_remote(self.path):
            write_atomically(Path(self._folder) / name, data)
            return
        with self._files.open_output_stream(f"{self._folder}/{name}") as file:
            file.write(data)


def check_apart(items: list[Item], output: str) -> None:
    """Refuse inputs that lie in the output.

    Raises:
        InputError: one does.
    """
    inside = open_filesystem(output)[1].rstrip("/") + "/"
    for item in items:
        if is_remote(item.path) == is_remote(output) and open_filesystem(item.path)[1].startswith(inside):
            raise InputError(f"{printable(item.path)}: is in the output {printable(output)}; choose another output")
