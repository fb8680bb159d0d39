"""The models of a server: open files that are looked after, and replaced when their files are."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fusenms.errors import ConfigError, FusenmsError, RunError, SourceError, first_line
from fusenms.graph.custom_ops import current_libraries
from fusenms.limits import Limits
from fusenms.runtime.detections import Detections
from fusenms.runtime.detector import Detector, file_stamp
from fusenms.safety.text import printable
from fusenms.serving.opened import Opened
from fusenms.serving.protocol import check_outputs, make_response, model_config, model_metadata, parse_request
from fusenms.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fusenms.serving.metrics import Metrics

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class OverloadedError(Exception):
    """The queue of a model is full."""


class Model:
    """A model of a server, by its name.

    Attributes:
        name: the name of its file up to the first dot.
        problem: why a file that replaced the one that is served was refused; empty: it was not.
    """

    def __init__(
        self,
        path: Path,
        settings: ServeSettings,
        limits: Limits,
        metrics: Metrics,
        pool: ThreadPoolExecutor,
        libraries: Sequence[str] = (),
    ) -> None:
        self.name, self.problem = name_of(path), ""
        self._path, self._pool, self._metrics = path.absolute(), pool, metrics
        self._max_queue = settings.max_queue
        self._lock, self._images = threading.Lock(), 0
        self._parsing = asyncio.Semaphore(1)
        self._open: Callable[[], Opened] = partial(Opened, self.name, self._path, settings, limits, metrics, libraries)
        self._tried = self._seen = file_stamp(self._path)
        self._opened = self._open()
        metrics.watch_queue(self.name, lambda: self.queued)

    @property
    def queued(self) -> int:
        """Number of images that wait or run."""
        return self._images

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a run."""
        return self._opened.waiting

    @property
    def full(self) -> bool:
        """Whether no more images are taken."""
        return self._images >= self._max_queue

    @contextmanager
    def _admitted(self, images: int) -> Iterator[None]:
        """Take images into the queue.

        Raises:
            OverloadedError: it is full.
        """
        with self._lock:
            if self._images + images > self._max_queue:
                raise OverloadedError
            self._images += images
        try:
            yield
        finally:
            with self._lock:
                self._images -= images

    @contextmanager
    def _used(self) -> Iterator[Opened]:
        """The open file, which stays open until the end. Errors are for clients: without the path of the file, and what the file itself
        did is in the log."""
        with self._lock:
            opened = self._opened
            opened.use(1)
        try:
            yield opened
            return
        except RunError as error:
            _LOG.error("%s", error)
            told: FusenmsError = RunError(f"{printable(self.name)}: the model fails; the log of the server says why")
        except FusenmsError as error:
            told = type(error)(str(error).replace(printable(self._path), printable(self.name)))
        finally:
            opened.use(-1)
        raise told  # a new one: the other's traceback holds the body

    @property
    def detector(self) -> Detector:
        """The detector of the file that is served now."""
        return self._opened.detector

    async def detect(self, body: bytes, settings: Mapping[str, Any]) -> bytes:
        """Detect objects in an image file, and return the JSON of the answer.

        Raises:
            OverloadedError: the queue is full.
            InputError: it is not an image, or a setting is none of this file.
            RunError: the model fails.
        """
        with self._admitted(1), self._used() as opened:
            prepare = partial(opened.detector.prepare, body, **settings)
            found = await opened.run(await self._in_pool(prepare))
            return await self._in_pool(self._written, found)

    async def _in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do work in another thread. If the request is cancelled, its end is awaited, so that what it holds in memory stays counted."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # nobody else asks for it
            raise

    def _written(self, found: Detections) -> bytes:
        place = found.masks.place
        answer = {
            "model": self.name,
            "height": place.height,
            "width": place.width,
            "detections": found.to_dicts(),
            "converged": found.converged,
        }
        return json.dumps(answer, allow_nan=False).encode()

    async def infer(self, body: bytes, header_length: str | None) -> tuple[bytes, int | None]:
        """Run on the tensors of a request of v2, and return the body of the answer and the length of its JSON, if bytes follow.

        Raises:
            OverloadedError: the queue is full.
            InputError: it is no such request, or its tensors are not those of the file.
            RunError: the model fails.
        """
        with self._admitted(1), self._used() as opened:
            detector = opened.detector
            async with self._parsing:  # one at a time: JSON stops all threads, and takes many times its size of memory
                request = await self._in_pool(parse_request, body, header_length, detector.inputs)
            check_outputs(request, detector.outputs)
            detector.check_tensors(request.tensors)
            with self._admitted(len(request.tensors[detector.inputs[0].name]) - 1):
                outputs = await opened.run_tensors(request.tensors)
            return await self._in_pool(make_response, self.name, request, outputs)

    async def metadata(self) -> dict[str, Any]:
        detector = self.detector
        return model_metadata(self.name, detector.runtime, detector.inputs, detector.outputs)

    async def config(self) -> dict[str, Any]:
        detector = self.detector
        return model_config(self.name, detector.runtime, detector.batch_size, detector.inputs, detector.outputs)

    def look(self) -> None:
        """Look whether the file was replaced; if so, and if it no longer changes, open the new one beside the old one, and swap them."""
        now = file_stamp(self._path)
        if now == self._tried or now != self._seen:
            self._seen = now
            return
        self._tried = now
        try:
            opened = self._open()
        except Exception as error:  # whatever is wrong with the new file, the older one goes on
            self.problem = first_line(error)
            self._metrics.reloads.labels(self.name, "refused").inc()
            self._metrics.refused.labels(self.name).set(1)
            _LOG.error("the file of %s was replaced by one that is refused; the older one is served (%s)",
                       printable(self.name), self.problem)  # fmt: skip
            return
        with self._lock:
            old, self._opened, self.problem = self._opened, opened, ""
        old.retire()
        self._metrics.reloads.labels(self.name, "opened").inc()
        self._metrics.refused.labels(self.name).set(0)
        _LOG.warning("the file of %s was replaced; the new one is served", printable(self.name))

    def close(self) -> None:
        self._opened.retire()


