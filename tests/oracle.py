"""A second oracle: the semantics of docs/concepts/semantics.md once more, in plain Python, by its own way.

It shares no code with the reference, the box arithmetic or the graph: of the package it reads `Layout` and `PostprocessConfig`, which are
data, and nothing else (`tests/test_architecture.py`).

`Scene` decodes one image of a head to candidates. Two things are then done with them:

- `greedy` is the definition as loops: the detections without any rounding.
- `faults` judges rows that something else found. It does not run suppression again. Greedy suppression has one result, and a set of
  rows is that result exactly if it has three properties: the rows are in order, no row suppresses a later one, and every candidate that
  is not among the rows has a reason: a row before it suppresses it, or the rows are full, or it was not among the best candidates. Each
  property is a statement about a pair of candidates, so rounding enters in one place only: a score and an IoU are intervals, and a row is
  at fault if no number of the interval excuses it. Where an interval has a width of 0, nothing is excused.

How wide the intervals are (`rounded`), with u = 2^-24, the rounding of one operation in float32:

- A logit, or a probability that the head gives, is compared as it is: width 0.
- A product, a power or a softmax: 64 u of the score, times its logarithm, since exponents are rounded too; and 8 u at least, since
  a float32 sigmoid is exact to some u of 1.
- A coordinate: 0 if float32 holds the exact one. Otherwise 64 u (4e-6) of the largest number that went into it.
- An upright IoU: the sides by two coordinates each, and 32 u of the IoU for its operations and the raised threshold of the graph. An IoU
  of coordinates that float32 holds, which is the threshold exactly, never suppresses.
- A probabilistic IoU: the Bhattacharyya distance by the coordinates and 1e-5, put through the formula that turns it into an IoU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusenms.config import PostprocessConfig
from fusenms.layout import (
    Activation,
    AnchorBoxes,
    AnchorDeltas,
    BoxFormat,
    Decoded,
    Distances,
    GridOffsets,
    Layout,
    PointOffsets,
    TanhOffsets,
    Tap,
)

U = 2.0**-24
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One class of one box. ``key`` orders candidates: a logit if ``is_logit``, else the score."""

    index: int
    label: int
    key: float
    score: float
    threshold: float
    box: tuple[float, ...] | None
    box_error: float
    exact: bool

    @cached_property
    def place(self) -> tuple[float, int, int]:
        """Sorts candidates, the best first."""
        return (-self.key, self.index, self.label)

    @cached_property
    def rounded(self) -> Interval:
        """What float32 may make of the key."""
        if self.exact or not 0 < abs(self.key) < math.inf:
            return self.key, self.key
        off = 64 * U * abs(self.key) * (1 + abs(math.log(abs(self.key)))) + 8 * U
        return self.key - off, self.key + off


@dataclass(frozen=True)
class Row:
    """A detection."""

    index: int
    label: int
    score: float
    box: tuple[float, ...]


