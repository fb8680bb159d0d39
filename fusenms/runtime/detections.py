"""`Detections`: the detections in one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.boxes import oriented_to_corners
from fusenms.runtime.masks import Masks


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """The detections in one image, best first. Arrays are never None; without detections they are empty.

    Attributes:
        boxes: ``[n, 4]`` float32, xyxy in pixels of the image. For oriented boxes, the smallest upright boxes around them.
        scores: ``[n]`` float32, 0 to 1.
        labels: ``[n]`` int32, indices into ``class_names``.
        class_names: names of all classes.
        oriented_boxes: ``[n, 5]`` float32: cx, cy, w, h in pixels of the image, and the angle in radians, from x to y. The angle is 0 if
            the boxes of the model are upright.
        keypoints: ``[n, P, D]`` float32: x, y in pixels of the image and, if D is 3, the visibility from 0 to 1. P is 0 if the model has
            no keypoints.
        masks: a sequence of n boolean arrays ``[height, width]`` of the image; of length 0 if the model has no masks.
        indices: ``[n]`` int32, the candidate of each row; -1 if the model does not output indices.
        oriented: whether the boxes of the model are oriented.
        converged: false if a fixed number of suppression rounds was too small. Boxes may then be wrong.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    oriented_boxes: np.ndarray
    keypoints: np.ndarray
    masks: Masks
    indices: np.ndarray
    oriented: bool = False
    converged: bool = True

    def __post_init__(self) -> None:
        count = len(self.scores)
        assert self.boxes.shape == (count, 4) and self.labels.shape == (count,), (self.boxes.shape, self.labels.shape)
        assert self.oriented_boxes.shape == (count, 5) and self.indices.shape == (count,), self.oriented_boxes.shape
        assert self.keypoints.ndim == 3 and len(self.keypoints) == count and len(self.masks) in (0, count)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int]]:
        """Iterate over the rows as (box, score, label)."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    @property
    def corners(self) -> np.ndarray:
        """Corners ``[n, 4, 2]`` of the oriented boxes, in order around each box, in pixels of the image."""
        return oriented_to_corners(self.oriented_boxes)

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class{label}"

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each row, for JSON. It has oriented box and corners, keypoints, mask outlines or index if the model does."""
        rows: list[dict[str, Any]] = [
            {
                "label": label,
                "name": self.name(label),
                "score": round(score, 6),
                "box": _rounded(box),
            }
            for box, score, label in self
        ]
        if self.oriented:
            for row, box, corners in zip(rows, self.oriented_boxes, self.corners, strict=True):
                row |= {"oriented_box": [*_rounded(box[:4]), round(float(box[4]), 6)], "corners": _rounded(corners)}
        if self.keypoints.shape[1]:
            for row, points in zip(rows, self.keypoints, strict=True):
                row["keypoints"] = _rounded(points)
        for row, outlines in zip(rows, self.masks.polygons(), strict=False):
            row["polygons"] = [_rounded(outline) for outline in outlines]
        if (self.indices >= 0).any():
            for row, index in zip(rows, self.indices.tolist(), strict=True):
                row["index"] = index
        return rows


def _rounded(values: np.ndarray) -> Any:
    return np.round(values.astype(np.float64), 3).tolist()
