"""`Opened`: a file that is open, with the batches of its requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms.limits import Limits
from fusenms.runtime.detections import Detections
from fusenms.runtime.detector import Detector, Prepared
from fusenms.serving.batching import Batcher
from fusenms.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fusenms.serving.metrics import Metrics


class Opened:
    """A file that is open, with its batches. Closed once it was retired and nobody uses it."""

    def __init__(
        self, name: str, path: Path, settings: ServeSettings, limits: Limits, metrics: Metrics, libraries: Sequence[str]
    ) -> None:
        """Open a file, and run it once.

        Args:
            libraries: paths of ONNX Runtime custom-op libraries.

        Raises:
            FusenmsError: it cannot be opened, or does not run.
        """
        self.detector = Detector(
            path, runtime=settings.runtime, device=settings.device, threads=settings.threads, batch_size=settings.batch_size,
            limits=limits, custom_ops=libraries,
        )  # fmt: skip
        self.detector.warm_up(1)
        self._name, self._metrics = name, metrics
        self._batcher = Batcher(
            self._run, batch_size=self.detector.batch_size, delay=settings.batch_delay / 1000, name=name
        )
        self._lock, self._users, self._retired = threading.Lock(), 0, False

    def use(self, users: int) -> None:
        """Count who uses it: 1 more, or -1. While it is used, it stays open."""
        with self._lock:
            self._users += users
            self._close_if_done()

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        with self._lock:
            self._retired = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._users:
            self._batcher.close()
            self.detector.close()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a run."""
        return self._batcher.waiting

    async def run(self, prepared: Prepared) -> Detections:
        return await asyncio.wrap_future(self._batcher.submit(prepared, prepared.fits))

    async def run_tensors(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = self.detector.inputs[0].name
        fed = tuple((name, value.tobytes()) for name, value in sorted(tensors.items()) if name != first)
        images = tensors[first]
        fits = (images.dtype, images.shape[1:], fed)
        return await asyncio.wrap_future(self._batcher.submit(tensors, fits, len(images)))

    def _run(self, items: Sequence[Any]) -> Sequence[Any]:
        """Run a batch: prepared images, or tensors."""
        start = time.perf_counter()
        if isinstance(items[0], Prepared):
            count, results = len(items), self.detector.run(items)
        else:
            count, results = self._run_joined(items)
        self._metrics.run.labels(self._name).observe(time.perf_counter() - start)
        self._metrics.batch.labels(self._name).observe(count)
        self._metrics.images.labels(self._name).inc(count)
        return results

    def _run_joined(self, items: Sequence[dict[str, np.ndarray]]) -> tuple[int, list[Any]]:
        first = self.detector.inputs[0].name
        images = items[0][first] if len(items) == 1 else np.concatenate([item[first] for item in items])
        outputs = self.detector.run_tensors(items[0] | {first: images})
        ends = np.cumsum([len(item[first]) for item in items])
        starts = [0, *ends[:-1]]
        return len(images), [
            {name: value[start:end] for name, value in outputs.items()} for start, end in zip(starts, ends, strict=True)
        ]
