"""SCRFD, a face detector (InsightFace): per level two candidates a cell, each with a score, four distances and maybe five landmarks.

Outputs: scores ``[B, n, 1]`` (probabilities), distances ``[B, n, 4]`` in strides and landmarks ``[B, n, 10]`` of each level, where the
candidates of a cell lie side by side; InsightFace's own files have no batch axis, ``[n, 1]``. Everything is measured from the low corner of
the cell. The head is taken where it is still a map ``[B, 2 * C, rows, columns]``, so that it holds for any batch.
Source: deepinsight/insightface, `SCRFD`.
"""

from __future__ import annotations

import numpy as np

from fusenms.artifacts.preprocessing import Pixels
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import STRIDES, in_pixels, not_distances
from fusenms.heads.probe import Probe, Sample, are_probabilities, map_before
from fusenms.layout import Activation, Distances, Join, KeypointTerms, Layout, Tap, cells_along

NAME = "scrfd"
ANCHORS = 2
WIDTHS = {1: "fusenms/head_scores", 4: "fusenms/head_distances", 10: "fusenms/head_landmarks"}


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize levels of scores, distances and landmarks, of two candidates a cell."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    expected = f"found outputs of shape {shapes}; expected for each level two candidates a cell, with a score, 4 distances and 10 landmarks"
    by_width: dict[int, dict[int, Sample]] = {}
    for sample in probe.samples:
        width, stride = sample.value.shape[-1], _stride(probe, sample)
        if stride is None or width not in WIDTHS or stride in by_width.setdefault(width, {}):
            return Mismatch(expected)
        by_width[width][stride] = sample
    strides = tuple(sorted(by_width.get(1, ())))
    if not {1, 4} <= set(by_width) or any(tuple(sorted(some)) != strides for some in by_width.values()):
        return Mismatch(expected)
    rows = {width: [_rows(some[stride]) for stride in strides] for width, some in by_width.items()}
    scores = np.concatenate(rows[1])
    if not are_probabilities(scores):
        return Mismatch(f"found scores from {scores.min():.3g} to {scores.max():.3g}; expected probabilities")
    if reason := not_distances(np.concatenate(rows[4])):
        return Mismatch(reason)
    if 10 in rows and in_pixels(rows[10], strides, probe.raw.image):
        return Mismatch("its landmarks are in pixels, not in strides; describe them by a layout")
    joins, activation = [], Activation.NONE
    for width, some in sorted(by_width.items()):
        maps = [map_before(probe, some[stride].tensor, ANCHORS, through_sigmoid=width == 1) for stride in strides]
        parts = [found for found in maps if found is not None]
        if len(parts) != len(strides):
            return Mismatch(
                "its outputs are not those of maps [batch, channels, rows, columns], moved only; describe them by a layout"
            )
        if width == 1 and any(sigmoid for _, sigmoid in parts):
            activation = Activation.SIGMOID
        joins.append(Join(WIDTHS[width], tuple(name for name, _ in parts), 2, width, anchors=ANCHORS))
    score_tap, box_tap, *others = (Tap(join.tensor, 2, 0, join.channels) for join in joins)
    decode = Distances(strides, 1, point=0.0, anchors=ANCHORS)
    points = KeypointTerms(others[0], 2, factor=1.0) if others else None
    return Layout(NAME, box_tap, score_tap, None, activation, decode, tuple(joins), keypoints=points)


def _stride(probe: Probe, sample: Sample) -> int | None:
    """The stride of the level whose candidates an output ``[1, n, C]`` or ``[n, C]`` has; None if there is none."""
    image, shape = probe.raw.image, sample.value.shape
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        return None
    counts = {ANCHORS * cells_along(image.height, s) * cells_along(image.width, s): s for s in STRIDES}
    return counts.get(shape[-2])


def _rows(sample: Sample) -> np.ndarray:
    return sample.value.reshape(-1, sample.value.shape[-1])


SCRFD = HeadSpec(NAME, match, pixels=Pixels("rgb", 255.0, (127.5,) * 3, (128.0,) * 3))
