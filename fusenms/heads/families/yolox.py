"""YOLOX and YOLOv6 (as its authors export it): one anchor per cell, with objectness, decoded in the file or not.

One output ``[B, N, 5 + C]``: box, objectness, then C class probabilities. A decoded box is cx, cy, w, h in pixels of the input. The default
export of YOLOX is not decoded: offsets to the cell and logarithms of the size, in units of the stride. Exports for NPUs have three outputs
for each level: 4 box terms, 1 objectness and C classes, as probabilities or as logits. The objectness of YOLOv6 is always 1, and it takes
RGB from 0 to 1.
"""

from __future__ import annotations

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import activation_of, join_group, score_box_groups, values_of, whole_tap
from fusenms.heads.probe import Probe, are_probabilities, box_format, hold_labels, sum_to_one
from fusenms.layout import Activation, GridOffsets, Layout, Tap

NAME, V6 = "yolox", "yolov6"
STRIDES = (8, 16, 32)
LEVEL_TENSORS = ("fusenms/head_boxes", "fusenms/head_classes", "fusenms/head_objectness")
MAX_CELL_OFFSET, MAX_LOG_SIZE = 20.0, 8.0
"""Limits on raw offsets, in cells, and on logarithms of sizes, in strides. Values beyond them are not raw box terms."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize an output with one candidate per cell and objectness, or three outputs for each level."""
    if len(probe.samples) > 3:
        return _match_levels(probe, certain)
    layout = _match(probe, certain, NAME)
    if isinstance(layout, Layout) and certain and _objectness_is_one(probe):
        return Mismatch(f"the objectness is always 1, as in {V6}")
    return layout


def match_v6(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize an output with one candidate per cell and an objectness of 1."""
    layout = _match(probe, False, V6)  # that channel 5 is always 1 shows that it is no class
    if isinstance(layout, Layout) and (isinstance(layout.decode, GridOffsets) or not _objectness_is_one(probe)):
        return Mismatch("expected decoded boxes and an objectness that is always 1")
    return layout


def _objectness_is_one(probe: Probe) -> bool:
    return bool((probe.samples[0].value[0, :, 4] == 1).all())


def _match(probe: Probe, certain: bool, name: str) -> Layout | Mismatch:
    if probe.raw.task != "detect":
        return Mismatch(f"the file says that its task is {probe.raw.task!r}; expected 'detect'")
    shapes = [list(sample.value.shape) for sample in probe.samples]
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return Mismatch(f"found outputs of shape {shapes}; expected one [batch, candidates, 5 + classes]")
    sample, (_, count, width) = probe.samples[0], shapes[0]
    strides = probe.strides(1, count)
    if strides is None or width < 6:
        return Mismatch(
            f"found an output of shape {shapes[0]}; expected [batch, candidates, 5 + classes] with one candidate "
            "per cell of levels with strides such as 8, 16, 32"
        )
    rows, names, classes = sample.value[0], probe.raw.class_names, width - 5
    if names and len(names) != classes:
        return Mismatch(
            f"found {classes} channels after box and objectness, but {len(names)} class names in the metadata"
        )
    if not are_probabilities(rows[:, 4:]):
        return Mismatch(f"found scores from {rows[:, 4:].min():.3g} to {rows[:, 4:].max():.3g}; expected probabilities")
    if hold_labels(rows[:, 5:]):
        return Mismatch("a class channel holds whole numbers only, as the number of the best class does")
    if certain and not names and not probe.joins_objectness(classes):
        return Mismatch(
            "nothing shows that channel 5 is objectness (no class names in the metadata; the output is joined from "
            f"{probe.joins or 'unknown'} channels); if it is, say family={name!r}"
        )
    boxes, objectness, scores = (Tap(sample.tensor, 2, *span) for span in ((0, 4), (4, 5), (5, width)))
    grid = probe.grid(1, count)
    assert grid is not None
    decode = box_format(rows[:, :4], grid, probe.sides)
    if decode is not None:
        return Layout(name, boxes, scores, objectness, Activation.NONE, decode)
    if _are_offsets(rows[:, :4]):
        return Layout(name, boxes, scores, objectness, Activation.NONE, GridOffsets(strides))
    return Mismatch("the first four channels are neither boxes in pixels of the input nor offsets to the cells")


def _match_levels(probe: Probe, certain: bool) -> Layout | Mismatch:
    groups = score_box_groups(probe)
    if isinstance(groups, str):
        return Mismatch(groups)
    classes, objectness, boxes = groups
    terms, names, count = values_of(boxes), probe.raw.class_names, classes[0].values.shape[1]
    if not (terms < 0).any() or not _are_offsets(terms):
        return Mismatch(
            "the four box channels are not offsets to the cells: none is below 0, or some are far too large"
        )
    if certain and not (terms[:, 2:] < 0).any():
        return Mismatch(
            "none of the channels of sizes is below 0, so they may be sizes, not their logarithms; if they are logarithms, say "
            f"family={NAME!r}"
        )
    strides = tuple(level.stride for level in boxes)
    if strides != STRIDES:
        return Mismatch(f"found strides {list(strides)}; expected {list(STRIDES)}")
    activations = {activation_of(values_of(group)) for group in (classes, objectness)}
    if len(activations) > 1 or sum_to_one(values_of(classes)):
        return Mismatch("either class scores or the objectness had a sigmoid already, or class scores had a softmax")
    if names and len(names) != count:
        return Mismatch(f"found {count} classes, but {len(names)} class names in the metadata")
    joins = tuple(map(join_group, LEVEL_TENSORS, (boxes, classes, objectness)))
    (activation,) = activations
    box_tap, class_tap, objectness_tap = map(whole_tap, joins)
    return Layout(NAME, box_tap, class_tap, objectness_tap, activation, GridOffsets(strides), joins)


def _are_offsets(terms: np.ndarray) -> bool:
    """Whether box terms ``[N, 4]`` may be offsets in cells, and logarithms of sizes in strides."""
    moves = bool((terms.std(0) > 0).all())
    return moves and abs(terms[:, :2]).max() <= MAX_CELL_OFFSET and abs(terms[:, 2:4]).max() <= MAX_LOG_SIZE


YOLOX = HeadSpec(NAME, match, pixels=PIXELS["bgr255"])
YOLOV6 = HeadSpec(V6, match_v6)
