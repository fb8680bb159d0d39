"""`Detector`: runs a fused model on images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusenms import contract
from fusenms.artifacts.fused import load_fused
from fusenms.boxes import oriented_to_corners, upright_around
from fusenms.errors import InputError, RunError, SourceError, UnsupportedByBackendError
from fusenms.fusion.backends import get_backend
from fusenms.graph.custom_ops import custom_ops as use_custom_ops
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.detections import Detections
from fusenms.runtime.images import Placement, is_single, letterbox, read_image, stretched, to_tensor
from fusenms.runtime.masks import Masks, logits_of
from fusenms.runtime.ncnn import TAIL, NcnnRunner, load_ncnn, sha256
from fusenms.safety.text import printable

_LOG = logging.getLogger(__name__)


class Detector:
    """A fused model, open in ONNX Runtime, or deployed for ncnn. Calling and closing it are thread-safe.

    with Detector("yolov8n.ort.onnx") as detect:
        for found in detect(["a.jpg", "b.jpg"]):
            print(found.boxes, found.scores, found.labels)

    A pickled detector holds the absolute path of its file, the SHA-256 of the file, and the settings. Unpickling opens the file again, and
    raises `SourceError` if the file is missing or has changed. A copy (`copy.copy`, `copy.deepcopy`) shares the open model, and is closed
    separately. After a fork, open the file again in the child process, because the threads of ONNX Runtime remain in the parent. With
    ``threads=1`` this is not necessary.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt").save("yolov8n.ort.onnx")
        >>> with fusenms.Detector(path) as detect:
        ...     found = detect("bus.jpg")[0]
        >>> found.boxes.shape[1], found.boxes.dtype
        (4, dtype('float32'))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        batch_size: int = 8,
        threads: int | None = None,
        custom_ops: Sequence[str | os.PathLike[str]] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Open a fused file, or a folder that `fusenms.deploy` wrote.

        Args:
            providers: ONNX Runtime execution providers, in order of preference.
            batch_size: maximum number of images in one run. It is 1 for models in which the images of a batch affect each other. A model
                with a fixed batch always runs on that many; copies of the last image fill up the batch.
            threads: number of threads of one run; default: chosen by ONNX Runtime.
            custom_ops: paths of ONNX Runtime custom-op libraries, as for `fusenms.custom_ops`. A library is code: name only your own.
            limits: bounds on the file, on the images, and on the time of each run.

        Raises:
            ConfigError: a custom-op library cannot be used.
            UnsupportedOperatorError: nothing here runs an operator of the model.
            SourceError: the file cannot be read, or is not a fused model.
            UnsupportedByBackendError: its backend does not run on ONNX Runtime.
            BackendUnavailableError: ONNX Runtime or a provider is missing.
            InputError: an argument is invalid.
        """
        if isinstance(providers, str) or not all(isinstance(name, str) for name in providers):
            raise InputError(f"providers is {providers!r}; expected a list of names, as ['CPUExecutionProvider']")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        if isinstance(custom_ops, (str, os.PathLike)):
            raise InputError(f"custom_ops is {custom_ops!r}; expected a list of paths, as ['libfold.so']")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; expected a whole number of at least 1, or None")
        stamp, deployed = _stamp(path), isinstance(path, (str, os.PathLike)) and os.path.isdir(path)
        if deployed and tuple(providers) != ("CPUExecutionProvider",):
            raise InputError(f"providers is {list(providers)!r}; expected none for ncnn, which runs on the CPU")
        fused = load_ncnn(path, limits) if deployed else load_fused(path, limits=limits)
        plugins = {node.domain for node in fused.model.graph.node} - {"", "ai.onnx"}
        if plugins and not get_backend(fused.backend).runs_on_onnxruntime:
            raise UnsupportedByBackendError(
                f"{path}: made for backend {fused.backend}, which does not run in ONNX Runtime; "
                "fuse the weights again with backend='ort', or build a TensorRT engine of this file (trtexec --onnx=FILE)"
            )
        self.class_names = fused.class_names
        self._image, self._names = fused.image, fused.config.output_names
        self._outputs, self._rows = fused.layout.outputs(fused.config), fused.config.max_detections
        self._batch_size = (fused.image.batch or batch_size) if fused.image.independent else 1
        self.limits = limits
        self._path, self._stamp = os.path.abspath(path), stamp
        self._settings: dict[str, Any] = {
            "providers": tuple(providers), "batch_size": batch_size, "threads": threads, "limits": limits,
            "custom_ops": tuple(map(os.path.abspath, custom_ops)),
        }  # fmt: skip
        self._process = None if threads == 1 else os.getpid()
        with use_custom_ops(*custom_ops):
            self._runner: OnnxRuntimeRunner | NcnnRunner | None = (
                NcnnRunner(path, fused, threads)
                if deployed
                else OnnxRuntimeRunner(
                    fused.model, tuple(providers), threads, source=str(path), max_seconds=limits.max_run_seconds
                )
            )

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
            InputError: the detector is closed.
            SourceError: the file is missing, or has changed since it was opened.
        """
        if self._runner is None:
            raise InputError("the detector is closed, so it cannot be pickled; open the file again")
        if self._stamp is None or _stamp(self._path) != self._stamp:
            raise SourceError(
                f"{printable(self._path)}: is missing or has changed since it was opened, so its detector cannot be pickled; open it again"
            )
        return _reopen, (self._path, _sha256(self._path, self.limits), self._settings)

    def __call__(self, images: Any) -> list[Detections]:
        """Detect objects in images.

        Args:
            images: one image or several. An image is a path, an array ``[height, width, 3]`` uint8 RGB or a PIL image.

        Returns:
            one `Detections` for each image, in order.

        Raises:
            InputError: an image is invalid or exceeds the limits, there is not enough memory, or the detector is closed.
            RunError: the model fails, takes too long, or returns outputs that violate its contract.
        """
        self._open_runner()  # fail before an image is read
        single = is_single(images)
        if not single and not isinstance(images, Iterable):
            raise InputError(
                f"found {printable(type(images).__name__)}; expected an image (a path, an array or a PIL image), or several"
            )
        sources: Iterable[Any] = [images] if single else images
        found: list[Detections] = []
        canvases: list[np.ndarray] = []
        places: list[Placement] = []
        for source in sources:
            canvas, place = self._place(source)
            canvases.append(canvas)
            places.append(place)
            if len(canvases) == self._batch_size:
                found += self._run(canvases, places)
                canvases, places = [], []
        return found + (self._run(canvases, places) if canvases else [])

    def _place(self, source: Any) -> tuple[np.ndarray, Placement]:
        """Read an image and scale it to the model's input."""
        image = read_image(source, self.limits)
        fit = stretched if self._image.stretch else letterbox
        try:
            return fit(image, self._image.height, self._image.width)
        except MemoryError as error:
            raise InputError("not enough memory for the image; expected a smaller one") from error

    def _open_runner(self) -> OnnxRuntimeRunner | NcnnRunner:
        runner = self._runner
        if runner is None:
            raise InputError("the detector is closed; open the file again")
        if self._process not in (None, os.getpid()):
            raise InputError(
                "the detector was opened before this process was forked, and the threads of ONNX Runtime remain in the parent; open the "
                "file again in this process, or with threads=1"
            )
        return runner

    def _run(self, canvases: list[np.ndarray], places: list[Placement]) -> list[Detections]:
        runner = self._open_runner()
        try:
            return self._infer(runner, canvases, places)
        except MemoryError as error:
            raise InputError(
                f"not enough memory for {len(canvases)} images at once; expected a smaller batch_size"
            ) from error

    def _infer(
        self, runner: OnnxRuntimeRunner | NcnnRunner, canvases: list[np.ndarray], places: list[Placement]
    ) -> list[Detections]:
        filled = canvases + canvases[-1:] * ((self._image.batch or 0) - len(canvases))
        outputs = runner.infer(to_tensor(filled))
        self._check(outputs, len(filled))
        outputs = {name: value[: len(canvases)] for name, value in outputs.items()}
        counts = outputs[self._names[0]]
        converged = outputs.get(contract.CONVERGED, np.ones_like(counts))[:, 0].astype(bool)
        if not converged.all():
            _LOG.warning(
                "%d of %d images need more suppression rounds than the model has, so boxes may be wrong; fuse it with more rounds",
                (~converged).sum(), len(converged),
            )  # fmt: skip
        return [
            self._found(
                {name: value[i] for name, value in outputs.items()}, int(counts[i, 0]), place, bool(converged[i])
            )
            for i, place in enumerate(places)
        ]

    def _check(self, outputs: dict[str, np.ndarray], batch: int) -> None:
        """Refuse outputs that violate the contract. The graph may have been changed after it was written.

        Raises:
            RunError: an output has another shape or type, or invalid values.
        """
        for name, output in self._outputs:
            value = outputs.get(name)
            sides = value.shape[2:] if isinstance(value, np.ndarray) and value.ndim == 4 and "h" in output.shape else ()
            expected = output.shape_for(batch, self._rows, *sides)
            if not isinstance(value, np.ndarray) or value.shape != expected or value.dtype != output.dtype:
                found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else "nothing"
                raise RunError(
                    f"{self._path}: gives {name} {found}; expected {output.dtype}{list(expected)}. Fuse the model again"
                )
        counts, boxes, scores, _ = (outputs[name] for name in self._names)
        if counts.min() < 0 or counts.max() > self._rows:
            raise RunError(
                f"{self._path}: gives {counts.ravel().tolist()[:8]} detections; expected 0 to {self._rows}. Fuse the model again"
            )
        used = np.arange(self._rows) < counts
        if not (np.isfinite(boxes).all(2) & np.isfinite(scores))[used].all():
            raise RunError(
                f"{self._path}: gives boxes or scores that are not finite; the weights or the file are damaged"
            )

    def _found(self, outputs: dict[str, np.ndarray], count: int, place: Placement, converged: bool) -> Detections:
        """The detections in one image, from its outputs."""
        boxes, scores, labels = (outputs[name][:count] for name in self._names[1:])
        turned = boxes.shape[1] == 5
        if turned:
            oriented = place.oriented_to_image(boxes)
            boxes = upright_around(oriented_to_corners(oriented))
        else:
            boxes = place.to_image(boxes)
            sides = boxes[:, 2:] - boxes[:, :2]
            oriented = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, sides, np.zeros_like(boxes[:, :1])), 1)
        points = outputs.get(contract.KEYPOINTS, np.zeros((count, 0, 2), np.float32))[:count]
        return Detections(
            boxes=boxes,
            scores=scores.copy(),
            labels=labels.copy(),
            class_names=self.class_names,
            oriented_boxes=oriented,
            keypoints=place.points_to_image(points),
            masks=Masks(self._mask_logits(outputs, count), boxes, place, (self._image.height, self._image.width)),
            indices=outputs.get(contract.INDICES, np.full(count, -1, np.int32))[:count].copy(),
            oriented=turned,
            converged=converged,
        )

    def _mask_logits(self, outputs: dict[str, np.ndarray], count: int) -> np.ndarray:
        """Mask logits ``[n, h, w]`` float32, above 0 inside the masks. n is 0 if the model has no masks."""
        if contract.MASKS in outputs:
            return outputs[contract.MASKS][:count] - np.float32(0.5)
        if contract.PROTOTYPES not in outputs:
            return np.zeros((0, 1, 1), np.float32)
        return logits_of(outputs[contract.MASK_COEFFICIENTS][:count], outputs[contract.PROTOTYPES])


def _stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Identity, size and time of a file, which show whether it was replaced or changed. None if there is no file."""
    try:
        status = os.stat(_checked(path))
    except (OSError, ValueError, TypeError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(path: str | os.PathLike[str]) -> str:
    """The file itself, or that of a folder which holds the sums of the others."""
    return os.path.join(path, TAIL) if os.path.isdir(path) else os.fspath(path)


def _sha256(path: str, limits: Limits) -> str:
    return sha256(Path(_checked(path)), limits)


def _reopen(path: str, sha256: str, settings: dict[str, Any]) -> Detector:
    """Open the file of a pickled detector.

    Raises:
        SourceError: the file is missing or has changed.
    """
    if _sha256(path, settings["limits"]) != sha256:
        raise SourceError(f"{printable(path)}: has changed since its detector was pickled; open it with Detector(...)")
    return Detector(path, **settings)
