"""Checks that loops can be interrupted.

ONNX Runtime checks its time limit before it runs a node. A loop whose body has no nodes, or only nodes that constant folding removes,
never reaches this check. So at least one output of a body must be computed from an input of the body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

LOOPS = ("Loop", "Scan")
CONSTANT = (
    "Constant", "ConstantOfShape", "Shape", "Size", "EyeLike", "CastLike", "If", "OptionalHasElement", "SequenceLength", "Range"
)  # fmt: skip
"""Operators whose results may be known without the values of their inputs. Constant folding can remove them."""


def check_loops(model: onnx.ModelProto) -> None:
    """Check all loops of a model, including those in functions and in other loops.

    Raises:
        ValueError: a loop might not be interruptible.
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
                    f"the loop {node.name[:100]!r} has a body that computes nothing from its inputs, so it could not be stopped; "
                    "expected at least one output computed from an input of the body"
                )


def _computes(body: onnx.GraphProto) -> bool:
    """Whether an output of the body is computed from the values of one of its inputs."""
    live, results = {entry.name for entry in body.input}, set[str]()
    for node in body.node:
        if node.domain in ("", "ai.onnx") and node.op_type not in CONSTANT and not live.isdisjoint(node.input):
            live.update(filter(None, node.output))
            results.update(node.output)
    return any(entry.name in results for entry in body.output)
