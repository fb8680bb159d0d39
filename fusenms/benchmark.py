"""Measure models side by side in ONNX Runtime: the whole model, its tail alone, and peak memory.

A round runs each model twice in turn and times the second run, so that changes in machine speed affect all models alike.
Times are medians, with the middle half of the runs as spread. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, load_fused, refuse_frames
from fusenms.errors import InputError, SourceError, UnsupportedByBackendError, first_line
from fusenms.fusion.backends import get_backend
from fusenms.graph.custom_ops import current_libraries, custom_ops
from fusenms.graph.model import cut_before, with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import probe_image
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.onnx_reading.metadata import read_json

WHOLE, TAIL = "whole", "tail"
REST = 0.005  # seconds
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}  # glibc returns freed memory to the system


@dataclass(frozen=True)
class Timing:
    """One model at one batch size.

    Attributes:
        name: name of the file.
        part: ``whole`` (the model) or ``tail`` (the part after the head, run on the head tensors of the same image).
        batch: batch size.
        milliseconds: median time of a run.
        low, high: first and third quartile of the times, in milliseconds.
        ratio: median over the rounds of this time divided by that of the first file's whole model.
        memory_mb: peak memory of a run beyond the loaded model, in megabytes, without ONNX Runtime's arena; None if not measured.
        note: why there is no time; the times are then NaN.
    """

    name: str
    part: str
    batch: int
    milliseconds: float
    low: float
    high: float
    ratio: float
    memory_mb: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with None for NaN."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Contestant:
    """A model or tail to time. ``prepare(images)`` returns what a round calls. ``file`` and ``threads`` serve to measure memory."""

    name: str
    part: str
    prepare: Callable[[np.ndarray], Callable[[], Any]]
    file: Path | None = None
    threads: int | None = None


def contestants(paths: Sequence[Path], threads: int | None = None, *, arena: bool = True) -> list[Contestant]:
    """List what to time: every model, and the tail of every fused model.

    Args:
        threads: threads of one run; default: ONNX Runtime's choice.
        arena: let ONNX Runtime keep freed memory for reuse, as it does by default.

    Raises:
        SourceError: a file cannot be read.
        UnsupportedByBackendError: a file does not run in ONNX Runtime.
        InputError: the number of threads is not positive.
    """

    def runner(model: Any) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(model, threads=threads, arena=arena)

    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; expected a positive number")
    found = []
    for path in paths:
        name = path.name if [p.name for p in paths].count(path.name) == 1 else str(path)
        model = read_onnx(path)
        fused = load_fused(path) if contract.KEY_BACKEND in read_metadata(model) else None
        if fused is not None:
            refuse_frames(path, fused.image, "bench")
        if fused is not None and not get_backend(fused.backend).runs_on_onnxruntime:
            raise UnsupportedByBackendError(
                f"{path}: made for backend {fused.backend}, which does not run in ONNX Runtime; fuse it with backend='ort'"
            )
        whole = runner(model)
        run = lambda images, whole=whole: lambda: whole.infer(images)  # noqa: E731
        found.append(Contestant(name, WHOLE, run, path, threads))
        if fused is not None:
            tail = lambda images, fused=fused: _tail(fused, images, runner)  # noqa: E731
            found.append(Contestant(name, TAIL, tail, path, threads))
    return found


def _tail(fused: FusedModel, images: np.ndarray, runner: Callable[[Any], OnnxRuntimeRunner]) -> Callable[[], Any]:
    """Return a function that runs the part after the head on the head tensors of these images."""
    values = runner(with_outputs(fused.model, fused.layout.tensors)).infer(images)
    inputs = {name: values[name] for name in fused.layout.tensors}
    tail = runner(cut_before(fused.model, {name: value.shape[1:] for name, value in inputs.items()}))
    if fused.image.tensor in tail.inputs:
        inputs[fused.image.tensor] = images
    return lambda: tail.run(inputs)


def measure(
    entries: Sequence[Contestant],
    images: np.ndarray,
    *,
    batches: Sequence[int] = (1, 8),
    runs: int = 25,
    memory: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Timing]:
    """Time all entries in turn, at each batch size.

    Args:
        images: ``[n, 3, height, width]`` float32; repeated to fill a batch.
        runs: number of rounds.
        memory: also measure peak memory, each file in its own process (Linux).

    Raises:
        InputError: a batch size or the number of runs is not positive.
    """
    if runs < 1 or not batches or min(batches) < 1:
        raise InputError(f"runs is {runs} and batches are {list(batches)}; expected positive numbers")
    timings = []
    for batch in batches:
        filled = images[np.arange(batch) % len(images)]
        ready: dict[int, Callable[[], Any]] = {}
        notes: dict[int, str] = {}
        for i, entry in enumerate(entries):
            try:
                ready[i] = entry.prepare(filled)
                ready[i]()
            except Exception as error:  # usually a frozen batch; ONNX Runtime raises its own exception types
                ready.pop(i, None)
                notes[i] = first_line(error)
        seconds: dict[int, list[float]] = {i: [] for i in ready}
        for step in range(runs):
            if progress is not None:
                progress(f"batch {batch}", step, runs)
            for i, call in ready.items():
                time.sleep(REST)  # let the threads of the previous model come to rest
                call()  # warm the caches, for each model alike
                start = time.perf_counter()
                call()
                seconds[i].append(time.perf_counter() - start)
        timings += [
            _timing(entry, filled, seconds.get(i), seconds.get(0), notes.get(i, ""), memory)
            for i, entry in enumerate(entries)
        ]
    return timings


def _timing(
    entry: Contestant,
    images: np.ndarray,
    seconds: list[float] | None,
    first: list[float] | None,
    note: str,
    memory: bool,
) -> Timing:
    batch, nan = len(images), float("nan")
    if seconds is None:
        return Timing(entry.name, entry.part, batch, nan, nan, nan, nan, None, note)
    low, middle, high = (float(v) * 1e3 for v in np.percentile(seconds, [25, 50, 75]))
    ratio = nan if first is None else float(np.median(np.divide(seconds, first)))
    peak = None
    if memory and entry.file is not None:
        peak = peak_memory(entry.file, entry.part, batch, images, entry.threads)
    return Timing(entry.name, entry.part, batch, middle, low, high, ratio, peak)


def peak_memory(
    path: Path, part: str, batch: int, images: np.ndarray | None = None, threads: int | None = None
) -> float | None:
    """Measure the peak memory of a run beyond the loaded model and its input, in megabytes, in its own process; None except on Linux.

    Less than half a megabyte may go unnoticed, because the process may reuse memory that it has kept.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        raise InputError(
            f"there is no folder for temporary files ({error.strerror or error}); set TMPDIR, or leave the memory out (memory=False)"
        ) from error
    with temporary as folder:
        file = Path(folder) / "images.npy"
        np.save(file, probe_image(*default_shape(path)) if images is None else images)
        command = [
            sys.executable,
            "-m",
            "fusenms.benchmark",
            os.fspath(path),
            part,
            str(batch),
            str(file),
            str(threads or 0),
            *current_libraries(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    return float(json.loads(done.stdout)) if done.returncode == 0 else None


def _measure_peak(path: Path, part: str, batch: int, file: Path, threads: int) -> float:
    """Measure in this process: peak resident memory during a run minus resident memory before it, in megabytes."""
    entry = next(e for e in contestants([path], threads or None, arena=False) if e.part == part)
    images = np.load(file)
    run = entry.prepare(images[np.arange(batch) % len(images)])
    run()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0.0, (_status("VmHWM") - before) / 1e3)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def default_shape(path: Path) -> tuple[int, int]:
    """Return the height and width of a model's input. If they are open: the default size of a fused file, or 640.

    Raises:
        SourceError: the file cannot be read.
        InputError: the model does not take images.
        UnsupportedByBackendError: it takes frames.
    """
    model = read_onnx(path)
    if contract.KEY_BACKEND in read_metadata(model):
        refuse_frames(path, load_fused(path).image, "bench")
    weights = {entry.name for entry in model.graph.initializer}
    shapes = [entry.type.tensor_type.shape.dim for entry in model.graph.input if entry.name not in weights]
    if not shapes or len(shapes[0]) != 4:
        raise InputError(f"{path}: does not take a batch of images [batch, 3, height, width]")
    try:
        usual = read_json(read_metadata(model).get(contract.KEY_IMAGE, "{}"))
        height, width = int(usual.get("height", 640)), int(usual.get("width", 640))
    except (AttributeError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: its metadata is damaged ({first_line(error)}); fuse the model again") from error
    return shapes[0][2].dim_value or height, shapes[0][3].dim_value or width


if __name__ == "__main__":
    path, part, batch, file, threads, *libraries = sys.argv[1:]
    with custom_ops(*libraries):
        print(json.dumps(_measure_peak(Path(path), part, int(batch), Path(file), int(threads))))
