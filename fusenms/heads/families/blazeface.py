"""BlazeFace, a face detector (MediaPipe): boxes and six landmarks as offsets in pixels from the centers of the cells, and a logit.

Two outputs: ``[B, N, 16]`` (x, y, width, height, then six points) and ``[B, N, 1]``. The finer level has two candidates a cell, the coarser
one six, side by side. Source: google-ai-edge/mediapipe, `SsdAnchorsCalculator` and `TensorsToDetectionsCalculator`, whose offsets are
divided by the size of the input and have anchors of size 1.
"""

from __future__ import annotations

from fusenms.artifacts.preprocessing import Pixels
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.probe import Probe
from fusenms.layout import Activation, KeypointTerms, Layout, PointOffsets, Tap, candidates_per_level

NAME = "blazeface"
WIDTH = 16
GRIDS = (PointOffsets((8, 16), (2, 6)), PointOffsets((16, 32), (2, 6)))
"""Of the model for near faces (128 pixels), and of that for far ones (256)."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize the two outputs."""
    image, shapes = probe.raw.image, [list(sample.value.shape) for sample in probe.samples]
    by_width = {sample.value.shape[2]: sample for sample in probe.samples if sample.value.ndim == 3}
    boxes, scores = by_width.get(WIDTH), by_width.get(1)
    if len(shapes) != 2 or boxes is None or scores is None or boxes.value.shape[1] != scores.value.shape[1]:
        return Mismatch(
            f"found outputs of shape {shapes}; expected [batch, candidates, {WIDTH}] and [batch, candidates, 1]"
        )
    count = boxes.value.shape[1]
    grids = [grid for grid in GRIDS if sum(candidates_per_level(grid, image.height, image.width)) == count]
    if not grids:
        return Mismatch(
            f"found {count} candidates; expected two a cell and six of the next level, strides 8 and 16 or 16 and 32"
        )
    middle = abs(boxes.value[0, :, :4]).mean()
    if not 1 < middle < max(image.height, image.width):
        return Mismatch(f"its boxes are {middle:.3g} on average; expected offsets in pixels")
    points = KeypointTerms(Tap(boxes.tensor, 2, 4, WIDTH), 2, factor=1.0, point=0.5, pixels=True)
    return Layout(
        NAME,
        Tap(boxes.tensor, 2, 0, 4),
        Tap(scores.tensor, 2, 0, 1),
        None,
        Activation.SIGMOID,
        grids[0],
        keypoints=points,
    )


BLAZEFACE = HeadSpec(NAME, match, pixels=Pixels("rgb", 255.0, (127.5,) * 3, (127.5,) * 3), stretch=False)
