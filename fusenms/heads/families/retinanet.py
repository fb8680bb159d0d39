"""RetinaNet and EfficientDet, before their decode: deltas to anchor boxes and a sigmoid for each class.

Two outputs, deltas ``[B, N, 4]`` and scores ``[B, N, C]``, where the anchors of a cell lie side by side, or two for each level,
``[B, 4 * A, rows, columns]`` and ``[B, C * A, rows, columns]``. A file does not show its anchors, so that it is read only if the user names
the family; without `anchors` they are those that its authors use. The anchors of RetinaNet (torchvision's, in whole pixels; those of
mmdetection are not rounded, so that they must be given) lie around the low corner of a cell, those of EfficientDet around its center, and
EfficientDet's deltas are y, x, height, width.
Sources: pytorch/vision `RetinaNet`; google/automl and zylo117/Yet-Another-EfficientDet-Pytorch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.anchors import PYRAMID, SETS, by_level
from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.level_outputs import Level, activation_of, group_levels, not_classes, read_level, values_of
from fusenms.heads.probe import Pair, Probe, sum_to_one
from fusenms.layout import AnchorDeltas, Join, Layout, Tap, candidates_per_level

DELTAS, CLASSES = "fusenms/head_deltas", "fusenms/head_classes"


def match(
    probe: Probe, certain: bool, *, name: str, point: float, y_first: bool, log_limit: float | None
) -> Layout | Mismatch:
    """Recognize deltas and class scores, in two outputs or in two for each level."""
    sizes = by_level(probe.anchors or SETS[name], len(PYRAMID))
    if isinstance(sizes, str):
        return Mismatch(sizes)
    decode = AnchorDeltas(PYRAMID, sizes, point=point, y_first=y_first, log_limit=log_limit)
    found = (
        _match_levels(probe, name, decode)
        if len(probe.samples) > 2
        else match_pairs(probe, partial(_match_pair, probe, name, decode))
    )
    if isinstance(found, Layout) and certain:
        return Mismatch(f"nothing in a file shows its anchors; if they are those of {name}, say family={name!r}")
    return found


def _match_pair(probe: Probe, name: str, decode: AnchorDeltas, pair: Pair) -> Layout | Mismatch:
    image, (count, classes) = probe.raw.image, pair.scores.shape
    expected = sum(candidates_per_level(decode, image.height, image.width))
    if count != expected:
        return Mismatch(
            f"found {count} candidates; expected {expected}, {len(decode.anchors[0])} for each cell of strides {list(PYRAMID)}"
        )
    if sum_to_one(pair.scores):
        return Mismatch("the class scores of each candidate sum to 1, so one of them is the background")
    if reason := not_classes(pair.scores) or _not_named(probe, classes):
        return Mismatch(reason)
    return Layout(name, pair.box_tap, pair.classes(0, classes), None, activation_of(pair.scores), decode)


def _match_levels(probe: Probe, name: str, decode: AnchorDeltas) -> Layout | Mismatch:
    shapes, anchors = [list(sample.value.shape) for sample in probe.samples], len(decode.anchors[0])
    levels = [level for sample in probe.samples if sample.value.ndim == 4 and (level := read_level(probe, sample))]
    groups = group_levels(levels) if len(levels) == len(shapes) else None
    deltas = [group for group in groups or [] if group[0].values.shape[1] == 4 * anchors]
    scores = [group for group in groups or [] if group not in deltas and group[0].values.shape[1] % anchors == 0]
    if (
        not groups
        or len(groups) != 2
        or len(deltas) != 1
        or len(scores) != 1
        or any(group[0].axis != 1 for group in groups)
    ):
        return Mismatch(
            f"found outputs of shape {shapes}; expected for each level deltas and class scores of {anchors} anchors"
        )
    if tuple(level.stride for level in deltas[0]) != PYRAMID:
        return Mismatch(f"found strides {[level.stride for level in deltas[0]]}; expected {list(PYRAMID)}")
    classes = scores[0][0].values.shape[1] // anchors
    if reason := not_classes(values_of(scores[0])) or _not_named(probe, classes):
        return Mismatch(reason)
    joins = (anchor_join(DELTAS, deltas[0], anchors), anchor_join(CLASSES, scores[0], anchors))
    boxes, class_tap = (Tap(join.tensor, 2, 0, join.channels) for join in joins)
    decode = replace(decode, anchors_last=False)
    return Layout(name, boxes, class_tap, None, activation_of(values_of(scores[0])), decode, joins)


def anchor_join(tensor: str, group: list[Level], anchors: int) -> Join:
    """The head tensor of maps ``[B, anchors * C, rows, columns]``."""
    return Join(tensor, tuple(level.tensor for level in group), 2, group[0].values.shape[1] // anchors, anchors)


def _not_named(probe: Probe, classes: int) -> str | None:
    names = probe.raw.class_names
    return (
        f"found {classes} classes, but {len(names)} class names in the metadata"
        if names and len(names) != classes
        else None
    )


RETINANET = HeadSpec(
    "retinanet",
    partial(match, name="retinanet", point=0.0, y_first=False, log_limit=math.log(1000 / 16)),
    pixels=PIXELS["imagenet"],
)
EFFICIENTDET = HeadSpec(
    "efficientdet",
    partial(match, name="efficientdet", point=0.5, y_first=True, log_limit=None),
    pixels=PIXELS["imagenet"],
)
