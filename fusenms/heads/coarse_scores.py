"""Scores that a quantized file cannot tell apart: one scale for boxes up to hundreds of pixels and for scores up to 1."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from fusenms.graph.model import DATA_MOVEMENT_OPS
from fusenms.layout import Activation, Layout

COARSE = 0.5
"""Probabilities in steps of at least this are 0, or 1 and more."""


def coarse_scores(model: onnx.ModelProto, layout: Layout) -> str | None:
    """Return why the scores of a layout are of no use, as a clause; None if they are.

    Only probabilities that come out of a `DequantizeLinear` with one constant scale count, through operators that move values.
    """
    if layout.activation is not Activation.NONE:
        return None
    step = _step(model, layout.classes.tensor)
    if step is None or step < COARSE:
        return None
    alike = layout.classes.tensor == layout.boxes.tensor
    shared = ", which they share with boxes up to hundreds of pixels" if alike else ""
    return (
        f"its scores are quantized in steps of {step:.3g}{shared}: those up to 1 become 0 or no probability, and nothing can be detected "
        "any more. Quantize only what comes before the decode, as precision='int8' does with the float32 weights"
    )


def _step(model: onnx.ModelProto, tensor: str) -> float | None:
    """The smallest step of a tensor; None if not all of it comes out of a `DequantizeLinear` with one constant scale."""
    made = {name: node for node in model.graph.node for name in node.output}
    constants = {item.name: item for item in model.graph.initializer}
    todo, seen, steps = [tensor], set[str](), list[float]()
    while todo:
        node = made.get(name := todo.pop())
        if name in seen:
            continue
        seen.add(name)
        if node is not None and node.op_type in DATA_MOVEMENT_OPS:
            todo += node.input if node.op_type == "Concat" else node.input[:1]
            continue
        scale = constants.get(node.input[1]) if node is not None and node.op_type == "DequantizeLinear" else None
        if scale is None or (values := numpy_helper.to_array(scale)).size != 1:
            return None
        steps.append(float(values.reshape(-1)[0]))
    return min(steps, default=None)
