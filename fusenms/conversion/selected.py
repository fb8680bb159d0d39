"""The head of a file that selects candidates before it suppresses them, as torchvision's detectors do.

Such a file holds boxes and scores only of what a threshold and a top-k leave, level by level (FCOS, RetinaNet) or class by class (SSD):

1. scores ``[n, C]`` of a level, flattened, or one column of the scores ``[N, 1 + C]``, or the best of each row; those above the threshold;
   the k best;
2. the regression and the anchors of these, decoded and clipped, or the boxes of these;
3. all levels or classes joined, moved apart by their class, suppressed; the first rows, scaled to the size of the images.

Everything between is computed row by row. So the head is what remains when each selection of rows is left out: boxes ``[1, N, 4]`` in
pixels of the images, clipped as in the file, and the scores before they were flattened, ``[1, N, C]``. A column that the file leaves out,
the background, is 0, and the others keep their numbers. That this is the head is shown by the file's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.artifacts.raw import RawModel
from fusenms.conversion.semantics import Semantics
from fusenms.conversion.suppressions import STANDARD, Found, ancestors, attributes, producers_of
from fusenms.graph.model import SHAPE_OPS, part_before
from fusenms.graph.session import Session
from fusenms.heads.probe import are_normalized, probe_image
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap

BOXES, SCORES = "fusenms/dense_boxes", "fusenms/dense_scores"
SELECTING = ("NonZero", "TopK", STANDARD)
"""Operators whose result tells rows apart by their values."""
MOVING = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Slice")
FAMILY = "corners"


@dataclass(frozen=True)
class Dense:
    """The file up to a head of all candidates, what the head means, and what the file does behind it.

    Attributes:
        pixels: pixels that the file takes, as the mean that it subtracts shows; None if it subtracts none.
        notes: what it does with images itself, a line each.
    """

    model: onnx.ModelProto
    layout: Layout
    semantics: Semantics
    pixels: Pixels | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Scores of one level, or of one class.

    Attributes:
        name: the scores, flat.
        source: the tensor that they are all of, or a column of.
        column: number of that column; None for all of it.
        best: whether they are the best of each row, and the class is its number.
    """

    name: str
    source: str
    column: int | None = None
    best: bool = False

    @property
    def of(self) -> str:
        """What the scores are those of, in words."""
        return "image" if self.best else "level" if self.column is None else "class"


def without_selections(raw: RawModel, found: Found) -> Dense | None:
    """Return the file with a head of all candidates; None if it is not of the known form.

    Args:
        raw: the whole file, whose outputs are boxes ``[n, 4]``, scores ``[n]`` and labels ``[n]`` of one image.
        found: its suppression.

    Raises:
        SourceError: the network does not run.
    """
    outputs = _outputs(raw.model)
    if outputs is None or found.operator != STANDARD or len(found.nodes) != 1:
        return None
    if attributes(found.nodes[0]).get("center_point_box", 0):
        return None
    chain = _Chain(raw, found.nodes[0], *outputs)
    dense = chain.boxes_of_all()
    parts = chain.parts_of(outputs[1])
    if dense is None or not parts or parts != chain.parts_of(found.scores[0]):
        return None
    return chain.made(dense, parts)


