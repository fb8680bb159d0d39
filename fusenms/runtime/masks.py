"""`Masks`: the masks of one image's detections, made at the image's size when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.runtime.images import Placement, opencv


@dataclass(frozen=True, eq=False)
class Masks(Sequence[np.ndarray]):
    """Masks as boolean arrays ``[height, width]`` of the image: ``masks[i]``, or ``np.asarray(masks)``, ``[n, height, width]``.

    They are enlarged when asked for, so a large image with many objects costs memory for those that are looked at.

    Attributes:
        logits: ``[n, h, w]`` float32 at the size of the prototypes, above 0 inside.
        boxes: ``[n, 4]`` xyxy in pixels of the image; a mask ends at its box.
        place: where the image lies in the model's input.
        size: (height, width) of the model's input.
    """

    logits: np.ndarray
    boxes: np.ndarray
    place: Placement
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, i: Any) -> Any:
        """Mask ``i``; of a slice, a list of numbers or a boolean array, those masks as `Masks`."""
        if np.ndim(i) or isinstance(i, slice):
            some = i if isinstance(i, slice) else np.asarray(i)
            return Masks(self.logits[some], self.boxes[some], self.place, self.size)
        inside = self._enlarged(self.logits[i]) > 0
        x1, y1, x2, y2 = self.boxes[i]
        columns, rows = np.arange(self.place.width), np.arange(self.place.height)
        inside &= ((columns >= x1) & (columns < x2))[None]
        inside &= ((rows >= y1) & (rows < y2))[:, None]
        return inside

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("masks are made when asked for, so there is nothing to share; leave copy=False out")
        shape = (len(self), self.place.height, self.place.width)
        return np.stack(list(self)).astype(dtype or bool) if len(self) else np.zeros(shape, dtype or bool)

    def polygons(self) -> list[list[np.ndarray]]:
        """Of each mask its outlines ``[m, 2]`` float32 (x, y in pixels of the image), the largest first; without holes, and without
        specks of fewer than three points, which are no polygons."""
        cv2, found = opencv(), []
        for mask in self:
            outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            outlines = sorted(outlines, key=cv2.contourArea, reverse=True)
            found.append([outline.reshape(-1, 2).astype(np.float32) for outline in outlines if len(outline) > 2])
        return found

    def _enlarged(self, logits: np.ndarray) -> np.ndarray:
        """Logits ``[h, w]`` at the image's size, ``[height, width]`` float32, in the steps that Ultralytics takes (process_mask_native):
        enlarged until the image's edge falls on whole pixels, cut to the image, resized; the threshold comes after that."""
        cv2, place = opencv(), self.place
        (height, width), (rows, columns) = self.size, logits.shape
        edges = [place.top * rows / height, (place.top + place.inner_height) * rows / height]
        edges += [place.left * columns / width, (place.left + place.inner_width) * columns / width]
        most = math.ceil(max(height / rows, width / columns))
        factor = next((f for f in (1, 2, 4, 8) if f < most and all((edge * f).is_integer() for edge in edges)), most)
        if factor > 1:
            logits = cv2.resize(logits, (columns * factor, rows * factor), interpolation=cv2.INTER_LINEAR)
        top, bottom, left, right = (round(edge * factor) for edge in edges)
        inner = logits[top:bottom, left:right]
        if inner.shape == (place.height, place.width):
            return np.array(inner)
        return cv2.resize(np.ascontiguousarray(inner), (place.width, place.height), interpolation=cv2.INTER_LINEAR)


def logits_of(coefficients: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Logits ``[n, h, w]`` float32 of masks with coefficients ``[n, M]`` over prototypes ``[M, h, w]``."""
    return np.tensordot(coefficients, prototypes, 1)
