"""YOLOv8 and detectors with the same decoded output (YOLOv5u, YOLOv9, YOLO11, YOLO12, YOLO26): one anchor per cell, no objectness.

One output ``[B, 4 + C + E, N]`` (or transposed): cx, cy, w, h in pixels of the input, C class probabilities, then E more channels: none,
mask coefficients (with a second output, the prototypes ``[B, M, h, w]``), keypoints, or the angle of an oriented box.
"""

from __future__ import annotations

import numpy as np

from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.late_decode import earliest_distances
from fusenms.heads.probe import Probe, Sample, box_format, hold_labels, width_of
from fusenms.heads.task_outputs import TASKS, not_terms, task_channels, task_terms
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap, other_axis

NAME = "yolov8"
EXPECTED = "one [batch, 4 + classes, candidates], or that with mask coefficients and [batch, prototypes, height, width]"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize the decoded output of an export of this family."""
    rows, maps = probe.split_prototypes()
    if len(rows) != 1 or len(maps) > 1:
        return Mismatch(f"found {len(probe.samples)} outputs; expected {EXPECTED}")
    extra = task_channels(probe, maps)
    if isinstance(extra, Mismatch):
        return extra
    sample = rows[0]
    shape = sample.value.shape
    if len(shape) != 3:
        return Mismatch(f"found an output of shape {list(shape)}; expected [batch, 4 + classes, candidates]")
    results = [
        _match_channels(probe, certain, sample, axis, grid, extra, maps)
        for axis in (1, 2)  # with as many channels as candidates, the values decide
        if (grid := probe.grid(1, shape[other_axis(axis)])) is not None and shape[axis] > 4 + extra
    ]
    layouts = [result for result in results if isinstance(result, Layout)]
    if results:
        return (
            layouts[0] if len(layouts) == 1 else Mismatch("either axis may be the channels") if layouts else results[0]
        )
    return Mismatch(
        f"found an output of shape {list(shape)}; expected one candidate per cell of levels with strides such as 8, 16, 32"
    )


def _match_channels(
    probe: Probe, certain: bool, sample: Sample, axis: int, grid: np.ndarray, extra: int, maps: list[Sample]
) -> Layout | Mismatch:
    names = probe.raw.class_names
    rows = sample.value[0].T if axis == 1 else sample.value[0]
    classes = rows.shape[1] - 4 - extra
    if names and len(names) != classes:
        return Mismatch(f"found {classes} channels after the box, but {len(names)} class names in the metadata")
    scores = rows[:, 4 : 4 + classes]
    if not ((scores >= 0) & (scores <= 1)).all():
        return Mismatch(
            f"found class scores from {scores.min():.3g} to {scores.max():.3g}; expected probabilities (a file with keypoints or angles "
            "must say so in its metadata: task, and kpt_shape)"
        )
    decode = box_format(rows[:, :4], grid, probe.sides)
    if decode is None:
        return Mismatch("the first four channels are not boxes that follow the cells of the image")
    if extra and (decode.normalized or (probe.raw.task == "obb" and decode != Decoded(BoxFormat.CXCYWH))):
        return Mismatch(
            f"found boxes as {decode}; expected pixels beside masks and keypoints, and centers and sizes beside angles"
        )
    if reason := not_terms(probe, rows[:, 4 + classes :]):
        return Mismatch(reason)
    if certain and classes > 1 and probe.joins_objectness(classes - 1):
        return Mismatch(f"the output is joined from 4, 1 and {classes - 1} channels, so channel 5 is objectness")
    if hold_labels(scores):
        return Mismatch("a class channel holds whole numbers only, as the number of the best class does")
    if certain and not names:
        widths = sorted(width_of(part, len(rows)) for part in sample.parts if part.ndim > 1)
        apart = sorted((4, classes, extra) if extra else (4, classes))
        if widths != apart and sorted((4, classes)) not in probe.joins and classes > 1:
            return Mismatch(
                f"nothing shows whether channel 5 is objectness (no class names in the metadata; the output is joined "
                f"from {widths or 'unknown'} channels); if it is a class, say family={NAME!r}"
            )
    last = 4 + classes
    boxes, class_tap = Tap(sample.tensor, axis, 0, 4), Tap(sample.tensor, axis, 4, last)
    terms = task_terms(probe, Tap(sample.tensor, axis, last, last + extra) if extra else None, maps)
    decoded = Layout(NAME, boxes, class_tap, None, Activation.NONE, decode, **terms)
    return earliest_distances(probe, decoded)


YOLOV8 = HeadSpec(NAME, match, tasks=TASKS)
