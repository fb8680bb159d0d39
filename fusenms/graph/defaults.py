"""Optional inputs as constants, for runtimes without them."""

from __future__ import annotations

import onnx

from fusenms.graph.model import captured, optional_inputs, part_before
from fusenms.graph.session import Session


def with_defaults(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without its optional inputs. What is computed from their defaults alone is computed here, in ONNX Runtime.

    TensorRT has no float64, in which thresholds become logits.
    """
    names = {entry.name for entry in optional_inputs(model)}
    if not names:
        return model
    constants = {item.name for item in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    made, folded, kept = set(names), list[onnx.NodeProto](), list[onnx.NodeProto]()
    for node in model.graph.node:
        read = _read(node)
        foldable = bool(read & made) and read <= made | constants
        (folded if foldable else kept).append(node)
        made.update(node.output if foldable else ())
    needed = {name for node in kept for name in _read(node)} | {entry.name for entry in model.graph.output}
    values = list[onnx.TensorProto]()
    if computed := sorted(needed & made - names):
        session = Session(part_before(model, computed), source="the defaults of the inputs")
        found = session.run({}, computed)
        session.close()
        values = [onnx.numpy_helper.from_array(value, name) for name, value in zip(computed, found, strict=True)]
    idle = {name for node in folded for name in _read(node)} - needed
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.input[:], graph.node[:], graph.initializer[:]
    graph.input.extend(entry for entry in model.graph.input if entry.name not in names)
    graph.node.extend(kept)
    graph.initializer.extend(item for item in model.graph.initializer if item.name not in idle)
    graph.initializer.extend(values)
    return copy


def _read(node: onnx.NodeProto) -> set[str]:
    """Names that a node and its subgraphs read."""
    return {name for name in (*node.input, *captured(node)) if name}
