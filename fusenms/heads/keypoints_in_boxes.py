"""Whether the keypoints of objects lie in their boxes: evidence for the place, order and units of keypoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusenms.heads.mirror import Head, Look

SCORE, VISIBLE = 0.5, 0.5
"""Objects with a better score count, and their keypoints with more visibility."""
AROUND = 0.25
"""Of the box, how far beside it a keypoint still counts, on each side."""
FEWEST = 3
LEAST = 0.6
"""Part of the keypoints of an object that are in its box, in the mean. Measured on seven detectors of faces and of shapes: at least 0.97;
with x and y exchanged, or in other units, at most 0.5."""


@dataclass(frozen=True)
class KeypointsInBoxes:
    """Of how many objects, and which part of their visible keypoints lies in or near their boxes."""

    objects: int
    part: float

    @property
    def contradiction(self) -> str | None:
        """What contradicts the layout, as a clause; None if nothing does."""
        if self.objects < FEWEST or self.part >= LEAST:
            return None
        return (
            f"{self.part:.0%} of the keypoints of {self.objects} objects lie in their boxes, so that they are in another order, in other "
            "units or something else; give a layout that says so"
        )

    def __str__(self) -> str:
        """A line for the user."""
        if self.objects < FEWEST:
            return "keypoints assumed: too few objects show them"
        return f"keypoints shown: {self.part:.0%} of those of {self.objects} objects lie in their boxes"


def keypoints_in_boxes(look: Look, heads: Iterable[Head]) -> KeypointsInBoxes:
    """Look at the keypoints of what a detector finds.

    Args:
        heads: values of the head on images; the layout has keypoints.
    """
    parts = []
    for values in heads:
        rows, points = look.keypoints(values)
        for box, score, own in zip(rows.boxes, rows.scores, points, strict=True):
            seen = own[own[:, 2] > VISIBLE, :2] if own.shape[1] == 3 else own[:, :2]
            if score >= SCORE and len(seen):
                margin = AROUND * (box[2:4] - box[:2])
                inside = (seen >= box[:2] - margin) & (seen <= box[2:4] + margin)
                parts.append(inside.all(1).mean())
    return KeypointsInBoxes(len(parts), float(np.mean(parts)) if parts else 0.0)
