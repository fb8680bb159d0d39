"""Measure models side by side in ONNX Runtime: whole, tail alone, peak memory.

Runs are interleaved (each in turn, twice, and the second time counts), so that a machine whose speed drifts treats all
alike; quoted are medians, with the middle half of the runs as spread, and the median of the ratios within a round.
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
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.errors import InputError, SourceError, UnsupportedByBackendError, first_line
from fusenms.fusion.backends import get_backend
from fusenms.graph.model import cut_before, with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import probe_image
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.onnx_reading.metadata import read_json

WHOLE, TAIL = "whole", "tail"
REST = 0.005  # seconds
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # glibc: freed memory leaves the process


@dataclass(frozen=True)
class Timing:
    """One model at one batch size.

    Attributes:
        name: of the file.
        part: ``whole`` model, or its ``tail`` alone (on the head tensors of the same image).
        batch: batch size.
        milliseconds: median of the runs.
        low, high: the middle half of the runs.
        ratio: median over the rounds of this time to that of the first file's whole model.
        memory_mb: peak of what a run needs beyond the loaded model, without ONNX Runtime's arena; None where not measured.
        note: why there is no time, where there is none (then it is NaN).
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
        """Plain values; NaN as None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Contestant:
    """Something to time: ``prepare(images)`` makes what a round calls. ``file`` and ``threads`` are for measuring its memory."""

    name: str
    part: str
    prepare: Callable[[np.ndarray], Callable[[], Any]]
    file: Path | None = None
    threads: int | None = None


def contestants(paths: Sequence[Path], threads: int | None = None, *, arena: bool = True) -> list[Contestant]:
    """Whole models, and the tails of the fused ones.

    Args:
        threads: of one run; default: ONNX Runtime's choice.
        arena: let ONNX Runtime keep freed memory for itself, as it does by default.

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
    """The part behind the head, on the head tensors of these images."""
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
    """Time contestants in turn, at each batch size.

    Args:
        images: ``[n, 3, height, width]`` float32; repeated to fill a batch.
        runs: rounds.
        memory: measure peak memory too, each file in a process of its own (Linux).

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
            except Exception as error:  # a frozen batch, mostly; ONNX Runtime raises its own kinds
                ready.pop(i, None)
                notes[i] = first_line(error)
        seconds: dict[int, list[float]] = {i: [] for i in ready}
        for step in range(runs):
            if progress is not None:
                progress(f"batch {batch}", step, runs)
            for i, call in ready.items():
                time.sleep(REST)  # the threads of the one before come to rest
                call()  # and the caches are one's own again, for each alike
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
    """Megabytes that a run needs at its peak beyond the loaded model and its input, measured in a process of its own; None off Linux.

    What it needs less than half a megabyte of may be hidden in memory that the process has kept.
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
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    return float(json.loads(done.stdout)) if done.returncode == 0 else None


def _measure_peak(path: Path, part: str, batch: int, file: Path, threads: int) -> float:
    """In a process of its own: highest resident memory during a run, less that before it."""
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
    """Height and width that a model takes; where they are open, those that a fused file names as usual, or 640.

    Raises:
        SourceError: the file cannot be read.
        InputError: it does not take images.
    """
    model = read_onnx(path)
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
    path, part, batch, file, threads = sys.argv[1:]
    print(json.dumps(_measure_peak(Path(path), part, int(batch), Path(file), int(threads))))
