"""The semantics of fusenms in NumPy and float64: the reference that every fused graph is compared with.

It shares no code with the modules that emit the graph. The steps for each image:

1. Score every candidate. The score is the highest class probability, times the objectness if the head has one. With `multi_label`, and for
   an end-to-end head whose classes are not a softmax, each class is a separate candidate. A candidate is left out if one of its class
   values is NaN or +infinity, or its score exceeds float32 (whether it takes a place in step 3 is undefined: runtimes differ in the maximum
   of NaN). With a softmax, its class values are those of all classes and of the background; otherwise, if each class is a candidate, its
   own.
2. Keep candidates with score > `score_threshold`.
3. Keep the best `max_candidates`; for an end-to-end head, the best `max_detections`. Ties go to the lower candidate number, then to the
   lower class. Of these, leave out those whose box is not usable: the four corners, before a negative size is set to zero, are finite, and
   their absolute values sum to less than 1e18 pixels (float32 then holds the area); the five numbers of an oriented box to less than 1e8.
4. Unless the head is end-to-end: in descending order of score, drop a candidate whose IoU with a kept one of the same class (of any class,
   with `class_agnostic`) is > `iou_threshold`. A degenerate box has IoU 0 with every box. Oriented boxes use the probabilistic IoU.
5. Keep the best `max_detections`, in the order of step 3. Where this order is that of logits, a row's score is the sigmoid of its logit in
   float32, which may be a unit in the last place above the score of the row before.

With optional inputs (`PostprocessConfig.runtime_thresholds`), a run gives `score_threshold`, one for all classes or one for each, and
`iou_threshold` and `class_mask`:

- Step 1. A class that the mask leaves out is no candidate, and is never the best class of one: the best class is that of the others. Their
  scores stay as they are; a softmax is over all classes. Unusable values count in all classes: a NaN of a class that is left out makes a
  candidate of the best class unusable, as it does in step 1.
- Step 2. A candidate is kept if its score is above the threshold of its class.

Rounding. A float32 graph cannot reproduce a float64 decision whose margin is smaller than the rounding of float32. `postprocess` therefore
takes the observed rows. A decision with a margin below rounding is accepted either way: it follows the observed rows and is counted as a
close call. A decision with a larger margin never depends on the observed rows. Neither does one with a margin of exactly zero, if float32
computes the same numbers: an IoU equal to the threshold, and equal scores of heads whose scores are a single class value. Scores that are a
product or a softmax are rounded before they are compared, so float32 may order two of them that are equal in float64, such as the softmax
of the same logits in another order, or see one beside the threshold that it equals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusenms.boxes import (
    MAX_REACH,
    MAX_REACH_ORIENTED,
    PROBIOU_EPSILON,
    cxcywh_to_xyxy,
    ordered,
    pairwise_iou,
    pairwise_probiou,
)
from fusenms.config import PostprocessConfig, Thresholds
from fusenms.layout import (
    LARGEST,
    Activation,
    AnchorBoxes,
    AnchorDeltas,
    BoxFormat,
    Decoded,
    Distances,
    Gridded,
    Layout,
    PointOffsets,
    TanhOffsets,
    Tap,
)

Floats = NDArray[np.float64]

SCORE_ROUNDING = 1e-5
"""Relative. Used for scores that are a product (objectness times class) or a softmax; the order of other scores is exact."""
SIGMOID_ROUNDING = 2e-7
"""Absolute, for the same scores: a float32 sigmoid is accurate to a unit in the last place of 1, not of its value."""
IOU_ROUNDING = 1e-5
IOU_ROUNDING_MOST = 1e-3
"""Upper limit of the IoU rounding, however small the boxes. A side that is itself below rounding has no limit."""
PIXEL_ROUNDING = 4 * 2.0**-23
"""Relative to the largest coordinate: four units in the last place of float32."""
BOX_TOLERANCE = 1e-3
"""Pixels, plus `BOX_RELATIVE` of the largest coordinate. Measured differences stay below a tenth of it."""
BOX_RELATIVE = 2e-6
SCORE_TOLERANCE = 1e-5
ANGLE_TOLERANCE = 1e-5
"""Radians; relative for angles above one."""
DISTANCE_ROUNDING = 4e-6
"""Absolute and relative rounding of the Bhattacharyya distance of two oriented boxes in float32."""
LOGIT_ROUNDING = 1e-5
"""Rounding of the weighted sum of a mask, relative to the sum of the magnitudes of its terms."""
KEYPOINT_TOLERANCE = 1e-3
"""Pixels, plus `BOX_RELATIVE` of the coordinate. The visibility has `SCORE_TOLERANCE`."""


@dataclass(frozen=True)
class Rows:
    """Detections of one image, best first: ``boxes`` ``[n, 4]`` xyxy in pixels of the input, ``scores`` ``[n]``, ``labels`` ``[n]``.

    Oriented boxes are ``[n, 5]``: cx, cy, w, h in pixels and the angle in radians. ``indices`` ``[n]`` are the candidate numbers, if they
    are known. They distinguish candidates with equal values.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    indices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Expected:
    """Result of the reference for one image.

    ``indices`` ``[n]`` are the candidate numbers. ``close_calls`` counts the decisions with a margin below rounding that followed the
    observed rows.
    """

    rows: Rows
    indices: NDArray[np.int64]
    close_calls: int


