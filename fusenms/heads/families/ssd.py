"""SSD and detectors derived from it, such as UltraFace: decoded corners, and a softmax over the classes and the background.

Two outputs: boxes ``[B, N, 4]`` (corners, normalized or in pixels of the input) and probabilities ``[B, N, 1 + C]`` or ``[B, 1 + C, N]``.
The first or the last class is the background. UltraFace is told apart by the number of its candidates, since it takes other pixels.
"""

from __future__ import annotations

from dataclasses import replace

from fusenms.artifacts.preprocessing import Pixels
from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.probe import Pair, Probe, are_corners, are_normalized, background_of, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Layout

NAME, ULTRAFACE_NAME = "ssd", "ultraface"
ULTRAFACE_ANCHORS = {8: 3, 16: 2, 32: 2, 64: 3}
"""Anchors per cell of each stride. Source: Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB, `vision/ssd/config/fd_config.py`."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize corners, with a row of a softmax each."""
    layout = match_pairs(probe, lambda pair: _match_pair(probe, pair))
    if isinstance(layout, Layout) and certain and _is_ultraface(probe, layout):
        return Mismatch("found the candidates and the class of UltraFace, which takes other pixels")
    return layout


def match_ultraface(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize one class, with the candidates of UltraFace."""
    layout = match_pairs(probe, lambda pair: _match_pair(probe, pair))
    if isinstance(layout, Layout) and not _is_ultraface(probe, layout):
        return Mismatch("expected one class, and the anchors of UltraFace")
    return layout if isinstance(layout, Mismatch) else replace(layout, family=ULTRAFACE_NAME)


def _is_ultraface(probe: Probe, layout: Layout) -> bool:
    strides, anchors = zip(*ULTRAFACE_ANCHORS.items(), strict=True)
    count = sum(a * cells for a, cells in zip(anchors, probe.cells(strides), strict=True))
    boxes = next(sample.value for sample in probe.samples if sample.tensor == layout.boxes.tensor)
    return layout.num_classes == 1 and boxes.shape[layout.boxes.candidate_axis] == count


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
ULTRAFACE = HeadSpec(
    ULTRAFACE_NAME,
    match_ultraface,
    pixels=Pixels("rgb", 255.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    stretch=True,
)
