"""`fuse`: load, recognize, fuse, verify. This module is the only implementation of the pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms.artifacts.frames import Tiles
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.artifacts.report import Report
from fusenms.config import ConfigFields, PostprocessConfig
from fusenms.errors import ConfigError, UnsupportedOperatorError, VerificationError
from fusenms.events import Compared, Event, Fused, OnEvent, Progress, QuantizedNetwork, Recognized, Verified
from fusenms.fusion.backends import get_backend
from fusenms.fusion.tail import fuse_head
from fusenms.graph.session import missing_operators
from fusenms.heads import Anchors, HeadSpec, check_tensors, raw_head, recognize
from fusenms.heads.meaning import check_meaning
from fusenms.layout import Layout
from fusenms.quantization import ADVISED_IMAGES, AUTO, LEAST_IMAGES, Int8Settings, check_count, quantize
from fusenms.runtime.example_images import example_images
from fusenms.runtime.image_set import ImageSet, listed
from fusenms.runtime.images import list_images
from fusenms.runtime.placement import load_tensor
from fusenms.sources import LoadFields, LoadOptions, load, options_from
from fusenms.transforms.dynamic_batch import open_batch
from fusenms.transforms.frames import check_frames, check_tiles, frames_from, with_frames
from fusenms.transforms.half_precision import PRECISIONS, to_half
from fusenms.verification.agreement import agreement
from fusenms.verification.checks import images_for, verify, verify_tail

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("fusenms")
CalibrationImages = str | os.PathLike[str] | Sequence[Any] | np.ndarray
MOST_IMAGES = 8
"""Images of the user that are looked at for what a head means."""


class FuseFields(LoadFields, ConfigFields, total=False):
    """The fields of `LoadOptions` and of `PostprocessConfig` as keywords."""


def fuse(
    weights: Any,
    *,
    backend: str = "ort",
    family: str | None = None,
    heads: Sequence[HeadSpec] = (),
    anchors: Anchors | None = None,
    precision: str = "fp32",
    calibrate: CalibrationImages | None = None,
    keep_float: int | str = AUTO,
    max_drift: float = Int8Settings.max_drift,
    frames: str | tuple[int, int] | None = None,
    frame_channels: str = "rgb",
    tiles: Tiles | tuple[int, int] | None = None,
    images: np.ndarray | str | os.PathLike[str] | None = None,
    unverified: bool = False,
    strict: bool = False,
    config: PostprocessConfig | None = None,
    options: LoadOptions | None = None,
    on_event: OnEvent | None = None,
    **fields: Unpack[FuseFields],
) -> FusedModel:
    """Load weights, recognize the head, fuse the post-processing and verify the result.

    Args:
        weights: a checkpoint (`.pt`), a raw `.onnx`, a directory of a Hugging Face detector, an `nn.Module`, or a loaded `RawModel`.
        backend: ``ort``, ``trt``, ``portable`` or ``plugin``.
        family: name of the detector family, if more than one fits the file.
        heads: families to try in addition to those of fusenms and of installed packages.
        anchors: anchor boxes of an `.onnx` whose head is not decoded, as for `fusenms.recognize`.
        precision: ``fp32``; ``fp16`` for a network in half precision; or ``int8`` for one that is quantized on the images of ``calibrate``.
            A note then says how the detections change.
        calibrate: images for ``int8``, at least 16, better 100, as the model sees them in use: a folder, a text file with a path in each
            line, a sequence of images or paths, or an array ``[n, 3, height, width]`` float32 (RGB, 0 to 1). Where enough are left, every
            fourth is held out, and the drift is measured on these, or on ``images``.
        keep_float: convolutions that stay float32 in ``int8``, beside the first and the last: ``auto``, or a number of the dearest.
        max_drift: largest share of the detections that ``int8`` may change.
        frames: size of the frames that the model takes instead of images, (height, width), or ``dynamic`` for any. Frames are uint8
            ``[B, height, width, 3]``; they are letterboxed (or stretched) in the graph; boxes and keypoints are in their pixels. Backends
            ``ort`` and ``portable``; not for masks.
        frame_channels: order of the colors of frames, ``rgb`` or ``bgr`` (as OpenCV reads them), or ``nv12``: frames are then uint8
            ``[B, height * 3 / 2, width]``.
        tiles: tiles to cut frames into, in the graph: (rows, columns), or `Tiles`. The network sees them as images of one batch, and the
            candidates of all of them suppress each other once. ``frames`` are then ``dynamic`` by default.
        images: images to verify on: ``[n, 3, height, width]`` float32 (RGB, 0 to 1), or a folder of images. The first eight are also
            looked at, beside the package's own, for what the head means.
        unverified: skip the verification; the result can then be saved only with ``unverified=True``.
        strict: refuse weights that find no objects in the images, and find them again in their mirror images.
        config: settings of the post-processing.
        options: how the weights are loaded.
        on_event: called after each step with an event of `fusenms.events`.
        **fields: fields of `PostprocessConfig` instead of ``config``, and of `LoadOptions` instead of ``options``. For a `RawModel`,
            ``layout`` is the result of `fusenms.recognize`, or one written by hand, and the other fields of `LoadOptions` are refused. For
            a raw `.onnx`, ``layout`` is used instead of recognizing the head.

    Returns:
        the fused model with its report.

    Raises:
        VerificationError: the result differs from the reference.
        DriftError: in int8, too many detections differ from those of float32.
        FusenmsError: another stage failed.

    Example:
        >>> import fusenms
        >>> fused = fusenms.fuse("yolov8n.pt", score_threshold=0.3, max_detections=100)
        >>> fused.report.mismatches
        0
        >>> fused.save("yolov8n.ort.onnx").name
        'yolov8n.ort.onnx'
    """
    tell = _Teller(on_event)
    loading = {name: value for name, value in fields.items() if name in LoadFields.__annotations__}
    settings = _settings(config, {name: value for name, value in fields.items() if name not in loading})
    get_backend(backend, settings)  # fails early
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    quantizing = _int8(precision, calibrate, keep_float, max_drift)
    taken = frames_from(frames, frame_channels, backend, settings, tiles)
    if quantizing is not None and taken is not None:
        raise ConfigError(
            "found frames and precision int8, whose steps amplify the rounding of scaled frames beyond what can be verified; leave frames "
            "out, or take precision fp32 or fp16"
        )
    if unverified and images is not None:
        raise ConfigError("found images and unverified, but images are only used to verify; leave one of them out")
    if isinstance(images, (str, os.PathLike)):
        list_images(Path(images))  # fails early
    raw, layout = _load(weights, options, loading)
    raw = _with_not_run(raw, layout, unverified)
    if raw.not_run and taken is not None:
        raise UnsupportedOperatorError(
            f"{raw.source}: nothing here runs {', '.join(raw.not_run)}, so that frames cannot be tried; leave frames out"
        )
    if layout is not None and anchors is not None:
        raise ConfigError("found anchors and layout; a layout has its anchors itself: leave one of them out")
    guessed = raw.layout is None and layout is None and family is None
    layout = layout or recognize(raw, family, heads=heads, anchors=anchors)
    check_tensors(raw, layout)
    if taken is not None:
        check_frames(raw.source, layout, taken, raw.limits.max_image_side)
    raw = open_batch(raw, layout)
    if taken is not None and taken.tiles is not None:
        check_tiles(raw, layout, settings)
    head = raw_head(raw, layout, heads)
    arrays = _arrays(raw, head, images)
    meaning = _meaning(raw, head, arrays, strict, guessed)
    raw = replace(raw, notes=(*raw.notes, *meaning))
    tell(Recognized(raw=raw, layout=layout, meaning=meaning))
    network = raw
    if quantizing is not None:
        quantized = quantize(
            raw,
            head,
            _calibration_images(calibrate, raw, head),
            backend=backend,
            settings=quantizing,
            compared=arrays,
            progress=tell.progress,
        )
        tell(QuantizedNetwork(quantized=quantized))
        network = quantized.raw
    elif precision not in (raw.precision, "fp32"):
        network = to_half(raw, head.layout)
    fused = fuse_head(network, head, settings, backend, None if taken is None else taken.tiles)
    framed = fused if taken is None else with_frames(fused, taken)
    tell(Fused(raw=raw, model=framed))
    if quantizing is None and network is not raw:
        full, half = (fuse_head(one, head, settings, backend) for one in (raw, network))
        found = agreement(full, half, images_for(half, arrays))
        framed = replace(framed, notes=(*framed.notes, found.summary))
        tell(Compared(agreement=found, own_images=images is not None))
    if raw.not_run:
        return _with_tail_note(framed, raw, head, tell)
    if unverified:
        return framed
    shown = example_images(raw.image.height, raw.image.width) if taken is not None and arrays is None else arrays
    report = verify(framed, images=shown, progress=tell.progress)
    tell(Verified(report=report))
    return _proven(framed, report)


def _int8(
    precision: str, calibrate: CalibrationImages | None, keep_float: int | str, max_drift: float
) -> Int8Settings | None:
    """How the network is quantized; None if it is not.

    Raises:
        ConfigError: precision and calibration images do not go together, or a setting is out of its range.
        InputError: there are too few images, or one is missing.
    """
    settings = Int8Settings(keep_float=keep_float, max_drift=max_drift)
    if precision != "int8":
        given = {"calibrate": calibrate is not None, "keep_float": keep_float != AUTO}
        if given["calibrate"] or given["keep_float"] or max_drift != Int8Settings.max_drift:
            name = next((name for name, is_given in given.items() if is_given), "max_drift")
            raise ConfigError(
                f"found {name} with precision {precision}, but only precision int8 is calibrated; leave {name} out"
            )
        return None
    if calibrate is None:
        raise ConfigError(
            f"precision is int8, but there are no images to calibrate on; expected at least {LEAST_IMAGES}, better {ADVISED_IMAGES} "
            "(calibrate)"
        )
    check_count(len(listed(calibrate)))  # fails early
    return settings


def _calibration_images(calibrate: CalibrationImages | None, raw: RawModel, head: RawHead) -> ImageSet:
    return ImageSet(listed(calibrate, raw.limits), (raw.image.height, raw.image.width), head.stretch, raw.limits)


def _settings(config: PostprocessConfig | None, fields: dict[str, Any]) -> PostprocessConfig:
    if config is None:
        return PostprocessConfig.from_dict(fields)
    if fields:
        raise ConfigError(f"found config and {', '.join(fields)}; expected either a PostprocessConfig or its fields")
    return config


def _load(weights: Any, options: LoadOptions | None, fields: Any) -> tuple[RawModel, Layout | None]:
    """Return the raw model, and the layout that was given with a `RawModel` or a raw `.onnx`."""
    given = options_from(options, fields)
    if not isinstance(weights, RawModel):
        if isinstance(weights, (str, os.PathLike)) and Path(weights).suffix.lower() == ".onnx":
            return load(weights, replace(given, layout=None)), given.layout
        return load(weights, given), None
    if others := [name for name in given.given if name != "layout"]:
        raise ConfigError(
            f"found {', '.join(others)} with a RawModel, which is loaded already; give loading options to fusenms.load"
        )
    return weights, given.layout


def _with_not_run(raw: RawModel, layout: Layout | None, unverified: bool) -> RawModel:
    """The model, with the operators that nothing here runs; with a layout and unverified it can be fused all the same.

    Raises:
        UnsupportedOperatorError: there are such operators, and the result is to be verified.
    """
    if raw.layout is None and layout is not None and unverified:
        raw = replace(raw, not_run=tuple(missing_operators(raw.model)))
    if raw.not_run and not unverified:
        raise UnsupportedOperatorError(
            f"{raw.source}: nothing here runs {', '.join(raw.not_run)}, so that the result cannot be verified; give a library that does: "
            "custom_ops='LIB', or fuse with unverified=True, which checks what comes after the head, and marks the file as unverified"
        )
    return raw


def _meaning(raw: RawModel, head: RawHead, arrays: np.ndarray | None, strict: bool, guessed: bool) -> tuple[str, ...]:
    """What the network shows of its layout; nothing, if nothing here runs it.

    Raises:
        UnsupportedOperatorError: strict, and nothing here runs it.
    """
    if not raw.not_run:
        return tuple(check_meaning(raw, head, _looked_at(raw, arrays), strict, guessed))
    names = ", ".join(raw.not_run)
    if strict:
        raise UnsupportedOperatorError(
            f"{raw.source}: nothing here runs {names}, so that no object is found; leave strict out"
        )
    return (f"nothing shown: nothing here runs {names}, and the layout is taken as given",)


def _with_tail_note(fused: FusedModel, raw: RawModel, head: RawHead, tell: _Teller) -> FusedModel:
    """The model with a note about the comparison of what comes after the head. It has no report, since its network was not run.

    Raises:
        VerificationError: what comes after the head differs from the reference.
    """
    shapes = dict(zip(fused.layout.tensors, (head.shapes[name] for name in head.layout.tensors), strict=True))
    report = _proven(fused, verify_tail(fused, shapes, tell.progress)).report
    assert report is not None
    note = f"not verified: nothing here runs {', '.join(raw.not_run)}; only what comes after the head was compared, on synthetic heads ("
    return replace(fused, notes=(*fused.notes, f"{note}{report.summary})"))


def _arrays(raw: RawModel, head: RawHead, images: np.ndarray | str | os.PathLike[str] | None) -> np.ndarray | None:
    if images is None or isinstance(images, np.ndarray):
        return images
    return load_tensor(Path(images), raw.image.height, raw.image.width, head.stretch, raw.limits)


def _looked_at(raw: RawModel, arrays: np.ndarray | None) -> list[np.ndarray]:
    """Images of real objects: the package's own, if OpenCV is there, and the first of the user's, if they fit (else refused later)."""
    size = raw.image.height, raw.image.width
    examples = example_images(*size)
    fit = isinstance(arrays, np.ndarray) and arrays.dtype == np.float32 and arrays.shape[1:] == (3, *size)
    own = arrays[:MOST_IMAGES] if arrays is not None and fit else ()
    return [*([] if examples is None else [examples]), *(image[None] for image in own)]


def _proven(fused: FusedModel, report: Report) -> FusedModel:
    if not report:
        raise VerificationError(f"the fused model could not be proven equal to the reference\n{report}", report)
    return fused.proven(report)


class _Teller:
    """Logs each step and reports it to the caller."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self._on_event = on_event or (lambda _: None)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Progress):
            log.info("%s", event.summary)
        self._on_event(event)

    def progress(self, what: str, done: int, total: int) -> None:
        self(Progress(what=what, done=done, total=total))
