"""What one run of a graph costs at least, found without running it.

Shapes are inferred by onnx from the input's size on; what they do not show (shapes that depend on values) is not counted. A single
operator cannot be interrupted, and memory is not limited within a process, so whatever shows here is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fusenms.limits import Limits
from fusenms.onnx_reading.structure import STANDARD, graphs_of

if TYPE_CHECKING:
    import onnx

MOST_SHAPE_ELEMENTS = 2**16
"""Elements of a vector of whole numbers that is joined from others. Shape inference follows these one by one."""
SMALL = 4096
"""Elements of a constant whose values shape inference may need."""
UNKNOWN = "fusenms.unknown"

Shape = tuple[int, ...]


def check_cost(model: onnx.ModelProto, sizes: Mapping[str, Shape], limits: Limits) -> None:
    """Refuse a graph in which a tensor, or the work on one run, exceeds the limits as far as shapes are known.

    Args:
        sizes: input name to the shape that it will have.

    Raises:
        ValueError: a tensor has too many elements, or there are too many operations.
    """
    import onnx

    skeleton = _skeleton(model, sizes)
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton)
        if _joins_are_small(inferred):
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise ValueError(
            f"shapes of its tensors cannot be found ({str(error).strip().splitlines()[0][:200]})"
        ) from error
    operations = _count(inferred.graph, {}, limits)
    if operations > limits.max_run_operations:
        raise ValueError(
            f"one run takes {operations:.2g} operations or more; expected at most {limits.max_run_operations:.2g} (max_run_operations)"
        )


def _skeleton(model: onnx.ModelProto, sizes: Mapping[str, Shape]) -> onnx.ModelProto:
    """The model with its functions expanded, without what it claims of its own shapes and without the values of large constants."""
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
        else:  # onnx takes the shape of an input
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
    """Forget claimed shapes in inner graphs; hide `Range`, whose values onnx would write down one by one."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.op_type == "Range":
            node.domain = UNKNOWN
        for graph in graphs_of(node):
            del graph.value_info[:]
            for entry in graph.output:
                entry.type.tensor_type.ClearField("shape")
            todo += graph.node


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Shapes as far as they are known; an unknown size counts as 1."""
    import onnx

    found = {item.name: tuple(item.dims) for item in graph.initializer}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        if entry.type.HasField("tensor_type") and entry.type.tensor_type.HasField("shape"):
            found[entry.name] = tuple(
                max(dim.dim_value, 0) if dim.HasField("dim_value") else 1 for dim in entry.type.tensor_type.shape.dim
            )
    for node in graph.node:
        if (
            node.op_type == "Constant"
            and node.domain in STANDARD
            and node.attribute[0].type == onnx.AttributeProto.TENSOR
        ):
            found[node.output[0]] = tuple(node.attribute[0].t.dims)
    return found


def _joins_are_small(model: onnx.ModelProto) -> bool:
    shapes = _shapes(model.graph)
    kinds = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.value_info}
    joined = [
        name
        for node in model.graph.node
        if node.op_type == "Concat"
        for name in node.output
        if kinds.get(name) in (6, 7)
    ]
    return all(
        math.prod(shapes.get(name, ())) <= MOST_SHAPE_ELEMENTS for name in joined if len(shapes.get(name, ())) < 2
    )


def _count(graph: onnx.GraphProto, outer: dict[str, Shape], limits: Limits) -> float:
    """Operations of one run of each node, of loops one round.

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
    """Multiplications of matrix products and convolutions; of all others the elements that they give."""
    given, result = (shapes.get(names[0], ()) if names else () for names in (node.input, node.output))
    elements = float(math.prod(result))
    weights = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger") and given:
        return elements * max(given[-1], given[-2] if len(given) > 1 else 1)  # Gemm may turn its input
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
