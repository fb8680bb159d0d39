"""YOLOv5 (original releases) and YOLOv7: three anchors per cell, with objectness.

One output ``[B, N, 5 + C]``: cx, cy, w, h in pixels of the input, objectness, then C class probabilities.
The score is objectness times class probability. With masks, mask coefficients follow, and a second output has the prototypes
``[B, M, h, w]``.
"""

from __future__ import annotations

from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.late_decode import earliest_anchors
from fusenms.heads.probe import Probe, box_format
from fusenms.heads.task_outputs import task_channels, task_terms
from fusenms.layout import Activation, Layout, Tap

NAME = "yolov5"
ANCHORS = 3
COCO = 80
"""Classes of the data set that most files without class names were trained on."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize the decoded output of an export of this family. Other outputs (raw levels) are ignored."""
    _, maps = probe.split_prototypes()
    maps = maps if len(maps) == 1 else []  # several are raw levels
    extra = task_channels(probe, maps)
    if isinstance(extra, Mismatch):
        return extra
    shapes = [list(sample.value.shape) for sample in probe.samples]
    for sample in probe.samples:
        shape = sample.value.shape
        grid = probe.grid(ANCHORS, shape[1]) if len(shape) == 3 and shape[2] > 5 + extra else None
        if grid is None:
            continue
        rows, names = sample.value[0], probe.raw.class_names
        classes = rows.shape[1] - 5 - extra
        if names and len(names) != classes:
            return Mismatch(
                f"found {classes} channels after box and objectness, but {len(names)} class names in the metadata"
            )
        values = rows[:, 4 : 5 + classes]
        if not ((values >= 0) & (values <= 1)).all():
            return Mismatch(f"found scores from {values.min():.3g} to {values.max():.3g}; expected probabilities")
        decode = box_format(rows[:, :4], grid, probe.sides)
        if decode is None:
            return Mismatch("the first four channels are not boxes that follow the cells of the image")
        if certain and not names and classes not in (1, COCO):  # a single one cannot be anything else
            return Mismatch(
                f"nothing shows that all {classes} channels after the objectness are classes (no class names in the metadata, and not "
                f"the {COCO} of COCO); if they are, say family={NAME!r}"
            )
        boxes, objectness, scores = (Tap(sample.tensor, 2, *span) for span in ((0, 4), (4, 5), (5, 5 + classes)))
        terms = task_terms(probe, Tap(sample.tensor, 2, 5 + classes, shape[2]) if extra else None, maps)
        decoded = Layout(NAME, boxes, scores, objectness, Activation.NONE, decode, **terms)
        return decoded if extra else earliest_anchors(probe, decoded, ANCHORS)
    return Mismatch(
        f"found outputs of shape {shapes}; expected [batch, candidates, 5 + classes] with three candidates "
        "per cell of levels with strides such as 8, 16, 32"
    )


YOLOV5 = HeadSpec(NAME, match, tasks=("detect", "segment"))