class Scene:
    """The candidates of one image. ``tensors`` are the head's, ``[channels, N]`` or ``[N, channels]``; ``size`` is (height, width)."""

    def __init__(
        self, tensors: dict[str, np.ndarray], layout: Layout, config: PostprocessConfig, size: tuple[int, int]
    ) -> None:
        self.layout, self.config, self.size = layout, config, size
        self._tensors = tensors
        self._ious: dict[tuple[int, int], tuple[float, float, float]] = {}
        count = tensors[layout.classes.tensor].shape[2 - layout.classes.channel_axis]
        self.candidates: list[Candidate] = []
        self.undefined = 0
        """Candidates that never win, of which nobody says whether they take a place among the best."""
        with np.errstate(all="ignore"):
            cells = self._cells()
            for index in range(count):
                self._add(index, cells[index] if cells else (0, 0, 1, 0))
        self.candidates.sort(key=lambda c: c.place)

    @property
    def oriented(self) -> bool:
        return self.layout.angle is not None

    def _read(self, tap: Tap, index: int) -> list[float]:
        values = self._tensors[tap.tensor]
        row = values[:, index] if tap.channel_axis == 1 else values[index]
        return [float(x) for x in row[tap.start : tap.stop]]

    # Scores.

    def _add(self, index: int, cell: tuple[int, int, int, int]) -> None:
        layout, config = self.layout, self.config
        raw = self._read(layout.classes, index)
        threshold = float(np.float32(config.score_threshold))
        exact = layout.activation is not Activation.SOFTMAX and layout.objectness is None
        logits = exact and layout.activation is Activation.SIGMOID
        scores = self._scores(raw, index)
        if logits:
            threshold = -math.inf if threshold == 0 else math.inf if threshold == 1 else _logit(threshold)
        every = config.multi_label or (not layout.suppress and layout.activation is not Activation.SOFTMAX)
        if every and layout.labels is None:
            wanted = range(len(raw))
            poor = [_is_poor(x) for x in raw]
        else:  # the best class, the lowest of equals; one poor class spoils the candidate
            best = 0
            for i, value in enumerate(raw):
                if value > raw[best] or math.isnan(raw[best]):
                    best = i
            wanted = range(best, best + 1)
            poor = [any(map(_is_poor, raw))] * len(raw)
        if layout.activation is Activation.SOFTMAX:
            others = [] if layout.background is None else self._read(layout.background, index)
            poor = [any(map(_is_poor, raw + others))] * len(raw)
        box, error = self._box(index, cell)
        for i in wanted:
            label = i if layout.labels is None else int(self._read(layout.labels, index)[0])
            if poor[i] or _is_poor(scores[i]):
                self.undefined += 1
                continue
            key = raw[i] if logits else scores[i]
            self.candidates.append(Candidate(index, label, key, scores[i], threshold, box, error, exact))

    def _scores(self, raw: list[float], index: int) -> list[float]:
        layout = self.layout
        if layout.activation is Activation.SOFTMAX:
            others = [] if layout.background is None else self._read(layout.background, index)
            return _softmax(raw + others)[: len(raw)]
        scores = [_sigmoid(x) for x in raw] if layout.activation is Activation.SIGMOID else raw
        if layout.objectness is None:
            return scores
        (objectness,) = self._read(layout.objectness, index)
        if layout.activation is Activation.SIGMOID:
            objectness = _sigmoid(objectness)
        weight = layout.objectness_weight
        if weight is None:
            return [float(np.float64(score) * objectness) for score in scores]
        return [_power(score, 1 - weight) * _power(objectness, weight) for score in scores]

    # Boxes.

    def _cells(self) -> list[tuple[int, int, int, int]]:
        """Column, row, stride and anchor (counted through the levels) of every candidate of a gridded head."""
        decode, (height, width) = self.layout.decode, self.size
        if isinstance(decode, Decoded):
            return []
        cells, before = [], 0
        for level, stride in enumerate(decode.strides):
            rows, columns = -(-height // stride), -(-width // stride)
            count = 1
            if isinstance(decode, (AnchorBoxes, AnchorDeltas)):
                count = len(decode.anchors[level])
            elif isinstance(decode, PointOffsets):
                count = decode.anchors[level]
            elif isinstance(decode, Distances):
                count = decode.anchors
            if isinstance(decode, (Distances, AnchorDeltas, PointOffsets)) and decode.anchors_last:
                for n in range(rows * columns * count):
                    cell, anchor = divmod(n, count)
                    cells.append((cell % columns, cell // columns, stride, before + anchor))
            else:
                for anchor in range(count):
                    for row in range(rows):
                        for column in range(columns):
                            cells.append((column, row, stride, before + anchor))
            before += count
        return cells

    def _box(self, index: int, cell: tuple[int, int, int, int]) -> tuple[tuple[float, ...] | None, float]:
        """The box, None if it never wins, and how far float32 may be from a coordinate of it."""
        terms = [np.float64(x) for x in self._read(self.layout.boxes, index)]
        decode, (height, width) = self.layout.decode, self.size
        column, row, stride, slot = cell
        scale, direct = 0.0, False
        if isinstance(decode, Distances):
            left, top, right, bottom = self._distances(decode, terms)
            x, y = column + decode.point, row + decode.point
            farthest = max(map(abs, decode.bin_values)) if decode.bins > 1 else 0
            scale = max(stride * max(x, y, 1), farthest * (1 if decode.pixels else stride))
            direct = decode.bins == 1
            if decode.pixels:
                corners = [x * stride - left, y * stride - top, x * stride + right, y * stride + bottom]
                return self._checked(corners, scale, direct)
            if not self.oriented:
                corners = [(x - left) * stride, (y - top) * stride, (x + right) * stride, (y + bottom) * stride]
                return self._checked(corners, scale, direct)
            angle = self._angle(index)
            along, across = (right - left) / 2, (bottom - top) / 2
            center_x = x + along * np.cos(angle) - across * np.sin(angle)
            center_y = y + along * np.sin(angle) + across * np.cos(angle)
            scale = max(scale, *(float(abs(d) * stride) for d in (left, top, right, bottom)))
            sides = [(left + right) * stride, (top + bottom) * stride]
            return self._checked([center_x * stride, center_y * stride, *sides, angle], scale, False)
        if isinstance(decode, Decoded):
            if self.oriented:
                return self._checked([*terms, self._angle(index)], 0.0, True)
            if decode.format is BoxFormat.CXCYWH:
                scale = float(max(abs(t) for t in terms))
                x, y, w, h = terms
                terms = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            if decode.normalized:
                scale *= max(width, height)
                terms = [terms[0] * width, terms[1] * height, terms[2] * width, terms[3] * height]
            return self._checked(terms, scale, True)
        tx, ty, tw, th = terms
        if isinstance(decode, PointOffsets):
            x, y = tx + (column + decode.point) * stride, ty + (row + decode.point) * stride
            scale = max(float(abs(t)) for t in (x, y, tx, ty, tw, th))
            return self._checked([x - tw / 2, y - th / 2, x + tw / 2, y + th / 2], scale, True)
        if isinstance(decode, GridOffsets):
            x, y = (tx + column) * stride, (ty + row) * stride
            w, h = np.exp(tw) * stride, np.exp(th) * stride
        elif isinstance(decode, TanhOffsets):
            x, y = (np.tanh(tx) + column) * stride, (np.tanh(ty) + row) * stride
            w, h = _sigmoid(tw) * width, _sigmoid(th) * height
            scale = max(width, height)
        elif isinstance(decode, AnchorDeltas):
            wide, tall = [pair for level in decode.anchors for pair in level][slot]
            if decode.y_first:
                tx, ty, tw, th = ty, tx, th, tw
            near, far = decode.variances
            if decode.log_limit is not None:
                tw, th = (decode.log_limit / far if t * far > decode.log_limit else t for t in (tw, th))
            x = tx * near * wide + (column + decode.point) * stride
            y = ty * near * tall + (row + decode.point) * stride
            w, h = np.exp(tw * far) * wide, np.exp(th * far) * tall
            scale = max(float(abs(tx * near * wide)), float(abs(ty * near * tall)), stride * max(column + 1, row + 1))
        else:
            assert isinstance(decode, AnchorBoxes)
            anchor = [pair for level in decode.anchors for pair in level][slot]
            x, y = (2 * _sigmoid(tx) - 0.5 + column) * stride, (2 * _sigmoid(ty) - 0.5 + row) * stride
            w, h = (2 * _sigmoid(tw)) ** 2 * anchor[0], (2 * _sigmoid(th)) ** 2 * anchor[1]
            scale = 4 * max(anchor)
        scale = max(scale, float(w), float(h), float(abs(x)), float(abs(y)), stride)
        return self._checked([x - w / 2, y - h / 2, x + w / 2, y + h / 2], scale, False)

    def _distances(self, decode: Distances, terms: list[float]) -> list[np.float64]:
        if decode.bins == 1:
            return [np.float64(t) for t in terms]
        found = []
        for side in range(4):
            shares = _softmax(terms[side * decode.bins : (side + 1) * decode.bins])
            found.append(np.float64(sum(share * value for share, value in zip(shares, decode.bin_values, strict=True))))
        return found

    def _angle(self, index: int) -> float:
        assert self.layout.angle is not None
        (angle,) = self._read(self.layout.angle.value, index)
        return (_sigmoid(angle) - 0.25) * math.pi if self.layout.angle.sigmoid else angle

    def _checked(self, numbers: list, scale: float, direct: bool) -> tuple[tuple[float, ...] | None, float]:
        """``direct``: only sums and products led to the numbers, so what float32 holds came out exactly."""
        box = [float(x) for x in numbers]
        reach = sum(map(abs, box))
        if not reach < (1e8 if self.oriented else 1e18):  # false for NaN
            return None, 0.0
        held = direct and all(float(np.float32(x)) == x for x in box)
        if not self.oriented:
            box[2], box[3] = max(box[0], box[2]), max(box[1], box[3])
        return tuple(box), 0.0 if held else 64 * U * max(scale, *map(abs, box[:4]))

    # The definition, as loops.

    def best(self) -> list[Candidate]:
        """The candidates that enter suppression: above the threshold, at most so many, those without a usable box among them."""
        return [c for c in self.candidates if c.key > c.threshold][: self.most]

    @property
    def most(self) -> int:
        return self.config.max_candidates if self.layout.suppress else self.config.max_detections

    def rivals(self, a: Candidate, b: Candidate) -> bool:
        """Whether one of them could suppress the other."""
        return self.layout.suppress and (self.config.class_agnostic or a.label == b.label)

    def greedy(self) -> list[Row]:
        """The detections."""
        kept: list[Candidate] = []
        for c in self.best():
            if c.box is None:
                continue
            if not any(self.rivals(k, c) and self.iou(k, c)[2] > self.config.iou_threshold for k in kept):
                kept.append(c)
        return [Row(c.index, c.label, c.score, c.box or ()) for c in kept[: self.config.max_detections]]

    def iou(self, a: Candidate, b: Candidate) -> tuple[float, float, float]:
        """The least and the largest IoU that float32 may find, and the exact one."""
        pair = (min(a.index, b.index), max(a.index, b.index))
        if pair not in self._ious:
            assert a.box is not None and b.box is not None
            error = max(a.box_error, b.box_error)
            self._ious[pair] = (_gaussian_iou if self.oriented else _iou)(a.box, b.box, error)
        return self._ious[pair]

    # The judge.

    def faults(self, rows: list[Row], exact: bool = False) -> list[str]:
        """What is wrong with the rows. ``exact``: nothing is excused by rounding."""
        by_number = {(c.index, c.label): c for c in self.candidates}
        found: list[Candidate] = []
        for n, row in enumerate(rows):
            c = by_number.get((row.index, row.label))
            if c is None:
                return [f"row {n} is of candidate {row.index}, class {row.label}, which is none"]
            if c.box is None:
                return [f"row {n} is of candidate {row.index}, whose box is not usable"]
            if c in found:
                return [f"row {n} is of candidate {row.index}, class {row.label}, again"]
            found.append(c)
        return [*self._wrong_values(found, rows, exact), *self._wrong_rows(found, exact), *self._missing(found, exact)]

    def _key(self, c: Candidate, exact: bool) -> Interval:
        return (c.key, c.key) if exact else c.rounded

    def _may_lead(self, a: Candidate, b: Candidate, exact: bool) -> bool:
        """Whether a may come before b."""
        if a.exact or exact:
            return a.place < b.place
        return self._key(a, exact)[1] >= self._key(b, exact)[0]

    def _overlap(self, a: Candidate, b: Candidate, exact: bool) -> tuple[bool, bool]:
        """Whether a suppresses b, if it comes before: surely, and possibly."""
        if not self.rivals(a, b):
            return False, False
        low, high, iou = self.iou(a, b)
        limit = self.config.iou_threshold
        held = a.box_error == b.box_error == 0 and not self.oriented
        if exact or (held and iou == limit):
            return iou > limit, iou > limit
        return low > limit, high > limit

    def _wrong_values(self, found: list[Candidate], rows: list[Row], exact: bool) -> list[str]:
        faults = []
        for n, (c, row) in enumerate(zip(found, rows, strict=True)):
            assert c.box is not None
            low, high = self._key(c, exact)
            off = (1e-12 if exact else 16 * U) * (1 + abs(c.score)) + (high - low)
            if not abs(row.score - c.score) <= off:
                faults.append(f"row {n}: score {row.score}, expected {c.score}")
            near = 1e-11 * (1 + max(map(abs, c.box))) if exact else c.box_error + 2 * U * max(map(abs, c.box[:4]))
            for i, (got, wanted) in enumerate(zip(row.box, c.box, strict=True)):
                if not abs(got - wanted) <= (16 * U * max(1, abs(wanted)) if i == 4 and not exact else near):
                    faults.append(f"row {n}: box {row.box}, expected {c.box}")
                    break
        return faults

    def _wrong_rows(self, found: list[Candidate], exact: bool) -> list[str]:
        faults = []
        if len(found) > self.config.max_detections:
            faults.append(f"{len(found)} rows")
        for n, c in enumerate(found):
            if not self._key(c, exact)[1] > c.threshold:
                faults.append(f"row {n} is not above the threshold")
            if len(self.candidates) > self.most and self._ahead(c, exact, surely=True) >= self.most:
                faults.append(f"row {n} is not among the best {self.most}")
            for m, earlier in enumerate(found[:n]):
                if not self._may_lead(earlier, c, exact):
                    faults.append(f"row {m} is before row {n}, which is better")
                if self._overlap(earlier, c, exact)[0]:
                    faults.append(f"row {m} suppresses row {n}")
        return faults

    def _ahead(self, c: Candidate, exact: bool, surely: bool) -> int:
        """How many candidates are above the threshold and better than c, surely or possibly. The box plays no part."""
        count = 0
        for other in self.candidates:
            low, high = self._key(other, exact)
            if other is c or not (low if surely else high) > c.threshold:
                continue
            count += not self._may_lead(c, other, exact) if surely else self._may_lead(other, c, exact)
        return count

    def _missing(self, found: list[Candidate], exact: bool) -> list[str]:
        """Candidates that are not among the rows without a reason."""
        faults = []
        full = len(found) == self.config.max_detections
        present = set(found)
        for c in self.candidates:
            if c in present or c.box is None or not self._key(c, exact)[0] > c.threshold:
                continue
            if full and self._may_lead(found[-1], c, exact):
                continue
            before = [row for row in found if self._may_lead(row, c, exact)]
            if any(self._overlap(row, c, exact)[1] for row in before):
                continue
            rest = len(self.candidates) + self.undefined
            if rest > self.most and self._ahead(c, exact, surely=False) + self.undefined >= self.most:
                continue
            faults.append(f"candidate {c.index}, class {c.label} ({c.score:.6g}, {c.box}) is missing")
        return faults


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _is_poor(x: float) -> bool:
    """NaN and numbers above float32 never win."""
    return math.isnan(x) or x > float(np.finfo(np.float32).max)


def _sigmoid(x: float) -> float:
    x = float(x)
    if math.isnan(x):
        return math.nan
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    power = math.exp(x)
    return power / (1 + power)


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    if any(math.isnan(v) or v == math.inf for v in values) or top == -math.inf:
        return [math.nan] * len(values)
    powers = [math.exp(v - top) for v in values]
    return [power / math.fsum(powers) for power in powers]


def _power(x: float, exponent: float) -> float:
    """Of what is not below 0; to the power 0, everything is 1."""
    return 1.0 if exponent == 0 else math.nan if math.isnan(x) else float(np.float64(max(x, 0.0)) ** exponent)


def _iou(a: tuple[float, ...], b: tuple[float, ...], error: float) -> tuple[float, float, float]:
    """Least, largest and exact IoU of corners, each of which may be off by ``error``."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide + 2 * error <= 0 or tall + 2 * error <= 0:
        return 0.0, 0.0, 0.0
    sides = [(box[2] - box[0], box[3] - box[1]) for box in (a, b)]
    inter = wide * tall if wide > 0 and tall > 0 else 0.0
    total = sum(w * h for w, h in sides)
    exact = inter / (total - inter) if inter > 0 else 0.0
    slip = 1e-44  # products that float32 does not hold

    def product(w: float, h: float, off: float) -> float:
        return max(w + off, 0.0) * max(h + off, 0.0)

    largest_inter = product(wide, tall, 2 * error) + slip
    least_inter = max(product(wide, tall, -2 * error) - slip, 0.0)
    largest_total = sum(product(w, h, 2 * error) for w, h in sides) + slip
    least_total = sum(product(w, h, -2 * error) for w, h in sides)
    least = least_inter / (largest_total - least_inter) if least_inter > 0 else 0.0
    largest = min(largest_inter / max(least_total - largest_inter, largest_inter, 1e-300), 1.0)
    return least * (1 - 32 * U), largest * (1 + 8 * U), exact


def _gaussian_iou(a: tuple[float, ...], b: tuple[float, ...], error: float) -> tuple[float, float, float]:
    """The same of oriented boxes: 1 minus the Hellinger distance of two normal distributions."""
    if min(a[2:4]) <= 1e-3 or min(b[2:4]) <= 1e-3:
        most = 1.0 if min(a[2:4]) + error > 1e-3 and min(b[2:4]) + error > 1e-3 else 0.0
        return 0.0, most if error else 0.0, 0.0
    longest = max(*a[2:4], *b[2:4])
    apart = math.hypot(a[0] - b[0], a[1] - b[1])
    if apart - 2 * error > 5 * (longest + error):  # the distance is above 37, and above 16 the IoU is 0
        return 0.0, 0.0, 0.0
    # Seen along the sides of a, whose covariance is then diagonal: long thin boxes cancel the least.
    turn, cos, sin = b[4] - a[4], math.cos(a[4]), math.sin(a[4])
    dx, dy = (b[0] - a[0]) * cos + (b[1] - a[1]) * sin, (b[1] - a[1]) * cos - (b[0] - a[0]) * sin
    along, across, cos, sin = b[2] ** 2 / 24, b[3] ** 2 / 24, math.cos(turn), math.sin(turn)
    xx = a[2] ** 2 / 24 + along * cos * cos + across * sin * sin  # the mean of the two covariances
    yy = a[3] ** 2 / 24 + along * sin * sin + across * cos * cos
    xy = (along - across) * cos * sin
    det = max(xx * yy - xy * xy, 1e-300)
    square = (dx * dx * yy - 2 * dx * dy * xy + dy * dy * xx) / det
    area = a[2] * a[3] * b[2] * b[3] / 144
    distance = square / 8 + math.log(det / area) / 2
    thin = min(*a[2:4], *b[2:4])
    step = error / thin * math.sqrt(12)
    off = 1e-5 * (1 + abs(distance)) + 4 * step + (2 * math.sqrt(max(square, 0)) * step + step * step) / 4

    def iou(d: float) -> float:
        return max(1 - math.sqrt(max(1 - math.exp(-d) + 1e-7, 0)), 0.0) if d < 700 else 0.0

    return iou(distance + off), iou(max(distance - off, 0.0)), iou(distance)