@dataclass(frozen=True)
class Candidates:
    """All candidates of one image: boxes ``[N, 4]`` xyxy in pixels (oriented ones ``[N, 5]``), class values ``[N, C]``.

    ``keys`` order the candidates and are compared with the threshold: logits if ``logits``, whose order is exact, else probabilities.
    An unusable class value is NaN in ``keys``, and an unusable box is NaN. ``probabilities`` ``[N, C]`` are None where they are the sigmoid
    of the class values ``labels_by``. ``rounding`` is the relative rounding of the keys. ``suppress``
    and ``every_class`` are those of the layout. ``given`` ``[N]`` are labels that the head gives; None if it gives none. ``scaled`` boxes
    were moved to another image, so that float32 rounds them: an IoU that equals the threshold in float64 is then a close call.
    """

    boxes: Floats
    keys: Floats
    probabilities: Floats | None
    labels_by: Floats
    logits: bool
    rounding: float
    suppress: bool
    every_class: bool
    given: NDArray[np.int64] | None
    scaled: bool = False

    @property
    def scores(self) -> Floats:
        """All scores ``[N, C]``."""
        return _sigmoid(self.labels_by) if self.probabilities is None else self.probabilities

    def scores_at(self, anchor: NDArray[np.int64], column: NDArray[np.int64]) -> Floats:
        """Scores ``[n]`` of these candidates and classes."""
        if self.probabilities is None:
            return _sigmoid(self.labels_by[anchor, column])
        return self.probabilities[anchor, column]


def candidates(head: Mapping[str, np.ndarray], image: int, layout: Layout, size: tuple[int, int]) -> Candidates:
    """Decode all candidates of one image. ``head`` maps tensor names to ``[B, …]`` float32; ``size`` is (height, width)."""
    terms, raw = _channels(head, image, layout.boxes), _channels(head, image, layout.classes)
    usable = ~np.isnan(raw) & (raw != np.inf)
    values = np.where(usable, raw, -np.inf)
    logits, rounding = False, SCORE_ROUNDING
    probabilities: Floats | None
    if layout.activation is Activation.SOFTMAX:
        every = (
            raw if layout.background is None else np.concatenate((raw, _channels(head, image, layout.background)), 1)
        )
        usable = usable & (~np.isnan(every) & (every != np.inf)).all(1, keepdims=True)
        probabilities = _softmax(np.where(usable.all(1, keepdims=True), every, 0))[:, : raw.shape[1]]
        keys = probabilities
    elif layout.objectness is None:
        logits, rounding = layout.activation is Activation.SIGMOID, 0.0
        probabilities, keys = None if logits else values, values
    else:
        objectness = _channels(head, image, layout.objectness)
        if layout.activation is Activation.SIGMOID:
            probabilities, objectness = _sigmoid(values), _sigmoid(objectness)
        else:
            probabilities = values
        if (weight := layout.objectness_weight) is not None:
            probabilities, objectness = probabilities.clip(0) ** (1 - weight), objectness.clip(0) ** weight
        with np.errstate(invalid="ignore"):
            keys = probabilities = probabilities * objectness
            usable = usable & (probabilities <= LARGEST)  # false for NaN
    with np.errstate(invalid="ignore"):
        if layout.angle is None:
            boxes = ordered(_within_reach(_boxes(terms, layout, size), MAX_REACH))
        else:
            angle = _channels(head, image, layout.angle.value)
            boxes = _within_reach(_oriented(terms, angle, layout, size), MAX_REACH_ORIENTED)
    return Candidates(
        boxes,
        np.where(usable, keys, np.nan),
        probabilities,
        values,
        logits,
        rounding,
        layout.suppress,
        layout.every_class,
        None if layout.labels is None else _channels(head, image, layout.labels)[:, 0].astype(np.int64),
    )


