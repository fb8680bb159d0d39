"""Whether candidates of different anchors agree on the objects that they see: evidence for anchor boxes, which a file does not show.

Several anchors of a cell, and of its neighbors, see the same object. Each decodes its box with its own anchor, so that with the right
anchors the boxes are alike. Anchors in the wrong order, or with width and height exchanged, give boxes of other sizes. A factor that all
anchors share is not seen, nor one of a level if every object is found on that level: YOLOv7's anchors are YOLOv5's, 1.2 times as large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusenms.config import PostprocessConfig
from fusenms.layout import AnchorBoxes, AnchorDeltas, Layout, anchors_per_cell, candidates_per_level, has_anchors_last
from fusenms.reference import candidates, postprocess

CONFIG = PostprocessConfig(max_detections=50)
NEAR = 0.25
"""A candidate sees the same object if its center is off by at most this part of the object's sides."""
MOST_UNLIKE = 0.25
"""Limit on the median difference of the sizes, as a logarithm. Measured on YOLOv5n: 0.03; with anchors in the wrong order 1.3, with width
and height exchanged 0.5."""
FEWEST = 8
"""Comparisons without which nothing is contradicted."""

Head = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How many pairs of anchors were compared, and the median difference of the sizes, as a logarithm."""

    compared: int
    unlike: float

    @property
    def contradiction(self) -> str | None:
        """What contradicts the layout, as a clause; None if nothing does."""
        if self.compared < FEWEST or self.unlike <= MOST_UNLIKE:
            return None
        return (
            f"its anchors see the same objects in sizes that differ by a factor of {np.exp(self.unlike):.2g} ({self.compared} "
            "comparisons); give the anchors that it was trained with"
        )

    def __str__(self) -> str:
        if not self.compared:
            return "anchors assumed: no object in the images is seen by several"
        if self.unlike > MOST_UNLIKE:
            return f"anchors assumed: {self.compared} comparisons are too few, and they differ by {self.unlike:.0%}"
        return f"anchors agree within {self.unlike:.0%} on the sizes of objects ({self.compared} comparisons); a common factor is not seen"


def compare_anchors(heads: Sequence[Head], layout: Layout, size: tuple[int, int]) -> Agreement | None:
    """Compare the boxes of different anchors for the same objects; None for a head without anchor boxes.

    Args:
        heads: values of the head's tensors ``[1, …]`` on images of objects.
        size: (height, width) of the input.
    """
    decode = layout.decode
    if not isinstance(decode, (AnchorBoxes, AnchorDeltas)):
        return None
    anchor, unlike = _anchors(decode, size), list[float]()
    for head in heads:
        found = candidates(head, 0, layout, size)
        labels, passing = found.labels_by.argmax(1), found.scores.max(1) > CONFIG.score_threshold
        rows = postprocess(found, CONFIG)
        for box, label, index in zip(rows.rows.boxes, rows.rows.labels, rows.indices, strict=True):
            others = np.flatnonzero(passing & (labels == label) & (anchor != anchor[index]))
            sides, boxes = box[2:] - box[:2], found.boxes[others]
            off = np.abs(boxes[:, :2] + boxes[:, 2:] - box[:2] - box[2:]) / 2
            near = (off < NEAR * sides).all(1)
            with np.errstate(divide="ignore", invalid="ignore"):
                grown = np.log((boxes[near, 2:] - boxes[near, :2]) / sides)
            for one in np.unique(anchor[others[near]]):
                unlike.append(float(np.abs(np.median(grown[anchor[others[near]] == one], 0)).max()))
    return Agreement(len(unlike), float(np.median(unlike)) if unlike else 0.0)


def _anchors(decode: AnchorBoxes | AnchorDeltas, size: tuple[int, int]) -> np.ndarray:
    """The anchor of every candidate ``[N]``, counted through the levels."""
    each, first = [], 0
    for count, total in zip(anchors_per_cell(decode), candidates_per_level(decode, *size), strict=True):
        own = np.arange(count)
        each.append(
            first + (np.tile(own, total // count) if has_anchors_last(decode) else np.repeat(own, total // count))
        )
        first += count
    return np.concatenate(each)
