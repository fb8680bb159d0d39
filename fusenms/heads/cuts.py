"""Whether what is left of an object that is cut ends at the cut: evidence for the sizes of boxes.

Half of an object is covered in plain gray, from the middle of its box on. A detector then sees half an object, and its box ends where the
gray begins. If sizes are read as half of what they are, boxes end well before it. Neither motion nor mirroring shows a factor of all sizes.

Boxes that reach beyond the cut contradict nothing: they may be too large, or those of whole objects, of which a detector was trained to
guess the covered part (as with CrowdHuman's full bodies).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusenms.boxes import pairwise_iou
from fusenms.heads.mirror import Head, Look

GRAY = 114 / 255
"""What letterboxing puts around images, as detectors know it."""
SCORE = 0.5
LEAST_SIDE = 0.15
"""Side of an object that is cut across it, as a part of the image's."""
MOST, FEWEST = 6, 4
"""Cuts that are tried, those of the best objects, and cuts behind which something of the object must be found for a judgement."""
FOUND = 0.25
"""IoU with the half that is left, from which on a box may be that of it."""
LIMIT = 0.2
"""Of the part that is left. Measured on 14 detectors that know the objects: medians of -0.03 to 0.04; with sizes halved, -0.5."""
AGREED = 0.75


@dataclass(frozen=True)
class Cuts:
    """Where boxes of cut objects end: ``errors`` ``[n]``, from the cut outward, as parts of what is left of the object."""

    errors: np.ndarray

    @property
    def judged(self) -> bool:
        return len(self.errors) >= FEWEST

    @property
    def error(self) -> float:
        """The median."""
        return float(np.median(self.errors))

    @property
    def contradiction(self) -> str | None:
        """If most boxes end well before the cut: this, as a clause."""
        if not self.judged or self.error >= -LIMIT or (self.errors < -LIMIT).mean() < AGREED:
            return None
        return (
            f"what is left of {len(self.errors)} cut objects ends {-self.error:.0%} of its size before the cut, so that its boxes are "
            "smaller than objects are (half sizes?); give another family, or a layout that says so"
        )

    def __str__(self) -> str:
        """A line for the user; empty if nothing could be judged."""
        if not self.judged:
            return ""
        if self.error > LIMIT:
            return f"sizes assumed: boxes of cut objects reach {self.error:.0%} beyond the cut, as those of whole objects or too large ones"
        return f"sizes shown: boxes of {len(self.errors)} cut objects end at the cut (within {abs(self.error):.1%})"


def cut_objects(look: Look, images: Sequence[np.ndarray], heads: Sequence[Head]) -> Cuts:
    """Cut the best objects of some images, and find what is left of them.

    Args:
        images: ``[1, 3, height, width]`` float32 each (RGB, 0 to 1).
        heads: values of the head on each image.

    Raises:
        SourceError: the model does not run.
    """
    cuts = sorted(_cuts(look, images, heads), key=lambda cut: -cut.score)[:MOST]
    if len(cuts) < FEWEST:
        return Cuts(np.empty(0))
    errors = []
    for cut, values in zip(cuts, look.values([cut.image for cut in cuts]), strict=True):
        rows = look.rows(values)[0]
        boxes = rows.boxes[rows.labels == cut.label]
        iou = pairwise_iou(cut.left[None], boxes)[0]
        if len(boxes) and iou.max() >= FOUND:
            errors.append(cut.error(boxes[iou.argmax()]))
    return Cuts(np.array(errors))


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One object of an image, cut across ``axis`` (0: x) at ``place``; what is below it is left, or with ``upper`` what is above."""

    image: np.ndarray
    left: np.ndarray
    axis: int
    upper: bool
    place: int
    label: int
    score: float

    def error(self, box: np.ndarray) -> float:
        """How far a box ends behind the cut, as a part of what is left."""
        end, other = (self.axis, self.axis + 2) if self.upper else (self.axis + 2, self.axis)
        beyond = self.place - box[end] if self.upper else box[end] - self.place
        return float(beyond / abs(self.place - self.left[other]))


def _cuts(look: Look, images: Sequence[np.ndarray], heads: Sequence[Head]) -> Iterator[_Cut]:
    """Both cuts of each large object: across it, and along it."""
    for image, values in zip(images, heads, strict=True):
        rows = look.rows(values)[0]
        if rows.boxes.shape[1] != 4:
            return
        for i, (box, label, score) in enumerate(zip(rows.boxes, rows.labels, rows.scores, strict=True)):
            for axis, side in ((0, image.shape[3]), (1, image.shape[2])):
                low, high = np.clip(box[[axis, axis + 2]], 0, side)
                if score >= SCORE and high - low >= LEAST_SIDE * side:
                    place, upper = round((low + high) / 2), i % 2 == 1
                    covered, left = image.copy(), box.copy()
                    span = slice(None, place) if upper else slice(place, None)
                    covered[(..., span) if axis == 0 else (..., span, slice(None))] = GRAY
                    left[axis if upper else axis + 2] = place
                    yield _Cut(
                        image=covered, left=left, axis=axis, upper=upper, place=place, label=int(label), score=float(score)
                    )  # fmt: skip
