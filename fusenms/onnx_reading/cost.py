"""Estimates a lower bound of the cost of one run of a graph, without running it.

onnx infers the shapes from the size of the input, and `sizes` computes sizes that the graph computes. Shapes that depend on pixels
stay unknown and are not counted. A single operator cannot be interrupted, and a process does not limit its own memory. Therefore a graph
whose shapes exceed the limits is refused before it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fusenms.errors import first_line
from fusenms.limits import Limits
from fusenms.onnx_reading.sizes import compute
from fusenms.onnx_reading.structure import graphs_of

if TYPE_CHECKING:
    import onnx

MOST_ROUNDS = 8
"""Maximum number of shape inferences. Each one uses the sizes that became known in the previous one."""
SMALL = 4096
"""Maximum number of elements of a constant, stored or computed, whose values are kept for shape inference."""

Shape = tuple[int, ...]


def check_cost(model: onnx.ModelProto, sizes: Mapping[str, Shape], limits: Limits) -> None:
    """Refuse a graph if the known shapes show that a tensor or the operations of one run exceed the limits.

    Args:
        sizes: input name to the shape of that input.

    Raises:
        ValueError: a tensor has too many elements, or there are too many operations.
    """
    import onnx

    skeleton = _skeleton(model, sizes)
    try:
        for _ in range(MOST_ROUNDS):
            inferred = onnx.shape_inference.infer_shapes(skeleton)
            operations = _count(inferred.graph, {}, limits)
            if not _fill_in(skeleton, _shapes(inferred.graph, known=True)):
                break
    except (onnx.shape_inference.InferenceError, RuntimeError, TypeError, MemoryError) as error:
        raise ValueError(f"the shapes of its tensors cannot be inferred ({first_line(error)})") from error
    if operations > limits.max_run_operations:
        raise ValueError(
            f"one run takes at least {operations:.2g} operations; expected at most {limits.max_run_operations:.2g} (max_run_operations)"
        )


def _skeleton(model: onnx.ModelProto, sizes: Mapping[str, Shape]) -> onnx.ModelProto:
    """A copy of the model with functions expanded, without its declared shapes and without the values of large constants."""
    import onnx
    import onnx.inliner

    small = onnx.ModelProto(ir_version=model.ir_version)
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    graph = small.graph
    graph.name = "skeleton"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(entry.name) for entry in model.graph.output)
    for item in model.graph.initializer:
        if math.prod(item.dims) <= SMALL:
            graph.initializer.add().CopyFrom(item)
        else:  # as an input, a constant has a shape without values
            known = {entry.name for entry in graph.input}
            if item.name not in known:
                graph.input.append(onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    for entry in graph.input:
        if (shape := sizes.get(entry.name)) is not None:
            entry.type.tensor_type.ClearField("shape")
            for size in shape:
                entry.type.tensor_type.shape.dim.add().dim_value = size
    if small.functions:
        small = onnx.inliner.inline_local_functions(small)
    _prepare(small.graph.node)
    return small


def _prepare(nodes: Iterable[onnx.NodeProto]) -> None:
    """Remove the declared shapes from inner graphs."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        for graph in graphs_of(node):
            del graph.value_info[:]
            for entry in graph.output:
                entry.type.tensor_type.ClearField("shape")
            todo += graph.node


def _shapes(graph: onnx.GraphProto, *, known: bool = False) -> dict[str, Shape]:
    """Shapes by tensor name. An unknown size counts as 1. With ``known``, shapes with an unknown size are left out."""
    found = {item.name: tuple(item.dims) for item in graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        tensor = entry.type.tensor_type
        if entry.type.HasField("tensor_type") and tensor.HasField("shape"):
            if known and not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                continue
            found[entry.name] = tuple(
                max(dim.dim_value, 0) if dim.HasField("dim_value") else 1 for dim in tensor.shape.dim
            )
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            found[node.output[0]] = tuple(node.attribute[0].t.dims)
    return found


def _fill_in(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> bool:
    """Replace nodes that compute sizes from known sizes by constants, in place. Return whether there were any.

    onnx can do this itself (``data_prop``), but then stores each element of every vector, whatever its length.
    """
    from onnx import numpy_helper

    values = {
        item.name: numpy_helper.to_array(item) for item in model.graph.initializer if math.prod(item.dims) <= SMALL
    }
    known, kept = set(values), []
    for node in model.graph.node:
        value = compute(node, values, shapes)
        if value is None:
            kept.append(node)
        else:
            values[node.output[0]] = value
    if len(kept) == len(model.graph.node):
        return False
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in values.items() if name not in known
    )
    return True


def _count(graph: onnx.GraphProto, outer: dict[str, Shape], limits: Limits) -> float:
    """Count the operations of one run. Each loop counts as one round.

    Raises:
        ValueError: a tensor is too large.
    """
    shapes = outer | _shapes(graph)
    constants = {item.name: item for item in graph.initializer}
    total = 0.0
    for node in graph.node:
        for name in node.output:
            if math.prod(shapes.get(name, ())) > limits.max_tensor_elements:
                raise ValueError(
                    f"node {node.name[:100]!r} ({node.op_type}) gives {list(shapes[name])[:8]}; expected at most "
                    f"{limits.max_tensor_elements} elements (max_tensor_elements)"
                )
        if node.op_type == "Range":
            _check_range(node, constants, limits)
        total += _operations(node, shapes)
        for inner in graphs_of(node):
            total += _count(inner, shapes, limits)
    return total


def _operations(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> float:
    """Operations of a node: multiplications of matrix products and convolutions, output elements of all other operators."""
    given, result = (shapes.get(names[0], ()) if names else () for names in (node.input, node.output))
    elements = float(math.prod(result))
    weights = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger") and given:
        return elements * max(given[-1], given[-2] if len(given) > 1 else 1)  # Gemm may transpose its input
    if node.op_type in ("Conv", "ConvInteger", "ConvTranspose") and weights:
        return (
            elements * math.prod(weights[1:])
            if node.op_type != "ConvTranspose"
            else math.prod(given) * math.prod(weights[1:])
        )
    return elements


def _check_range(node: onnx.NodeProto, constants: Mapping[str, Any], limits: Limits) -> None:
    from onnx import numpy_helper

    if any(name not in constants for name in node.input):
        return
    start, stop, step = (float(numpy_helper.to_array(constants[name]).reshape(-1)[0]) for name in node.input)
    if step == 0 or not (stop - start) / step <= limits.max_tensor_elements:
        raise ValueError(
            f"node {node.name[:100]!r} (Range) counts from {start:g} to {stop:g} by {step:g}; expected at most "
            f"{limits.max_tensor_elements} elements (max_tensor_elements)"
        )
