"""What a raw ONNX model shows of its head: shapes, the parts that its outputs are joined from, values on a test image.

Names of nodes and tensors are ignored. The samples come from one run in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import onnx
from onnx import helper

from fusenms import contract
from fusenms.artifacts.raw import RawModel
from fusenms.errors import SourceError
from fusenms.graph.model import cut_before, with_only_outputs
from fusenms.graph.session import Session
from fusenms.layout import BoxFormat, Decoded, Join, Layout, Tap, cells_along, other_axis
from fusenms.onnx_reading.files import read_metadata
from fusenms.onnx_reading.metadata import parse_literal

USUAL_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32), (8, 16), (32,), (16,), (8,))
"""Sets of strides that detectors use, the most common one first."""

MOST_QUERIES = 1000
"""Limit on the queries of DETR-like heads, which have 100 to 900."""

PASSES_THROUGH = (
    "Identity",
    "Cast",
    "Transpose",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "QuantizeLinear",
    "DequantizeLinear",
)


COMPUTING_OPS = ("Add", "Sub", "Mul", "Div", "Exp", "Sigmoid", "Pow")
"""Elementwise operators that decodes consist of."""

MOVING_OPS = (*PASSES_THROUGH, "Slice", "Split", "Concat")
"""Operators that only move values."""


@dataclass(frozen=True)
class Sample:
    """One output of the model on the test image: its values ``[1, …]``, and the values of the parts that it is joined from."""

    tensor: str
    value: np.ndarray
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Probe:
    """Everything that a family may inspect to recognize its head.

    ``anchors`` are the anchor boxes that the user gives: width, height, width, height, … in pixels, the finest level first.
    """

    raw: RawModel
    anchors: tuple[float, ...] | None = None

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Each output with its parts.

        Raises:
            SourceError: the model does not run.
        """
        graph = self.raw.model.graph
        producers = producers_of(graph)
        outputs = [entry.name for entry in graph.output]
        joined = {name: joined_parts(producers, name) for name in outputs}
        values = self._run(outputs, sorted({part for parts in joined.values() for part in parts} - set(outputs)))
        return tuple(Sample(name, values[name], tuple(values[part] for part in joined[name])) for name in outputs)

    @property
    def keypoints(self) -> tuple[int, int] | None:
        """Number of keypoints and of values per keypoint, from the file's metadata; None if missing or unreadable."""
        shape = parse_literal(read_metadata(self.raw.model).get(contract.KEY_KEYPOINTS, ""))
        if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(type(n) is int for n in shape):
            return None
        count, numbers = shape
        return (count, numbers) if count > 0 and numbers in (2, 3) else None

    def split_prototypes(self) -> tuple[list[Sample], list[Sample]]:
        """Return the outputs in two lists; the second has those that may be mask prototypes: ``[1, M, height, width]``."""
        maps = [sample for sample in self.samples if sample.value.ndim == 4]
        return [sample for sample in self.samples if sample.value.ndim != 4], maps

    @cached_property
    def joins(self) -> list[list[int]]:
        """Channels of the parts of each Concat on the way to the outputs, sorted; one list for each Concat.

        The way leads through operators that move values or compute elementwise.
        """
        producers = producers_of(self.raw.model.graph)
        todo, seen, joints = [entry.name for entry in self.raw.model.graph.output], set(), []
        while todo:
            node = producers.get(todo.pop())
            if node is None or id(node) in seen or node.op_type not in (*MOVING_OPS, *COMPUTING_OPS):
                continue
            seen.add(id(node))
            todo += node.input
            if node.op_type == "Concat":
                joints.append(tuple(node.input))
        values = self.values(list(dict.fromkeys(part for parts in joints for part in parts)))
        return [sorted(_widths([values[part].shape[1:] for part in parts])) for parts in joints]

    def head(self, layout: Layout) -> dict[str, np.ndarray]:
        """Values ``[1, …]`` of the head's tensors on the test image, joined as the layout says."""
        values = self.values(layout.sources)
        return values | {join.tensor: joined(values, join) for join in layout.joins}

    def joins_objectness(self, classes: int) -> bool:
        """Whether a Concat on the way to the outputs joins box channels (4, or 2 and 2), objectness and classes."""
        return any(sorted((*box, 1, classes)) in self.joins for box in ((4,), (2, 2)))

    def heads_on(self, images: Sequence[np.ndarray], layout: Layout) -> list[dict[str, np.ndarray]]:
        """Values ``[1, …]`` of the head's tensors on each of these images ``[1, 3, height, width]``, which are as the network takes them.

        Raises:
            SourceError: the model does not run.
        """
        names, batch = tuple(dict.fromkeys(layout.sources)), self.raw.frozen_batch or 1
        session, heads = self._sessions(names), []
        for image in images:
            got = session.run({self.raw.image.tensor: np.repeat(image, batch, 0)}, names)
            values = {name: first_copy(value, batch) for name, value in zip(names, got, strict=True)}
            heads.append(values | {join.tensor: joined(values, join) for join in layout.joins})
        return heads

    @cached_property
    def _sessions(self) -> Callable[[tuple[str, ...]], Session]:
        """Opens the model with only these outputs, once."""
        raw = self.raw
        return cache(
            lambda names: Session(
                with_only_outputs(raw.model, names), source=raw.source, max_seconds=raw.limits.max_run_seconds
            )
        )

    def values(self, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """Values ``[1, …]`` of any tensors of the model on the test image.

        Raises:
            SourceError: the model does not run.
        """
        outputs = [entry.name for entry in self.raw.model.graph.output]
        found = self._run(outputs, [name for name in tensors if name not in outputs])
        return {name: found[name] for name in tensors}

    def run_behind(self, taps: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run the part of the model after some of its tensors, given their values ``[1, …]`` float32.

        Raises:
            SourceError: that part does not run.
        """
        model = cut_before(self.raw.model, {name: value.shape[1:] for name, value in taps.items()})
        given = {entry.name for entry in model.graph.output}
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs if name not in given)
        return self._infer(model, list(outputs), taps)

    def _run(self, outputs: list[str], inner: list[str]) -> dict[str, np.ndarray]:
        model = onnx.ModelProto()
        model.CopyFrom(self.raw.model)
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inner)
        return self._infer(model, [*outputs, *inner], {})

    def _infer(
        self, model: onnx.ModelProto, outputs: list[str], inputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run on these values, and on the test image if the model has an image input; with a frozen batch, on copies of them."""
        image, batch = self.raw.image, self.raw.frozen_batch or 1
        session = Session(model, source=self.raw.source, max_seconds=self.raw.limits.max_run_seconds)
        given = inputs | {image.tensor: probe_image(image.height, image.width)}
        got = session.run(
            {name: np.repeat(value, batch, 0) for name, value in given.items() if name in session.inputs}, outputs
        )
        for name, value in zip(outputs, got, strict=True):
            if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
                raise SourceError(
                    f"{self.raw.source}: output {name[:100]!r} is not a batch of numbers; expected tensors of numbers"
                )
        return {name: first_copy(value, batch) for name, value in zip(outputs, got, strict=True)}

    def strides(self, anchors: int, count: int) -> tuple[int, ...] | None:
        """Strides of a head with this number of anchors per cell and of candidates; None if no usual set of strides fits."""
        for strides in USUAL_STRIDES:
            if anchors * sum(self.cells(strides)) == count:
                return strides
        return None

    def cells(self, strides: Sequence[int]) -> list[int]:
        """Number of cells of each level."""
        return [len(self._centers(stride)) for stride in strides]

    @property
    def sides(self) -> np.ndarray:
        """Width, height, width, height of the input in pixels."""
        return np.array([self.raw.image.width, self.raw.image.height] * 2, np.float64)

    def grid(self, anchors: int, count: int) -> np.ndarray | None:
        """Cell centers ``[count, 2]`` (x, y in pixels) of such a head; None if no usual set of strides gives ``count``."""
        strides = self.strides(anchors, count)
        return None if strides is None else np.concatenate([np.tile(self._centers(s), (anchors, 1)) for s in strides])

    def _centers(self, stride: int) -> np.ndarray:
        return cell_centers(self.raw.image.height, self.raw.image.width, stride)


@dataclass(frozen=True)
class Pair:
    """Two outputs that may be boxes and class scores: their values ``[N, 4]`` and ``[N, C]``, and their places."""

    box_tap: Tap
    boxes: np.ndarray
    score_tensor: str
    score_axis: int
    scores: np.ndarray

    def classes(self, start: int, stop: int) -> Tap:
        return Tap(self.score_tensor, self.score_axis, start, stop)


def pairs(probe: Probe) -> list[Pair] | str:
    """Return the ways to read two outputs as boxes and class scores, or the reason why there is none."""
    samples = probe.samples
    shapes = [list(sample.value.shape) for sample in samples]
    if len(samples) != 2:
        return f"found {len(samples)} outputs of shape {shapes}; expected two, boxes [batch, candidates, 4] and class scores"
    found = []
    for boxes, scores in (samples, samples[::-1]):
        if boxes.value.ndim != 3 or scores.value.ndim != 3:
            continue
        for box_axis in (1, 2):
            count = boxes.value.shape[other_axis(box_axis)]
            axes = [axis for axis in (1, 2) if scores.value.shape[other_axis(axis)] == count]
            if boxes.value.shape[box_axis] != 4 or not axes:
                continue
            if len(axes) > 1:
                return f"found outputs of shape {shapes}; either axis of {list(scores.value.shape)} may be that of the classes"
            rows, values = (_rows(s.value, axis) for s, axis in ((boxes, box_axis), (scores, axes[0])))
            found.append(Pair(Tap(boxes.tensor, box_axis, 0, 4), rows, scores.tensor, axes[0], values))
    return found or f"found outputs of shape {shapes}; expected boxes [batch, candidates, 4] and as many class scores"


def _widths(shapes: list[tuple[int, ...]]) -> list[int]:
    """Sizes of parts (shapes without the batch) along the axis that joins them; empty unless they differ in exactly one axis."""
    for axis in range(min(map(len, shapes))):
        rest = {(*shape[:axis], None, *shape[axis + 1 :]) for shape in shapes}
        if len(rest) == 1 and len(set(shapes)) > 1:
            return [shape[axis] for shape in shapes]
    return []


def _rows(value: np.ndarray, axis: int) -> np.ndarray:
    """Values ``[1, C, N]`` or ``[1, N, C]`` as ``[N, C]``."""
    return value[0].T if axis == 1 else value[0]


def are_probabilities(values: np.ndarray) -> bool:
    """Whether all are finite and from 0 to 1."""
    return bool(((values >= 0) & (values <= 1)).all())


def as_probabilities(values: np.ndarray) -> np.ndarray:
    """Scores as probabilities: unchanged if they are from 0 to 1, else their sigmoids."""
    return values if are_probabilities(values) else 1 / (1 + np.exp(-values.astype(np.float64).clip(-80, 80)))


def hold_labels(scores: np.ndarray) -> bool:
    """Whether a column of class probabilities ``[N, C]`` is a class number instead: whole in every row, and 1 or more in some.

    A single column that is 0 in every row is one too: a sigmoid is never 0 everywhere.
    """
    whole = (scores == np.round(scores)).all(0)
    return bool((whole & (scores.max(0) >= 1)).any() or (scores.shape[1] == 1 and whole.all()))


def sum_to_one(values: np.ndarray) -> bool:
    """Whether rows ``[N, C]`` may be the result of a softmax over C > 1 classes."""
    return values.shape[1] > 1 and are_probabilities(values) and bool((np.abs(values.sum(1) - 1) < 1e-3).all())


def are_corners(boxes: np.ndarray) -> bool:
    """Whether the high corner of boxes ``[N, 4]`` is never below the low one, and not always equal to it."""
    return bool((boxes[:, 2:] >= boxes[:, :2]).all() and (boxes[:, 2:] > boxes[:, :2]).any())


def are_normalized(boxes: np.ndarray) -> bool:
    """Whether boxes ``[N, 4]`` are in units of the image, not in pixels: no coordinate is far outside 0 to 1."""
    return bool(np.isfinite(boxes).all() and np.abs(boxes).max() <= 2)


def background_of(scores: np.ndarray) -> int | None:
    """Index of the background class in scores ``[N, C]``: the first or the last, if it is the best class of most candidates; else None."""
    share = np.bincount(scores.argmax(1), minlength=scores.shape[1]) / len(scores)
    place = int(share.argmax())
    return place if share[place] > 0.5 and place in (0, scores.shape[1] - 1) else None


def not_queries(boxes: np.ndarray) -> str | None:
    """Return why boxes ``[N, 4]`` are not those of a DETR's queries (cx, cy, w, h, normalized); None if they may be."""
    if len(boxes) > MOST_QUERIES:
        return f"found {len(boxes)} candidates; expected at most {MOST_QUERIES} queries"
    if not are_probabilities(boxes):
        return f"found box channels from {boxes.min():.3g} to {boxes.max():.3g}; expected cx, cy, w, h normalized to the input"
    if are_corners(boxes):
        return "the boxes are corners; expected cx, cy, w, h"
    if sum_to_one(boxes) or (boxes.std(0) == 0).any():
        return "the box channels are the same for every query, or sum to 1; expected cx, cy, w, h"
    return None


def width_of(part: np.ndarray, count: int) -> int:
    """Number of channels of a part ``[1, C, N]``, ``[1, N, C]`` or, for one level, ``[1, C, height, width]``."""
    return int(part.shape[2] if part.ndim == 3 and part.shape[1] == count else part.shape[1])


def probe_image(height: int, width: int) -> np.ndarray:
    """The test image ``[1, 3, height, width]`` float32: uniform color patches with noise, always the same."""
    rng = np.random.default_rng(7)
    coarse = rng.random((3, 8, 8))
    patches = np.kron(coarse, np.ones((1, -(-height // 8), -(-width // 8))))[:, :height, :width]
    return np.clip(patches + rng.normal(0, 0.08, patches.shape), 0, 1).astype(np.float32)[None]


def cell_centers(height: int, width: int, stride: int) -> np.ndarray:
    """Centers ``[cells, 2]`` (x, y in pixels) of one level, row by row."""
    y, x = np.mgrid[: cells_along(height, stride), : cells_along(width, stride)]
    return (np.stack((x, y), -1).reshape(-1, 2) + 0.5) * stride


def follows_grid(values: np.ndarray, grid: np.ndarray) -> bool:
    """Whether positions ``[N, 2]`` in pixels follow the cell centers ``[N, 2]``, as the centers of decoded boxes do."""
    if not np.isfinite(values).all() or (values.std(0) < 1e-6).any():
        return False
    close = np.abs(values - grid).mean() < 0.12 * np.ptp(grid)
    return close and all(np.corrcoef(values[:, i], grid[:, i])[0, 1] > 0.9 for i in (0, 1))


def box_format(boxes: np.ndarray, grid: np.ndarray, sides: np.ndarray) -> Decoded | None:
    """The format in which boxes ``[N, 4]`` follow the cell centers ``[N, 2]``; None if they do in none.

    ``sides`` is width, height, width, height of the input.
    """
    normalized = are_normalized(boxes)
    pixels = boxes * sides if normalized else boxes.astype(np.float64)
    if are_corners(pixels) and follows_grid((pixels[:, :2] + pixels[:, 2:]) / 2, grid):
        return Decoded(BoxFormat.XYXY, normalized)
    if (pixels[:, 2:] >= 0).all() and follows_grid(pixels[:, :2], grid):
        return Decoded(BoxFormat.CXCYWH, normalized)
    return None


def map_before(probe: Probe, tensor: str, anchors: int, through_sigmoid: bool) -> tuple[str, bool] | None:
    """Find the map ``[1, anchors * C, rows, columns]`` that rows ``[…, C]`` were made from by moving values, a cell's anchors side by side.

    Returns:
        its name, and whether a sigmoid lies between; None if there is no such map, or its values are others.
    """
    producers = producers_of(probe.raw.model.graph)
    way, sigmoid = list[tuple[str, bool]](), False
    name = tensor
    while (node := producers.get(name)) is not None:
        if node.op_type not in PASSES_THROUGH and not (through_sigmoid and node.op_type == "Sigmoid" and not sigmoid):
            break
        sigmoid, name = sigmoid or node.op_type == "Sigmoid", node.input[0]
        way.append((name, sigmoid))
    values = probe.values(list(dict.fromkeys([tensor, *(name for name, _ in way)])))
    rows = values[tensor].reshape(-1, values[tensor].shape[-1])
    for name, after in way:
        value = values[name]
        if value.ndim != 4 or value.shape[:2] != (1, anchors * rows.shape[1]) or value.size != rows.size:
            continue
        moved = value[0].reshape(anchors, rows.shape[1], -1).transpose(2, 0, 1).reshape(rows.shape)
        if np.allclose(1 / (1 + np.exp(-moved.astype(np.float64))) if after else moved, rows, rtol=0, atol=1e-6):
            return name, after
    return None


def first_copy(value: np.ndarray, batch: int) -> np.ndarray:
    """The part for one image of a value computed from ``batch`` copies of an image; the whole value if it is the same for any batch."""
    if batch == 1 or not value.ndim or len(value) % batch:
        return value
    copies = value.reshape(batch, len(value) // batch, *value.shape[1:])
    rounding = 1e-3 * float(np.abs(copies[0][np.isfinite(copies[0])]).max(initial=0))
    same = np.allclose(copies[1:], copies[:1], rtol=0, atol=rounding, equal_nan=True)
    return copies[0] if same else value


def joined(values: dict[str, np.ndarray], join: Join) -> np.ndarray:
    """Join the parts ``[1, …]`` of a `Join`."""
    parts = [values[part].astype(np.float32) for part in join.parts]
    if join.anchors > 1:
        parts = [part.reshape(1, join.anchors, join.channels, -1).transpose(0, 1, 3, 2) for part in parts]
    return np.concatenate([part.reshape(1, *join.part_shape[1:]) for part in parts], join.candidate_axis)


def channels_of(values: Mapping[str, np.ndarray], tap: Tap) -> np.ndarray:
    """The channels ``[N, C]`` of a tap, of the head's tensors ``[1, …]``."""
    tensor = values[tap.tensor][0]
    return (tensor.T if tap.channel_axis == 1 else tensor)[:, tap.start : tap.stop]


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Map each tensor to the node that computes it."""
    return {output: node for node in graph.node for output in node.output}


def inputs_of(op: str, tensor: str, producers: dict[str, onnx.NodeProto]) -> list[str]:
    """List the inputs of the nodes of this type that a tensor comes from, with only operators that move values in between."""
    found, todo, seen = [], [tensor], set()
    while todo:
        node = producers.get(todo.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type == op:
            found.append(node.input[0])
        elif node.op_type in MOVING_OPS:
            todo += node.input
    return found


def joined_parts(producers: dict[str, onnx.NodeProto], name: str) -> tuple[str, ...]:
    """Follow an output back to the Concat that joins channels: the nearest one with two inputs or with inputs of different operators.

    A Concat of levels has inputs of the same operator. The search goes on through its first input.
    """
    while (node := producers.get(name)) is not None:
        if node.op_type == "Concat":
            makers = {producers[part].op_type if part in producers else "" for part in node.input}
            if len(makers) > 1 or len(node.input) == 2:
                return tuple(node.input)
            name = node.input[0]
        elif node.op_type in PASSES_THROUGH:
            name = node.input[0]
        else:
            break
    return ()