def postprocess(
    found: Candidates, config: PostprocessConfig, observed: Rows | None = None, thresholds: Thresholds | None = None
) -> Expected:
    """Choose candidates, suppress and select. With ``observed`` rows, close calls follow these rows.

    ``thresholds`` are those of the run; None: those of the settings.
    """
    thresholds = thresholds or Thresholds.of(config)
    chosen = _choose(found, config, 0.0 if observed is None else found.rounding, thresholds)
    boxes, labels = found.boxes[chosen.anchor], chosen.label
    largest, shortest = np.abs(boxes).max(1), (boxes[:, 2:4] - boxes[:, :2]).min(1)
    alive: NDArray[np.bool_] = np.ones(len(labels), bool)
    doubtful: NDArray[np.bool_] = chosen.doubtful.copy()
    picked: list[int] = []
    close_calls = 0
    first = 0
    while len(picked) < config.max_detections:
        while first < len(alive) and not alive[first]:
            first += 1
        if first == len(alive):
            break
        best = first
        if observed is not None:
            best, certain = _follow(observed, len(picked), found, chosen, boxes, alive, doubtful, first)
            close_calls += not certain
            if best < 0:
                alive[first] = False
                continue
        alive[best] = False
        picked.append(best)
        if not found.suppress:
            continue
        rivals = np.flatnonzero(alive & (True if config.class_agnostic else labels == labels[best]))
        if not len(rivals):
            continue
        oriented = boxes.shape[1] == 5
        iou = (pairwise_probiou if oriented else pairwise_iou)(boxes[best][None], boxes[rivals])[0]
        margin = np.abs(iou - thresholds.iou)
        rounding = (
            _probiou_rounding(boxes[best], boxes[rivals], iou)
            if oriented
            else _iou_rounding(np.maximum(largest[best], largest[rivals]), np.minimum(shortest[best], shortest[rivals]))
        )
        close = ((margin > 0) | found.scaled) & (margin <= rounding) & (observed is not None)
        alive[rivals[(iou > thresholds.iou) & ~close]] = False
        doubtful[rivals[close & (iou > 0)]] = True
    order = np.array(picked, np.int64)
    rows = Rows(boxes[order], chosen.score[order], labels[order])
    return Expected(rows, chosen.anchor[order], close_calls)


def matches(rows: Rows, row: int, box: Floats, score: float, label: int) -> bool:
    """Whether an observed row is this candidate, within tolerance."""
    if rows.labels[row] != label or not abs(rows.scores[row] - score) <= SCORE_TOLERANCE:
        return False
    expected = box.tolist()
    tolerance = BOX_TOLERANCE + BOX_RELATIVE * max(map(abs, expected))
    tolerances = [tolerance] * 4 + [ANGLE_TOLERANCE * max(1, abs(angle)) for angle in expected[4:]]
    return all(abs(a - b) <= most for a, b, most in zip(rows.boxes[row].tolist(), expected, tolerances, strict=True))


def mask_coefficients(head: Mapping[str, np.ndarray], image: int, layout: Layout, numbers: NDArray[np.int64]) -> Floats:
    """Mask coefficients ``[n, M]`` of the candidates with these numbers."""
    assert layout.masks is not None
    return _channels(head, image, layout.masks.coefficients)[numbers]