class Models(Mapping[str, Model]):
    """The models of a server by name. They are looked after in a thread until they are closed."""

    def __init__(
        self, files: Sequence[str | os.PathLike[str]], settings: ServeSettings, limits: Limits, metrics: Metrics
    ) -> None:
        """Open the files, side by side.

        Raises:
            ConfigError: there is no file, or two have one name.
            FusenmsError: a file cannot be opened, or does not run.
        """
        names = checked_names(files)
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="fusenms-images")
        self._stop = threading.Event()
        self._models: dict[str, Model] = {}
        libraries = current_libraries()  # of this thread
        opening = [
            self._pool.submit(Model, path, settings, limits, metrics, self._pool, libraries) for path in names.values()
        ]
        try:
            self._models = {name: future.result() for name, future in zip(names, opening, strict=True)}
        except BaseException:
            for future in opening:
                if not future.cancel() and future.exception() is None:
                    future.result().close()
            self._pool.shutdown()
            raise
        if settings.watch:
            threading.Thread(target=self._watch, args=(settings.watch,), name="fusenms-watch", daemon=True).start()

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def _watch(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            for model in self._models.values():
                model.look()

    @property
    def closed(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        """Close the files, once what runs has ended."""
        self._stop.set()
        for model in self._models.values():
            model.close()
        self._pool.shutdown(wait=False)


def checked_names(files: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Name of a model to its file.

    Raises:
        ConfigError: there is no file, a name is empty, or two files have one name.
        SourceError: a file is no path.
    """
    if isinstance(files, (str, os.PathLike)) or not files:
        raise ConfigError(f"files is {printable(repr(files))[:200]}; expected a list of at least one fused file")
    found: dict[str, Path] = {}
    for file in files:
        if not isinstance(file, (str, os.PathLike)):
            raise SourceError(f"found a {type(file).__name__}; expected the path of a fused file")
        path = Path(file)
        name = name_of(path)
        if not name:
            raise ConfigError(f"{printable(path)}: has no name before its first dot; rename it, as in yolov8n.ort.onnx")
        if name in found:
            raise ConfigError(
                f"{printable(found[name])} and {printable(path)} would both be served as {printable(name)}, the name up to the first dot; "
                "rename one of them"
            )
        found[name] = path
    return found


def name_of(path: Path) -> str:
    """Name of the model of a file: that of the file up to the first dot."""
    return path.name.split(".")[0]
