"""`Masks`: the masks of the detections in one image. A mask is computed at the size of the image when it is accessed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.errors import InputError
from fusenms.runtime.images import opencv
from fusenms.runtime.placement import Placement


@dataclass(frozen=True, eq=False)
class Masks(Sequence[np.ndarray]):
    """Masks as boolean arrays: ``masks[i]`` is ``[height, width]`` of the image, ``np.asarray(masks)`` is ``[n, height, width]``.

    Masks are upsampled on access, so a large image with many objects needs memory only for the masks that are used.

    Attributes:
        logits: ``[n, h, w]`` float32 at the size of the prototypes, above 0 inside the masks.
        boxes: ``[n, 4]`` xyxy in pixels of the image. Each mask is clipped to its box.
        place: placement of the image in the model's input.
        size: (height, width) of the model's input, in pixels.
    """

    logits: np.ndarray
    boxes: np.ndarray
    place: Placement
    size: tuple[int, int]

    @classmethod
    def none(cls) -> Masks:
        """No masks."""
        return cls(np.zeros((0, 1, 1), np.float32), np.zeros((0, 4), np.float32), Placement(1, 1, 0, 0, 1, 1), (1, 1))

    @classmethod
    def of_arrays(cls, arrays: np.ndarray) -> Masks:
        """Masks that are known at the size of the image, ``[n, height, width]`` bool."""
        count, height, width = arrays.shape
        whole = np.tile(np.array([0, 0, width, height], np.float32), (count, 1))
        return cls(
            arrays.astype(np.float32) - np.float32(0.5),
            whole,
            Placement(height, width, 0, 0, height, width),
            (height, width),
        )

    @classmethod
    def joined(cls, parts: Sequence[Masks]) -> Masks:
        """The masks of several, in order.

        Raises:
            InputError: some have masks and others not, or they are of images of other sizes.
        """
        lengths = {len(part) > 0 for part in parts}
        if not parts or lengths == {False}:
            return cls.none()
        if len(lengths) > 1 or len({(part.place.height, part.place.width) for part in parts}) > 1:
            raise InputError(
                "found detections with masks and others without, or of images of other sizes; expected those of one image"
            )
        first = parts[0]
        if all(
            (part.place, part.size, part.logits.shape[1:]) == (first.place, first.size, first.logits.shape[1:])
            for part in parts
        ):
            logits, boxes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "boxes"))
            return cls(logits, boxes, first.place, first.size)
        return cls.of_arrays(np.concatenate([np.asarray(part) for part in parts]))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, i: Any) -> Any:
        """Mask ``i``, or `Masks` for a slice, a list of indices or a boolean array."""
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
            raise ValueError("masks are computed on access, so they cannot be shared; leave copy=False out")
        shape = (len(self), self.place.height, self.place.width)
        return np.stack(list(self)).astype(dtype or bool) if len(self) else np.zeros(shape, dtype or bool)

    def polygons(self) -> list[list[np.ndarray]]:
        """Outlines of each mask, the largest first: ``[m, 2]`` float32, x and y in pixels of the image.

        Holes are left out, and so are outlines with fewer than three points, which are not polygons.
        """
        cv2, found = opencv(), []
        for mask in self:
            outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            outlines = sorted(outlines, key=cv2.contourArea, reverse=True)
            found.append([outline.reshape(-1, 2).astype(np.float32) for outline in outlines if len(outline) > 2])
        return found

    def _enlarged(self, logits: np.ndarray) -> np.ndarray:
        """Upsample logits ``[h, w]`` to the image ``[height, width]``, float32.

        The steps are those of Ultralytics (process_mask_native), before its threshold:

        1. Upsample until the edges of the image fall on whole pixels.
        2. Crop to the image.
        3. Resize to the size of the image.
        """
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
    """Mask logits ``[n, h, w]`` float32, from coefficients ``[n, M]`` and prototypes ``[M, h, w]``."""
    return np.tensordot(coefficients, prototypes, 1)
