"""Whether what a cell sees is mirrored with the image: evidence for how boxes are decoded from cells.

Where a cell sees an object, the cell at the mirrored place of the mirror image sees it too, and its box must be the mirrored box. That
tells left from top, distances from offsets, boxes that are decoded already from terms that are not, and centers from corners. A factor of
all sizes, and whatever else mirroring leaves as it is, is not seen.

Networks that cannot tell left from right, as those with random weights and kernels of one pixel, give the same box terms in the mirror
image, where those of a right reading change: nothing follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fusenms.boxes import pairwise_iou, pairwise_probiou
from fusenms.heads.motion import Grid
from fusenms.heads.probe import cell_centers, channels_of
from fusenms.layout import Decoded, Layout, cells_along
from fusenms.reference import candidates

FEWEST = 8
"""Cells that must see something in both images."""
MOST = 200
"""Cells that are looked at, those with the best scores: enough for a median."""
LEAST_IOU = 0.6
"""Limit on the median IoU of a box and the mirrored one. Measured on 24 detectors: at least 0.69; read wrongly, at most 0.57."""
SAME = 0.05
"""Box terms that change by less than this, of their spread, are the same in the mirror image."""
NEARLY_ALL = 0.95
"""Part of the cells that see the same in the mirror image if nothing but the place of the box terms depends on the side."""

Head = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sightings:
    """What cells see in images and at the mirrored places of their mirror images.

    Attributes:
        cells: how many see an object in both.
        part: the part of those that see one in the image.
        iou: median IoU of a box and the mirrored one.
        change: how much the box terms change, in units of their spread: the median of the channel that changes most.
    """

    cells: int
    part: float
    iou: float
    change: float

    @property
    def unlike(self) -> bool:
        """Whether the boxes are not mirrored, though the terms that they are decoded from change."""
        return self.cells >= FEWEST and self.iou < LEAST_IOU and self.change > SAME

    @property
    def symmetric(self) -> bool:
        """Whether the network sees the same in every mirror image, as networks with random weights may."""
        return self.part >= NEARLY_ALL


def compare_cells(pairs: Iterable[tuple[Head, Head]], layout: Layout, grid: Grid, score_threshold: float) -> Sightings:
    """Compare the boxes of cells in images and in their mirror images.

    Args:
        pairs: values of the head's tensors ``[1, …]`` on an image and on its mirror image.
        grid: the cells of the candidates.
        score_threshold: scores above it are objects.
    """
    size = grid.height, grid.width
    opposite = _opposite(grid)
    ious, changes, seen = list[np.ndarray](), list[np.ndarray](), 0
    for plain, mirror in pairs:
        one, two = (candidates(values, 0, layout, size) for values in (plain, mirror))
        scores, others = one.scores, two.scores[opposite]
        on = (scores.max(1) > score_threshold) & (opposite >= 0)
        both = np.flatnonzero(on & (others.max(1) > score_threshold) & (scores.argmax(1) == others.argmax(1)))
        both = both[np.argsort(-scores[both].max(1), kind="stable")[:MOST]]
        seen += min(int(on.sum()), MOST)
        back = mirror_boxes(two.boxes[opposite[both]], size[1])
        iou = (pairwise_probiou if back.shape[1] == 5 else pairwise_iou)(one.boxes[both], back)
        ious.append(np.nan_to_num(iou.diagonal()))
        if isinstance(layout.decode, Decoded):
            terms, again = (_beside_cells(found.boxes, grid) for found in (one, two))
        else:
            terms, again = (channels_of(values, layout.boxes).astype(np.float64) for values in (plain, mirror))
        spread = np.maximum(terms.std(0), 1e-12)
        changes.append(np.abs(terms[both] - again[opposite[both]]) / spread)
    iou, change = np.concatenate(ious), np.concatenate(changes)
    if not len(iou):
        return Sightings(cells=0, part=0.0, iou=0.0, change=0.0)
    middle = np.median(np.nan_to_num(change), 0).max()
    return Sightings(cells=len(iou), part=len(iou) / seen, iou=float(np.median(iou)), change=float(middle))


def mirror_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes ``[N, 4]`` xyxy, or oriented ones ``[N, 5]``, of an image ``width`` pixels wide in its mirror image."""
    back = boxes.copy()
    if boxes.shape[1] == 5:
        back[:, 0], back[:, 4] = width - boxes[:, 0], -boxes[:, 4]
    else:
        back[:, 0], back[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return back


def _opposite(grid: Grid) -> np.ndarray:
    """For each candidate, the one at the mirrored place; -1 where cells do not fill the width, so that there is none."""
    parts, start = [], 0
    for stride, anchors in zip(grid.strides, grid.anchors, strict=True):
        rows, columns = (cells_along(side, stride) for side in (grid.height, grid.width))
        shape = (rows, columns, anchors) if grid.anchors_last else (anchors, rows, columns)
        stop = start + rows * columns * anchors
        places = np.flip(np.arange(start, stop).reshape(shape), 1 if grid.anchors_last else 2).ravel()
        parts.append(places if columns * stride == grid.width else np.full_like(places, -1))
        start = stop
    return np.concatenate(parts)


def _beside_cells(boxes: np.ndarray, grid: Grid) -> np.ndarray:
    """What a network may have decoded boxes ``[N, 4]`` xyxy or ``[N, 5]`` from: place in the cell and size in strides, and angle."""
    parts, start = [], 0
    for stride, anchors in zip(grid.strides, grid.anchors, strict=True):
        cells = cell_centers(grid.height, grid.width, stride).reshape(-1, 2)
        cells = np.repeat(cells, anchors, 0) if grid.anchors_last else np.tile(cells, (anchors, 1))
        level = boxes[start : start + len(cells)]
        start += len(cells)
        if boxes.shape[1] == 4:
            level = np.concatenate(((level[:, :2] + level[:, 2:]) / 2, level[:, 2:] - level[:, :2]), 1)
        parts.append(np.concatenate(((level[:, :2] - cells) / stride, level[:, 2:4] / stride, level[:, 4:]), 1))
    return np.concatenate(parts)
