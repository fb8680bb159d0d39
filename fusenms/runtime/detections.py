"""`Detections`: what was found in one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.boxes import oriented_to_corners
from fusenms.runtime.masks import Masks


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """What was found in one image, best first; never optional, empty arrays where nothing was.

    Attributes:
        boxes: ``[n, 4]`` float32, xyxy in pixels of the image; of oriented boxes the smallest upright ones around them.
        scores: ``[n]`` float32, 0 to 1.
        labels: ``[n]`` int32, index into ``class_names``.
        class_names: names of all classes.
        oriented_boxes: ``[n, 5]`` float32: cx, cy, w, h in pixels of the image, and the angle in radians, from x to y. It is 0 where
            the model gives upright boxes.
        keypoints: ``[n, P, D]`` float32: x, y in pixels of the image and, where D is 3, the visibility from 0 to 1; P is 0 where the
            model has none.
        masks: a sequence of n boolean arrays ``[height, width]`` of the image; of length 0 where the model has none.
        indices: ``[n]`` int32, the candidate that each row came from; -1 where the model does not say.
        oriented: whether the model gives turned boxes.
        converged: false where a model with a fixed number of rounds says that they were too few: boxes may be wrong.
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
        """Rows as (box, score, label)."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    @property
    def corners(self) -> np.ndarray:
        """Corner points ``[n, 4, 2]`` of the oriented boxes, around each, in pixels of the image."""
        return oriented_to_corners(self.oriented_boxes)

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class{label}"

    def to_dicts(self) -> list[dict[str, Any]]:
        """One plain dictionary a row, for JSON; with angle and corners, keypoints, or the mask's outlines, where the model gives them."""
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
