"""`detect_dataset`: runs a fused model on a data set, with Ray Data, and writes the detections as Parquet."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.cluster.actor import Job
from fusenms.cluster.connection import LOCAL, connected, import_pyarrow
from fusenms.cluster.dataset import items_of
from fusenms.cluster.job import run_job
from fusenms.cluster.output import Output, check_apart
from fusenms.cluster.writer import Writer
from fusenms.errors import InputError
from fusenms.graph.custom_ops import current_libraries
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime import Detector
from fusenms.runtime.call import CallFields
from fusenms.safety.files import read_regular
from fusenms.safety.text import printable

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class DatasetRun:
    """What `detect_dataset` did.

    Attributes:
        output: the folder of Parquet files.
        images: number of rows that were written: images, frames and rows of Parquet files.
        failed: number of these that have an error instead of detections.
        skipped: number of images, videos and rows that earlier runs had done.
        detections: number of detections that were written.
        actors: number of actors that worked.
        nodes: number of nodes that they worked on.
        seconds: from the first task given to the last row received.
        ready_seconds: until the first row came, of these: actors start, and open the model.
        start_seconds: before that: reading the model, listing the data set, starting Ray or connecting to it.
    """

    output: str
    images: int
    failed: int
    skipped: int
    detections: int
    actors: int
    nodes: int
    seconds: float
    ready_seconds: float
    start_seconds: float

    @property
    def images_per_second(self) -> float:
        """Of ``seconds``; 0 if there was nothing to do."""
        return self.images / self.seconds if self.images else 0.0


def detect_dataset(
    model: str | os.PathLike[str],
    dataset: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    address: str = LOCAL,
    column: str = "image",
    every: int = 1,
    batch_size: int = 8,
    actors: int | None = None,
    cpus: int = 1,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[CallFields],
) -> DatasetRun:
    """Detect objects in a data set with the CPUs of a Ray cluster, and write the detections as Parquet.

    A run that was stopped, by Ctrl-C or with its machine, goes on when it is called again: what the output has is not done again, and no
    row is written twice. A node that is lost gives its work to the others. Libraries of `fusenms.custom_ops` are opened on every node,
    under the same path.

    Args:
        model: path of a fused `.onnx`. The cluster needs no copy of it.
        dataset: a folder, a pattern, a ``.txt`` or ``.lst`` with a path in each line, a video, an image, a `.parquet`, or several of these;
            local, or addresses that pyarrow knows, as ``s3://bucket/photos``. Local paths must lead to the same files on every node.
        output: a folder for Parquet files, local or in an object store; this process alone writes it.
        address: ``local`` starts Ray here; ``auto`` or ``HOST:PORT`` is a cluster. A connection that this process has already is taken.
        column: of Parquet files, the column with the images: bytes, paths, or structures of both.
        every: of a video, every n-th frame.
        batch_size: most images in one run of the model.
        actors: most processes that detect; default: one for each ``cpus`` CPUs of the cluster.
        cpus: CPUs, and threads, of each of these.
        limits: bounds on files, images and runs.
        progress: called with the number of inputs that are done, and of all.
        **settings: score_threshold, iou_threshold, labels and max_detections, as for a call of `Detector`.

    Returns:
        what was done, and how fast.

    Raises:
        InputError: the data set names nothing, or an argument is invalid.
        ConfigError: the output has rows of another model or of other settings.
        SourceError: the model cannot be read, or the output cannot be written or is in use.
        BackendUnavailableError: Ray is not installed, or there is no cluster at the address.
        RunError: the model fails, or the job fails on the cluster. What was written stays.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> done = fusenms.detect_dataset(path, "bus.jpg", "found.parquet", address="local", actors=1)
        >>> done.images, done.failed
        (1, 0)
        >>> import pyarrow.parquet
        >>> pyarrow.parquet.read_table("found.parquet").column_names[:3]
        ['image', 'row', 'frame']
    """
    for name, value in (
        ("every", every),
        ("batch_size", batch_size),
        ("cpus", cpus),
        ("actors", 1 if actors is None else actors),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
    begin = time.perf_counter()
    named = [dataset] if isinstance(dataset, (str, os.PathLike)) else list(dataset)
    arguments, folder = [os.fspath(each) for each in named], os.fspath(output)
    job = Job(
        sha256="", settings=settings, column=column, every=every, batch_size=batch_size, cpus=cpus, limits=limits,
        custom_ops=current_libraries(),
    )  # fmt: skip
    import_pyarrow()
    data = _checked_model(model, job)
    job = replace(job, sha256=hashlib.sha256(data).hexdigest())
    items = items_of(arguments, column, limits)
    check_apart(items, folder)
    with Output(folder, _identity(job), limits) as out:
        found = [(item, *out.left(item)) for item in items]
        left = [(item, done) for item, count, done in found if count]
        total, waiting = sum(item.rows for item in items), sum(count for _, count, _ in found)
        writer = Writer(out, total - waiting, total, progress)
        if not left:
            return _result(folder, writer, begin, begin)
        with connected(address, len(data)) as ray:
            if progress is not None:
                progress(total - waiting, total)
            start = time.perf_counter()
            most = actors or max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
            run_job(ray, job, data, left, most, writer)
            return _result(folder, writer, begin, start)


def _checked_model(model: Any, job: Job) -> bytes:
    """The file of a model that opens here, with settings that it takes.

    Raises:
        InputError: it is no `.onnx`, or a setting is invalid.
        FusenmsError: it cannot be opened.
    """
    if not isinstance(model, (str, os.PathLike)) or Path(model).suffix.lower() != ".onnx":
        shown = printable(model) if isinstance(model, (str, os.PathLike)) else printable(type(model).__name__)
        raise InputError(f"found {shown}; expected the path of a fused .onnx, which is one file")
    with Detector(model, batch_size=job.batch_size, threads=job.cpus, limits=job.limits) as detect:
        detect.stream([], **job.settings)  # checks the settings, and runs nothing
    return read_regular(Path(model), job.limits.max_file_bytes)


def _identity(job: Job) -> dict[str, Any]:
    """What the rows of an output depend on, as values for JSON."""
    settings: dict[str, Any] = {name: value for name, value in job.settings.items() if value is not None}
    if isinstance(by_class := settings.get("score_threshold"), Mapping):
        settings["score_threshold"] = {str(label): float(value) for label, value in by_class.items()}
    if "labels" in settings:
        settings["labels"] = list(settings["labels"])
    return {"model": job.sha256, "settings": settings, "column": job.column, "every": job.every, "columns": 1}


def _result(output: str, writer: Writer, begin: float, start: float) -> DatasetRun:
    ready, end = writer.first or start, writer.last or start
    return DatasetRun(
        output=output, images=writer.images, failed=writer.failed, skipped=writer.skipped, detections=writer.detections,
        actors=len(writer.actors), nodes=len(writer.nodes), seconds=end - start, ready_seconds=ready - start, start_seconds=start - begin,
    )  # fmt: skip
