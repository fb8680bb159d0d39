"""`Detections`: what was found in one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first; never optional, empty arrays where nothing was.

    Attributes:
        boxes: ``[n, 4]`` float32, xyxy in pixels of the picture.
        scores: ``[n]`` float32, 0 to 1.
        labels: ``[n]`` int32, index into ``class_names``.
        class_names: names of all classes.
        converged: false where a model with a fixed number of rounds says that they were too few: boxes may be wrong.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    converged: bool = True

    def __post_init__(self) -> None:
        count = len(self.scores)
        assert self.boxes.shape == (count, 4) and self.labels.shape == (count,), (self.boxes.shape, self.labels.shape)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int]]:
        """Rows as (box, score, label)."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class{label}"

    def to_dicts(self) -> list[dict[str, Any]]:
        """One plain dictionary a row, for JSON."""
        return [
            {
                "label": label,
                "name": self.name(label),
                "score": round(score, 6),
                "box": [round(float(v), 3) for v in box],
            }
            for box, score, label in self
        ]
