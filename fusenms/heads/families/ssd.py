"""SSD and detectors derived from it, such as UltraFace: decoded corners, and a softmax over the classes and the background.

Two outputs: boxes ``[B, N, 4]`` (corners, normalized or in pixels of the input) and probabilities ``[B, N, 1 + C]`` or ``[B, 1 + C, N]``.
The first or the last class is the background.
"""

from __future__ import annotations

from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.probe import Pair, Probe, are_corners, are_normalized, background_of, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Layout

NAME = "ssd"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize corners, with a row of a softmax each."""
    return match_pairs(probe, lambda pair: _match_pair(probe, pair))


def _match_pair(probe: Probe, pair: Pair) -> Layout | Mismatch:
    if not sum_to_one(pair.scores):
        return Mismatch(
            "the class scores of a candidate do not sum to 1; expected a softmax over classes and background"
        )
    if not are_corners(pair.boxes):
        return Mismatch("the boxes are not corners: a high corner is below its low corner")
    place = background_of(pair.scores)
    if place is None:
        return Mismatch(
            "neither the first nor the last class is the best one of most candidates; expected the background there"
        )
    classes = pair.scores.shape[1] - 1
    names = probe.raw.class_names
    if names and len(names) != classes:
        return Mismatch(f"found {classes} classes beside the background, but {len(names)} class names in the metadata")
    scores = pair.classes(1, 1 + classes) if place == 0 else pair.classes(0, classes)
    decode = Decoded(BoxFormat.XYXY, are_normalized(pair.boxes))
    return Layout(NAME, pair.box_tap, scores, None, Activation.NONE, decode)


SSD = HeadSpec(NAME, match)
