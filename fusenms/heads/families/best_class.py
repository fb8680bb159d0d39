"""Exports that keep only the best class of each candidate, and leave suppression to who runs them (DeepStream-Yolo).

One output ``[B, N, 6]`` (x1, y1, x2, y2, score, class) or three, boxes ``[B, N, 4]``, scores ``[B, N, 1]`` and classes ``[B, N, 1]``, one
candidate a cell, in the order of the cells. The score is that of the best class, or times an objectness. The head is taken where all class
scores are still there, ``[B, N, C]``: with the best class alone nobody knows how many there are.
Source: marcoslucianops/DeepStream-Yolo, `DeepStreamOutput`.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx

from fusenms.errors import SourceError
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.late_decode import earliest_distances
from fusenms.heads.probe import Probe, are_probabilities, box_format, inputs_of, joined_parts, producers_of
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap, other_axis

NAME = "best_class"
BEST_OF = ("ReduceMax", "TopK")


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize candidates with their best class, and find all of their class scores."""
    rows = _rows(probe)
    shapes = [list(sample.value.shape) for sample in probe.samples]
    if rows is None:
        return Mismatch(
            f"found outputs of shape {shapes}; expected one [batch, candidates, 6], or boxes [batch, candidates, 4], scores and classes "
            "[batch, candidates, 1]"
        )
    boxes, scores, labels = rows
    grids = [grid for anchors in (1, 3) if (grid := probe.grid(anchors, len(boxes))) is not None]
    if not grids:
        return Mismatch(
            f"found {len(boxes)} candidates; expected one or three per cell of levels with strides such as 8, 16, 32"
        )
    if not are_probabilities(scores) or (labels != np.round(labels)).any() or (labels < 0).any():
        return Mismatch("expected a probability and a class number for each candidate")
    if box_format(boxes, grids[0], probe.sides) != Decoded(BoxFormat.XYXY):
        return Mismatch("its boxes are not corners in pixels that follow the cells of the image")
    found = _before_the_best(probe, boxes)
    if found is None:
        return Mismatch("the class scores that the best class was taken of are not in the file")
    box_tap, class_tap, objectness = found
    names = probe.raw.class_names
    if names and len(names) != class_tap.channels:
        return Mismatch(f"found {class_tap.channels} classes, but {len(names)} class names in the metadata")
    decoded = Layout(NAME, box_tap, class_tap, objectness, Activation.NONE, Decoded(BoxFormat.XYXY))
    return decoded if objectness else earliest_distances(probe, decoded)


def _rows(probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Boxes ``[N, 4]``, scores ``[N]`` and classes ``[N]`` on the test image; None if the outputs are others."""
    values = [sample.value[0].astype(np.float64) for sample in probe.samples if sample.value.ndim == 3]
    if len(values) == len(probe.samples) == 1 and values[0].shape[1] == 6:
        return values[0][:, :4], values[0][:, 4], values[0][:, 5]
    if len(values) != 3 or len(probe.samples) != 3 or sorted(v.shape[1] for v in values) != [1, 1, 4]:
        return None
    (boxes,), ones = ([v for v in values if v.shape[1] == width] for width in (4, 1))
    whole = [bool((v == np.round(v)).all()) for v in ones]
    if len({len(v) for v in values}) != 1 or whole[0] == whole[1]:
        return None
    scores, labels = ones if whole[1] else ones[::-1]
    return boxes, scores[:, 0], labels[:, 0]


def _before_the_best(probe: Probe, boxes: np.ndarray) -> tuple[Tap, Tap, Tap | None] | None:
    """The boxes, all class scores and the objectness, if there is one, where the output is made of them and of nothing else."""
    graph = probe.raw.model.graph
    producers = producers_of(graph)
    ends = [entry.name for entry in graph.output]
    scores: list[tuple[str, str | None]] = [
        (name, None) for op in BEST_OF for end in ends for name in inputs_of(op, end, producers)
    ]
    scores += _products_with_the_best(probe, producers)
    places = list(dict.fromkeys([*ends, *(part for end in ends for part in joined_parts(producers, end))]))
    values = probe.values(list(dict.fromkeys([*(name for pair in scores for name in pair if name), *places])))
    places = [name for name in places if values[name].ndim == 3 and values[name].shape[2] in (4, 6)]
    for class_name, factor in dict.fromkeys(scores):
        classes = values[class_name]
        if factor is not None and values[factor].shape != (1, len(boxes), 1):
            continue
        axes = [axis for axis in (2, 1) if classes.ndim == 3 and classes.shape[other_axis(axis)] == len(boxes)]
        for axis, box_name in product(axes, places):
            box = values[box_name]
            if box.shape[:2] != (1, len(boxes)) or not np.array_equal(box[0, :, :4], boxes.astype(box.dtype)):
                continue
            objectness = None if factor is None else Tap(factor, 2, 0, 1)
            if _gives_the_best(
                probe, box_name, Tap(class_name, axis, 0, classes.shape[axis]), classes.shape, objectness
            ):
                return Tap(box_name, 2, 0, 4), Tap(class_name, axis, 0, classes.shape[axis]), objectness
    return None


def _products_with_the_best(probe: Probe, producers: dict[str, onnx.NodeProto]) -> list[tuple[str, str | None]]:
    """Class scores whose best is multiplied by something, and by what."""
    products = [node.input for node in probe.raw.model.graph.node if node.op_type == "Mul"]
    return [
        (name, other)
        for one, two in products
        for best, other in ((one, two), (two, one))
        for op in BEST_OF
        for name in inputs_of(op, best, producers)
    ]


def _gives_the_best(probe: Probe, box_name: str, classes: Tap, shape: tuple[int, ...], objectness: Tap | None) -> bool:
    """Whether the outputs beside the boxes are the best score, times the objectness, and its class, for any class scores."""
    rng = np.random.default_rng(3)
    scores, factors = (
        rng.random(shape).astype(np.float32),
        rng.random((1, shape[3 - classes.channel_axis], 1)).astype(np.float32),
    )
    given = {classes.tensor: scores} | ({objectness.tensor: factors} if objectness else {})
    ends = [entry.name for entry in probe.raw.model.graph.output if entry.name != box_name]
    try:
        got = probe.run_behind(given, ends or [box_name])
    except SourceError:
        return False
    rows = scores[0] if classes.channel_axis == 2 else scores[0].T
    high = rows.max(1) * factors[0, :, 0] if objectness else rows.max(1)
    made, best = np.concatenate([value[0] for value in got.values()], 1)[:, -2:], (high, rows.argmax(1))
    return any(np.array_equal(made, np.stack(pair, 1)) for pair in (best, best[::-1]))


BEST_CLASS = HeadSpec(NAME, match)
