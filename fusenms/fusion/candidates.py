"""Choose the candidates that enter suppression, in the graph: score all, keep the best above the threshold, decode these.

If the backend allows it (`Backend.adaptive`), the number of candidates is that of the image of the batch with the most, so that a batch
with few objects costs little. Otherwise it is `max_candidates`, and candidates below the threshold are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fusenms.artifacts.raw import ImageInput
from fusenms.boxes import MAX_REACH, MAX_REACH_ORIENTED
from fusenms.config import PostprocessConfig
from fusenms.fusion.decoding import decode_boxes, order_corners
from fusenms.fusion.thresholds import class_mask, class_thresholds, strict_threshold
from fusenms.fusion.tiles import TiledCandidates
from fusenms.graph.builder import FLOAT, INT32, INT64, Graph, Tensor
from fusenms.layout import MOST_CHANNELS, Activation, Layout, Tap, other_axis

NEVER = -3e38
"""Score of candidates that do not pass. It is finite, and above float32's lowest value, because ONNX Runtime's TopK on CUDA takes what is
not above the lowest value for no element: it returns the lowest value and a place outside of the tensor. Logits down to it, which pass a
score threshold of 0, are raised to `LOWEST`: they come last, in the order of their numbers, with a score of 0."""
LOWEST = float(np.nextafter(np.float32(NEVER), np.float32(0)))


@dataclass(frozen=True)
class Head:
    """A head in a graph.

    Attributes:
        layout: meaning of the head.
        image: image input of the model.
        widths: number of channels of each head tensor.
        total: number of candidates per image; None if it is open.
        tiled: where candidates lie, if an image is a frame whose tiles the network sees; ``total`` are then those of all tiles.
    """

    layout: Layout
    image: ImageInput
    widths: Mapping[str, int]
    total: int | None
    tiled: TiledCandidates | None = None

    @property
    def suppress(self) -> bool:
        """Whether candidates suppress each other. Those of tiles always do: tiles that overlap find the same object twice."""
        return self.layout.suppress or self.tiled is not None


@dataclass(frozen=True)
class CandidateTensors:
    """The candidates that enter suppression, best first.

    Attributes:
        scores: ``[B, k]`` float32 probabilities.
        passing: ``[B, k]`` bool, True above the threshold. Candidates that do not pass come last.
        decode: emits the decoding of some columns (``[n]`` int32; None: all) to boxes ``[B, n, 4 or 5]`` float32, labels ``[B, n]`` int32
            and valid ``[B, n]`` bool. A candidate is valid if it passes and its class scores and box are usable.
        count: k; None if it depends on the data (`Backend.adaptive`).
        num_classes: number of classes.
        oriented: whether boxes are cx, cy, w, h and an angle, and are suppressed by their probabilistic IoU; otherwise they are xyxy.
        indices: emits the candidate numbers ``[B, n]`` int32 (as defined in `fusenms.layout`) of places ``[B, n]`` int32 among these
            candidates.
    """

    scores: Tensor
    passing: Tensor
    decode: Callable[[Tensor | None], tuple[Tensor, Tensor, Tensor]]
    count: int | None
    num_classes: int
    oriented: bool
    indices: Callable[[Tensor], Tensor]

    @property
    def box_size(self) -> int:
        """How many numbers a box has."""
        return 5 if self.oriented else 4


def emit_candidates(g: Graph, head: Head, config: PostprocessConfig, adaptive: bool) -> CandidateTensors:
    """Emit scoring and top-k. The backend emits the decoding of the candidates by `CandidateTensors.decode`.

    ``adaptive``: the number of candidates may depend on the data.
    """
    layout, image, total, tiled = head.layout, head.image, head.total, head.tiled
    multi_label = layout.every_class or (config.multi_label and layout.labels is None)
    most = config.max_candidates if head.suppress else config.max_detections
    judge = _judged_by_inputs if config.runtime_thresholds else _judged
    judged = judge(g, head, config, multi_label, adaptive)
    pool, origin, passes, activation = judged.pool, judged.origin, judged.passes, judged.activation
    eligible = g.where(passes, judged.scores, g.floats(NEVER))
    if adaptive:
        count = None
        best, place = g.top_k(eligible, _most_passing(g, passes, most))
    else:
        count = most
        if total is None:  # an open number of candidates
            end = g.cast(g.slice(g.op("Shape", eligible), 0, 1, 2), INT32)
            eligible = g.op("Pad", eligible, g.const([0, 0, 0, count], np.int64), g.floats(NEVER))
        else:
            count = min(count, total * (layout.num_classes if multi_label else 1))
        best, place = g.top_k(eligible, g.const([count], np.int64))
        if total is None:
            place = g.where(g.op("Less", place, end), place, g.ints(0))
    passing = g.op("Greater", best, g.floats(NEVER))

    def decode(columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        at, valid = (x if columns is None else g.op("Gather", x, columns, axis=1) for x in (place, passing))
        if multi_label:
            classes = g.ints(layout.num_classes)
            anchor = g.op("Div", at, classes)
            labels = g.op("Sub", at, g.op("Mul", anchor, classes))
            candidates = pool.take(
                anchor, *(tap.tensor for tap in (layout.boxes, layout.angle and layout.angle.value) if tap)
            )
        else:
            anchor, candidates = at, pool.take(at)
            class_scores = candidates.part(layout.classes)
            if judged.labels is not None:
                labels = g.op("GatherElements", judged.labels, at, axis=1)
            elif layout.labels is None:
                labels = g.cast(g.op("ArgMax", class_scores, axis=2, keepdims=0), INT32)
            else:
                labels = g.cast(g.reshape(candidates.part(layout.labels), 0, -1), INT32)
            # ReduceMax may ignore NaN. The sum of a candidate's classes is NaN or infinite if one of them is, and only then if they are
            # scaled down, so that large ones do not add up to infinity.
            total_score = g.reduce("ReduceSum", g.op("Mul", class_scores, g.floats(1 / MOST_CHANNELS)), 2)
            valid = g.op("And", valid, g.op("Less", total_score, g.floats(np.inf)))
        angle = None if layout.angle is None else candidates.part(layout.angle.value)
        number, tile = in_head(anchor), None
        if tiled is not None:
            tile, number = tiled.split(g, number)
        boxes = decode_boxes(g, layout, image, candidates.part(layout.boxes), number, angle)
        valid = g.op("And", valid, within_reach(boxes))
        if tiled is not None and tile is not None:
            boxes = tiled.to_frame(g, boxes, tile, angle is not None)
            valid = g.op("And", valid, within_reach(boxes))
        return order_corners(g, layout, boxes), labels, valid

    def within_reach(boxes: Tensor) -> Tensor:
        farthest = g.floats(MAX_REACH if layout.angle is None else MAX_REACH_ORIENTED)
        return g.op("Less", g.reduce("ReduceSum", g.op("Abs", boxes), 2), farthest)  # false for NaN

    def in_head(anchor: Tensor) -> Tensor:
        return anchor if origin is None else g.op("GatherElements", origin, anchor, axis=1)

    def indices(places: Tensor) -> Tensor:
        at = g.op("GatherElements", place, places, axis=1)
        return in_head(g.op("Div", at, g.ints(layout.num_classes)) if multi_label else at)

    probabilities = g.op("Sigmoid", best) if activation is Activation.SIGMOID else best
    return CandidateTensors(
        probabilities, passing, decode, count, layout.num_classes, layout.angle is not None, indices
    )


@dataclass(frozen=True)
class _Judged:
    """Scored candidates, and which of them pass.

    Attributes:
        pool: the candidates; ``origin`` ``[B, n]`` int32 are their numbers in the head, None if they are all of it.
        scores: ``[B, n]`` float32, with ``multi_label`` ``[B, n * C]``; those that pass are above `NEVER`.
        passes: of the same shape, bool.
        activation: what still turns a score into a probability.
        labels: ``[B, n]`` int32; None if the classes of the candidates tell them.
    """

    pool: _Pool
    origin: Tensor | None
    scores: Tensor
    passes: Tensor
    activation: Activation
    labels: Tensor | None = None


def _judged(g: Graph, head: Head, config: PostprocessConfig, multi_label: bool, adaptive: bool) -> _Judged:
    """Emit the comparison of all scores with the threshold of the settings."""
    pool, origin = _Pool.of_head(g, head.layout, head.widths), None
    if adaptive and _bounded(head.layout):
        least = g.const(strict_threshold(config.score_threshold, Activation.NONE), np.float32)
        origin = _pass_objectness(g, pool, least, head.total)
        pool = pool.take(origin)
    scores, activation = _scores(g, pool, multi_label)
    threshold = strict_threshold(config.score_threshold, activation)
    passes = g.op("And", g.op("Greater", scores, g.floats(float(threshold))), g.op("Less", scores, g.floats(np.inf)))
    above = scores if threshold > NEVER else g.op("Max", scores, g.floats(LOWEST))
    return _Judged(pool, origin, above, passes, activation)


def _judged_by_inputs(g: Graph, head: Head, config: PostprocessConfig, multi_label: bool, adaptive: bool) -> _Judged:
    """Emit the comparison of each score with the threshold of its class, an input of the graph.

    The best class of a candidate is the best one that the mask lets count. To find it takes three passes over all classes, so that where
    the number of candidates may depend on the data, those below the lowest threshold are left out before.
    """
    layout = head.layout
    pool, origin = _Pool.of_head(g, layout, head.widths), None
    last = layout.activation if layout.objectness is None else Activation.NONE
    last = Activation.NONE if last is Activation.SOFTMAX else last
    thresholds = class_thresholds(g, layout, last)
    least = g.reduce("ReduceMin", thresholds, 0, keepdims=True)
    if adaptive and _bounded(layout):
        origin = _pass_objectness(g, pool, least, head.total)
    elif adaptive and not multi_label and layout.objectness is None and layout.activation is not Activation.SOFTMAX:
        best, _ = _scores(g, pool, False)
        origin = _numbers(g, g.op("Greater", best, least), head.total)
    pool = pool if origin is None else pool.take(origin)
    labels: Tensor | None = None
    if multi_label:
        scores, activation = _scores(g, pool, True)
        each = g.op("Greater", g.reshape(scores, 0, -1, layout.num_classes), thresholds)
        passes = g.reshape(each, 0, -1)
    elif layout.labels is not None:
        scores, activation = _scores(g, pool, False)
        passes = g.op("Greater", scores, thresholds)
    else:
        mask, axis = class_mask(g), pool.channel_axis(layout.classes)
        labels = g.cast(g.op("ArgMax", _masked(g, mask, pool.part(layout.classes), axis), axis=axis, keepdims=0), INT32)
        scores, activation = _scores(g, pool, False, mask)
        passes = g.op("Greater", scores, g.op("Gather", thresholds, labels, axis=0))
    assert activation is last
    passes = g.op("And", passes, g.op("Less", scores, g.floats(np.inf)))
    if activation is Activation.SIGMOID:  # a threshold may be 0
        scores = g.op("Max", scores, g.floats(LOWEST))
    return _Judged(pool, origin, scores, passes, activation, labels)


def _masked(g: Graph, mask: Tensor, classes: Tensor, axis: int) -> Tensor:
    """The class values of candidates, ``[B, C, n]`` (``axis`` 1) or ``[B, n, C]``: -infinity for a class that does not count."""
    return g.where(g.unsqueeze(mask, 1) if axis == 1 else mask, classes, g.floats(-np.inf))


@dataclass(frozen=True)
class _Pool:
    """The head's tensors for some candidates: ``[B, C, n]`` or ``[B, n, C]`` each, with its channel axis."""

    g: Graph
    tensors: dict[str, tuple[Tensor, int]]
    widths: Mapping[str, int]
    layout: Layout

    @classmethod
    def of_head(cls, g: Graph, layout: Layout, widths: Mapping[str, int]) -> _Pool:
        tensors: dict[str, tuple[Tensor, int]] = {
            tap.tensor: (g.tensor(tap.tensor), tap.channel_axis) for tap in layout.box_taps
        }
        return cls(g, tensors, widths, layout)

    def part(self, tap: Tap) -> Tensor:
        """The channels of a tap; no copy if the tap is the whole tensor."""
        tensor, axis = self.tensors[tap.tensor]
        whole = (tap.start, tap.stop) == (0, self.widths[tap.tensor])
        return tensor if whole else self.g.slice(tensor, axis, tap.start, tap.stop)

    def channel_axis(self, tap: Tap) -> int:
        return self.tensors[tap.tensor][1]

    def take(self, index: Tensor, *names: str) -> _Pool:
        """Return only these candidates ``[B, k]``, of all tensors or of those named: ``[B, k, C]`` each."""
        taken: dict[str, tuple[Tensor, int]] = {
            name: (self.g.take_rows(tensor, index, other_axis(axis), self.widths[name]), 2)
            for name, (tensor, axis) in self.tensors.items()
            if not names or name in names
        }
        return _Pool(self.g, taken, self.widths, self.layout)


