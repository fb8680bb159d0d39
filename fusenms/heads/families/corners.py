"""YOLO-NAS, PP-YOLOE and others with separate outputs for boxes and class probabilities, one candidate per cell, not yet suppressed.

Two outputs: boxes ``[B, N, 4]`` and class probabilities ``[B, N, C]`` or ``[B, C, N]``. Boxes are corners, or center and size, in pixels of
the input or normalized to it.
"""

from __future__ import annotations

from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.probe import Pair, Probe, are_probabilities, box_format, sum_to_one
from fusenms.layout import Activation, Layout

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
    decode = box_format(pair.boxes, grid, probe.sides)
    if decode is None:
        return Mismatch("the boxes do not follow the cells of the image")
    return Layout(NAME, pair.box_tap, pair.classes(0, classes), None, Activation.NONE, decode)


CORNERS = HeadSpec(NAME, match)
