"""`fusenms.convert` and `fusenms.configure`: a file with suppression inside becomes another one, without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw_head import RawHead
from fusenms.config import ConfigFields, PostprocessConfig
from fusenms.contract import KEY_BACKEND
from fusenms.conversion.own import changes, fused_again, raw_of, with_settings
from fusenms.conversion.result import Conversion, layout_path
from fusenms.conversion.third_party import Wanted, take_apart
from fusenms.engines.running import ENGINES
from fusenms.errors import ConfigError, SourceError, VerificationError
from fusenms.events import Event, Progress, Recognized
from fusenms.fusion.backends import BACKENDS
from fusenms.heads import Anchors
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.pipeline import fuse
from fusenms.runtime.example_images import example_images
from fusenms.runtime.images import list_images
from fusenms.runtime.placement import load_tensor
from fusenms.sources import LoadOptions
from fusenms.verification.agreement import agreement
from fusenms.verification.checks import OnProgress, images_for, verify

if TYPE_CHECKING:
    from typing_extensions import Unpack

RAW = "raw"
"""In place of a backend: the network up to its head."""
TARGETS = (*BACKENDS, RAW)

__all__ = ["RAW", "TARGETS", "Conversion", "configure", "convert", "layout_path"]
PathLike = str | os.PathLike[str]
Images = np.ndarray | PathLike | None


def convert(
    path: PathLike,
    backend: str = "ort",
    *,
    keep_semantics: bool = False,
    family: str | None = None,
    pixels: str | Pixels | None = None,
    stretch: bool | None = None,
    anchors: Anchors | None = None,
    images: Images = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: OnProgress | None = None,
    **fields: Unpack[ConfigFields],
) -> Conversion:
    """Fuse a file that has suppression inside again for another backend, without its weights, and verify the result.

    The network stays as it is. Settings of a file that fusenms fused are kept, but for those that are given. A file that others fused is
    cut before its suppression; its head is recognized, and must give the rows of the file with the file's own settings. The new file has
    the settings of fusenms, or with ``keep_semantics`` those of the file.

    Args:
        path: an `.onnx` with suppression inside.
        backend: ``ort``, ``trt``, ``portable`` or ``plugin``; ``raw`` for the network up to its head, which nothing is behind.
        keep_semantics: take thresholds, rows, multi-label and class-agnostic suppression from a file that others fused, and its output
            names, if they are those of a preset and mean the same.
        family: name of the detector family of a file that others fused, if several fit.
        pixels: pixels that its network expects, if they are not those that are usual for its family: a name, or a `Pixels`.
        stretch: whether its images are stretched instead of letterboxed, if that is not as usual for its family.
        anchors: its anchor boxes, as for `fusenms.recognize`, if its head is not decoded.
        images: images to compare and to verify on: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), or a folder of images.
        limits: bounds on the file and on each run.
        progress: called for each step of the verification.
        **fields: fields of `PostprocessConfig` to change.

    Returns:
        the converted model with its report; ``save`` writes it.

    Raises:
        SourceError: the file cannot be read, or is damaged.
        ConfigError: there is no such backend or setting, or a setting does not fit.
        UnsupportedByBackendError: the backend cannot express the settings of the file.
        SuppressionError: the suppression of the file cannot be cut out, or its rows are not those of the head before it.
        VerificationError: the result differs from the reference.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> made = fusenms.convert(path, "portable", score_threshold=0.4)
        >>> made.changes, bool(made.report)
        (('backend ort -> portable', 'score_threshold 0.25 -> 0.4'), True)
        >>> made.save("yolov8n.portable.onnx").name
        'yolov8n.portable.onnx'
    """
    if backend not in TARGETS:
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(TARGETS)}")
    if backend == RAW and fields:
        raise ConfigError(f"found {', '.join(fields)} with backend {RAW!r}, which has no post-processing; leave it out")
    if not _is_ours(_onnx(path), limits):
        options = LoadOptions(pixels=pixels, stretch=stretch, limits=limits)
        wanted = Wanted(family, anchors, images, keep_semantics, dict(fields))
        return _of_others(Path(path), backend, options, wanted, progress)
    stated = {"family": family, "pixels": pixels, "stretch": stretch, "anchors": anchors}
    if given := [name for name, value in stated.items() if value is not None]:
        raise ConfigError(
            f"found {', '.join(given)}, but {path} says itself what its network expects and its head means; leave that out"
        )
    fused = load_fused(path, limits=limits)
    if backend == RAW:
        raw, head = raw_of(fused)
        if images is not None:
            raise ConfigError(f"found images with backend {RAW!r}, which leaves nothing to compare; leave them out")
        return Conversion(
            source=str(path), found=_found(fused), model=None, raw=raw, layout=head.layout, changes=_without(fused)
        )
    return _again(str(path), fused, backend, images, progress, fields)


def configure(
    path: PathLike,
    *,
    images: Images = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: OnProgress | None = None,
    **fields: Unpack[ConfigFields],
) -> Conversion:
    """Change settings of a fused file, without its weights, and verify the result. Its backend stays.

    Args:
        path: a fused `.onnx`. It is not changed; ``save`` of the result may replace it.
        images: images to compare and to verify on: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), or a folder of images.
        limits: bounds on the file and on each run.
        progress: called for each step of the verification.
        **fields: fields of `PostprocessConfig` to change.

    Returns:
        the changed model with its report.

    Raises:
        SourceError: the file cannot be read, or is damaged.
        ConfigError: nothing is to be changed, there is no such setting, or it does not fit the file.
        VerificationError: the result differs from the reference.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> made = fusenms.configure(path, score_threshold=0.4, output_preset="tensorrt")
        >>> made.save(path).name, fusenms.load_fused(path).config.score_threshold
        ('yolov8n.ort.onnx', 0.4)
    """
    if not fields:
        raise ConfigError("found nothing to change; expected settings, such as score_threshold or output_preset")
    fused = load_fused(_onnx(path), limits=limits)
    return _again(str(path), fused, fused.backend, images, progress, fields)


def _again(
    source: str, fused: FusedModel, backend: str, images: Images, progress: OnProgress | None, fields: ConfigFields
) -> Conversion:
    """Fuse again, verify, and compare the detections of both on images."""
    config = with_settings(fused.config, dict(fields))
    raw, head = raw_of(fused)
    made = fused_again(fused, raw, head, config, backend)
    arrays = _arrays(images, head, raw.image.height, raw.image.width, limits=fused.limits)
    report = verify(made, images=arrays, progress=progress)
    if not report:
        raise VerificationError(f"{source} was not converted: the result differs from the reference\n{report}", report)
    lines = [f"backend {fused.backend} -> {backend}"] if backend != fused.backend else []
    compared = None
    if raw.image.frames is None and fused.image.frames is None:
        compared = agreement(fused, made, images_for(made, arrays))
    return Conversion(
        source=source,
        found=_found(fused),
        model=made.proven(report),
        raw=raw,
        layout=head.layout,
        changes=(*lines, *changes(fused.config, config)),
        agreement=compared,
    )


def _of_others(
    path: Path, backend: str, options: LoadOptions, wanted: Wanted, progress: OnProgress | None
) -> Conversion:
    """Cut a file that others fused before its suppression, and fuse it again."""
    taken = take_apart(path, options, wanted)
    shared: dict[str, Any] = {
        "source": str(path), "found": taken.semantics.summary, "semantics": taken.semantics, "rows": taken.rows
    }  # fmt: skip
    if backend == RAW:
        return Conversion(model=None, raw=taken.raw, layout=taken.layout, changes=("suppression removed",), **shared)
    config = wanted.config(taken.semantics)

    meaning: tuple[str, ...] = ()

    def on_event(event: Event) -> None:
        nonlocal meaning
        if isinstance(event, Recognized):
            meaning = event.meaning
        if isinstance(event, Progress) and progress is not None:
            progress(event.what, event.done, event.total)

    shown = (
        taken.meant or taken.rows.same > 0 or wanted.family is not None
    )  # else the head is a guess, and is looked at as one
    layout = taken.layout if shown else None
    made = fuse(taken.raw, backend=backend, layout=layout, config=config, images=taken.images, on_event=on_event)
    own = taken.semantics.config
    return Conversion(
        model=made,
        raw=taken.raw,
        layout=taken.layout,
        changes=_changed_semantics(own, config),
        meaning=(*taken.notes, *meaning),
        lost=taken.semantics.lost if wanted.keep_semantics else (),
        **shared,
    )


def _changed_semantics(own: PostprocessConfig, config: PostprocessConfig) -> tuple[str, ...]:
    """Settings of the suppression that differ from those of the file."""
    read = ("score_threshold", "iou_threshold", "max_detections", "multi_label", "class_agnostic")
    return tuple(line for line in changes(own, config) if line.split()[0] in read)


def _is_ours(path: Path, limits: Limits) -> bool:
    """Whether fusenms fused a file."""
    return KEY_BACKEND in read_metadata(read_onnx(path, limits))


def _arrays(images: Images, head: RawHead, height: int, width: int, *, limits: Limits) -> np.ndarray | None:
    """The images as an array: those given, or the package's own; None without OpenCV."""
    if images is None:
        return example_images(height, width)
    if isinstance(images, np.ndarray):
        return images
    list_images(Path(images))
    return load_tensor(Path(images), height, width, head.stretch, limits)


def _onnx(path: PathLike) -> Path:
    """The path of an `.onnx`.

    Raises:
        SourceError: it is none, or that of an engine.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise SourceError(f"found a {type(path).__name__}; expected the path of an .onnx file")
    if Path(path).suffix in ENGINES:
        raise SourceError(
            f"{path}: is an engine, which cannot be changed; convert the .onnx that it was built from, and build it again"
        )
    return Path(path)


def _found(fused: FusedModel) -> str:
    return f"fused by fusenms · backend {fused.backend} · {fused.suppressed_by}"


def _without(fused: FusedModel) -> tuple[str, ...]:
    return (f"decode and {fused.suppressed_by} of backend {fused.backend} removed",)