def _scores(g: Graph, pool: _Pool, multi_label: bool, mask: Tensor | None = None) -> tuple[Tensor, Activation]:
    """Emit the score of every candidate of the pool. Return it with the activation that still turns it into a probability.

    Scores are ``[B, n]``, the best class of each box; with ``multi_label`` ``[B, n * C]``, with the classes of a box side by side. Only
    classes of the ``mask`` ``[C]`` bool count, if there is one; a softmax is over all classes.
    """
    layout, activation = pool.layout, pool.layout.activation
    classes, axis = pool.part(layout.classes), pool.channel_axis(layout.classes)
    if activation is Activation.SOFTMAX:
        classes, axis, activation = _softmax(g, pool), 2, Activation.NONE
    if mask is not None:
        classes = _masked(g, mask, classes, axis)
    if multi_label:
        scores: Tensor = g.op("Transpose", classes, perm=[0, 2, 1]) if axis == 1 else classes
    else:
        scores = g.reduce("ReduceMax", classes, axis)
    if layout.objectness is not None:
        usable = g.op("Less", scores, g.floats(np.inf))  # false for NaN; a sigmoid or a power of 0 would hide it
        if activation is Activation.SIGMOID:
            scores = g.where(usable, g.op("Sigmoid", scores), g.floats(0.0))
        objectness = _objectness(g, pool, layout.objectness)
        if (weight := layout.objectness_weight) is not None:
            scores = g.op("Pow", g.op("Relu", scores), g.floats(1 - weight))
            scores = g.where(usable, scores, g.floats(0.0)) if weight == 1 else scores
            objectness = g.op("Pow", g.op("Relu", objectness), g.floats(weight))
        scores = g.op("Mul", scores, g.unsqueeze(objectness, 2) if multi_label else objectness)
        activation = Activation.NONE
    return (g.reshape(scores, 0, -1) if multi_label else scores), activation


