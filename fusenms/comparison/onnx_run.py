"""`OnnxRun`: an ONNX graph in ONNX Runtime, whose inner tensors are read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.comparison.runs import BFLOAT16, FLOAT16, FLOAT32, IMAGES, INT8, Place, Read
from fusenms.graph.model import DATA_MOVEMENT_OPS, SHAPE_OPS, captured, part_before
from fusenms.graph.session import Session
from fusenms.limits import DEFAULT_LIMITS, Limits

JITTERED = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
QUANTIZED_OPS = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
)
UNKNOWN_BYTES = 2**20
"""Assumed of tensors whose shape is not known before they are made."""


class OnnxRun:
    """An ONNX graph as a `Run`."""

    jitters = True

    def __init__(
        self,
        model: onnx.ModelProto,
        image: str,
        *,
        source: str,
        size: tuple[int, int],
        batch: int = 1,
        outputs: Sequence[str] = (),
        pixels: Pixels = PIXELS["rgb"],
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Open a graph.

        Args:
            image: name of its input for images, float32 ``[B, 3, height, width]``.
            size: height and width of the images, in pixels.
            batch: its batch size; an image is repeated.
            outputs: tensors that count as its outputs; default: the outputs of the graph.
            pixels: what it expects; it is given RGB from 0 to 1.
        """
        self.source, self.size = source, size
        self._image, self._batch, self._pixels, self._limits = image, batch, pixels, limits
        self.model = _with_types(model, image, (batch, 3, *size))
        graph = self.model.graph
        self._types = {
            entry.name: entry.type.tensor_type
            for entry in (*graph.value_info, *graph.output, *graph.input)
            if entry.type.WhichOneof("value") == "tensor_type"
        }
        self._sessions: dict[float, Session] = {}
        self.nodes: dict[int, onnx.NodeProto] = {}
        self.places = self._places()
        self.numbers = {place.name: place.number for place in self.places}
        names = outputs or [entry.name for entry in graph.output]
        self.outputs = {name: self.numbers[name] for name in names if name in self.numbers}
        kinds = {entry.name: entry.type.WhichOneof("value") for entry in graph.value_info}
        self.readable = [p.number for p in self.places[1:] if kinds.get(p.name, "tensor_type") in ("tensor_type", None)]
        self.unit = _unit(self.model)

    def _places(self) -> list[Place]:
        places = [Place(number=IMAGES, name=self._image)]
        numbers = {self._image: IMAGES}
        for node in self.model.graph.node:
            used = [] if node.op_type in SHAPE_OPS else [*node.input, *captured(node)]
            inputs = tuple(dict.fromkeys(numbers[name] for name in used if name in numbers))
            if not inputs:
                continue
            for name in node.output:
                if name:
                    number = len(places)
                    numbers[name], self.nodes[number] = number, node
                    places.append(Place(number=number, name=name, operator=node.op_type, node=node.name, inputs=inputs))
        return places

    def bytes_of(self, number: int) -> int:
        kind = self._types.get(self.places[number].name)
        if kind is None or not kind.HasField("shape") or not all(dim.dim_value for dim in kind.shape.dim):
            return UNKNOWN_BYTES
        return 4 * int(np.prod([dim.dim_value for dim in kind.shape.dim], dtype=np.int64))

    def reader(self, numbers: Sequence[int], jitter: float = 0.0) -> Read:
        names = [self.places[number].name for number in numbers]
        inner = [name for name in dict.fromkeys(names) if name != self._image]
        session = self._session(inner, jitter)

        def read(image: np.ndarray) -> list[np.ndarray]:
            images = self._pixels.apply(image).repeat(self._batch, 0)
            values = dict(zip(inner, session.run({self._image: images}, inner), strict=True)) if inner else {}
            values[self._image] = images
            return [self._first(np.asarray(values[name])) for name in names]

        return read

    def _session(self, tensors: Sequence[str], jitter: float) -> Session:
        """A session that gives these tensors: the last one with this jitter, if it gives them too."""
        held = self._sessions.get(jitter)
        if held is not None and set(tensors) <= set(held.outputs):
            return held
        model = part_before(self.model, tensors)
        if jitter:
            model = self._jittered(model, jitter)
        opened = Session(model, source=self.source, max_seconds=self._limits.max_run_seconds)
        self._sessions[jitter] = opened
        return opened

    def _first(self, value: np.ndarray) -> np.ndarray:
        """Of a fixed batch of copies, one."""
        return value[:1] if self._batch > 1 and value.ndim and len(value) == self._batch else value

    def _jittered(self, model: onnx.ModelProto, jitter: float) -> onnx.ModelProto:
        """The graph with a random factor behind each computation of numbers from the images."""
        nodes = list(model.graph.node)
        del model.graph.node[:]
        for node in nodes:
            model.graph.node.append(node)
            for i, name in enumerate(node.output):
                if name in self.numbers and node.op_type not in DATA_MOVEMENT_OPS:
                    model.graph.node.extend(self._factor(model.graph.node[-1], i, name, jitter))
        return model

    def _factor(self, node: onnx.NodeProto, output: int, name: str, jitter: float) -> Iterator[onnx.NodeProto]:
        kind = self._types[name].elem_type if name in self._types else 0
        if kind not in JITTERED:
            return
        exact, factor = f"{name}/exact", f"{name}/factor"
        node.output[output] = exact
        drawn = TensorProto.DOUBLE if kind == TensorProto.DOUBLE else TensorProto.FLOAT
        yield helper.make_node(
            "RandomUniformLike",
            [exact],
            [factor],
            dtype=drawn,
            low=1 - jitter,
            high=1 + jitter,
            seed=float(self.numbers[name]),
        )
        if kind != drawn:
            yield helper.make_node("Cast", [factor], [f"{factor}/cast"], to=kind)
            factor = f"{factor}/cast"
        yield helper.make_node("Mul", [exact, factor], [name])


def _with_types(model: onnx.ModelProto, image: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A copy at one batch and size, with the types and shapes that ONNX infers, and without those that the file states."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    entry = next(entry for entry in copy.graph.input if entry.name == image)
    for dim, side in zip(entry.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = side
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except Exception:  # an operator of another domain, a model above 2 GB: shapes are only a help
        return copy


def _unit(model: onnx.ModelProto) -> float:
    """The coarsest precision of a graph."""
    kinds = {item.data_type for item in model.graph.initializer}
    kinds |= {entry.type.tensor_type.elem_type for entry in model.graph.value_info}
    kinds |= {attribute.i for node in model.graph.node if node.op_type == "Cast" for attribute in node.attribute}
    if any(node.op_type in QUANTIZED_OPS for node in model.graph.node):
        return INT8
    if TensorProto.BFLOAT16 in kinds:
        return BFLOAT16
    return FLOAT16 if TensorProto.FLOAT16 in kinds else FLOAT32
