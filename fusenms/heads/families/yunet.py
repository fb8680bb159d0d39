"""YuNet, a face detector: per level one box and five landmarks per cell, with a class and an objectness.

Four outputs per level: ``[B, cells, 1]`` twice, ``[B, cells, 4]`` and ``[B, cells, 10]``. Class and objectness are probabilities, the box
terms are those of YOLOX, and x and y of a landmark are (t + cell) * stride. The score is the square root of class times objectness, so that
it does not matter which is which. Source: ShiqiYu/libfacedetection.train, and OpenCV's `FaceDetectorYN`.
"""

from __future__ import annotations

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import group_levels, join_group, read_level, values_of, whole_tap
from fusenms.heads.probe import Probe, are_probabilities
from fusenms.layout import Activation, GridOffsets, KeypointTerms, Layout

NAME = "yunet"
WIDTHS = (1, 1, 4, 10)
NAMES = ("fusenms/head_classes", "fusenms/head_objectness", "fusenms/head_boxes", "fusenms/head_landmarks")


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize levels of class, objectness, box and landmarks."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    expected = f"found outputs of shape {shapes}; expected for each level two of one channel, one of 4 and one of 10"
    found = [level for sample in probe.samples if (level := read_level(probe, sample)) is not None]
    groups = group_levels(found) if len(found) == len(shapes) else None
    if groups is None or tuple(group[0].values.shape[1] for group in groups) != WIDTHS:
        return Mismatch(expected)
    scores = np.concatenate([values_of(group) for group in groups[:2]])
    if not are_probabilities(scores):
        return Mismatch(f"found scores from {scores.min():.3g} to {scores.max():.3g}; expected probabilities")
    joins = tuple(join_group(name, group) for name, group in zip(NAMES, groups, strict=True))
    classes, objectness, boxes, landmarks = map(whole_tap, joins)
    strides = tuple(level.stride for level in groups[0])
    return Layout(
        NAME,
        boxes,
        classes,
        objectness,
        Activation.NONE,
        GridOffsets(strides),
        joins,
        objectness_weight=0.5,
        keypoints=KeypointTerms(landmarks, 2, factor=1.0),
    )


YUNET = HeadSpec(NAME, match, pixels=PIXELS["bgr255"])
