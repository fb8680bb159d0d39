"""`Detector`: runs a fused model on images."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms import contract
from fusenms.artifacts.frames import CHANNELS, NV12, Frames
from fusenms.artifacts.fused import FusedModel
from fusenms.errors import InputError, RunError, SourceError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.ahead import work_ahead
from fusenms.runtime.call import Call, CallFields, checked_call
from fusenms.runtime.detections import Detections
from fusenms.runtime.images import is_single, nv12_frame, open_image, red_first, to_nv12
from fusenms.runtime.opening import FOLDERS, Runner, Wanted, folder_runtime, open_model
from fusenms.runtime.placement import Placement, letterbox, rectangle, stretched, to_tensor
from fusenms.runtime.results import Placed, Results
from fusenms.runtime.tensors import check_tensors, inputs_of, outputs_of
from fusenms.safety.files import sha256
from fusenms.safety.text import printable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusenms.graph.session import Provider

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the model takes it, and the settings of its call: what `Detector.prepare` gives and `Detector.run` takes.

    Attributes:
        fits: equal for images that can run in one batch.
    """

    placed: Placed
    call: Call
    fits: Hashable


class Detector:
    """A fused model that is open in a runtime. Calling and closing it are thread-safe.

    with Detector("yolov8n.ort.onnx") as detect:
        for found in detect(["a.jpg", "b.jpg"]):
            print(found.boxes, found.scores, found.labels)

    A pickled detector holds the absolute path of its file, the SHA-256 of the file, and the settings. Unpickling opens the file again, and
    raises `SourceError` if the file is missing or has changed. A copy (`copy.copy`, `copy.deepcopy`) shares the open model, and is closed
    separately. After a fork, open the file again in the child process, because the threads of the runtime remain in the parent. In ONNX
    Runtime with ``threads=1`` this is not necessary. In asyncio, run a call in a thread: ``await asyncio.to_thread(detect, image)``.

    Attributes:
        class_names: names of the classes.
        runtime: name of the runtime that the model is open in.
        limits: bounds on the file, on the images, and on the time of each run.
        batch_size: maximum number of images in one run, as the file allows it.
        inputs, outputs: the tensors of the file, as `run_tensors` takes and returns them; that of the images is the first input.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt").save("yolov8n.ort.onnx")
        >>> with fusenms.Detector(path) as detect:
        ...     found = detect("bus.jpg")[0]
        ...     sure = detect("bus.jpg", score_threshold=0.6, labels=[0])[0]
        >>> found.boxes.shape[1], found.boxes.dtype
        (4, dtype('float32'))
        >>> len(sure) <= len(found)
        True
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | FusedModel,
        *,
        runtime: str = "auto",
        device: str = "cpu",
        channels: str = "rgb",
        size: int | tuple[int, int] | None = None,
        providers: Sequence[Provider] | None = None,
        session_options: Any = None,
        batch_size: int = 8,
        threads: int | None = None,
        custom_ops: Sequence[str | os.PathLike[str]] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Open a fused model.

        Args:
            model: path of a fused `.onnx`, of a folder that `fusenms.deploy` wrote, or of an engine with its sidecar; or a model that
                `fusenms.fuse` or `fusenms.load_fused` returned.
            runtime: ``onnxruntime``, ``openvino``, ``ncnn``, ``tensorrt`` or ``tensorrt-rtx``. ``auto`` is the one that the file is made
                for; ONNX Runtime for an `.onnx`.
            device: ``cpu`` or ``cuda`` (``cuda:1``) in ONNX Runtime; ``cpu``, ``gpu``, ``npu`` or ``auto`` in OpenVINO.
            channels: order of the channels of arrays, ``rgb`` or ``bgr`` (as OpenCV reads them). Files and PIL images know theirs.
                ``nv12``, for a file that takes NV12 frames: arrays are such frames, ``[height * 3 / 2, width]`` uint8.
            size: of a model with a dynamic size: the longer side of its input, or height and width; default: that of the file. With
                a number or None, the input is only as large as the image needs, in whole strides; with two, it is that size always.
            providers: ONNX Runtime execution providers, in order of preference, each a name or a name with options; instead of ``device``.
            session_options: an `onnxruntime.SessionOptions` to open the model with.
            batch_size: maximum number of images in one run. It is 1 for models in which the images of a batch affect each other, and at
                most the largest batch of an engine. A model with a fixed batch always runs on that many; copies of the last image fill up
                the batch.
            threads: number of threads of one run; default: chosen by the runtime.
            custom_ops: paths of ONNX Runtime custom-op libraries, as for `fusenms.custom_ops`. A library is code: name only your own.
            limits: bounds on the file, on the images, and on the time of each run (but for engines).

        Raises:
            ConfigError: a custom-op library cannot be used.
            UnsupportedOperatorError: nothing here runs an operator of the model.
            SourceError: the file cannot be read, or is not a fused model.
            UnsupportedByBackendError: its backend does not run in that runtime.
            BackendUnavailableError: the runtime, a provider or a device is missing.
            InputError: an argument is invalid.
        """
        if providers is not None and (isinstance(providers, str) or not all(map(_is_provider, providers))):
            raise InputError(
                f"providers is {providers!r}; expected a list of names, as ['CPUExecutionProvider'], or of names with options"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        if isinstance(custom_ops, (str, os.PathLike)):
            raise InputError(f"custom_ops is {custom_ops!r}; expected a list of paths, as ['libfold.so']")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; expected a whole number of at least 1, or None")
        if not isinstance(model, (str, os.PathLike, FusedModel)):
            raise InputError(
                f"found a {printable(type(model).__name__)}; expected the path of a fused file, or a FusedModel"
            )
        if channels not in CHANNELS:
            raise InputError(f"channels is {channels!r}; expected one of {', '.join(map(repr, CHANNELS))}")
        self._settings: dict[str, Any] = {
            "runtime": runtime, "device": device, "channels": channels, "size": size, "session_options": session_options,
            "providers": None if providers is None else tuple(providers), "batch_size": batch_size, "threads": threads, "limits": limits,
            "custom_ops": tuple(map(os.path.abspath, custom_ops)),
        }  # fmt: skip
        self._path, self._stamp = (
            ("", None) if isinstance(model, FusedModel) else (os.path.abspath(model), file_stamp(model))
        )
        wanted = Wanted(
            runtime=runtime, device=device, providers=providers, session_options=session_options, threads=threads, custom_ops=custom_ops
        )  # fmt: skip
        opened = open_model(model, wanted, limits)
        fused = opened.fused
        self.runtime, self.limits, self.class_names = opened.runtime, limits, fused.class_names
        self._source = self._path or fused.source
        self._image, self._config = fused.image, fused.config
        self._results = Results.of(fused, self._source)
        self.inputs, self.outputs = inputs_of(fused), outputs_of(fused)
        self._layout = fused.layout
        self._size, self._fixed = _size(size, fused)
        least, most = opened.batches or (1, batch_size)
        self._least = fused.image.batch or least
        self.batch_size = (fused.image.batch or min(batch_size, most)) if fused.image.independent else 1
        self._frames, self._channels = fused.image.frames, channels
        if channels == NV12 and (self._frames is None or self._frames.channels != NV12):
            raise InputError(
                "channels is 'nv12', but the file takes no NV12 frames; fuse the weights with frame_channels='nv12'"
            )
        self._process = None if threads == 1 and opened.runtime == "onnxruntime" else os.getpid()
        self._runner: Runner | None = opened.runner

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, once the runs of other threads have ended. Later calls raise `InputError`."""
        self._runner = None  # each run has its own reference to the model

    def __copy__(self) -> Detector:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Detector:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path.

        Raises:
            InputError: the detector is closed, or has no file, or has options of ONNX Runtime that cannot be pickled.
            SourceError: the file is missing, or has changed since it was opened.
        """
        if self._runner is None:
            raise InputError("the detector is closed, so it cannot be pickled; open the file again")
        if not self._path:
            raise InputError(
                "the detector was opened from a model in memory, so it cannot be pickled; save the model, and open its file"
            )
        if self._settings["session_options"] is not None:
            raise InputError(
                "the detector has session_options, which cannot be pickled; open the file again in the other process"
            )
        if self._stamp is None or file_stamp(self._path) != self._stamp:
            raise SourceError(
                f"{printable(self._path)}: is missing or has changed since it was opened, so its detector cannot be pickled; open it again"
            )
        return _reopen, (self._path, _sha256(self._path, self.limits), self._settings)

    def __call__(self, images: Any, **settings: Unpack[CallFields]) -> list[Detections]:
        """Detect objects in images.

        Args:
            images: one image or several. An image is a path, the contents of an image file (bytes), an array ``[height, width, 3]`` uint8
                (gray or with opacity too; RGB unless ``channels`` says BGR) or a PIL image. An array ``[B, height, width, 3]`` is several.
            score_threshold: keep scores above this: a number, or numbers by class; at least that of the file, unless it was fused with
                ``runtime_thresholds``.
            iou_threshold: suppress above this, if the file was fused with ``runtime_thresholds``.
            labels: keep these classes only, by number or name. They are chosen from what the model finds, after its suppression; with
                ``runtime_thresholds``, the model runs as if it did not know the others.
            max_detections: keep the best of each image, at most as many as the file has rows.

        Returns:
            one `Detections` for each image, in order.

        Raises:
            InputError: an image is invalid or exceeds the limits, there is not enough memory, a setting asks for what the file does not
                give, or the detector is closed.
            RunError: the model fails, takes too long, or returns outputs that violate its contract.
        """
        self._open_runner()  # fail before an image is read
        call = self._call(settings)
        single = is_single(images)
        if not single and not isinstance(images, Iterable):
            raise InputError(
                f"found {printable(type(images).__name__)}; expected an image (a path, bytes, an array or a PIL image), or several"
            )
        sources: Iterable[Any] = [images] if single else images
        found: dict[int, Detections] = {}
        waiting: dict[tuple[int, ...], list[tuple[int, Placed]]] = {}
        for number, source in enumerate(sources):
            placed = self._place(source)
            batch = waiting.setdefault(placed[0].shape, [])
            batch.append((number, placed))
            if len(batch) == self.batch_size:
                found |= self._run(waiting.pop(placed[0].shape), call)
        for batch in waiting.values():
            found |= self._run(batch, call)
        return [found[number] for number in range(len(found))]

    def stream(
        self,
        images: Iterable[Any],
        *,
        batch_size: int | None = None,
        prefetch: int = 2,
        readers: int = 2,
        **settings: Unpack[CallFields],
    ) -> Iterator[Detections | InputError]:
        """Detect objects in the images of an iterable, without end if need be. The next images are read while the model runs.

        Args:
            images: as for a call. It is iterated in other threads, one item at a time.
            batch_size: number of images in one run; default: that of the detector. 1 gives each result as soon as possible.
            prefetch: number of batches that are read ahead. So many, and one more, are in memory.
            readers: number of threads that read and scale images.
            **settings: as for a call.

        Yields:
            for each image, in order, its `Detections`; for one that cannot be read, the `InputError` that says why.

        Raises:
            InputError: an argument is invalid, or the detector is closed.
            RunError: the model fails.

        Example:
            >>> import fusenms
            >>> path = fusenms.fuse("yolov8n.pt", size=64).save("small.ort.onnx")
            >>> with fusenms.Detector(path) as detect:
            ...     for found in detect.stream(["bus.jpg", "missing.jpg"]):
            ...         print(type(found).__name__)
            Detections
            InputError
        """
        for name, value in (
            ("prefetch", prefetch),
            ("readers", readers),
            ("batch_size", batch_size or self.batch_size),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a whole number of at least 1")
        if is_single(images) or not isinstance(images, Iterable):
            raise InputError(f"found one {printable(type(images).__name__)}; expected an iterable of images")
        self._open_runner()
        size = min(batch_size or self.batch_size, self.batch_size)
        return self._streamed(images, size, prefetch, readers, self._call(settings))

    def _streamed(
        self, images: Iterable[Any], size: int, prefetch: int, readers: int, call: Call
    ) -> Iterator[Detections | InputError]:
        some: list[Placed | InputError] = []
        try:
            for placed in work_ahead(images, self._placed_or_error, prefetch * size, readers):
                some.append(placed)
                if len(some) == size:
                    full, some = some, []
                    yield from self._run_some(full, call)
        except Exception:  # of the user's own iterable: what came before it is not lost
            yield from self._run_some(some, call)
            raise
        yield from self._run_some(some, call)

    def _placed_or_error(self, source: Any) -> Placed | InputError:
        try:
            return self._place(source)
        except InputError as error:
            return error

    def _run_some(self, some: list[Placed | InputError], call: Call) -> Iterator[Detections | InputError]:
        """Results of images of any sizes, in order, errors in their places."""
        batches: dict[tuple[int, ...], list[tuple[int, Placed]]] = {}
        for number, placed in enumerate(some):
            if not isinstance(placed, InputError):
                batches.setdefault(placed[0].shape, []).append((number, placed))
        found: dict[int, Detections] = {}
        for batch in batches.values():
            found |= self._run(batch, call)
        for number, placed in enumerate(some):
            yield placed if isinstance(placed, InputError) else found[number]

    def prepare(self, image: Any, **settings: Unpack[CallFields]) -> Prepared:
        """Read an image, scale it to the model's input, and check the settings of its call: what a call does before the model runs.

        So a service reads images in some threads and runs batches in another one. Arguments and errors are those of a call.

        Example:
            >>> import fusenms
            >>> path = fusenms.fuse("yolov8n.pt", size=64).save("small.ort.onnx")
            >>> with fusenms.Detector(path) as detect:
            ...     some = [detect.prepare("bus.jpg"), detect.prepare("bus.jpg", score_threshold=0.6)]
            ...     found = detect.run(some) if some[0].fits == some[1].fits else []
            >>> len(found)
            2
        """
        call = self._call(settings)
        placed = self._place(image)
        fed = tuple((name, value.tobytes()) for name, value in sorted(call.inputs.items()))
        return Prepared(placed, call, (placed[0].shape, fed))

    def run(self, prepared: Sequence[Prepared]) -> list[Detections]:
        """Run the model once on images that `prepare` gave.

        Args:
            prepared: 1 to `batch_size` images with equal ``fits``.

        Returns:
            one `Detections` for each, in order.

        Raises:
            InputError: there are too many or they do not fit together, there is not enough memory, or the detector is closed.
            RunError: the model fails, takes too long, or returns outputs that violate its contract.
        """
        if not 1 <= len(prepared) <= self.batch_size or len({each.fits for each in prepared}) > 1:
            raise InputError(
                f"found {len(prepared)} prepared images; expected 1 to {self.batch_size} (batch_size), all with equal fits"
            )
        return self._guarded([each.placed for each in prepared], [each.call for each in prepared])

    def run_tensors(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once on tensors as the file takes them, and return its outputs as they are.

        Args:
            tensors: by name, as `inputs` has them: of 1 to `batch_size` images.

        Returns:
            the tensors of `outputs`, by name.

        Raises:
            InputError: a tensor is missing, unknown, or of another type or shape; there is not enough memory, or the detector is closed.
            RunError: the model fails, takes too long, or returns outputs of another batch.

        Example:
            >>> import fusenms, numpy as np
            >>> path = fusenms.fuse("yolov8n.pt", size=64).save("small.ort.onnx")
            >>> with fusenms.Detector(path) as detect:
            ...     print(detect.inputs[0])
            ...     detect.run_tensors({"images": np.zeros((2, 3, 64, 64), np.float32)})["boxes"].shape
            images float32[-1, 3, 64, 64]
            (2, 300, 4)
        """
        runner = self._open_runner()
        self.check_tensors(tensors)
        name = self.inputs[0].name
        images = tensors[name]
        count = len(images)
        if count < self._least:
            images = np.concatenate((images, np.repeat(images[-1:], self._least - count, 0)))
        more = {key: np.ascontiguousarray(value) for key, value in tensors.items() if key != name}
        try:
            outputs = runner.infer(np.ascontiguousarray(images), more)
        except MemoryError as error:
            raise InputError(f"not enough memory for {count} images at once; expected a smaller batch") from error
        if wrong := [key for key, value in outputs.items() if value.ndim < 1 or len(value) != len(images)]:
            raise RunError(
                f"{self._source}: gives {wrong[0]} {list(outputs[wrong[0]].shape)}; expected a batch of {len(images)}"
            )
        return {key: value[:count] for key, value in outputs.items()}

    def check_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Check tensors as `run_tensors` does.

        Raises:
            InputError: a tensor is missing, unknown, or of another type or shape.
        """
        check_tensors(tensors, self.inputs, self._image.stride, self.limits)
        count = len(tensors[self.inputs[0].name])
        if count > self.batch_size:
            raise InputError(f"found a batch of {count}; expected at most {self.batch_size} (batch_size)")

    def warm_up(self, batch_size: int | None = None) -> None:
        """Run once on a gray image, so that the first image does not wait for what the runtime does on its first run.

        Args:
            batch_size: number of images; default: that of the detector.
        """
        count = min(batch_size or self.batch_size, self.batch_size)
        shape = (*self._size, 3)
        if self._frames is not None and self._channels == NV12:
            shape = self._frames.shape(*self._size)
        gray = np.full(shape, 114, np.uint8)
        self([gray] * count)

    def _call(self, settings: CallFields) -> Call:
        return checked_call(self._layout, self._config, self.class_names, **settings)

    def _place(self, source: Any) -> Placed:
        """Read an image and scale it to the model's input. Channels are put in order afterwards, when the image is small."""
        if self._frames is not None and self._channels == NV12 and isinstance(source, np.ndarray):
            frame = nv12_frame(source)
            return self._checked_size(frame, self._frames, len(frame) * 2 // 3, frame.shape[1])
        image, reversed_ = open_image(source, self.limits, self._channels)
        if self._frames is not None:
            return self._frame(image, reversed_, self._frames)
        height, width = self._size
        if not self._fixed:
            height, width = rectangle(image, height, width, self._image.stride)
        fit = stretched if self._image.stretch else letterbox
        try:
            canvas, place = fit(image, height, width)
        except MemoryError as error:
            raise InputError("not enough memory for the image; expected a smaller one") from error
        return (red_first(canvas) if reversed_ else canvas), place

    def _frame(self, image: np.ndarray, reversed_: bool, frames: Frames) -> Placed:
        """An image as the frame that the model takes. Its results are in pixels of the image already."""
        height, width = image.shape[:2]
        if frames.channels == NV12:
            return self._checked_size(to_nv12(image, reversed_), frames, height, width)
        frame = image if reversed_ == (frames.channels == "bgr") else red_first(image)
        return self._checked_size(frame, frames, height, width)

    def _checked_size(self, frame: np.ndarray, frames: Frames, height: int, width: int) -> Placed:
        if frames.size not in (None, (height, width)):
            raise InputError(
                f"found an image of {height}x{width} (height x width); {printable(self._source)} takes {frames} only: scale the image, or "
                "fuse the weights with frames='dynamic'"
            )
        return frame, Placement(height, width, 0, 0, height, width)

    def _open_runner(self) -> Runner:
        runner = self._runner
        if runner is None:
            raise InputError("the detector is closed; open the file again")
        if self._process not in (None, os.getpid()):
            raise InputError(
                "the detector was opened before this process was forked, and the threads of its runtime remain in the parent; open the "
                "file again in this process, or in ONNX Runtime with threads=1"
            )
        return runner

    def _run(self, batch: list[tuple[int, Placed]], call: Call) -> dict[int, Detections]:
        """Results of numbered images of one size, by number."""
        found = self._guarded([placed for _, placed in batch], [call] * len(batch))
        return dict(zip((number for number, _ in batch), found, strict=True))

    def _guarded(self, batch: list[Placed], calls: list[Call]) -> list[Detections]:
        runner = self._open_runner()
        try:
            return self._infer(runner, batch, calls)
        except MemoryError as error:
            raise InputError(
                f"not enough memory for {len(batch)} images at once; expected a smaller batch_size"
            ) from error

    def _infer(self, runner: Runner, batch: list[Placed], calls: list[Call]) -> list[Detections]:
        """Results of images of one size, whose calls feed the graph the same."""
        canvases = [canvas for canvas, _ in batch]
        filled = canvases + canvases[-1:] * (self._least - len(canvases))
        tensor = to_tensor(filled) if self._frames is None else np.stack(filled)
        outputs = runner.infer(tensor, calls[0].inputs)
        self._results.check(outputs, len(filled))
        outputs = {name: value[: len(canvases)] for name, value in outputs.items()}
        counts = outputs[self._results.names[0]]
        converged = outputs.get(contract.CONVERGED, np.ones_like(counts))[:, 0].astype(bool)
        if not converged.all():
            _LOG.warning(
                "%d of %d images need more suppression rounds than the model has, so boxes may be wrong; fuse it with more rounds",
                (~converged).sum(), len(converged),
            )  # fmt: skip
        return [
            self._results.found(
                {name: value[i] for name, value in outputs.items()}, int(counts[i, 0]), placed, bool(converged[i]), call
            )
            for i, (placed, call) in enumerate(zip(batch, calls, strict=True))
        ]


def _is_provider(value: Any) -> bool:
    """Whether a value is an execution provider: a name, or a name with options."""
    pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
    return isinstance(value[0] if pair else value, str)


def _size(size: Any, fused: FusedModel) -> tuple[tuple[int, int], bool]:
    """Height and width of the input, and whether every input has that size.

    Raises:
        InputError: the model does not take images of that size.
    """
    image = fused.image
    if image.frames is not None:
        if size is not None:
            raise InputError(
                f"size is {size!r}, but the model takes {image.frames}, and scales them itself; leave it out"
            )
        return image.frames.size or (image.height, image.width), True
    if size is None:
        return (image.height, image.width), not image.dynamic_size or image.stretch
    sides = size if isinstance(size, tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 and side % image.stride == 0 for side in sides):
        raise InputError(f"size is {size!r}; expected a multiple of {image.stride}, or two as (height, width)")
    if not image.dynamic_size and sides != (image.height, image.width):
        raise InputError(
            f"size is {size!r}, but the model takes {image.height}x{image.width} only; fuse the weights again with dynamic_size=True"
        )
    return sides, isinstance(size, tuple) or not image.dynamic_size or image.stretch


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Identity, size and time of a file, which show whether it was replaced or changed. None if there is no file."""
    try:
        status = os.stat(_checked(path))
    except (OSError, ValueError, TypeError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(path: str | os.PathLike[str]) -> str:
    """The file itself, or that of a folder which holds the sums of the others."""
    return os.path.join(path, FOLDERS[folder_runtime(path)]) if os.path.isdir(path) else os.fspath(path)


def _sha256(path: str, limits: Limits) -> str:
    return sha256(Path(_checked(path)), limits.max_file_bytes)


def _reopen(path: str, sha256: str, settings: dict[str, Any]) -> Detector:
    """Open the file of a pickled detector.

    Raises:
        SourceError: the file is missing or has changed.
    """
    if _sha256(path, settings["limits"]) != sha256:
        raise SourceError(f"{printable(path)}: has changed since its detector was pickled; open it with Detector(...)")
    return Detector(path, **settings)
