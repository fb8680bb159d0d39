"""End-to-end exports with finished rows (YOLOv10, YOLO26, D-FINE, DEIM, RT-DETR with their top-k): nothing to suppress.

Rows are sorted by score, best first. There are two forms:

- One output ``[B, K, 6]``: x1, y1, x2, y2, score, class. Mask coefficients, keypoints or an angle may follow. With an angle, the first four
  values are cx, cy, w, h of the rotated box.
- Three outputs in any order: classes ``[B, K]``, boxes ``[B, K, 4]`` (corners) and scores ``[B, K]``.

If the graph shows the inputs of its top-k, the head is taken there. This needs fewer operators, and it avoids the operators that fix the
batch size in many such files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.late_decode import earliest_rows
from fusenms.heads.probe import Probe, Sample, are_corners, are_normalized, are_probabilities
from fusenms.heads.task_outputs import TASKS, not_terms, task_channels, task_terms
from fusenms.layout import Activation, BoxFormat, Decoded, Join, Layout, Tap

NAME = "rows"
MOST = 1000
SCORES, LABELS = "fusenms/row_scores", "fusenms/row_labels"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize rows of corners, score and class."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    expected = "one [batch, rows, 6] (corners, score, class), or classes [batch, rows], boxes [batch, rows, 4] and scores [batch, rows]"
    together, maps = probe.split_prototypes()
    extra = task_channels(probe, maps) if len(maps) <= 1 else Mismatch(f"found outputs of shape {shapes}")
    if isinstance(extra, Mismatch):
        return extra
    own = list(together[0].value.shape) if len(together) == 1 else []
    if len(own) == 3 and own[2] == 6 + extra and own[1] <= MOST:
        sample = together[0]
        rows = sample.value[0]
        if reason := _not_rows(rows[:, :4], rows[:, 4], rows[:, 5], probe, certain) or not_terms(probe, rows[:, 6:]):
            return Mismatch(reason)
        boxes, scores, labels = (Tap(sample.tensor, 2, *span) for span in ((0, 4), (4, 5), (5, 6)))
        terms = task_terms(probe, Tap(sample.tensor, 2, 6, own[2]) if extra else None, maps)
        return _layout(probe, boxes, scores, labels, rows[:, :4], (), terms)
    boxes_of = [s for s in probe.samples if s.value.ndim == 3 and s.value.shape[2] == 4 and s.value.shape[1] <= MOST]
    flat = [s for s in probe.samples if s.value.ndim == 2]
    if (
        len(shapes) != 3
        or len(boxes_of) != 1
        or len(flat) != 2
        or any(s.value.shape[1] != boxes_of[0].value.shape[1] for s in flat)
    ):
        return Mismatch(f"found outputs of shape {shapes}; expected {expected}")
    return _match_apart(probe, boxes_of[0], flat, certain)


def _match_apart(probe: Probe, boxes: Sample, flat: list[Sample], certain: bool) -> Layout | Mismatch:
    found, reasons = [], []
    for scores, labels in (flat, flat[::-1]):
        if scores.value.dtype.kind != "f":
            continue
        reason = _not_rows(boxes.value[0], scores.value[0], labels.value[0], probe, certain)
        reasons.append(reason)
        if reason is None:
            found.append((scores.tensor, labels.tensor))
    if len(found) != 1:
        return Mismatch(
            "either output may be the scores" if found else str(next(filter(None, reasons), "no output holds scores"))
        )
    joins = tuple(Join(name, (part,), 2, 1) for name, part in zip((SCORES, LABELS), found[0], strict=True))
    return _layout(
        probe, Tap(boxes.tensor, 2, 0, 4), Tap(SCORES, 2, 0, 1), Tap(LABELS, 2, 0, 1), boxes.value[0], joins, {}
    )


def _layout(
    probe: Probe, box_tap: Tap, scores: Tap, labels: Tap, boxes: np.ndarray, joins: tuple[Join, ...], extra: dict[str, Any]
) -> Layout:  # fmt: skip
    decode = Decoded(BoxFormat.XYXY, are_normalized(boxes)) if "angle" not in extra else Decoded(BoxFormat.CXCYWH)
    rows = Layout(NAME, box_tap, scores, None, Activation.NONE, decode, joins, suppress=False, labels=labels, **extra)
    return rows if extra else earliest_rows(probe, rows)


def _not_rows(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, probe: Probe, certain: bool) -> str | None:
    """Return why these are not finished rows; None if they may be."""
    if not are_probabilities(scores):
        return f"found scores from {scores.min():.3g} to {scores.max():.3g}; expected probabilities"
    if (np.diff(scores) > 0).any():
        return "the rows are not sorted by score"
    names = probe.raw.class_names
    if (labels != np.round(labels)).any() or (labels < -1).any() or (names and (labels >= len(names)).any()):
        return "the last channel does not hold class numbers"
    if certain and not scores.any():
        return (
            f"every score is 0 on the test image, so nothing is shown; if these are finished rows, say family={NAME!r}"
        )
    if probe.raw.task != "obb" and not are_corners(boxes[scores > 0]) and scores.any():
        return "the boxes are not corners: a high corner is below its low corner"
    return None


ROWS = HeadSpec(NAME, match, tasks=TASKS)
