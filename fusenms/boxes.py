"""Box arithmetic in NumPy. Boxes are ``[..., 4]`` (xyxy: corners; cxcywh: center and size); oriented boxes are ``[..., 5]``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
"""An array of any floating-point dtype."""

THINNEST = 1e-3
"""Pixels. An oriented box with a side not longer than this is degenerate: it overlaps nothing."""
MAX_REACH, MAX_REACH_ORIENTED = 1e18, 1e8
"""Limits on the sum of a box's absolute coordinates, in pixels. float32 can hold the square of the first limit, and the fourth power of
the second one, which is for oriented boxes. A box beyond its limit is never selected."""
PROBIOU_EPSILON = 1e-7
"""Added inside the Hellinger distance, so that the probabilistic IoU of distant boxes is exactly 0."""


def cxcywh_to_xyxy(boxes: Floats) -> Floats:
    """Convert center and size ``[..., 4]`` to corners, in the same unit and dtype."""
    half = boxes[..., 2:] / 2
    return np.concatenate((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def oriented_to_corners(boxes: Floats) -> Floats:
    """Corner points ``[..., 4, 2]`` of oriented boxes ``[..., 5]`` (cx, cy, w, h, angle in radians), in order around the box.

    The angle turns from x to y. The first point is at the high end of both sides.
    """
    center, angle = boxes[..., None, :2], boxes[..., 4:]
    along = np.concatenate((np.cos(angle), np.sin(angle)), -1)[..., None, :] * (boxes[..., None, 2:3] / 2)
    across = np.concatenate((-np.sin(angle), np.cos(angle)), -1)[..., None, :] * (boxes[..., None, 3:4] / 2)
    return np.concatenate(
        (center + along + across, center + along - across, center - along - across, center - along + across), -2
    )


def upright_around(corners: Floats) -> Floats:
    """Smallest xyxy boxes ``[..., 4]`` that contain points ``[..., n, 2]``."""
    return np.concatenate((corners.min(-2), corners.max(-2)), -1)


def pairwise_probiou(a: Floats, b: Floats) -> Floats:
    """Probabilistic IoU ``[n, m]`` of oriented boxes ``[n, 5]`` and ``[m, 5]``; 0 if a side is not above `THINNEST`.

    It is 1 minus the Hellinger distance of the boxes as normal distributions. Source: Llerena et al., "Gaussian Bounding Boxes and
    Probabilistic Intersection-over-Union", 2021. `PROBIOU_EPSILON` is used as in Ultralytics.
    """

    def covariance(boxes: Floats) -> Floats:
        turn = np.stack(
            (np.cos(boxes[:, 4]), -np.sin(boxes[:, 4]), np.sin(boxes[:, 4]), np.cos(boxes[:, 4])), 1
        ).reshape(-1, 2, 2)
        return turn @ (boxes[:, 2:4, None] ** 2 / 12 * np.eye(2)) @ turn.transpose(0, 2, 1)

    thick = (a[:, 2:4].min(1) > THINNEST)[:, None] & (b[:, 2:4].min(1) > THINNEST)[None]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        both = covariance(a)[:, None] + covariance(b)[None]
        apart = a[:, None, :2] - b[None, :, :2]
        determinant = both[..., 0, 0] * both[..., 1, 1] - both[..., 0, 1] * both[..., 1, 0]
        adjugate = np.stack((both[..., 1, 1], -both[..., 0, 1], -both[..., 1, 0], both[..., 0, 0]), -1).reshape(
            both.shape
        )
        spread = np.einsum("nmi,nmij,nmj->nm", apart, adjugate, apart) / determinant
        area = a[:, 2:4].prod(1)[:, None] * b[:, 2:4].prod(1)[None] / 144
        distance = spread / 4 + np.log(determinant / (4 * area)) / 2
        overlap = 1 - np.sqrt(np.maximum(1 - np.exp(-distance) + PROBIOU_EPSILON, 0))
    return np.where(thick & (overlap > 0), overlap, 0)


def ordered(boxes: Floats) -> Floats:
    """Set negative sizes of corners ``[..., 4]`` to zero, so that the high corner is never below the low one."""
    return np.concatenate((boxes[..., :2], np.maximum(boxes[..., :2], boxes[..., 2:])), -1)


def area(boxes: Floats) -> Floats:
    """Area ``[...]`` of corners ``[..., 4]``; a degenerate box has area 0."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1)


def pairwise_iou(a: Floats, b: Floats) -> Floats:
    """IoU ``[n, m]`` of corners ``[n, 4]`` and ``[m, 4]``; 0 if either box is degenerate."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(-1)
    union = area(a)[:, None] + area(b)[None] - inter
    return np.where(inter > 0, inter / np.where(union > 0, union, 1), 0)
