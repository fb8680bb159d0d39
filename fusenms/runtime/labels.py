"""Place text labels at boxes, so that none covers another or leaves the image.

The placement is greedy, as is usual for map labels: the first label takes the best free position at its box, the next one the best of those
still free. Every position touches the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OFFSETS = np.array([(0, -1), (0, 0), (-1, -1), (-1, 0), (-0.5, -1), (-0.5, 0), (0, -0.5), (-1, -0.5)])
"""Where a label lies at an anchor, in widths and heights of the label, best first: above it to the right, below it to the right, …"""
RANK_COST = 0.002
"""Of each further position in the order of preference, in shares of a box that a label would hide."""
POINT_COST = 0.2
"""Of a hidden keypoint, in the same unit."""
FULLEST = 0.7
"""Share of the image beyond which labels are not tried: they would not fit."""


@dataclass(frozen=True)
class Obstacles:
    """What labels should not hide.

    Attributes:
        height: of the image.
        width: of the image.
        boxes: ``[n, 4]`` xyxy in pixels, all of the image.
        points: ``[m, 2]`` x, y in pixels: keypoints.
    """

    height: int
    width: int
    boxes: np.ndarray
    points: np.ndarray


def place_labels(
    sizes: Sequence[Sequence[tuple[int, int]]], corners: np.ndarray, obstacles: Obstacles, all_or_none: bool = False
) -> list[tuple[int, int, int] | None]:
    """Find a place for each label.

    Args:
        sizes: of each label the sizes (width, height in pixels) of its texts, preferred first.
        corners: ``[n, 4, 2]`` corner points of the boxes, x and y in pixels.
        obstacles: the image, and what in it should stay visible.
        all_or_none: stop at the first label that finds no place.

    Returns:
        of each label the number of its text and its left and top edge in pixels; None where no text finds a place. With `all_or_none` an
        empty list where one finds none.
    """
    places: list[tuple[int, int, int] | None] = []
    taken = np.zeros((len(sizes), 4))
    count, room = 0, FULLEST * obstacles.height * obstacles.width
    if all_or_none and sum(width * height for (width, height), *_ in sizes) > room:
        return []
    for texts, points in zip(sizes, anchors(corners, obstacles), strict=True):
        found = None
        for number, (width, height) in enumerate(texts):
            if (best := best_place(width, height, points, taken[:count], obstacles)) is not None:
                found = (number, *best)
                taken[count] = (*best, best[0] + width, best[1] + height)
                count += 1
                break
        if found is None and all_or_none:
            return []
        places.append(found)
    return places


def anchors(corners: np.ndarray, obstacles: Obstacles) -> np.ndarray:
    """Points ``[n, 8, 2]`` at which labels may be put: corners and middles of the edges inside the image, from the top to the bottom."""
    points = np.concatenate((corners, (corners + np.roll(corners, -1, 1)) / 2), 1).round()
    points = points.clip(0, (obstacles.width, obstacles.height))
    order = np.lexsort((points[..., 0], points[..., 1]))
    return np.take_along_axis(points, order[..., None], 1)


def best_place(
    width: int, height: int, points: np.ndarray, taken: np.ndarray, obstacles: Obstacles
) -> tuple[int, int] | None:
    """Left and top edge of one label at one of the anchors ``[A, 2]``, apart from those taken ``[p, 4]``; None where there is no room."""
    if width > obstacles.width or height > obstacles.height:
        return None
    size = np.array((width, height))
    wanted = (points[:, None] + OFFSETS[None] * size).reshape(-1, 2)
    corner = np.floor(wanted).clip(0, (obstacles.width - width, obstacles.height - height))
    cost = RANK_COST * np.arange(len(corner)) + np.abs(corner - wanted).sum(1) / (width + height)
    boxes = np.concatenate((corner, corner + size), 1)
    reach = np.concatenate((boxes[:, :2].min(0), boxes[:, 2:].max(0)))[None]
    free = ~(shared(boxes, taken[shared(reach, taken)[0] > 0]) > 0).any(1)
    if not free.any():
        return None
    corner, boxes, cost = corner[free], boxes[free], cost[free]
    near = obstacles.boxes[shared(reach, obstacles.boxes)[0] > 0]
    areas = ((near[:, 2] - near[:, 0]) * (near[:, 3] - near[:, 1])).clip(1)
    cost = cost + (shared(boxes, near) / areas).sum(1)
    x, y = obstacles.points[:, 0], obstacles.points[:, 1]
    left, top, right, bottom = boxes.T[..., None]
    cost = cost + POINT_COST * ((x >= left) & (x < right) & (y >= top) & (y < bottom)).sum(1)
    left, top = corner[cost.argmin()]
    return int(left), int(top)


def shared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area ``[n, m]`` that each of the boxes ``[n, 4]`` shares with each of ``[m, 4]`` (xyxy)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clip(0).prod(2)
