"""`Batcher`: collects jobs of many threads into batches, runs these in a thread of its own, and gives each job its own result or error."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Job:
    """What is to run.

    Attributes:
        item: what `Batcher` passes to its function.
        fits: equal for jobs that can run together; those of other values wait for another batch.
        size: number of images in it.
        future: gets the result or the error.
    """

    item: Any
    fits: Hashable
    size: int = 1
    future: Future[Any] = field(default_factory=Future)


class Batcher:
    """Runs jobs in batches.

    A batch is the oldest job, and others that fit it, up to ``batch_size`` images. It runs as soon as it is full, or ``delay`` seconds
    after the thread turned to it. Jobs that come while a batch runs wait for the next one, so with no delay a busy model has full batches
    and an idle one runs at once. A job whose future is cancelled does not run. If a batch fails, each of its jobs runs alone, so that the
    error is that of the job which caused it.
    """

    def __init__(
        self, run: Callable[[Sequence[Any]], Sequence[Any]], *, batch_size: int, delay: float = 0.0, name: str = ""
    ) -> None:
        """Start the thread.

        Args:
            run: takes the items of jobs that fit together, and returns a result for each, in order.
        """
        self._run, self._batch_size, self._delay = run, batch_size, delay
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"fusenms-batches-{name}", daemon=True)
        self._thread.start()

    def submit(self, item: Any, fits: Hashable, size: int = 1) -> Future[Any]:
        """Add a job; return the future of its result.

        Raises:
            RuntimeError: the batcher is closed.
        """
        job = Job(item, fits, size)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs = self._wanted()  # those that nobody waits for do not pile up behind a long run
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a batch."""
        with self._changed:
            return len(self._wanted())

    def close(self) -> None:
        """Take no more jobs, and end the thread once those that wait have run. Does not wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end of the thread."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._answer(running)

    def _next(self) -> list[Job]:
        """The jobs of the next batch; empty at the end."""
        with self._changed:
            until = None
            while True:
                self._jobs = self._wanted()
                batch, full = self._choose()
                now = time.monotonic()
                until = now + self._delay if batch and until is None else until
                if self._closed or full or (until is not None and now >= until and batch):
                    break
                self._changed.wait(None if until is None else max(until - now, 0.0))
            taken = set(map(id, batch))
            self._jobs = deque(job for job in self._jobs if id(job) not in taken)
        return batch

    def _wanted(self) -> deque[Job]:
        return deque(job for job in self._jobs if not job.future.cancelled())

    def _choose(self) -> tuple[list[Job], bool]:
        """The oldest job and those that fit it, and whether no more can join them."""
        batch: list[Job] = []
        images = 0
        for job in self._jobs:
            if batch and job.fits != batch[0].fits:
                continue
            if batch and images + job.size > self._batch_size:
                return batch, True
            batch.append(job)
            images += job.size
        return batch, images >= self._batch_size

    def _answer(self, batch: Sequence[Job]) -> None:
        try:
            results = self._run([job.item for job in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for job in batch:
                self._answer([job])
            return
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)