def _softmax(g: Graph, pool: _Pool) -> Tensor:
    """Class probabilities ``[B, n, C]`` of a softmax over the classes and, if there is one, the background."""
    layout = pool.layout
    parts = [
        g.op("Transpose", pool.part(tap), perm=[0, 2, 1]) if pool.channel_axis(tap) == 1 else pool.part(tap)
        for tap in (layout.classes, layout.background)
        if tap is not None
    ]
    shares = g.op("Softmax", g.concat(parts, 2) if len(parts) > 1 else parts[0], axis=2)
    return g.slice(shares, 2, 0, layout.classes.channels) if len(parts) > 1 else shares


def _objectness(g: Graph, pool: _Pool, tap: Tap) -> Tensor:
    """Objectness as a probability, ``[B, n]``."""
    values = g.reduce("ReduceMax", pool.part(tap), pool.channel_axis(tap))  # one channel: only drops the axis
    return g.op("Sigmoid", values) if pool.layout.activation is Activation.SIGMOID else values


def _bounded(layout: Layout) -> bool:
    """Whether no score is above its objectness: it is the product of two sigmoids."""
    return (
        layout.activation is Activation.SIGMOID and layout.objectness is not None and layout.objectness_weight is None
    )


def _pass_objectness(g: Graph, pool: _Pool, least: Tensor, total: int | None) -> Tensor:
    """Emit the numbers of the candidates whose objectness alone is above ``least``, ascending, ``[B, k]`` int32.

    The score is objectness times a sigmoid, which is at most 1, so no other candidate can pass.
    """
    assert pool.layout.objectness is not None
    return _numbers(g, g.op("Greater", _objectness(g, pool, pool.layout.objectness), least), total)


