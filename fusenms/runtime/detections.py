"""`Detections`: the detections in one image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms.boxes import oriented_to_corners
from fusenms.errors import InputError
from fusenms.runtime.drawing import draw
from fusenms.runtime.masks import Masks

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import supervision


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """The detections in one image, best first. Arrays are never None; without detections they are empty.

    ``found[i]``, ``found[2:5]``, ``found[[0, 3]]`` and ``found[found.scores > 0.5]`` are `Detections` too, with those rows.

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

    Example:
        >>> import numpy as np
        >>> from fusenms import Detections
        >>> found = Detections(
        ...     boxes=np.array([[0, 0, 9, 9], [5, 5, 8, 8]], np.float32),
        ...     scores=np.array([0.9, 0.4], np.float32),
        ...     labels=np.array([1, 0], np.int32),
        ...     class_names=("cat", "dog"),
        ... )
        >>> [found.name(label) for label in found[found.scores > 0.5].labels]
        ['dog']
        >>> len(Detections.concatenate([found, found[0]]))
        3
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    oriented_boxes: np.ndarray = None  # type: ignore[assignment]
    keypoints: np.ndarray = None  # type: ignore[assignment]
    masks: Masks = field(default_factory=Masks.none)
    indices: np.ndarray = None  # type: ignore[assignment]
    oriented: bool = False
    converged: bool = True

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.oriented_boxes is None:
            low, high = self.boxes[:, :2], self.boxes[:, 2:]
            upright = np.concatenate(((low + high) / 2, high - low, np.zeros((count, 1))), 1).astype(np.float32)
            object.__setattr__(self, "oriented_boxes", upright)
        if self.keypoints is None:
            object.__setattr__(self, "keypoints", np.zeros((count, 0, 2), np.float32))
        if self.indices is None:
            object.__setattr__(self, "indices", np.full(count, -1, np.int32))
        assert self.boxes.shape == (count, 4) and self.labels.shape == (count,), (self.boxes.shape, self.labels.shape)
        assert self.oriented_boxes.shape == (count, 5) and self.indices.shape == (count,), self.oriented_boxes.shape
        assert self.keypoints.ndim == 3 and len(self.keypoints) == count and len(self.masks) in (0, count)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int]]:
        """Iterate over the rows as (box, score, label)."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> Detections:
        """Some rows: of a number, a slice, numbers, or a boolean for each row.

        Raises:
            IndexError: there is no such row, or the booleans are not one for each row.
        """
        chosen = np.arange(len(self))[
            rows if isinstance(rows, slice) else np.asarray(rows, None if np.size(rows) else int)
        ]
        chosen = np.atleast_1d(chosen)
        arrays = ("boxes", "scores", "labels", "oriented_boxes", "keypoints", "indices")
        some: dict[str, Any] = {name: getattr(self, name)[chosen] for name in arrays}
        return replace(self, **some, masks=self.masks[chosen] if len(self.masks) else self.masks)

    @staticmethod
    def concatenate(parts: Iterable[Detections]) -> Detections:
        """Put the rows of several together, in order; they are not sorted.

        Raises:
            InputError: there are none, or they differ in their class names, keypoints or kind of boxes, or some have masks and others not.
        """
        some = list(parts)
        if not some:
            raise InputError("found no detections to concatenate; expected at least one Detections")
        first = some[0]
        for other in some[1:]:
            if other.class_names != first.class_names or other.oriented != first.oriented:
                raise InputError(
                    "found detections of models with other class names or another kind of boxes; expected those of one model"
                )
            if other.keypoints.shape[1:] != first.keypoints.shape[1:]:
                raise InputError("found detections with other keypoints; expected those of one model")
        arrays = ("boxes", "scores", "labels", "oriented_boxes", "keypoints", "indices")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in some]) for name in arrays}
        masks = Masks.joined([part.masks for part in some if len(part)])
        return replace(first, **joined, masks=masks, converged=all(part.converged for part in some))

    @property
    def corners(self) -> np.ndarray:
        """Corners ``[n, 4, 2]`` of the oriented boxes, in order around each box, in pixels of the image."""
        return oriented_to_corners(self.oriented_boxes)

    def name(self, label: int) -> str:
        """Name of a class."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class{label}"

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Draw masks, boxes, keypoints and labels onto a copy of an image ``[height, width, 3]`` uint8 RGB."""
        return draw(image, self)

    def crop(self, image: np.ndarray) -> list[np.ndarray]:
        """Views of the image ``[height, width, ...]`` inside the boxes, rounded outwards to whole pixels, of at least one pixel."""
        height, width = image.shape[:2]
        low = np.floor(self.boxes[:, :2]).astype(int).clip(0, (width - 1, height - 1))
        high = np.maximum(np.ceil(self.boxes[:, 2:]).astype(int).clip(0, (width, height)), low + 1)
        return [image[y1:y2, x1:x2] for (x1, y1), (x2, y2) in zip(low, high, strict=True)]

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

    def to_coco(self, image_id: int, categories: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """One dictionary for each row, as COCO's results have them.

        Args:
            image_id: number of the image in the data set.
            categories: number of each class in the data set; default: its index.

        Returns:
            ``image_id``, ``category_id``, ``bbox`` (x, y, w, h in pixels) and ``score``; if the model has them ``segmentation`` (polygons)
            and ``keypoints`` (flat: x, y, visibility).
        """
        rows = []
        for box, score, label in self:
            x1, y1, x2, y2 = map(float, box)
            category = label if categories is None else int(categories[label])
            size = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
            rows.append({"image_id": image_id, "category_id": category, "bbox": size, "score": round(score, 6)})
        for row, outlines in zip(rows, self.masks.polygons(), strict=False):
            row["segmentation"] = [_rounded(outline.ravel()) for outline in outlines]
        if self.keypoints.shape[1]:
            seen = np.ones((*self.keypoints.shape[:2], 1), np.float32)
            points = self.keypoints if self.keypoints.shape[2] == 3 else np.concatenate((self.keypoints, seen), 2)
            for row, some in zip(rows, points, strict=True):
                row["keypoints"] = _rounded(some.ravel())
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a row for each detection: x1, y1, x2, y2, score, label, name; cx, cy, w, h, angle of oriented boxes.

        Raises:
            InputError: pandas is not installed.
        """
        return _imported("pandas").DataFrame(self._columns())

    def to_arrow(self) -> pyarrow.Table:
        """The table of `to_pandas`, in Arrow.

        Raises:
            InputError: pyarrow is not installed.
        """
        return _imported("pyarrow").table(self._columns())

    def _columns(self) -> dict[str, Any]:
        columns = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T.copy(), strict=True))
        if self.oriented:
            columns |= dict(zip(("cx", "cy", "w", "h", "angle"), self.oriented_boxes.T.copy(), strict=True))
        return columns | {
            "score": self.scores,
            "label": self.labels,
            "name": [self.name(label) for _, _, label in self],
        }

    def to_supervision(self) -> supervision.Detections:
        """The detections as `supervision.Detections`: boxes, masks, scores, class numbers, ``class_name``; corners of oriented boxes.

        Raises:
            InputError: supervision is not installed.
        """
        data: dict[str, Any] = {"class_name": np.array([self.name(label) for _, _, label in self], dtype=str)}
        if self.oriented:
            data["xyxyxyxy"] = self.corners.astype(np.float32)  # supervision's ORIENTED_BOX_COORDINATES
        return _imported("supervision").Detections(
            xyxy=self.boxes,
            mask=np.asarray(self.masks) if len(self.masks) else None,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data=data,
        )

    @classmethod
    def from_supervision(cls, found: supervision.Detections, class_names: Sequence[str] = ()) -> Detections:
        """Detections from `supervision.Detections`, without corners of oriented boxes. Scores that it lacks are 1, class numbers 0."""
        count = len(found.xyxy)
        return cls(
            boxes=np.asarray(found.xyxy, np.float32).reshape(count, 4),
            scores=np.ones(count, np.float32) if found.confidence is None else np.asarray(found.confidence, np.float32),
            labels=np.zeros(count, np.int32) if found.class_id is None else np.asarray(found.class_id, np.int32),
            class_names=tuple(class_names),
            masks=Masks.none() if found.mask is None else Masks.of_arrays(np.asarray(found.mask, bool)),
        )


def _imported(package: str) -> Any:
    """A package that only its own method needs.

    Raises:
        InputError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(f"{package} is not installed ({error}); install it with: pip install {package}") from error


def _rounded(values: np.ndarray) -> Any:
    return np.round(values.astype(np.float64), 3).tolist()
