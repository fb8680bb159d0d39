"""YOLO-NAS, PP-YOLOE and others with separate outputs for boxes and class probabilities, one candidate per cell, not yet suppressed.

Two outputs: boxes ``[B, N, 4]`` and class probabilities ``[B, N, C]`` or ``[B, C, N]``. Boxes are corners, or center and size, in pixels of
the input or normalized to it.
"""

from __future__ import annotations

import numpy as np

from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.probe import Pair, Probe, are_corners, are_normalized, are_probabilities, follows_grid, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Layout

NAME = "corners"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize boxes on a grid, with a row of class probabilities each."""
    return match_pairs(probe, lambda pair: _match_pair(probe, pair))


def _match_pair(probe: Probe, pair: Pair) -> Layout | Mismatch:
    count, classes = pair.scores.shape
    if (grid := probe.grid(1, count)) is None:
        return Mismatch(f"found {count} candidates; expected one per cell of levels with strides such as 8, 16, 32")
    if not are_probabilities(pair.scores):
        return Mismatch(
            f"found class scores from {pair.scores.min():.3g} to {pair.scores.max():.3g}; expected probabilities"
        )
    if sum_to_one(pair.scores):
        return Mismatch("the class scores of each candidate sum to 1, so one of them is the background")
    names = probe.raw.class_names
    if names and len(names) != classes:
        return Mismatch(f"found {classes} classes, but {len(names)} class names in the metadata")
    normalized = are_normalized(pair.boxes)
    boxes = pair.boxes * probe.sides if normalized else pair.boxes.astype(np.float64)
    if are_corners(boxes) and follows_grid((boxes[:, :2] + boxes[:, 2:]) / 2, grid):
        form = BoxFormat.XYXY
    elif (boxes[:, 2:] >= 0).all() and follows_grid(boxes[:, :2], grid):
        form = BoxFormat.CXCYWH
    else:
        return Mismatch("the boxes do not follow the cells of the image")
    return Layout(NAME, pair.box_tap, pair.classes(0, classes), None, Activation.NONE, Decoded(form, normalized))


CORNERS = HeadSpec(NAME, match)
