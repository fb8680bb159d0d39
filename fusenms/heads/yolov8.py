"""YOLOv8 and its heirs with the same decoded output (YOLOv5u, YOLOv9, YOLO11, YOLO12): one anchor per cell, no objectness.

One output ``[B, 4 + C, N]`` (or transposed): cx, cy, w, h in pixels of the input, then C class probabilities.
"""

from __future__ import annotations

import numpy as np

from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.evidence import Evidence, follows_grid, width_of
from fusenms.heads.late import earliest_distances
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap

NAME = "yolov8"


def match(evidence: Evidence, certain: bool) -> Layout | Mismatch:
    """Recognize the decoded output of an export of this family."""
    if len(evidence.samples) != 1:
        return Mismatch(f"found {len(evidence.samples)} outputs; expected one [batch, 4 + classes, candidates]")
    if evidence.raw.task != "detect":
        return Mismatch(f"the file says that its task is {evidence.raw.task!r}; expected 'detect'")
    sample = evidence.samples[0]
    shape = sample.value.shape
    if len(shape) != 3:
        return Mismatch(f"found an output of shape {list(shape)}; expected [batch, 4 + classes, candidates]")
    results = [
        _match_channels(evidence, certain, axis, grid)
        for axis in (1, 2)  # as many channels as candidates: the values tell
        if (grid := evidence.grid(1, shape[3 - axis])) is not None and shape[axis] > 4
    ]
    layouts = [result for result in results if isinstance(result, Layout)]
    if results:
        return (
            layouts[0] if len(layouts) == 1 else Mismatch("either axis may be the channels") if layouts else results[0]
        )
    return Mismatch(
        f"found an output of shape {list(shape)}; expected one candidate per cell of levels with strides such as 8, 16, 32"
    )


def _match_channels(evidence: Evidence, certain: bool, axis: int, grid: np.ndarray) -> Layout | Mismatch:
    sample, names = evidence.samples[0], evidence.raw.names
    rows = sample.value[0].T if axis == 1 else sample.value[0]
    classes = rows.shape[1] - 4
    if names and len(names) != classes:
        return Mismatch(f"found {classes} channels after the box, but {len(names)} class names in the metadata")
    if not ((rows[:, 4:] >= 0) & (rows[:, 4:] <= 1)).all():
        return Mismatch(
            f"found class scores from {rows[:, 4:].min():.3g} to {rows[:, 4:].max():.3g}; expected probabilities"
        )
    if (rows[:, 2:4] < 0).any() or not follows_grid(rows[:, :2], grid):
        return Mismatch("the first four channels are no box centers and sizes in pixels of the input")
    if certain and classes > 1 and sorted((4, 1, classes - 1)) in evidence.joins:
        return Mismatch(f"the output is joined from 4, 1 and {classes - 1} channels, so channel 5 is objectness")
    if certain and not names:
        widths = tuple(width_of(part, len(rows)) for part in sample.parts if part.ndim > 1)
        if sorted(widths) != sorted((4, classes)) and classes > 1:
            return Mismatch(
                f"nothing shows whether channel 5 is objectness (no class names in the metadata; the output is joined "
                f"from {list(widths) or 'unknown'} channels); if it is a class, say --family {NAME}"
            )
    boxes, scores = Tap(sample.tensor, axis, 0, 4), Tap(sample.tensor, axis, 4, 4 + classes)
    decoded = Layout(NAME, boxes, scores, None, Activation.NONE, Decoded(BoxFormat.CXCYWH))
    return earliest_distances(evidence, decoded)


YOLOV8 = HeadSpec(NAME, match)