def _outputs(model: onnx.ModelProto) -> tuple[str, str, str] | None:
    """Names of boxes, scores and labels; None if the outputs are others."""
    entries = list(model.graph.output)
    ranks = {entry.name: len(entry.type.tensor_type.shape.dim) for entry in entries}
    floats = [entry.name for entry in entries if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    labels = [entry.name for entry in entries if entry.name not in floats]
    boxes, scores = ([name for name in floats if ranks[name] == rank] for rank in (2, 1))
    if (len(boxes), len(scores), len(labels)) != (1, 1, 1):
        return None
    return boxes[0], scores[0], labels[0]


class _Chain:
    """The way from the scores of a network to three outputs of selected rows."""

    def __init__(self, raw: RawModel, node: onnx.NodeProto, boxes: str, scores: str, labels: str) -> None:
        self.raw, self.node, self.boxes, self.scores, self.labels = raw, node, boxes, scores, labels
        self.model = raw.model
        self.producers = producers_of(self.model)
        self.stored = {item.name: item for item in self.model.graph.initializer}
        self.most = set[int]()

    @cached_property
    def selected(self) -> set[str]:
        """Tensors that depend on a selection. A shape does not."""
        found = set[str]()
        for node in self.model.graph.node:
            if node.op_type in SELECTING or (node.op_type not in SHAPE_OPS and found.intersection(node.input)):
                found.update(node.output)
        return found

    def boxes_of_all(self) -> onnx.ModelProto | None:
        """The model whose boxes are those of all candidates; None if something else than rows is selected on the way."""
        behind, todo = dict[str, str](), [self.boxes]
        joins, seen = list[onnx.NodeProto](), set[str]()
        while todo:
            name = todo.pop()
            if name in seen or name not in self.selected:
                continue
            seen.add(name)
            node = self.producers[name]
            if self._selects_rows(node):
                behind[name] = node.input[0]
                todo.append(node.input[0])
                continue
            if node.op_type in SELECTING or (node.attribute and any(a.type == a.GRAPH for a in node.attribute)):
                return None
            if node.op_type == "Concat" and len(node.input) > 1:
                joins.append(node)
            todo += node.input

        def root(name: str) -> str:
            while name in behind:
                name = behind[name]
            return name

        for node in joins:
            if len({root(name) for name in node.input}) == 1:  # the boxes of each class: the same for all
                behind[node.output[0]] = node.input[0]
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        for node in copy.graph.node:
            if len(node.output) == 1 and node.output[0] in behind:
                whole = helper.make_node("Identity", [behind[node.output[0]]], list(node.output), name=node.name)
                node.CopyFrom(whole)
        return copy

    def parts_of(self, name: str) -> list[str] | None:
        """The flat scores that selected ones are of, level by level or class by class; None if they are computed otherwise."""
        if name not in self.selected:
            return [name]
        node = self.producers[name]
        if node.op_type == "Concat":
            found = [self.parts_of(one) for one in node.input]
            return None if None in found else [name for part in found if part is not None for name in part]
        if node.op_type == "TopK" and name == node.output[0]:
            self.most |= {
                value
                for one in ancestors(self.producers, [node.input[1]], self._shapes)
                if (value := self._whole(one)) > 1
            }
        elif not self._selects_rows(node) and node.op_type not in MOVING:
            return None
        return self.parts_of(node.input[0])

    def made(self, model: onnx.ModelProto, flat: list[str]) -> Dense | None:
        """The model with its head, whose meaning the values on the test image confirm."""
        sources = [self.producers[name].input[0] for name in flat if name in self.producers]
        values = self._run(model, [self.boxes, *flat, *sources, *filter(None, [self._first_map()])])
        parts = [self._part(name, values) for name in flat]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        b, boxes = _Builder(model.graph), values[self.boxes]
        sources = list(dict.fromkeys(part.source for part in known))
        columns = [part.column for part in known if part.column is not None]
        if len({part.of for part in known}) > 1 or (known[0].best and len(known) > 1):
            return None
        if columns and (len(columns) < len(known) or len(sources) > 1 or len(set(columns)) < len(columns)):
            return None
        classes = {values[source].shape[-1] for source in sources}
        count = sum(values[source].size // values[source].shape[-1] for source in sources)
        if len(classes) != 1 or boxes.shape != (count, 4):
            return None
        (width,) = classes
        rows = [b.op("Reshape", source, b.const(np.array([1, -1, width], np.int64))) for source in sources]
        scores = rows[0] if len(rows) == 1 else b.op("Concat", *rows, axis=1)
        used = np.isin(np.arange(width), columns or np.arange(width)).astype(np.float32)
        b.op("Mul", scores, b.const(used), output=SCORES)
        b.op("Reshape", self.boxes, b.const(np.array([1, -1, 4], np.int64)), output=BOXES)
        part = part_before(model, [BOXES, SCORES])
        del part.graph.output[:]
        part.graph.output.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, count, channels])
            for name, channels in ((BOXES, 4), (SCORES, width))
        )
        decode = Decoded(BoxFormat.XYXY, are_normalized(boxes))
        layout = Layout(FAMILY, Tap(BOXES, 2, 0, 4), Tap(SCORES, 2, 0, width), None, Activation.NONE, decode)
        semantics = self._semantics(known, width)
        if semantics is None:
            return None
        pixels, notes = self._images(values[first] if (first := self._first_map()) else None)
        return Dense(part, layout, semantics, pixels, notes)

    def _first_map(self) -> str | None:
        """The tensor that the first convolution reads."""
        return next((node.input[0] for node in self.model.graph.node if node.op_type == "Conv"), None)

    def _images(self, first: np.ndarray | None) -> tuple[Pixels | None, tuple[str, ...]]:
        """The pixels that the file takes, and what it does with them before the first convolution."""
        pixels, notes, image = None, [], self.raw.image
        mean = next(
            (
                value
                for name in ancestors(self.producers, [self._first_map() or ""])
                if (value := self._mean(name)) is not None
            ),
            None,
        )
        if mean is not None:
            pixels = PIXELS["rgb255" if mean.max() > 1 else "rgb"]
            subtracted = ", ".join(f"{value:.4g}" for value in mean.reshape(-1))
            notes.append(
                f"normalizes images inside: {subtracted} subtracted, so that it takes them from 0 to {pixels.scale:g}"
            )
        if first is not None and first.ndim == 4 and first.shape[2:] != (image.height, image.width):
            height, width = first.shape[2:]
            notes.append(
                f"resizes images of {image.height}x{image.width} to {height}x{width} inside, and its boxes back"
            )
        return pixels, tuple(notes)

    def _mean(self, name: str) -> np.ndarray | None:
        """Three constants that are subtracted from images, to give a tensor."""
        node = self.producers.get(name)
        value = self._value(node.input[1]) if node is not None and node.op_type == "Sub" else None
        return value if value is not None and value.size == 3 and value.dtype.kind == "f" else None

    def _part(self, name: str, values: dict[str, np.ndarray]) -> Part | None:
        node = self.producers.get(name)
        if node is None or values[name].ndim != 1:
            return None
        source, flat = values[node.input[0]], values[name]
        if source.ndim < 2:
            return None
        if node.op_type == "Gather" and attributes(node).get("axis", 0) in (source.ndim - 1, -1):
            column = self._whole(node.input[1])
            if 0 <= column < source.shape[-1] and np.array_equal(source[..., column].reshape(-1), flat):
                return Part(name, node.input[0], column)
        if node.op_type in ("Reshape", "Flatten") and np.array_equal(source.reshape(-1), flat):
            return Part(name, node.input[0])
        if node.op_type == "ReduceMax" and source.ndim == 2 and np.array_equal(source.max(1), flat):
            return Part(name, node.input[0], best=True)
        return None

    def _semantics(self, parts: list[Part], classes: int) -> Semantics | None:
        compared = [self._compared(part.name) for part in parts]
        iou = self._number(self.node.input[3]) if len(self.node.input) > 3 else 0.0
        if len(set(compared)) > 1 or iou is None:
            return None
        threshold, inclusive = compared[0]
        apart = bool(ancestors(self.producers, [self.node.input[0]]) & set(self._first_rows(self.labels)))
        others = []
        if self.most:
            named = ", ".join(map(str, sorted(self.most)))
            others.append(
                f"at most {named} candidates of each {parts[0].of} enter suppression: rows differ only where more pass the threshold"
            )
        if apart:
            others.append("classes kept apart by an offset of their boxes, which rounds coordinates")
        if parts[0].column is not None and len(parts) < classes:
            left_out = sorted(set(range(classes)) - {part.column for part in parts})
            others.append(
                f"class {', '.join(map(str, left_out))} is never a row, as the background: its score is 0 in the new file, too"
            )
        return Semantics(
            operator=STANDARD,
            score_threshold=threshold,
            iou_threshold=iou,
            max_detections=self._rows(),
            multi_label=classes > 1 and not parts[0].best,
            class_agnostic=classes > 1 and not apart,
            inclusive=inclusive,
            others=tuple(others),
        )

    def _compared(self, name: str) -> tuple[float, bool]:
        """The threshold of some scores, and whether one equal to it passes."""
        found = [
            (value, node.op_type == "GreaterOrEqual")
            for node in self.model.graph.node
            if node.op_type in ("Greater", "GreaterOrEqual") and node.input[0] == name
            if (value := self._number(node.input[1])) is not None
        ]
        return max(found, default=(0.0, False))

    def _first_rows(self, name: str) -> list[str]:
        """A tensor and all that it is a selection of."""
        names = [name]
        while (node := self.producers.get(names[-1])) is not None and (
            self._selects_rows(node) or node.op_type in MOVING
        ):
            names.append(node.input[0])
        return names[1:] or names

    def _rows(self) -> int | None:
        """The constant end of a slice of what the suppression keeps."""
        kept = set(self.node.output)
        for node in self.model.graph.node:
            if kept.intersection(node.input) and node.op_type not in SHAPE_OPS:
                kept.update(node.output)
        ends = [
            self._whole(node.input[2])
            for node in self.model.graph.node
            if node.op_type == "Slice" and node.input[0] in kept and len(node.input) > 2
        ]
        limits = [end for end in ends if 0 < end < 2**31 - 1]
        most = self._whole(self.node.input[2]) if len(self.node.input) > 2 else -1
        return min([*limits, *([most] if 0 < most < 2**31 - 1 else [])], default=None)

    def _selects_rows(self, node: onnx.NodeProto) -> bool:
        given = attributes(node)
        return (
            node.op_type in ("Gather", "GatherND")
            and node.input[1] in self.selected
            and not given.get("axis" if node.op_type == "Gather" else "batch_dims", 0)
        )

    @cached_property
    def _shapes(self) -> list[str]:
        return [name for node in self.model.graph.node if node.op_type in SHAPE_OPS for name in node.output]

    def _value(self, name: str) -> np.ndarray | None:
        """The value of a stored tensor."""
        while (node := self.producers.get(name)) is not None and node.op_type == "Identity":
            name = node.input[0]
        if node is not None and node.op_type == "Constant":
            return next((numpy_helper.to_array(one.t) for one in node.attribute if one.name == "value"), None)
        return numpy_helper.to_array(self.stored[name]) if name in self.stored else None

    def _number(self, name: str) -> float | None:
        value = self._value(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def _whole(self, name: str) -> int:
        """A stored whole number; -1 if the tensor is something else."""
        value = self._value(name)
        return int(value.reshape(-1)[0]) if value is not None and value.size == 1 and value.dtype.kind == "i" else -1

    def _run(self, model: onnx.ModelProto, names: list[str]) -> dict[str, np.ndarray]:
        names = [name for name in dict.fromkeys(names) if name not in self.stored]
        image, part = self.raw.image, part_before(model, names)
        session = Session(part, source=self.raw.source, max_seconds=self.raw.limits.max_run_seconds)
        values = session.run({image.tensor: probe_image(image.height, image.width)}, names)
        session.close()
        return dict(zip(names, values, strict=True))


class _Builder:
    """Appends nodes to a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph

    def op(self, kind: str, *inputs: str, output: str | None = None, **given: Any) -> str:
        name = output or f"fusenms/dense_{kind}_{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(kind, inputs, [name], name=name, **given))
        return name

    def const(self, value: np.ndarray) -> str:
        name = f"fusenms/dense_const_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name