def _numbers(g: Graph, passes: Tensor, total: int | None) -> Tensor:
    """Emit the numbers of the candidates that pass ``[B, N]``, ascending, ``[B, k]`` int32.

    An image with fewer of them than the image with the most is padded with other candidates, which their score then removes.
    """
    if total is not None:
        falling: Tensor = g.const(np.arange(total, 0, -1)[None], np.float32)
    else:
        falling = g.op("CumSum", g.cast(g.op("Equal", passes, passes), FLOAT), g.const(1, np.int64), reverse=1)
    _, index = g.top_k(g.where(passes, falling, g.floats(0.0)), _most_passing(g, passes, None))
    return index


def _most_passing(g: Graph, passes: Tensor, most: int | None) -> Tensor:
    """Number of passing candidates in the image with the most of them: at least 1, ``[1]`` int64."""
    counts = g.reduce("ReduceSum", g.cast(passes, INT32), 1)
    fullest = g.cast(g.reduce("ReduceMax", counts, 0, keepdims=True), INT64)
    one = g.const([1], np.int64)
    fullest = g.where(g.op("Less", fullest, one), one, fullest)
    return fullest if most is None else _smaller(g, fullest, g.const([most], np.int64))


def _smaller(g: Graph, a: Tensor, b: Tensor) -> Tensor:
    return g.where(g.op("Less", a, b), a, b)  # Min does not take integers before opset 12
