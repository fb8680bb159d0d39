"""More to time beside `fusenms.benchmark.contestants`: other runtimes, and whole calls of `Detector`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fusenms import contract
from fusenms.benchmark import WHOLE, Contestant
from fusenms.errors import InputError
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.runtime.detector import Detector
from fusenms.runtime.opening import ONNXRUNTIME, OPENVINO
from fusenms.runtime.openvino import OpenVinoRunner

CALL = "call"
"""The part of a whole call of `Detector` on an array: scaling, the run, and boxes in pixels of the image."""
RUNTIMES = (ONNXRUNTIME, OPENVINO)


def installed_runtimes() -> tuple[str, ...]:
    """Those of `RUNTIMES` that are installed."""
    return tuple(name for name in RUNTIMES if find_spec(name) is not None)


def more_contestants(
    paths: Sequence[Path], image: np.ndarray, runtimes: Collection[str], threads: int | None = None
) -> list[Contestant]:
    """List what to time besides: every model in OpenVINO, and calls of every fused model in each runtime.

    A file that a runtime does not open is timed all the same; its `fusenms.benchmark.Timing` says why there is no time.

    Args:
        image: ``[height, width, 3]`` uint8 RGB, of any size, for the calls.
        runtimes: some of `RUNTIMES`.
        threads: threads of one run; default: the runtime's choice.

    Raises:
        InputError: a runtime is unknown.
        SourceError: a file cannot be read.
    """
    if unknown := sorted(set(runtimes) - set(RUNTIMES)):
        raise InputError(f"runtime is {unknown[0]!r}; expected {' or '.join(RUNTIMES)}")
    found = []
    for path in paths:
        name = path.name if [p.name for p in paths].count(path.name) == 1 else str(path)
        if OPENVINO in runtimes:
            found.append(Contestant(f"{name} in {OPENVINO}", WHOLE, _whole(path, threads)))
        if contract.KEY_BACKEND in read_metadata(read_onnx(path)):
            for runtime in runtimes:
                shown = name if runtime == ONNXRUNTIME else f"{name} in {runtime}"
                found.append(Contestant(shown, CALL, _call(path, runtime, threads, image)))
    return found


def _whole(path: Path, threads: int | None) -> Callable[[np.ndarray], Callable[[], Any]]:
    opened = cache(lambda: OpenVinoRunner(read_onnx(path), threads=threads, source=str(path)))
    return lambda images: lambda: opened().infer(images)


def _call(
    path: Path, runtime: str, threads: int | None, image: np.ndarray
) -> Callable[[np.ndarray], Callable[[], Any]]:
    @cache
    def opened(batch: int) -> Detector:
        return Detector(path, runtime=runtime, threads=threads, batch_size=batch)

    return lambda images: lambda: opened(len(images))([image] * len(images))
