"""RT-DETR, D-FINE, DEIM, Deformable and Conditional DETR before their top-k: sigmoid classes, normalized boxes, no suppression.

Class logits or probabilities ``[B, queries, C]`` and boxes ``[B, queries, 4]``, cx, cy, w, h normalized to the input, in two
outputs; or both in one ``[B, queries, 4 + C]``, as older exports of Ultralytics have them. Its newer exports have finished rows
``[B, queries, 6]``: cx, cy, w, h, score and class. They are taken before their top-k if that can be proven. Every class of a query counts,
as in the papers (Zhu et al., 2020; Zhao et al., 2023).

RF-DETR has the same head. Its exports name their outputs `dets` and `labels`, and it takes pixels normalized with ImageNet's mean and
deviation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.late_decode import earliest_rows
from fusenms.heads.probe import Pair, Probe, are_probabilities, as_probabilities, not_queries, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap

NAME, RF_NAME = "rtdetr", "rfdetr"
RF_OUTPUTS = {"dets", "labels"}
OUTSIDE = 0.1
"""How far a box may reach beyond the image, in sides of the image."""
MOST_OF_A_CLASS = 0.2
"""Limit on the average score of a class over the queries of the test image. Most queries find nothing."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize queries with independent classes."""
    if certain and {sample.tensor for sample in probe.samples} == RF_OUTPUTS:
        return Mismatch("found outputs named dets and labels, as those of RF-DETR")
    return _match(probe, certain)


def match_rf(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize the same head in an export of RF-DETR. Only the names of its outputs tell, and they decide over the pixels."""
    if certain and {sample.tensor for sample in probe.samples} != RF_OUTPUTS:
        return Mismatch(
            f"found outputs {', '.join(sample.tensor for sample in probe.samples)}; expected dets and labels"
        )
    layout = _match(probe, certain)
    return replace(layout, family=RF_NAME) if isinstance(layout, Layout) else layout


def _match(probe: Probe, certain: bool) -> Layout | Mismatch:
    if len(probe.samples) == 1:
        layout = _match_joined(probe)
        return layout if isinstance(layout, Layout) else _match_rows(probe, layout)
    return match_pairs(probe, lambda pair: _match_pair(probe, pair, certain))


def _match_pair(probe: Probe, pair: Pair, certain: bool) -> Layout | Mismatch:
    if reason := not_queries(pair.boxes) or _not_sigmoid(probe, pair.scores, certain):
        return Mismatch(reason)
    return _layout(pair.box_tap, pair.classes(0, pair.scores.shape[1]), pair.scores)


def _match_joined(probe: Probe) -> Layout | Mismatch:
    sample = probe.samples[0]
    shape = list(sample.value.shape)
    if len(shape) != 3 or shape[2] < 5:
        return Mismatch(f"found an output of shape {shape}; expected [batch, queries, 4 + classes]")
    boxes, scores = sample.value[0, :, :4], sample.value[0, :, 4:]
    if reason := not_queries(boxes) or _not_sigmoid(probe, scores, True):
        return Mismatch(reason)
    if not are_probabilities(scores):
        return Mismatch("the channels after the box are not probabilities")
    return _layout(Tap(sample.tensor, 2, 0, 4), Tap(sample.tensor, 2, 4, shape[2]), scores)


def _match_rows(probe: Probe, otherwise: Mismatch) -> Layout | Mismatch:
    """Match finished rows of centers; ``otherwise`` is the reason for an output of another shape."""
    sample = probe.samples[0]
    shape = sample.value.shape
    if len(shape) != 3 or shape[2] != 6:
        return otherwise
    rows, names = sample.value[0], probe.raw.class_names
    boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5]
    if reason := not_queries(boxes):
        return Mismatch(reason)
    if not are_probabilities(scores) or (np.diff(scores) > 0).any():
        return Mismatch("channel 5 does not hold scores, best first")
    if (labels != np.round(labels)).any() or (labels < 0).any() or (names and (labels >= len(names)).any()):
        return Mismatch("channel 6 does not hold class numbers")
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    if low.min() < -OUTSIDE or high.max() > 1 + OUTSIDE or (boxes[:, :2] + boxes[:, 2:]).max() <= 1:
        return Mismatch("nothing shows that the boxes are centers and sizes, and not low corners and sizes")
    taps = (Tap(sample.tensor, 2, *span) for span in ((0, 4), (4, 5), (5, 6)))
    box_tap, score_tap, label_tap = taps
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    found = Layout(NAME, box_tap, score_tap, None, Activation.NONE, decode, suppress=False, labels=label_tap)
    return earliest_rows(probe, found)


def _layout(boxes: Tap, classes: Tap, scores: np.ndarray) -> Layout:
    activation = Activation.NONE if are_probabilities(scores) else Activation.SIGMOID
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    return Layout(NAME, boxes, classes, None, activation, decode, suppress=False)


def _not_sigmoid(probe: Probe, scores: np.ndarray, certain: bool) -> str | None:
    """Return why these are not class scores with a sigmoid each; None if they may be."""
    names = probe.raw.class_names
    if names and len(names) != scores.shape[1]:
        return f"found {scores.shape[1]} classes, but {len(names)} class names in the metadata"
    if sum_to_one(scores):
        return "the class scores of each query sum to 1; expected independent ones"
    highest = float(as_probabilities(scores).mean(0).max())
    if certain and not highest < MOST_OF_A_CLASS:
        return (
            f"a class has a score of {highest:.2g} on average, like the class for no object of a softmax; if these are sigmoids, "
            f"say family={NAME!r}"
        )
    return None


RTDETR = HeadSpec(NAME, match, stretch=True)
RFDETR = HeadSpec(RF_NAME, match_rf, pixels=PIXELS["imagenet"], stretch=True)
