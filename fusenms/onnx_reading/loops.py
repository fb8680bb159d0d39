"""Loops that can be stopped.

ONNX Runtime looks at its time limit before it runs a node. A loop whose body has no node, or one whose nodes are all removed when
constants are folded, never comes to that. So at least one output of a body must be computed, step by step, from an input of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

LOOPS = ("Loop", "Scan")
CONSTANT = (
    "Constant", "ConstantOfShape", "Shape", "Size", "EyeLike", "CastLike", "If", "OptionalHasElement", "SequenceLength", "Range"
)  # fmt: skip
"""Operators whose result may be known without the values of their inputs."""


def check_loops(model: onnx.ModelProto) -> None:
    """Check all loops of a model, those in functions and in other loops too.

    Raises:
        ValueError: a loop may not be stoppable.
    """
    todo: list[Any] = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while todo:
        node = todo.pop()
        bodies = [
            graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.ByteSize()
        ]
        for body in bodies:
            todo += body.node
            if node.op_type in LOOPS and not _computes(body):
                raise ValueError(
                    f"the loop {node.name[:100]!r} has a body that computes nothing from its inputs, so that it could not be stopped; "
                    "expected none of that kind"
                )


def _computes(body: onnx.GraphProto) -> bool:
    """Whether an output of the body comes out of nodes that work on the values of one of its inputs."""
    live, results = {entry.name for entry in body.input}, set[str]()
    for node in body.node:
        if node.domain in ("", "ai.onnx") and node.op_type not in CONSTANT and not live.isdisjoint(node.input):
            live.update(filter(None, node.output))
            results.update(node.output)
    return any(entry.name in results for entry in body.output)
