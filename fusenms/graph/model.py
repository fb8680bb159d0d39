"""Models as values: their outputs, the part after some tensors, what their outputs declare.

No function changes its arguments, but for `declare_optional_inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

DATA_MOVEMENT_OPS = (
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that only move values."""
SHAPE_OPS = ("Shape", "Size")
"""Operators whose result does not depend on values."""


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of the model with these inner tensors (float32) as additional outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {entry.name for entry in copy.graph.output}
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in tensors
        if name not in present
    )
    return copy


def with_only_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy whose only outputs are these tensors, in the model's order."""
    copy = with_outputs(model, tensors)
    kept = [entry for entry in copy.graph.output if entry.name in tensors]
    del copy.graph.output[:]
    copy.graph.output.extend(kept)
    return copy


def part_before(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return the part of the model that some tensors are computed by. They are its only outputs.

    Unlike `with_only_outputs`, it takes tensors of any type, and has no other nodes.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    needed, todo = set[str](), list(tensors)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            node = producers.get(name)
            todo += [*node.input, *captured(node)] if node is not None else []
    part = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
        metadata_props=model.metadata_props,
    )
    graph = part.graph
    graph.name = model.graph.name or "part"
    graph.node.extend(node for node in model.graph.node if needed.intersection(node.output))
    graph.initializer.extend(item for item in model.graph.initializer if item.name in needed)
    graph.sparse_initializer.extend(item for item in model.graph.sparse_initializer if item.values.name in needed)
    graph.input.extend(entry for entry in model.graph.input if entry.name in needed)
    graph.value_info.extend(entry for entry in model.graph.value_info if entry.name in needed)
    known = {entry.name: entry for entry in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
    graph.output.extend(
        known.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(tensors)
    )
    return part


def captured(node: onnx.NodeProto) -> list[str]:
    """Names that the subgraphs of a node use."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    inner = [item for graph in graphs for item in graph.node]
    return [name for item in inner for name in (*item.input, *captured(item))] + [
        output.name for graph in graphs for output in graph.output
    ]


def sorted_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without unused nodes, sorted topologically, with a unique name for each node. Metadata is not copied."""
    graph = gs.import_onnx(model)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    taken: set[str] = set()
    for i, node in enumerate(graph.nodes):
        node.name = node.name if node.name and node.name not in taken else f"{node.op}_{i}"
        taken.add(node.name)
    ordered = gs.export_onnx(graph, do_type_check=False)
    ordered.ir_version = model.ir_version
    return ordered


def constants_as_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with initializers in place of its `Constant` nodes that hold a tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            item = copy.graph.initializer.add()
            item.CopyFrom(node.attribute[0].t)
            item.name = node.output[0]
        else:
            copy.graph.node.append(node)
    return copy


def cut_before(model: onnx.ModelProto, tensors: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Return the part of the model after some of its tensors, which become its inputs.

    Inputs of the model that this part still needs (for their shape) stay.

    Args:
        tensors: name to shape of one image (without the batch dimension); float32.
    """
    graph = gs.import_onnx(model)
    known = graph.tensors()
    for name, shape in tensors.items():
        tensor = known[name]
        for node in list(tensor.inputs):  # a Split keeps its number of outputs
            node.outputs[node.outputs.index(tensor)] = gs.Variable(f"{name}/cut")
        tensor.dtype, tensor.shape = np.dtype(np.float32), ["batch", *shape]
        graph.inputs.append(tensor)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()  # True would also remove inputs of loop bodies
    graph.inputs = [tensor for tensor in graph.inputs if tensor.outputs]
    cut = gs.export_onnx(graph, do_type_check=False)
    cut.ir_version = model.ir_version
    declare_optional_inputs(cut, model)
    return cut


def optional_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that have a default, an initializer of the same name. Before IR version 4, every initializer was listed as an input."""
    defaults = {item.name for item in model.graph.initializer} if model.ir_version >= 4 else set()
    return [entry for entry in model.graph.input if entry.name in defaults]


def declare_optional_inputs(made: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """List those of a model again in another one that onnx-graphsurgeon, which takes them for constants, made of it."""
    present = {item.name for item in made.graph.initializer}
    made.graph.input.extend(entry for entry in optional_inputs(model) if entry.name in present)


def declared_shape(model: onnx.ModelProto, tensor: str) -> tuple[int, ...]:
    """Declared shape of an output ``[B, …]`` without the batch; empty if the tensor is not an output or a size is open."""
    entry = next((entry for entry in model.graph.output if entry.name == tensor), None)
    dims = entry.type.tensor_type.shape.dim[1:] if entry is not None else []
    return tuple(dim.dim_value for dim in dims) if all(dim.dim_value for dim in dims) else ()


def declared_type(model: onnx.ModelProto, tensor: str) -> int:
    """Declared element type of an output; 0 if the tensor is not an output."""
    entry = next((entry for entry in model.graph.output if entry.name == tensor), None)
    return 0 if entry is None else int(entry.type.tensor_type.elem_type)
