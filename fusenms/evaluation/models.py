"""`Subject`: what is evaluated, opened. Weights are fused for it; a fused file is taken with the settings that it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusenms import contract
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.artifacts.raw import RawModel
from fusenms.config import ConfigFields
from fusenms.errors import ConfigError
from fusenms.evaluation.raw import RawDetector
from fusenms.events import OnEvent, Recognized
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.pipeline import fuse
from fusenms.runtime import Detector
from fusenms.runtime.ncnn import TAIL, load_ncnn
from fusenms.runtime.openvino import IR_METADATA, load_ir
from fusenms.sources import load

SETTINGS: ConfigFields = {"score_threshold": 0.001, "iou_threshold": 0.7, "max_detections": 300, "multi_label": True}
"""Settings for mAP, as those of Ultralytics' validation: nearly every candidate counts, ranked by its score."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A detector that is open, with the fused model that it runs, and the raw detector that it is compared with, if it is."""

    name: str
    fused: FusedModel
    detect: Detector
    raw: RawDetector | None

    @property
    def notes(self) -> list[str]:
        """What its settings do to mAP."""
        config, suppresses = self.fused.config, self.fused.layout.suppress
        notes = []
        if config.score_threshold > SETTINGS["score_threshold"]:
            notes.append(
                f"mAP is a lower bound: the file leaves out detections with a score up to {config.score_threshold:g}, and mAP counts them "
                f"from {SETTINGS['score_threshold']:g} on; give the weights instead, which are fused for it"
            )
        if suppresses and config.iou_threshold != SETTINGS["iou_threshold"]:
            notes.append(
                f"IoU > {config.iou_threshold:g} is suppressed; published numbers are usually at {SETTINGS['iou_threshold']:g}"
            )
        return notes


@contextmanager
def open_subject(
    file: Any,
    *,
    family: str | None,
    against: Any,
    fields: Mapping[str, Any],
    opening: Mapping[str, Any],
    on_event: OnEvent | None,
) -> Iterator[Subject]:
    """Open what is evaluated, and close it at the end.

    Args:
        file: weights, a fused file, or a `FusedModel`.
        against: weights of the raw model; True: those of ``file``; None: none.
        fields: fields of `LoadOptions` and of `PostprocessConfig`.
        opening: arguments of `Detector`.

    Raises:
        ConfigError: settings are given for a fused file, or ``against`` does not say which weights.
        FusenmsError: a stage failed.
    """
    limits = fields.get("limits", DEFAULT_LIMITS)
    opening = {**opening, "limits": limits}
    path = file if isinstance(file, (str, os.PathLike)) else None
    fused = file if isinstance(file, FusedModel) else None if path is None else _fused(Path(path), limits)
    recognized: list[Recognized] = []
    if fused is not None:
        given = sorted({*fields, *(["family"] if family else [])} - {"limits"})
        if given:
            raise ConfigError(
                f"found {', '.join(given)}, but the model is fused already, and has its settings inside; leave them out"
            )
        if against is True:
            raise ConfigError(
                "the model is fused already, so the raw model is not known; name its weights: against='yolov8n.pt'"
            )
    else:
        fused = fuse(file, family=family, on_event=_watching(recognized, on_event), **{**SETTINGS, **fields})
    raw = None
    if against is True:
        raw = RawDetector(recognized[0].raw, recognized[0].layout, fused)
    elif against is not None and against is not False:
        raw = RawDetector(_weights(against, fused, limits), None, fused)
    if fused.image.dynamic_size:  # one size for all images, as the raw model has
        opening["size"] = (fused.image.height, fused.image.width)
    with Detector(fused if recognized or path is None else path, **opening) as detect:
        yield Subject(name=str(path) if path is not None else fused.source, fused=fused, detect=detect, raw=raw)


def _weights(against: Any, fused: FusedModel, limits: Limits) -> RawModel:
    """The weights that a fused model is compared with, at its size."""
    if isinstance(against, RawModel):
        return against
    stated = isinstance(against, (str, os.PathLike)) and Path(against).suffix.lower() == ".onnx"
    size = None if stated else (fused.image.height, fused.image.width)
    return load(against, size=size, limits=limits)


def _watching(recognized: list[Recognized], on_event: OnEvent | None) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        if isinstance(event, Recognized):
            recognized.append(event)
        if on_event is not None:
            on_event(event)

    return watch


def _fused(path: Path, limits: Limits) -> FusedModel | None:
    """The fused model of a file or of a deployed folder; None if it is neither."""
    if path.is_dir():
        if (path / IR_METADATA).exists():
            return load_ir(path, limits)
        return load_ncnn(path, limits) if (path / TAIL).exists() else None
    if path.suffix.lower() != ".onnx" or not path.exists():
        return None
    return load_fused(path, limits=limits) if contract.KEY_BACKEND in read_metadata(read_onnx(path, limits)) else None
