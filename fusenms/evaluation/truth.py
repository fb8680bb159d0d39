"""The ground truth of a set of images, from whichever format: `TrueImage` and its `TrueObject`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrueObject:
    """One object. All lengths are in pixels of the image, or in shares of its sides if the ground truth is normalized.

    Attributes:
        category: its category.
        box: left, top, width, height.
        area: of the object, which decides whether it is small, medium or large.
        crowd: whether it is a crowd: detections in it count neither as right nor as wrong.
        segmentation: polygons ``[[x, y, x, y, …], …]`` or a run-length encoding, as in COCO; None: not known.
        keypoints: x, y, visibility, x, y, …; empty: not known.
    """

    category: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool = False
    segmentation: Any = None
    keypoints: tuple[float, ...] = ()

    def annotation(self, number: int, image: int, scale: tuple[float, float]) -> dict[str, Any]:
        """The annotation in COCO's format, in pixels.

        Args:
            number: of the annotation, at least 1, because matching takes 0 for none.
            image: number of the image.
            scale: what an x and a y of 1 are in pixels.
        """
        wide, high = scale
        left, top, width, height = self.box
        entry: dict[str, Any] = {
            "id": number, "image_id": image, "category_id": self.category, "iscrowd": int(self.crowd), "area": self.area * wide * high,
            "bbox": [left * wide, top * high, width * wide, height * high],
        }  # fmt: skip
        if isinstance(self.segmentation, list):
            entry["segmentation"] = [
                [value * scale[i % 2] for i, value in enumerate(ring)] for ring in self.segmentation
            ]
        elif self.segmentation is not None:
            entry["segmentation"] = self.segmentation
        if self.keypoints:
            factors = (wide, high, 1.0)
            entry["keypoints"] = [value * factors[i % 3] for i, value in enumerate(self.keypoints)]
            entry["num_keypoints"] = sum(value > 0 for value in self.keypoints[2::3])
        return entry


@dataclass(frozen=True, kw_only=True)
class TrueImage:
    """One image. ``key`` is its id in files of results; ``size`` is (height, width) in pixels, None if the ground truth does not say."""

    key: int | str
    path: Path
    size: tuple[int, int] | None
    objects: tuple[TrueObject, ...]


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The images that a model is evaluated on.

    Attributes:
        source: what it was read from.
        images: the images, at least one of which has an object.
        categories: id to name; None if categories are class numbers of the model.
        normalized: whether lengths are shares of the sides of an image.
        notes: what was left out.
    """

    source: str
    images: tuple[TrueImage, ...]
    categories: Mapping[int, str] | None
    normalized: bool = False
    notes: tuple[str, ...] = ()

    @property
    def objects(self) -> list[TrueObject]:
        """The objects of all images."""
        return [each for image in self.images for each in image.objects]

    @property
    def keypoints(self) -> int:
        """Number of keypoints of an object; 0 if none has any."""
        return max((len(each.keypoints) // 3 for each in self.objects), default=0)

    @property
    def has_masks(self) -> bool:
        """Whether every object has a mask."""
        return all(each.segmentation is not None for each in self.objects)
