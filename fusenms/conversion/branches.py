"""Take a suppression out of the branch of an `If`.

torch.onnx writes torchvision's ``batched_nms`` so: one branch for no boxes at all, which gives no rows, and one with `NonMaxSuppression`.
The nodes of the second one take the place of the `If`, which is the same wherever there are boxes.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from fusenms.errors import SourceError
from fusenms.graph.model import captured
from fusenms.graph.session import Session
from fusenms.sources.onnx_file import NMS_OPS


def with_suppressions_inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the nodes of a branch in place of each `If` of which that branch suppresses and the other one gives no rows.

    An `If` whose other branch gives something, or reads something, stays. The same model is returned if there is nothing to replace.
    """
    bodies = {i: branch for i, node in enumerate(model.graph.node) if (branch := _suppressing(model, node)) is not None}
    if not bodies:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for i, node in enumerate(nodes):
        if i in bodies:
            _inline(copy.graph, node, bodies[i], f"fusenms/inlined_{i}/")
        else:
            copy.graph.node.append(node)
    return copy


def inner_types(node: onnx.NodeProto) -> set[str]:
    """Operators in the subgraphs of a node."""
    inner = [one for attribute in node.attribute for one in attribute.g.node]
    return {one.op_type for one in inner}.union(*map(inner_types, inner))


def _suppressing(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.GraphProto | None:
    """The branch of an `If` that suppresses, if the other one gives no rows."""
    if node.op_type != "If":
        return None
    branches = [attribute.g for attribute in node.attribute if attribute.name in ("then_branch", "else_branch")]
    suppress = [graph for graph in branches if {one.op_type for one in graph.node} & set(NMS_OPS)]
    if len(branches) != 2 or len(suppress) != 1:
        return None
    (other,) = (graph for graph in branches if graph is not suppress[0])
    return suppress[0] if _gives_nothing(model, other) else None


def _gives_nothing(model: onnx.ModelProto, branch: onnx.GraphProto) -> bool:
    """Whether a branch gives tensors without elements, whatever is outside of it."""
    made = {name for node in branch.node for name in node.output} | {item.name for item in branch.initializer}
    read = {name for node in branch.node for name in (*node.input, *captured(node)) if name}
    read |= {entry.name for entry in branch.output}
    if read - made:
        return False
    alone = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=branch)
    try:
        session = Session(alone, source="branch")
        values = session.run({})
        session.close()
    except SourceError:
        return False
    return all(getattr(value, "size", 1) == 0 for value in values)


def _inline(graph: onnx.GraphProto, node: onnx.NodeProto, branch: onnx.GraphProto, prefix: str) -> None:
    """Append the nodes of a branch, whose outputs get the names of those of the `If`, and whose other tensors get names of their own."""
    own = [name for one in branch.node for name in one.output] + [item.name for item in branch.initializer]
    renamed = {name: f"{prefix}{name}" for name in own if name}
    for item in branch.initializer:
        graph.initializer.add().CopyFrom(item)
        graph.initializer[-1].name = renamed[item.name]
    for one in branch.node:
        copy = graph.node.add()
        copy.CopyFrom(one)
        copy.name = f"{prefix}{one.name}"
        rename(copy, renamed)
    for inner, outer in zip(branch.output, node.output, strict=True):
        graph.node.append(
            onnx.helper.make_node("Identity", [renamed.get(inner.name, inner.name)], [outer], name=f"{prefix}{outer}")
        )


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give tensors other names in a node and in its subgraphs, in place."""
    for tensors in (node.input, node.output):
        tensors[:] = [names.get(name, name) for name in tensors]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                rename(inner, names)
            for entry in attribute.g.output:
                entry.name = names.get(entry.name, entry.name)
