"""Box arithmetic in NumPy. Boxes are ``[..., 4]``; xyxy are corners, cxcywh center and size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
"""Of any floating-point dtype."""


def cxcywh_to_xyxy(boxes: Floats) -> Floats:
    """Center and size ``[..., 4]`` to corners, in the same unit and dtype."""
    half = boxes[..., 2:] / 2
    return np.concatenate((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def ordered(boxes: Floats) -> Floats:
    """Corners ``[..., 4]`` with a negative size made zero: the high corner is never below the low one."""
    return np.concatenate((boxes[..., :2], np.maximum(boxes[..., :2], boxes[..., 2:])), -1)


def area(boxes: Floats) -> Floats:
    """Area ``[...]`` of corners ``[..., 4]``; a degenerate box has area 0."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1)


def pairwise_iou(a: Floats, b: Floats) -> Floats:
    """IoU ``[n, m]`` of corners ``[n, 4]`` and ``[m, 4]``; 0 where either box is degenerate."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(-1)
    union = area(a)[:, None] + area(b)[None] - inter
    return np.where(inter > 0, inter / np.where(union > 0, union, 1), 0)
