"""Runs what is evaluated on every image, and compares what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from fusenms.errors import InputError, UnsupportedByBackendError, first_line
from fusenms.evaluation.classes import match_classes
from fusenms.evaluation.models import Subject
from fusenms.evaluation.result import Evaluation
from fusenms.evaluation.results import results_of
from fusenms.evaluation.scoring import Scores, score
from fusenms.evaluation.truth import GroundTruth, TrueImage
from fusenms.evaluation.yolo import YoloFolder
from fusenms.limits import Limits
from fusenms.runtime.images import read_image
from fusenms.safety.text import printable


@dataclass
class _Collected:
    """What was found so far. Images are numbered from 1."""

    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    keys: dict[int, int | str] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    raw_results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


def run(
    subject: Subject, given: GroundTruth | YoloFolder, batch_size: int, progress: Callable[[str, int, int], None]
) -> Evaluation:
    """Run what is evaluated on the images, and compute the metrics.

    Raises:
        InputError: the ground truth does not fit the model, or no image can be read.
        UnsupportedByBackendError: the model has oriented boxes.
    """
    layout = subject.fused.layout
    if layout.angle is not None:
        raise UnsupportedByBackendError(
            f"{subject.name}: has oriented boxes, for which COCO defines no metric; expected a model for boxes, masks or keypoints"
        )
    points = layout.keypoints
    truth = (
        given.truth(None if points is None else (points.count, points.dims)) if isinstance(given, YoloFolder) else given
    )
    labels, categories, matched = match_classes(subject.fused.class_names, truth)
    kinds, missing = _kinds(subject, truth)
    found = _collect(subject, truth, labels, batch_size, progress)
    if not found.sizes:
        raise InputError(
            f"{printable(truth.source)}: none of its {len(truth.images)} images can be read, the first because {found.failed[0][1]}; give "
            "the folder that they lie in"
        )
    if not found.annotations:
        raise InputError(f"{printable(truth.source)}: the {len(found.sizes)} images that can be read have no objects")

    def scores(results: Sequence[dict[str, Any]]) -> dict[str, Scores]:
        return {kind: score(kind, found.sizes, categories, found.annotations, results) for kind in kinds}

    progress("metrics", len(truth.images), len(truth.images))
    return Evaluation(
        file=subject.name,
        truth=truth.source,
        images=len(found.sizes),
        objects=sum(not entry["iscrowd"] for entry in found.annotations),
        matched=matched,
        config=subject.fused.config,
        suppress=layout.suppress,
        scores=scores(found.results),
        raw_scores=scores(found.raw_results) if subject.raw is not None else {},
        failed=tuple(found.failed),
        notes=(*subject.notes, *truth.notes, *missing),
        results=[row | {"image_id": found.keys[row["image_id"]]} for row in found.results],
        seconds=found.seconds,
    )


def _kinds(subject: Subject, truth: GroundTruth) -> tuple[list[str], list[str]]:
    """What is compared, and notes about what the ground truth lacks.

    Raises:
        InputError: the ground truth has another number of keypoints than the model.
    """
    layout, kinds, notes = subject.fused.layout, ["boxes"], []
    if layout.masks is not None:
        if truth.has_masks:
            kinds.append("masks")
        else:
            notes.append("masks are not evaluated: the ground truth has objects without")
    if layout.keypoints is not None:
        if truth.keypoints not in (0, layout.keypoints.count):
            raise InputError(
                f"{printable(truth.source)}: has objects with {truth.keypoints} keypoints, but the model has {layout.keypoints.count}"
            )
        if truth.keypoints:
            kinds.append("keypoints")
        else:
            notes.append("keypoints are not evaluated: the ground truth has none")
    return kinds, notes


def _collect(
    subject: Subject,
    truth: GroundTruth,
    labels: Mapping[int, int],
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> _Collected:
    found = _Collected()
    readable = _readable(truth, found, subject.detect.limits)
    while batch := list(islice(readable, batch_size)):
        start = time.perf_counter()
        detections = subject.detect([image for _, image in batch])
        found.seconds += time.perf_counter() - start
        for (true, image), rows in zip(batch, detections, strict=True):
            number = len(found.sizes) + 1
            height, width = image.shape[:2]
            found.sizes[number], found.keys[number] = (height, width), true.key
            scale = (float(width), float(height)) if truth.normalized else (1.0, 1.0)
            for each in true.objects:
                found.annotations.append(each.annotation(len(found.annotations) + 1, number, scale))
            found.results += results_of(rows, number, labels)
            if subject.raw is not None:
                found.raw_results += results_of(subject.raw(image), number, labels)
        progress("images", len(found.sizes) + len(found.failed), len(truth.images))
    return found


def _readable(truth: GroundTruth, found: _Collected, limits: Limits) -> Iterator[tuple[TrueImage, np.ndarray]]:
    """The images that can be read; the others are written down."""
    for true in truth.images:
        try:
            image = read_image(true.path, limits)
        except InputError as error:
            found.failed.append((str(true.path), first_line(error)))
            continue
        if true.size not in (None, image.shape[:2]):
            (height, width), (own_height, own_width) = true.size or (0, 0), image.shape[:2]
            reason = f"is {own_width}x{own_height} pixels, but the ground truth says {width}x{height}"
            found.failed.append((str(true.path), f"{printable(true.path)}: {reason}"))
            continue
        yield true, image
