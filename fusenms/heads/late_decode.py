"""Find the tensors before the decode of a third-party graph, and prove by value that they are the right ones.

1. The graph only suggests tensors: the inputs of the sigmoids and of the softmax over the box distribution; for finished rows, the inputs
   of the top-k and of the gathers.
2. The graph is cut at these tensors. The part after the cut runs on random values, so that every class and every bin counts.
3. The reference decodes the same values. It must give the model's own output for every candidate. Otherwise the tensors are rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from fusenms.config import PostprocessConfig
from fusenms.errors import SourceError
from fusenms.heads.probe import COMPUTING_OPS, MOVING_OPS, Probe, inputs_of, joined, joined_parts, producers_of
from fusenms.layout import (
    LARGEST,
    Activation,
    AnchorBoxes,
    AngleTerm,
    Decoded,
    Distances,
    Join,
    KeypointTerms,
    Layout,
    Tap,
    other_axis,
)
from fusenms.reference import candidates, keypoints, mask_coefficients, postprocess

BOX_TOLERANCE = 0.02  # pixels, for decoding a distribution in float32; a wrong tensor is off by tens
SCORE_TOLERANCE = 1e-4
ANGLE_TOLERANCE = 1e-5
JOINED = "fusenms/head"
MOST_ROWS = 1000


def earliest_distances(probe: Probe, layout: Layout) -> Layout:
    """Return the layout of the same head before its sigmoid and softmax if that can be proven, else ``layout``.

    If the boxes are decoded in an unknown way (for example in int8), only the sigmoid is left out. ``layout`` is that of a decoded output
    with one anchor per cell and no objectness. Masks, keypoints and angles are taken before their own decode in the same way.
    """
    count = _count(probe, layout)
    strides = probe.strides(1, count)
    if strides is None:
        return layout
    graph = probe.raw.model.graph
    producers = producers_of(graph)
    logits = inputs_of("Sigmoid", layout.classes.tensor, producers)
    softmaxes = (node.input[0] for node in graph.node if node.op_type == "Softmax")
    spreads = list(dict.fromkeys(name for start in softmaxes for name in _behind(start, producers)))
    if not logits:
        return layout
    plain = _upstream(layout.boxes.tensor, producers)[::-1]  # with one bin, the distances; the farthest first
    values = probe.values([*logits, *spreads, *plain])
    box_taps = [tap for tap in _taps(values, spreads, count, None) if tap.channels % 4 == 0 and tap.channels >= 8]
    box_taps += [tap for tap in _taps(values, plain, count, 4) if tap.tensor != layout.boxes.tensor]
    task_terms = list(_earlier_task_terms(probe, layout, count, producers))
    for class_tap in _taps(values, logits, count, layout.num_classes):
        for box_tap in box_taps:
            decode = Distances(strides, box_tap.channels // 4)
            late = replace(layout, boxes=box_tap, classes=class_tap, activation=Activation.SIGMOID, decode=decode)
            for terms in task_terms:
                if _same(probe, layout, earliest := replace(late, **terms)):
                    return earliest
    parts = joined_parts(producers, layout.boxes.tensor)
    values |= probe.values(parts)
    for class_tap in _taps(values, logits, count, layout.num_classes):
        for box_tap in _taps(values, parts, count, 4):
            half = replace(layout, boxes=box_tap, classes=class_tap, activation=Activation.SIGMOID)
            for terms in (*(t for t in task_terms if _stand_alone(t)), {}):
                if _same(probe, layout, earliest := replace(half, **terms)):
                    return earliest
    return layout


def _stand_alone(terms: dict[str, Any]) -> bool:
    """Whether task outputs are decoded without the cells and do not change the boxes."""
    points = terms.get("keypoints")
    return "angle" not in terms and (points is None or points.factor is None)


def _earlier_task_terms(
    probe: Probe, layout: Layout, count: int, producers: dict[str, onnx.NodeProto]
) -> Iterator[dict[str, Any]]:
    """Yield the earlier places in the graph that the layout's masks, keypoints or angle may have, as fields of a layout.

    The last one is the present place, if it can be combined with boxes before their decode.
    """
    masks, points, angle = layout.masks, layout.keypoints, layout.angle
    tap = masks.coefficients if masks else points.values if points else angle.value if angle else None
    if tap is None:
        yield {}
        return
    values = probe.values(_upstream(tap.tensor, producers))
    channels = tap.channels
    for earlier in _taps(values, list(values)[::-1], count, channels):  # the farthest first
        if earlier.tensor == tap.tensor:
            continue
        if masks is not None:
            yield {"masks": replace(masks, coefficients=earlier)}
        elif points is not None:
            for factor, point in ((2.0, 0.0), (1.0, 0.5)):  # YOLOv8 and YOLO11; YOLO26
                yield {"keypoints": KeypointTerms(earlier, points.dims, factor, point)}
            yield {"keypoints": replace(points, values=earlier)}
        else:
            for sigmoid in (True, False):
                yield {"angle": AngleTerm(earlier, sigmoid)}
    if angle is None:
        yield {}


MOST_UPSTREAM = 120


def _upstream(tensor: str, producers: dict[str, onnx.NodeProto]) -> list[str]:
    """List the tensors from which a tensor is made by moving values and by elementwise operators, the nearest first."""
    found, todo = list[str](), [tensor]
    while todo and len(found) < MOST_UPSTREAM:
        name = todo.pop(0)
        node = producers.get(name)
        if node is None or name in found:
            continue
        found.append(name)
        if node.op_type in (*MOVING_OPS, *COMPUTING_OPS, "Sin", "Cos"):
            todo += node.input
    return found


def earliest_anchors(probe: Probe, layout: Layout, anchors: int) -> Layout:
    """Return the layout of the same head before the sigmoid of each level if that can be proven, else ``layout``.

    ``layout`` is that of a decoded output ``[B, N, 5 + C]`` with this number of anchors per cell: box, objectness, classes. The anchor
    sizes are the decoded sizes divided by the factors that the sigmoid gives.
    """
    count, channels = _count(probe, layout), layout.classes.stop
    strides = probe.strides(anchors, count)
    names = inputs_of("Sigmoid", layout.classes.tensor, producers_of(probe.raw.model.graph))
    if strides is None or not names:
        return layout
    values = probe.values(names)
    levels = sorted((n for n in names if values[n].shape[-1:] == (channels,)), key=lambda n: -values[n].size)
    join = Join(JOINED, tuple(levels), 2, channels)
    if not levels or (head := joined(values, join)).shape[1] != count:
        return layout
    decoded = next(s.value for s in probe.samples if s.tensor == layout.classes.tensor)
    factors = decoded[0, :, 2:4] * ((1 + np.exp(-head[0, :, 2:4].astype(np.float64))) / 2) ** 2
    sizes: list[tuple[tuple[float, float], ...]] = []
    for level in np.split(factors, np.cumsum([anchors * n for n in probe.cells(strides)])[:-1]):
        found = np.median(level.reshape(anchors, -1, 2), 1).round(4)
        sizes.append(tuple((float(w), float(h)) for w, h in found))
    if not all(
        0 < side < LARGEST for level in sizes for pair in level for side in pair
    ):  # out of range or NaN: not anchors, so the decode is another one
        return layout
    boxes, classes, objectness = (Tap(join.tensor, 2, *span) for span in ((0, 4), (5, channels), (4, 5)))
    decode = AnchorBoxes(strides, tuple(sizes))
    late = Layout(layout.family, boxes, classes, objectness, Activation.SIGMOID, decode, (join,))
    return late if _same(probe, layout, late) else layout


def earliest_rows(probe: Probe, layout: Layout) -> Layout:
    """Return the layout of the same head before its top-k if that can be proven, else ``layout``.

    ``layout`` is that of finished rows. The proof: from random boxes and scores, the rest of the graph selects the same rows as the
    reference. A sigmoid of the scores is then left out too.
    """
    graph = probe.raw.model.graph
    producers = producers_of(graph)
    every = [node.input[0] for node in graph.node if node.op_type == "TopK"]
    scores = list(dict.fromkeys(name for start in every for name in _behind(start, producers, ("ReduceMax",))))
    starts = [node.input[0] for node in graph.node if node.op_type in ("GatherElements", "GatherND", "Gather")]
    boxes = list(dict.fromkeys(name for start in starts for name in _behind(start, producers)))
    values = probe.values([*scores, *boxes])
    for class_tap in (tap for name in scores for tap in _any_taps(values, name)):
        count = values[class_tap.tensor].shape[class_tap.candidate_axis]
        for box_tap in _taps(values, boxes, count, 4):
            early = replace(layout, boxes=box_tap, classes=class_tap, labels=None, joins=())
            if _same_rows(probe, layout, early):
                return _before_sigmoid(probe, early, producers)
    return layout


def _any_taps(values: dict[str, np.ndarray], name: str) -> Iterator[Tap]:
    shape = values[name].shape
    if len(shape) == 3:
        longer = 1 if shape[1] > shape[2] else 2
        for axis in (other_axis(longer), longer):  # there are usually more candidates than classes
            yield Tap(name, axis, 0, shape[axis])


def _before_sigmoid(probe: Probe, layout: Layout, producers: dict[str, onnx.NodeProto]) -> Layout:
    """Return the layout before the sigmoid of its class scores, if that sigmoid is a single operator."""
    for name in inputs_of("Sigmoid", layout.classes.tensor, producers):
        values = probe.values([name, layout.classes.tensor])
        logits, scores = values[name], values[layout.classes.tensor]
        for tap in _any_taps(values, name):
            rows, expected = (
                v[0].T if axis == 1 else v[0]
                for v, axis in ((logits, tap.channel_axis), (scores, layout.classes.channel_axis))
            )
            if (
                rows.shape == expected.shape
                and np.abs(1 / (1 + np.exp(-rows.astype(np.float64))) - expected).max() <= 1e-6
            ):
                return replace(layout, classes=tap, activation=Activation.SIGMOID)
    return layout


def _same_rows(probe: Probe, rows: Layout, early: Layout) -> bool:
    """Whether the graph after the taps of ``early`` and the reference select the same rows from random boxes and scores."""
    rng = np.random.default_rng(13)
    values = probe.values(early.sources)
    if any(value.dtype != np.float32 for value in values.values()):
        return False
    normalized = isinstance(rows.decode, Decoded) and rows.decode.normalized
    sides = np.ones(2) if normalized else probe.sides[:2]
    shape = values[early.boxes.tensor].shape
    count = shape[early.boxes.candidate_axis]
    corner = rng.random((1, count, 2)) * sides * 0.5
    boxes = np.concatenate((corner, corner + rng.random((1, count, 2)) * sides * 0.5), 2).astype(np.float32)
    taps = {
        early.boxes.tensor: boxes if early.boxes.channel_axis == 2 else boxes.transpose(0, 2, 1),
        early.classes.tensor: rng.random(values[early.classes.tensor].shape, dtype=np.float32),
    }
    try:
        got = probe.run_behind(taps, rows.sources)
    except SourceError:  # the rest of the graph does not run on the taps alone
        return False
    got = dict(got) | {join.tensor: joined(got, join) for join in rows.joins}
    size = (probe.raw.image.height, probe.raw.image.width)
    found = candidates(got, 0, rows, size)
    config = PostprocessConfig(score_threshold=0, max_detections=len(found.boxes), max_candidates=MOST_ROWS)
    expected, own = (postprocess(c, config).rows for c in (candidates(taps, 0, early, size), found))
    return len(own) == len(expected) and all(
        np.abs(a - b).max() <= tolerance
        for a, b, tolerance in (
            (own.boxes, expected.boxes, BOX_TOLERANCE), (own.scores, expected.scores, SCORE_TOLERANCE), (own.labels, expected.labels, 0)
        )
    )  # fmt: skip


def _count(probe: Probe, layout: Layout) -> int:
    values = probe.values([layout.classes.tensor])[layout.classes.tensor]
    return int(values.shape[layout.classes.candidate_axis])


def _behind(tensor: str, producers: dict[str, onnx.NodeProto], more: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a tensor and the tensors that its values were moved from, one by one. ``more`` operators count as moves too."""
    while tensor in producers:
        yield tensor
        node = producers[tensor]
        if node.op_type not in (*MOVING_OPS, *more) or node.op_type == "Concat":
            return
        tensor = node.input[0]


