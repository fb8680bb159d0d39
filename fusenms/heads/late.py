"""Find the tensors before a decode that a stranger's graph contains, and show by value that they are the ones.

The graph only suggests tensors: what goes into the sigmoids, and into the softmax of the box distribution. For the proof the
graph is cut there, and what is left of it runs on random values, so that every class and every bin counts: the reference,
decoding the same values, must give the model's own output for every candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx

from fusenms.errors import SourceError
from fusenms.heads.evidence import MOVES, Evidence, inputs_of, joined, joined_parts, producers_of
from fusenms.layout import Activation, AnchorBoxes, Distances, Join, Layout, Tap
from fusenms.reference import candidates

PIXELS = 0.02  # of a distribution's decode in float32; a wrong tensor is off by tens
SCORES = 1e-4
JOINED = "fusenms/head"


def earliest_distances(evidence: Evidence, layout: Layout) -> Layout:
    """The layout of the same head before its sigmoid and softmax, where that can be shown; else the layout as it is.

    Where the boxes are decoded in a way that is not known (in int8, for one), before its sigmoid alone.
    ``layout`` is that of a decoded output with one anchor per cell and no objectness.
    """
    count = _count(evidence, layout)
    strides = evidence.strides(1, count)
    if strides is None:
        return layout
    graph = evidence.raw.model.graph
    producers = producers_of(graph)
    logits = inputs_of("Sigmoid", layout.classes.tensor, producers)
    softmaxes = (node.input[0] for node in graph.node if node.op_type == "Softmax")
    spreads = list(dict.fromkeys(name for start in softmaxes for name in _behind(start, producers)))
    if not logits or not spreads:
        return layout
    values = evidence.values([*logits, *spreads])
    for class_tap in _taps(values, logits, count, layout.num_classes):
        for box_tap in _taps(values, spreads, count, None):
            if box_tap.channels % 4 or box_tap.channels < 8:
                continue
            decode = Distances(strides, box_tap.channels // 4)
            late = Layout(layout.family, box_tap, class_tap, None, Activation.SIGMOID, decode)
            if _same(evidence, layout, late):
                return late
    parts = joined_parts(producers, layout.boxes.tensor)
    values |= evidence.values(parts)
    for class_tap in _taps(values, logits, count, layout.num_classes):
        for box_tap in _taps(values, parts, count, 4):
            half = replace(layout, boxes=box_tap, classes=class_tap, activation=Activation.SIGMOID)
            if _same(evidence, layout, half):
                return half
    return layout


def earliest_anchors(evidence: Evidence, layout: Layout, anchors: int) -> Layout:
    """The layout of the same head before the sigmoid of each level, where that can be shown; else the layout as it is.

    ``layout`` is that of a decoded output ``[B, N, 5 + C]`` with so many anchors per cell: box, objectness, classes. The anchors'
    sizes are what is left of the decoded sizes after dividing by those of the sigmoid.
    """
    count, channels = _count(evidence, layout), layout.classes.stop
    strides = evidence.strides(anchors, count)
    names = inputs_of("Sigmoid", layout.classes.tensor, producers_of(evidence.raw.model.graph))
    if strides is None or not names:
        return layout
    values = evidence.values(names)
    levels = sorted((n for n in names if values[n].shape[-1:] == (channels,)), key=lambda n: -values[n].size)
    join = Join(JOINED, tuple(levels), 2, channels)
    if not levels or (head := joined(values, join)).shape[1] != count:
        return layout
    decoded = next(s.value for s in evidence.samples if s.tensor == layout.classes.tensor)
    factors = decoded[0, :, 2:4] * ((1 + np.exp(-head[0, :, 2:4].astype(np.float64))) / 2) ** 2
    sizes: list[tuple[tuple[float, float], ...]] = []
    for level in np.split(factors, np.cumsum([anchors * n for n in evidence.cells(strides)])[:-1]):
        found = np.median(level.reshape(anchors, -1, 2), 1).round(4)
        sizes.append(tuple((float(w), float(h)) for w, h in found))
    boxes, classes, objectness = (Tap(join.tensor, 2, *span) for span in ((0, 4), (5, channels), (4, 5)))
    decode = AnchorBoxes(strides, tuple(sizes))
    late = Layout(layout.family, boxes, classes, objectness, Activation.SIGMOID, decode, (join,))
    return late if _same(evidence, layout, late) else layout


def _count(evidence: Evidence, layout: Layout) -> int:
    sample = next(s for s in evidence.samples if s.tensor == layout.classes.tensor)
    return int(sample.value.shape[3 - layout.classes.channel_axis])


def _behind(tensor: str, producers: dict[str, onnx.NodeProto]) -> Iterator[str]:
    """A tensor and those it was moved from, one by one."""
    while tensor in producers:
        yield tensor
        node = producers[tensor]
        if node.op_type not in MOVES or node.op_type == "Concat":
            return
        tensor = node.input[0]


def _taps(values: dict[str, np.ndarray], names: Sequence[str], count: int, channels: int | None) -> Iterator[Tap]:
    """Those of the tensors that have a row of channels for each candidate."""
    for name in names:
        shape = values[name].shape
        for axis in (1, 2):
            if len(shape) == 3 and shape[3 - axis] == count and channels in (None, shape[axis]):
                yield Tap(name, axis, 0, shape[axis])


def _same(evidence: Evidence, decoded: Layout, late: Layout) -> bool:
    """Whether the graph behind the taps of ``late`` makes of random values what the reference makes of them."""
    rng = np.random.default_rng(11)
    values = evidence.values(late.sources)
    if any(value.dtype != np.float32 for value in values.values()):  # half precision: the tail is float32
        return False
    taps = {name: rng.normal(0, 2.5, value.shape).astype(np.float32) for name, value in values.items()}
    try:
        got = evidence.run_behind(taps, decoded.tensors)
    except SourceError:  # what is behind does not stand alone
        return False
    size = (evidence.raw.image.height, evidence.raw.image.width)
    own = candidates(got, 0, decoded, size)
    ours = candidates(taps | {join.tensor: joined(taps, join) for join in late.joins}, 0, late, size)
    return bool(np.abs(own.boxes - ours.boxes).max() <= PIXELS and np.abs(own.scores - ours.scores).max() <= SCORES)