def masks(
    coefficients: Floats, prototypes: np.ndarray, boxes: Floats, size: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks ``[n, h, w]`` at the size of the prototypes, and the pixels ``[n, h, w]`` where rounding may decide either way.

    Args:
        coefficients: ``[n, M]``; ``prototypes`` are ``[M, h, w]``.
        boxes: ``[n, 4]`` xyxy in pixels of the input. ``size`` is the (height, width) of the input.
    """
    terms = prototypes.astype(np.float64)
    logits = np.tensordot(coefficients, terms, 1)
    doubtful = np.abs(logits) <= LOGIT_ROUNDING * np.tensordot(np.abs(coefficients), np.abs(terms), 1)
    inside = logits > 0
    for axis, low in ((1, 1), (2, 0)):
        edges = np.arange(logits.shape[axis]) * (size[axis - 1] / logits.shape[axis])
        edges = edges[None, :, None] if axis == 1 else edges[None, None, :]
        start, stop = (boxes[:, i, None, None] for i in (low, low + 2))
        inside = inside & (edges >= start) & (edges < stop)
        reach = BOX_TOLERANCE + BOX_RELATIVE * np.abs(boxes).max(initial=0)
        doubtful = doubtful | (np.abs(edges - start) <= reach) | (np.abs(edges - stop) <= reach)
    return inside, doubtful


def keypoints(
    head: Mapping[str, np.ndarray], image: int, layout: Layout, size: tuple[int, int], numbers: NDArray[np.int64]
) -> Floats:
    """Keypoints ``[n, P, D]`` of the candidates with these numbers: x, y in pixels of the input, and the visibility if D is 3."""
    points = layout.keypoints
    assert points is not None
    found = _channels(head, image, points.values)[numbers].reshape(len(numbers), points.count, points.dims)
    if points.factor is None:
        return found
    assert isinstance(layout.decode, Gridded)
    cells, strides, _ = _grid(layout.decode, size)
    cell, stride = cells[numbers][:, None], strides[numbers][:, None, None]
    if points.pixels:
        found[..., :2] = points.factor * found[..., :2] + (cell + points.point) * stride
    else:
        found[..., :2] = (points.factor * found[..., :2] + cell + points.point) * stride
    found[..., 2:] = _sigmoid(found[..., 2:])
    return found


@dataclass(frozen=True)
class _Chosen:
    anchor: NDArray[np.int64]
    label: NDArray[np.int64]
    key: Floats
    score: Floats
    doubtful: NDArray[np.bool_]


def _choose(found: Candidates, config: PostprocessConfig, rounding: float, thresholds: Thresholds) -> _Chosen:
    """Steps 1 to 3: the candidates, best first. A candidate is doubtful if rounding (relative) decides whether it is among them."""
    limits = np.array(thresholds.score, np.float32).astype(np.float64)
    if found.logits:
        near_half = np.abs(limits - 0.5) < 0.25  # where the difference of the logarithms has lost digits
        with np.errstate(divide="ignore"):
            limits = np.where(near_half, 2 * np.arctanh(2 * limits - 1), np.log(limits) - np.log1p(-limits))
    classes = found.keys.shape[1]
    counts: NDArray[np.bool_] = np.array(thresholds.class_mask or (True,) * classes, bool)
    if found.every_class or (config.multi_label and found.given is None):
        anchor, column = (i.ravel() for i in np.indices(found.keys.shape))
        usable = ~np.isnan(found.keys)
    else:
        anchor, column = np.arange(len(found.keys)), np.where(counts, found.labels_by, -np.inf).argmax(1)
        usable = np.broadcast_to(~np.isnan(found.keys).any(axis=1, keepdims=True), found.keys.shape)
    label = column if found.given is None else found.given[anchor]
    key = found.keys[anchor, column]
    threshold = np.broadcast_to(limits, classes)[column]
    with np.errstate(invalid="ignore"):
        near: NDArray[np.bool_] = np.asarray(np.abs(key - threshold) <= _key_rounding(threshold, rounding))
        near = near if rounding else np.zeros_like(near)
        keep = usable[anchor, column] & counts[column] & ((key > threshold) | near)
    score = found.scores_at(anchor[keep], column[keep])
    anchor, label, key, doubtful = anchor[keep], label[keep], key[keep], near[keep]
    order = np.argsort(-key, kind="stable")
    finite = ~np.isnan(found.boxes.sum(1))
    most = config.max_candidates if found.suppress else config.max_detections
    if len(order) > most:
        last = key[order[most - 1]]
        edge = (np.abs(key - last) <= _key_rounding(last, rounding)) & (rounding > 0)
        doubtful = doubtful | edge
        order = order[(np.arange(len(order)) < most) | edge[order]]
    order = order[finite[anchor[order]]]
    return _Chosen(anchor[order], label[order], key[order], score[order], doubtful[order])


def _key_rounding(key: float | Floats, rounding: float) -> Floats:
    """Largest error of a key in float32; 0 if keys are exact."""
    return np.asarray(rounding * np.abs(key) + SIGMOID_ROUNDING if rounding else np.zeros_like(key))


def _follow(
    observed: Rows, row: int, found: Candidates, chosen: _Chosen, boxes: Floats,
    alive: NDArray[np.bool_], doubtful: NDArray[np.bool_], first: int,
) -> tuple[int, bool]:  # fmt: skip
    """Return the next candidate as (its place, whether that was certain), or (-1, False) to leave out the first one."""
    cluster = np.array([first])
    if found.rounding:
        reach = chosen.key[first] - _key_rounding(chosen.key[first], found.rounding)
        cluster = first + np.flatnonzero(alive[first:] & (chosen.key[first:] >= reach))
    if row < len(observed):
        alike = [i for i in cluster if matches(observed, row, boxes[i], chosen.score[i], chosen.label[i])]
        if (indices := observed.indices) is not None:
            alike.sort(key=lambda i: chosen.anchor[i] != indices[row])
        if alike:
            return int(alike[0]), alike[0] == first and not doubtful[alike[0]]
    return (-1, False) if doubtful[first] else (first, True)


def _iou_rounding(largest: Floats, shortest: Floats) -> Floats:
    """Largest error of the IoU of float32 boxes: relative rounding, plus the rounding of coordinates divided by the shortest side.

    ``largest`` are the largest coordinates of each pair, ``shortest`` their shortest sides.

    If that side is itself below rounding, it may be 0 in float32. The IoU is then 0, whatever its exact value.
    """
    off = np.minimum(IOU_ROUNDING + 4 * PIXEL_ROUNDING * largest / np.maximum(shortest, 1e-6), IOU_ROUNDING_MOST)
    return np.where(shortest <= PIXEL_ROUNDING * largest, 1.0, off)


def _probiou_rounding(box: Floats, rivals: Floats, overlap: Floats) -> Floats:
    """The same for the probabilistic IoU: its slope by the distance, plus the rounding of coordinates divided by the shortest side."""
    apart = 1 - overlap  # the Hellinger distance
    distance = -np.log(np.maximum(1 + PROBIOU_EPSILON - apart**2, 1e-300))
    slope = np.exp(-distance) / (2 * np.maximum(apart, 1e-9))
    largest = np.maximum(np.abs(box[:4]).max(), np.abs(rivals[:, :4]).max(1))
    shortest = np.minimum(box[2:4].min(), rivals[:, 2:4].min(1))
    rounding = (
        IOU_ROUNDING
        + slope * DISTANCE_ROUNDING * (1 + np.abs(distance))
        + 4 * PIXEL_ROUNDING * largest / np.maximum(shortest, 1e-6)
    )
    return np.minimum(rounding, IOU_ROUNDING_MOST)


def _channels(head: Mapping[str, np.ndarray], image: int, tap: Tap) -> Floats:
    """Channels of a tap as ``[N, channels]`` float64."""
    values = head[tap.tensor][image].astype(np.float64)
    rows = values.T if tap.channel_axis == 1 else values
    return rows[:, tap.start : tap.stop]


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _softmax(x: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def _within_reach(boxes: Floats, reach: float) -> Floats:
    """Boxes as they are decoded; NaN where they are not finite, or their absolute numbers sum to ``reach`` or more."""
    return np.where(np.abs(boxes).sum(1, keepdims=True) < reach, boxes, np.nan)


def _boxes(terms: Floats, layout: Layout, size: tuple[int, int]) -> Floats:
    """Decode corners ``[N, 4]``, whose high corner may still be below the low one."""
    decode = layout.decode
    sides = np.array([size[1], size[0]] * 2, np.float64)
    if isinstance(decode, Decoded):
        boxes = cxcywh_to_xyxy(terms) if decode.format is BoxFormat.CXCYWH else terms
        return boxes * sides if decode.normalized else boxes
    cells, strides, anchors = _grid(decode, size)
    steps = strides[:, None]
    if isinstance(decode, Distances):
        spread = terms.reshape(len(terms), 4, decode.bins)
        distance = spread[:, :, 0] if decode.bins == 1 else (_softmax(spread) * np.array(decode.bin_values)).sum(2)
        center, unit = cells + decode.point, steps
        if decode.pixels:
            center, unit = center * steps, np.ones_like(steps)
        return np.concatenate((center - distance[:, :2], center + distance[:, 2:]), 1) * unit
    if isinstance(decode, AnchorBoxes):
        t = _sigmoid(terms)
        center, extent = (2 * t[:, :2] - 0.5 + cells) * steps, (2 * t[:, 2:]) ** 2 * anchors
    elif isinstance(decode, AnchorDeltas):
        t = terms[:, [1, 0, 3, 2]] if decode.y_first else terms
        center = t[:, :2] * decode.variances[0] * anchors + (cells + decode.point) * steps
        grown = t[:, 2:] * decode.variances[1]
        grown = grown if decode.log_limit is None else np.minimum(grown, decode.log_limit)
        with np.errstate(over="ignore"):
            extent = np.exp(grown) * anchors
    elif isinstance(decode, PointOffsets):
        center, extent = terms[:, :2] + (cells + decode.point) * steps, terms[:, 2:]
    elif isinstance(decode, TanhOffsets):
        center, extent = (np.tanh(terms[:, :2]) + cells) * steps, _sigmoid(terms[:, 2:]) * sides[:2]
    else:
        with np.errstate(over="ignore"):
            center, extent = (terms[:, :2] + cells) * steps, np.exp(terms[:, 2:]) * steps
    return cxcywh_to_xyxy(np.concatenate((center, extent), 1))


def _oriented(terms: Floats, angle: Floats, layout: Layout, size: tuple[int, int]) -> Floats:
    """Decode boxes ``[N, 5]`` from their terms and the angle channel ``[N, 1]``. Source: Ultralytics, dist2rbox."""
    assert layout.angle is not None
    if layout.angle.sigmoid:
        angle = (_sigmoid(angle) - 0.25) * np.pi
    if isinstance(layout.decode, Decoded):
        return np.concatenate((terms, angle), 1)
    assert isinstance(layout.decode, Distances)
    cells, strides, _ = _grid(layout.decode, size)
    spread = terms.reshape(len(terms), 4, layout.decode.bins)
    left, top, right, bottom = (
        spread[:, :, 0] if layout.decode.bins == 1 else (_softmax(spread) * np.array(layout.decode.bin_values)).sum(2)
    ).T
    with np.errstate(invalid="ignore"):
        turned = (((right - left) + 1j * (bottom - top)) / 2) * np.exp(1j * angle[:, 0])  # a rotation
    center = np.stack((turned.real, turned.imag), 1) + cells + layout.decode.point
    extent = np.stack((left + right, top + bottom), 1)
    return np.concatenate((np.concatenate((center, extent), 1) * strides[:, None], angle), 1)


def _grid(decode: Gridded, size: tuple[int, int]) -> tuple[Floats, Floats, Floats]:
    """Cell (column, row), stride and anchor box (width, height; NaN if the head has none) of every candidate, in candidate order."""
    cells, steps, anchors = [], [], []
    for level, stride in enumerate(decode.strides):
        sizes = _anchors(decode, level)
        shape = (math.ceil(size[0] / stride), math.ceil(size[1] / stride), len(sizes))
        order = (0, 1, 2) if getattr(decode, "anchors_last", False) else (2, 0, 1)
        row, column, anchor = (i.transpose(order).ravel() for i in np.indices(shape))
        cells.append(np.stack((column, row), 1).astype(np.float64))
        steps.append(np.full(len(anchor), float(stride)))
        anchors.append(sizes[anchor])
    return np.concatenate(cells), np.concatenate(steps), np.concatenate(anchors)


def _anchors(decode: Gridded, level: int) -> Floats:
    """Anchor boxes ``[A, 2]`` of a level; NaN for candidates without one."""
    if isinstance(decode, (AnchorBoxes, AnchorDeltas)):
        return np.array(decode.anchors[level], np.float64)
    if isinstance(decode, PointOffsets):
        return np.full((decode.anchors[level], 2), np.nan)
    return np.full((decode.anchors if isinstance(decode, Distances) else 1, 2), np.nan)
