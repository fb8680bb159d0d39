"""YOLOv4 and YOLOv3 as pytorch-YOLOv4 exports them: separate outputs for normalized corners and class scores, three anchors per cell.

Two outputs: boxes ``[B, N, 1, 4]``, x1, y1, x2, y2 in units of the input, and scores ``[B, N, C]``, objectness times class. Source:
Tianxiaomo/pytorch-YOLOv4, `yolo_forward_dynamic`.
"""

from __future__ import annotations

from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.probe import Probe, are_corners, are_normalized, are_probabilities, follows_grid
from fusenms.layout import Activation, BoxFormat, Decoded, Join, Layout, Tap

NAME = "yolov4"
ANCHORS = 3
BOXES = "fusenms/head_boxes"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize corners with an axis of size one, with a row of scores each."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    boxes = [s for s in probe.samples if s.value.ndim == 4 and s.value.shape[2:] == (1, 4)]
    scores = [s for s in probe.samples if s.value.ndim == 3]
    if len(shapes) != 2 or len(boxes) != 1 or len(scores) != 1 or boxes[0].value.shape[1] != scores[0].value.shape[1]:
        return Mismatch(
            f"found outputs of shape {shapes}; expected boxes [batch, candidates, 1, 4] and scores [batch, candidates, classes]"
        )
    corners, values, names = boxes[0].value[0, :, 0], scores[0].value[0], probe.raw.class_names
    grid = probe.grid(ANCHORS, len(corners))
    if grid is None:
        return Mismatch(
            f"found {len(corners)} candidates; expected three per cell of levels with strides such as 8, 16, 32"
        )
    if names and len(names) != values.shape[1]:
        return Mismatch(f"found {values.shape[1]} classes, but {len(names)} class names in the metadata")
    if not are_probabilities(values):
        return Mismatch(f"found scores from {values.min():.3g} to {values.max():.3g}; expected probabilities")
    center = (corners[:, :2] + corners[:, 2:]) / 2 * probe.sides[:2]
    if not are_corners(corners) or not are_normalized(corners) or not follows_grid(center, grid):
        return Mismatch("the boxes are not corners in units of the input that follow its cells")
    join = Join(BOXES, (boxes[0].tensor,), 2, 4)
    classes = Tap(scores[0].tensor, 2, 0, values.shape[1])
    decode = Decoded(BoxFormat.XYXY, normalized=True)
    return Layout(NAME, Tap(BOXES, 2, 0, 4), classes, None, Activation.NONE, decode, (join,))


YOLOV4 = HeadSpec(NAME, match, stretch=True)
