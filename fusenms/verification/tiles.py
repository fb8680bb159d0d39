"""The reference of tiles, in NumPy and float64: what is cut out of a frame, and where the candidates of a tile lie in it.

A frame's candidates are those of its tiles, each decoded alone by `fusenms.reference` and then moved to the frame. Suppression and
selection are those of `fusenms.reference` on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fusenms.artifacts.frames import Tiles
from fusenms.artifacts.raw import ImageInput
from fusenms.boxes import MAX_REACH, MAX_REACH_ORIENTED
from fusenms.reference import Candidates, Floats
from fusenms.transforms.tiles import PLACES
from fusenms.verification.image_heads import ImageHead
from fusenms.verification.letterboxing import Place, Size, in_colors, letterboxed


@dataclass(frozen=True)
class Tile:
    """A part of a frame: its first row and column, and where it lies in the model's input."""

    top: int
    left: int
    place: Place

    @property
    def mapping(self) -> tuple[Floats, Floats]:
        """Scale and shift of x and y, from pixels of the model's input to those of the frame."""
        place = self.place
        scale = np.array((place.width / place.inner[1], place.height / place.inner[0]))
        return scale, np.array((self.left, self.top)) - scale * (place.left, place.top)


def tiles_of(size: Size, tiles: Tiles, image: ImageInput) -> list[Tile]:
    """The tiles of a frame of a size, row by row, and then its whole."""
    tops, lefts = (_starts(*pair, tiles.overlap) for pair in zip(size, (tiles.rows, tiles.columns), strict=True))
    found = [Tile(top, left, Place.of(height, width, image)) for top, height in tops for left, width in lefts]
    return [*found, Tile(0, 0, Place.of(*size, image))] if tiles.whole else found


def _starts(side: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """Start and length of each tile along a side."""
    length = math.ceil(side / (1 + (count - 1) * (1 - overlap)))
    if count == 1:
        return [(0, length)]
    return [(math.floor(i * (side - length) / (count - 1)), length) for i in range(count)]


def tiled_images(frames: np.ndarray, tiles: list[Tile], image: ImageInput, channels: str) -> np.ndarray:
    """What a model is given for the tiles of frames: ``[B * tiles, 3, height, width]`` float64, in levels from 0 to 255."""
    whole = in_colors(frames, channels)
    cut = [
        letterboxed(whole[:, t.top : t.top + t.place.height, t.left : t.left + t.place.width], image, "rgb")
        for t in tiles
    ]
    return np.stack(cut, 1).reshape(-1, 3, image.height, image.width)


@dataclass(frozen=True)
class TiledHead(ImageHead):
    """Reads the head tensors of the tiles of frames, ``[B * tiles, …]``."""

    tiles: tuple[Tile, ...]

    @property
    def each(self) -> int:
        return len(self.tiles)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return {PLACES: np.array([np.concatenate(tile.mapping) for tile in self.tiles], np.float32)}

    def candidates(self, head: Mapping[str, np.ndarray], image: int) -> Candidates:
        found = [super(TiledHead, self).candidates(head, image * self.each + i) for i in range(self.each)]
        boxes = [self._moved(one.boxes, tile) for one, tile in zip(found, self.tiles, strict=True)]
        given = [one.given for one in found if one.given is not None]
        return replace(
            found[0],
            boxes=np.concatenate(boxes),
            keys=np.concatenate([one.keys for one in found]),
            probabilities=None if found[0].probabilities is None else np.concatenate([one.scores for one in found]),
            labels_by=np.concatenate([one.labels_by for one in found]),
            suppress=True,
            scaled=True,
            given=np.concatenate(given) if given else None,
        )

    def keypoints(self, head: Mapping[str, np.ndarray], image: int, numbers: NDArray[np.int64]) -> Floats:
        assert self.layout.keypoints is not None
        count = head[self.layout.classes.tensor].shape[self.layout.classes.candidate_axis]
        points = np.zeros((len(numbers), self.layout.keypoints.count, self.layout.keypoints.dims))
        for i, tile in enumerate(self.tiles):
            own = numbers // count == i
            some = super().keypoints(head, image * self.each + i, numbers[own] % count)
            scale, shift = tile.mapping
            some[..., :2] = some[..., :2] * scale + shift
            points[own] = some
        return points

    def _moved(self, boxes: Floats, tile: Tile) -> Floats:
        (x, y), shift = tile.mapping
        if self.layout.angle is not None:
            moved, reach = boxes * (x, y, x, y, 1), MAX_REACH_ORIENTED
            moved[:, :2] += shift
        else:
            moved, reach = boxes * (x, y, x, y) + np.tile(shift, 2), MAX_REACH
        with np.errstate(invalid="ignore"):
            return np.where(np.abs(moved).sum(1, keepdims=True) < reach, moved, np.nan)
