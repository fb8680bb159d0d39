"""Give a graph float32 images ``[B, 3, height, width]`` as input and float32 outputs, whatever its network works with.

Networks of TensorFlow take images with the channels last; quantized and half-precision files take uint8 or float16. The conversion becomes
part of the graph, so that everything after it has one kind of model.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

IMAGE_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8)
HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def has_channels_last(entry: onnx.ValueInfoProto) -> bool:
    """Whether an input is ``[B, height, width, 3]``."""
    dims = entry.type.tensor_type.shape.dim
    return len(dims) == 4 and dims[3].dim_value == 3 and dims[1].dim_value != 3


def with_float_images(model: onnx.ModelProto, entry: onnx.ValueInfoProto) -> tuple[onnx.ModelProto, str]:
    """Return a copy that takes float32 images with the channels first, and what was changed: an empty text if nothing was.

    A network that takes uint8 gets values from 0 to 255, rounded.

    Args:
        entry: the image input, of one of `IMAGE_TYPES`.
    """
    kind, channels_last = entry.type.tensor_type.elem_type, has_channels_last(entry)
    if kind == TensorProto.FLOAT and not channels_last:
        return model, ""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, inner = copy.graph, entry.name
    name = _free(graph, "images")
    nodes, tensor = [], name

    def add(op: str, *more: str, last: bool = False, **attributes: Any) -> str:
        made = inner if last else _free(graph, f"{name}_{op.lower()}")
        nodes.append(helper.make_node(op, [tensor, *more], [made], **attributes))
        return made

    if channels_last:
        tensor = add("Transpose", last=kind == TensorProto.FLOAT, perm=[0, 2, 3, 1])
    if kind == TensorProto.UINT8:  # opset 9 has neither Round nor Clip with bounds
        for op, value in (("Add", 0.5), ("Floor", None), ("Max", 0.0), ("Min", 255.0)):
            bounds = []
            if value is not None:
                bounds.append(_free(graph, f"{name}_{op.lower()}_value"))
                graph.initializer.append(helper.make_tensor(bounds[0], TensorProto.FLOAT, [], [value]))
            tensor = add(op, *bounds)
    if kind != TensorProto.FLOAT:
        add("Cast", last=True, to=kind)
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *old])
    dims = [dim.dim_value or dim.dim_param or None for dim in entry.type.tensor_type.shape.dim]
    shape = [dims[0], dims[3], dims[1], dims[2]] if channels_last else dims
    at = next(i for i, item in enumerate(graph.input) if item.name == inner)
    graph.input[at].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    said = [f"channels first, not last ({inner})"] if channels_last else []
    if kind != TensorProto.FLOAT:
        said.append(f"float32, not {_text(kind)}")
    return copy, f"images are {' and '.join(said)}: converted inside"


def with_float_outputs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """Return a copy whose outputs of another float type are cast to float32, and what was changed: an empty text if nothing was."""
    names = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.output}
    half = {name: kind for name, kind in names.items() if kind in HALF_TYPES}
    if not half:
        return model, ""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    renamed = {name: _free(graph, f"{name}_{_text(kind)}") for name, kind in half.items()}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for info in graph.value_info:
        info.name = renamed.get(info.name, info.name)
    for entry in graph.output:
        if entry.name in half:
            graph.node.append(helper.make_node("Cast", [renamed[entry.name]], [entry.name], to=TensorProto.FLOAT))
            entry.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy, f"outputs {', '.join(half)} are cast to float32"


def _free(graph: onnx.GraphProto, name: str) -> str:
    """A name that the graph does not use yet."""
    taken = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
    taken |= {entry.name for entries in (graph.input, graph.output, graph.initializer) for entry in entries}
    while name in taken:
        name += "_"
    return name


def _text(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()
