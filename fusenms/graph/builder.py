"""Edit ONNX graphs: a small builder over onnx-graphsurgeon, which only this folder imports.

onnx-graphsurgeon drops metadata and producer; `Graph.to_model` restores them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from fusenms.graph.custom_ops import KNOWN_DOMAINS
from fusenms.graph.model import DATA_MOVEMENT_OPS

Tensor: TypeAlias = gs.Tensor
INT32, INT64, FLOAT, DOUBLE, BOOL = (
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BOOL,
)
TAIL = "fusenms"
"""Prefix of every node and tensor that fusenms adds."""


class Graph:
    """A model being edited. Each operator method adds one node and returns its output."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = gs.import_onnx(model)
        self._tensors = self._graph.tensors()
        self._count = _last_number(_names(model.graph))
        self._defaults: list[onnx.TensorProto] = []

    @property
    def opset(self) -> int:
        return int(self._graph.opset)

    def tensor(self, name: str) -> gs.Variable:
        """Return an existing tensor. Raises KeyError if there is none of that name."""
        return self._tensors[name]

    def rename(self, name: str, new_name: str) -> None:
        """Rename an existing tensor."""
        tensor = self._tensors.pop(name)
        tensor.name = new_name
        self._tensors[new_name] = tensor

    def name(self, tensor: gs.Variable, name: str) -> None:
        """Name a tensor made here, so that `tensor` finds it by that name."""
        tensor.name = name
        self._tensors[name] = tensor

    def feed(self, name: str, make: Callable[[Tensor], Tensor]) -> None:
        """Replace a tensor in all nodes that read it by what ``make`` emits from it."""
        tensor = self._tensors[name]
        readers = list(tensor.outputs)
        made = make(tensor)
        for node in readers:
            for i, given in enumerate(node.inputs):
                if given is tensor:
                    node.inputs[i] = made

    def compute_inputs(
        self,
        given: str,
        dtype: type[np.generic],
        shape: tuple[str | int, ...],
        make: Callable[[Tensor], Mapping[str, Tensor]],
    ) -> None:
        """Replace inputs by another one, ``given``. What ``make`` emits from that has the names of the former inputs."""
        after = gs.Variable(given, dtype, list(shape))
        self._tensors[given] = after
        made = make(after)
        first, *_ = made
        self._graph.inputs = [
            after if tensor.name == first else tensor
            for tensor in self._graph.inputs
            if tensor.name == first or tensor.name not in made
        ]
        for name, tensor in made.items():
            (node,) = tensor.inputs
            node.outputs = [self._tensors[name]]

    def in_half(self, tensor: Tensor) -> Tensor | None:
        """Return the same values in float16, if they were cast from float16 and only moved since; otherwise None."""
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or node.op not in ("Cast", *DATA_MOVEMENT_OPS):
            return None
        if node.op == "Cast":
            return node.inputs[0] if node.attrs["to"] == FLOAT and node.inputs[0].name in self._half else None
        moved = len(node.inputs) if node.op == "Concat" else 1  # other inputs say where to move
        inputs = [self.in_half(given) for given in node.inputs[:moved]]
        if any(given is None for given in inputs):
            return None
        made = self.add(node.op, [*inputs, *node.inputs[moved:]], len(node.outputs), **node.attrs)
        return made[[output is tensor for output in node.outputs].index(True)]

    @cached_property
    def _half(self) -> set[str]:
        """Names of the float16 tensors of the model being edited."""
        graph = onnx.shape_inference.infer_shapes(self._model).graph
        known = (*graph.value_info, *graph.output, *graph.input)
        return {entry.name for entry in known if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}

    def replace(self, op: str, make: Callable[[], Sequence[Tensor]]) -> None:
        """Replace the only node of an operator by what ``make`` emits: one tensor for each output of the node."""
        (node,) = (node for node in self._graph.nodes if node.op == op)
        before = list(node.outputs)
        node.outputs.clear()
        for old, new in zip(before, make(), strict=True):
            self._graph.nodes.append(gs.Node("Identity", f"{TAIL}/{old.name}", inputs=[new], outputs=[old]))

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def add_input(self, name: str, dtype: type[np.generic], shape: tuple[str | int, ...]) -> gs.Variable:
        """Add an input, and return it."""
        tensor = gs.Variable(name, dtype, list(shape))
        self._graph.inputs.append(tensor)
        self._tensors[name] = tensor
        return tensor

    def add_optional_input(self, name: str, default: np.ndarray, shape: tuple[str | int, ...]) -> None:
        """Add an input with a default, an initializer of the same name. `tensor` finds it by its name."""
        tensor = gs.Variable(name, default.dtype, list(shape))
        self._graph.inputs.append(tensor)
        self._tensors[name] = tensor
        self._defaults.append(onnx.numpy_helper.from_array(default, name))

    def set_outputs(self, outputs: Sequence[tuple[Tensor, str, np.dtype[Any], tuple[str | int, ...]]]) -> None:
        """Make these the outputs: (tensor, name, dtype, shape)."""
        self._graph.outputs = []
        for output in outputs:
            self.add_output(*output)

    def add_output(self, tensor: Tensor, name: str, dtype: np.dtype[Any], shape: tuple[str | int, ...]) -> None:
        """Make a tensor a further output."""
        tensor.name, tensor.dtype, tensor.shape = name, dtype, list(shape)
        self._graph.outputs.append(tensor)

    def to_model(self) -> onnx.ModelProto:
        """Return the edited model: unused nodes removed, nodes in order, metadata and producer as before."""
        self._graph.cleanup(remove_unused_graph_inputs=False).toposort()
        model = gs.export_onnx(self._graph, do_type_check=False)
        model.graph.initializer.extend(self._defaults)
        model.ir_version = self._model.ir_version
        model.producer_name, model.producer_version = self._model.producer_name, self._model.producer_version
        model.metadata_props.extend(self._model.metadata_props)
        # Inner shapes: every runtime infers them, and tract takes their symbols as fixed sizes. Nobody infers those of other domains.
        made = {name for node in model.graph.node if node.domain not in KNOWN_DOMAINS for name in node.output}
        kept = [entry for entry in self._model.graph.value_info if entry.name in made]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        return model

    # Operators.

    def add(
        self, op: str, inputs: Sequence[Tensor | None], outputs: int = 1, domain: str | None = None, **attrs: Any
    ) -> list[gs.Variable]:
        """Add any node and return its outputs. None as an input omits an optional one."""
        self._count += 1
        name = f"{TAIL}/{op}_{self._count}"
        made = [gs.Variable(name if outputs == 1 else f"{name}_{i}") for i in range(outputs)]
        given = [gs.Variable.empty() if tensor is None else tensor for tensor in inputs]
        self._graph.nodes.append(gs.Node(op=op, name=name, inputs=given, outputs=made, attrs=attrs, domain=domain))
        return made

    def import_domain(self, domain: str, version: int) -> None:
        """Declare a custom operator domain."""
        domains = list(self._graph.import_domains or [])
        self._graph.import_domains = [*domains, onnx.helper.make_opsetid(domain, version)]

    def const(self, values: Any, dtype: type[np.generic]) -> gs.Constant:
        self._count += 1
        return gs.Constant(f"{TAIL}/const_{self._count}", np.asarray(values, dtype, order="C"))

    def floats(self, *values: float) -> gs.Constant:
        """A float32 scalar (one value) or vector."""
        return self.const(values[0] if len(values) == 1 else values, np.float32)

    def ints(self, *values: int) -> gs.Constant:
        """An int32 scalar (one value) or vector."""
        return self.const(values[0] if len(values) == 1 else values, np.int32)

    def op(self, op: str, *inputs: Tensor | None, **attrs: Any) -> gs.Variable:
        return self.add(op, inputs, **attrs)[0]

    def cast(self, x: Tensor, to: int) -> gs.Variable:
        return self.op("Cast", x, to=to)

    def reshape(self, x: Tensor, *shape: int) -> gs.Variable:
        """Reshape; 0 copies a dimension, -1 is inferred."""
        return self.op("Reshape", x, self.const(shape, np.int64))

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> gs.Variable:
        return self.op("Slice", x, *(self.const([value], np.int64) for value in (start, stop, axis)))

    def slice_at(self, x: Tensor, axis: int, start: Tensor, stop: Tensor) -> gs.Variable:
        """Slice between computed bounds, ``[1]`` int64 each."""
        return self.op("Slice", x, start, stop, self.const([axis], np.int64))

    def split(self, x: Tensor, axis: int, parts: int) -> list[gs.Variable]:
        """Split an axis into equal parts. The opset decides whether the node states their number."""
        said: dict[str, Any] = {"num_outputs": parts} if self.opset >= 18 else {}
        return self.add("Split", [x], parts, axis=axis, **said)

    def reduce(self, op: str, x: Tensor, axis: int, keepdims: bool = False) -> gs.Variable:
        """ReduceMax, ReduceMin or ReduceSum over one axis. The opset decides whether the axis is an input or an attribute."""
        since = 13 if op == "ReduceSum" else 18
        if self.opset >= since:
            return self.op(op, x, self.const([axis], np.int64), keepdims=int(keepdims))
        return self.op(op, x, axes=[axis], keepdims=int(keepdims))

    def concat(self, parts: Sequence[Tensor], axis: int) -> gs.Variable:
        return self.op("Concat", *parts, axis=axis)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> gs.Variable:
        return self.op("Where", condition, x, y)

    def top_k(self, x: Tensor, k: Tensor) -> tuple[gs.Variable, gs.Variable]:
        """The k largest values of the last axis, in descending order, and their indices (int32). Ties go to the lower index."""
        values, indices = self.add("TopK", [x, k], 2, axis=-1, largest=1, sorted=1)
        return values, self.cast(indices, INT32)

    def take_rows(self, x: Tensor, index: Tensor, axis: int, width: int) -> gs.Variable:
        """Take rows ``index`` ``[B, k]`` of ``x`` ``[B, width, N]`` (``axis`` 2) or ``[B, N, width]`` (``axis`` 1): ``[B, k, width]``."""
        if axis == 2:
            wide = self.op("Expand", self.unsqueeze(index, 1), self.const([1, width, 1], np.int64))
            return self.op("Transpose", self.op("GatherElements", x, wide, axis=2), perm=[0, 2, 1])
        wide = self.op("Expand", self.unsqueeze(index, 2), self.const([1, 1, width], np.int64))
        return self.op("GatherElements", x, wide, axis=1)

    def loop(
        self,
        most: int,
        start: Tensor,
        state: Tensor,
        shape: tuple[str | int, ...],
        step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> gs.Variable:
        """Repeat ``step`` on a float32 state and return its last value.

        Args:
            most: maximum number of rounds.
            start: bool scalar, whether there is a first round.
            state: initial state, of ``shape``.
            step: maps the round number (int64 scalar) and the state to whether there is another round (bool scalar) and the new state.
                What it emits becomes the body, which may use tensors from outside.
        """
        self._count += 1
        name, outer = f"{TAIL}/Loop_{self._count}", self._graph
        number = gs.Variable(f"{name}_number", np.int64, [])
        go = gs.Variable(f"{name}_go", np.bool_, [])
        before = gs.Variable(f"{name}_state", np.float32, list(shape))
        self._graph = gs.Graph(name=name, inputs=[number, go, before], opset=outer.opset)
        more, after = step(number, before)
        more.dtype, more.shape, after.dtype, after.shape = np.bool_, [], np.float32, list(shape)
        self._graph.outputs = [more, after]
        body, self._graph = self._graph, outer
        return self.add("Loop", [self.const(most, np.int64), start, state], body=body)[0]

    def if_else(
        self, condition: Tensor, then: Callable[[], Tensor], otherwise: Callable[[], Tensor], dtype: type[np.generic]
    ) -> gs.Variable:
        """Return what ``then`` emits if the condition (bool scalar) holds, else what ``otherwise`` emits. Only that branch is computed.

        Both may use tensors from outside. ``dtype`` is that of the result.
        """
        self._count += 1
        outer, branches = self._graph, {}
        for name, emit in (("then_branch", then), ("else_branch", otherwise)):
            self._graph = gs.Graph(name=f"{TAIL}/If_{self._count}_{name}", opset=outer.opset)
            result = emit()
            result.dtype = dtype
            self._graph.outputs = [result]
            branches[name], self._graph = self._graph, outer
        return self.add("If", [condition], **branches)[0]

    def unsqueeze(self, x: Tensor, axis: int) -> gs.Variable:
        """Insert an axis. The opset decides whether its number is an input or an attribute."""
        if self.opset >= 13:
            return self.op("Unsqueeze", x, self.const([axis], np.int64))
        return self.op("Unsqueeze", x, axes=[axis])


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of all tensors that are made in a graph and in its subgraphs."""
    yield from (item.name for item in graph.initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            yield from _names(attribute.g)


def _last_number(names: Iterable[str]) -> int:
    """Highest number in names that this builder gave before; 0 if there are none."""
    numbers = (re.match(rf"{TAIL}/.*?_(\d+)", name) for name in names)
    return max((int(found[1]) for found in numbers if found), default=0)