def _taps(values: dict[str, np.ndarray], names: Sequence[str], count: int, channels: int | None) -> Iterator[Tap]:
    """Yield taps of those tensors that have a row of channels for each candidate."""
    for name in names:
        shape = values[name].shape
        for axis in (1, 2):
            if len(shape) == 3 and shape[other_axis(axis)] == count and channels in (None, shape[axis]):
                yield Tap(name, axis, 0, shape[axis])


def _same(probe: Probe, decoded: Layout, late: Layout) -> bool:
    """Whether the graph after the taps of ``late`` and the reference give the same results from random values."""
    rng = np.random.default_rng(11)
    prototypes = None if late.masks is None else late.masks.prototypes
    values = probe.values([name for name in late.sources if name != prototypes])
    if any(value.dtype != np.float32 for value in values.values()):  # half precision: the tail is float32
        return False
    taps = {name: rng.normal(0, 2.5, value.shape).astype(np.float32) for name, value in values.items()}
    try:
        got = probe.run_behind(taps, list(dict.fromkeys(tap.tensor for tap in decoded.taps)))
    except SourceError:  # the rest of the graph does not run on the taps alone
        return False
    size = (probe.raw.image.height, probe.raw.image.width)
    own = candidates(got, 0, decoded, size)
    ours = candidates(taps | {join.tensor: joined(taps, join) for join in late.joins}, 0, late, size)
    pairs: list[tuple[Any, Any, float]] = [
        (own.boxes[:, :4], ours.boxes[:, :4], BOX_TOLERANCE),
        (own.scores, ours.scores, SCORE_TOLERANCE),
    ]
    pairs.append((own.boxes[:, 4:], ours.boxes[:, 4:], ANGLE_TOLERANCE))
    numbers = np.arange(len(own.boxes))
    if late.masks is not None:
        pair = (mask_coefficients(v, 0, layout, numbers) for v, layout in ((got, decoded), (taps, late)))
        pairs.append((next(pair), next(pair), 0.0))
    if late.keypoints is not None:
        pair = (keypoints(v, 0, layout, size, numbers) for v, layout in ((got, decoded), (taps, late)))
        pairs.append((next(pair), next(pair), BOX_TOLERANCE))
    return all(np.abs(a - b).max(initial=0) <= tolerance for a, b, tolerance in pairs)
