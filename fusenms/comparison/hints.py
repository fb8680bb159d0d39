"""What two operators at the same place differ in: attributes and weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from fusenms.comparison.onnx_run import OnnxRun
from fusenms.comparison.runs import Run
from fusenms.comparison.torch_run import TorchRun

FEW = 0.1
"""A weight in which more of the numbers differ was computed otherwise, such as one that a BatchNorm was folded into."""


def differences(a: Run, i: int, b: Run, j: int) -> Iterator[str]:
    """Yield what the operators of two places differ in, as far as both say it."""
    if isinstance(a, OnnxRun) and isinstance(b, OnnxRun):
        one, two = a.nodes[i], b.nodes[j]
        if one.op_type != two.op_type:
            yield f"operator: {one.op_type} in A, {two.op_type} in B"
            return
        yield from _attributes(one, two)
        yield from _weights(_constants(a, one), _constants(b, two))
    elif isinstance(a, TorchRun) and isinstance(b, OnnxRun):
        yield from _weights(_parameters(a, i), _constants(b, b.nodes[j]))
    elif isinstance(a, OnnxRun) and isinstance(b, TorchRun):
        yield from _weights(_constants(a, a.nodes[i]), _parameters(b, j))


def _attributes(one: onnx.NodeProto, two: onnx.NodeProto) -> Iterator[str]:
    values = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != onnx.AttributeProto.GRAPH}
        for node in (one, two)
    ]
    for name in sorted({*values[0], *values[1]}):
        x, y = (_text(side.get(name)) for side in values)
        if x != y:
            yield f"{name}: {x} in A, {y} in B"


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")[:80]
    return "(not given)" if value is None else str(value)[:80]


def _constants(run: OnnxRun, node: onnx.NodeProto) -> dict[str, np.ndarray]:
    held = {item.name: item for item in run.model.graph.initializer}
    held |= {
        one.output[0]: one.attribute[0].t for one in run.model.graph.node if one.op_type == "Constant" and one.attribute[0].HasField("t")
    }  # fmt: skip
    return {name: numpy_helper.to_array(held[name]) for name in node.input if name in held}


def _parameters(run: TorchRun, number: int) -> dict[str, np.ndarray]:
    path = run.places[number].module
    module = run.module.get_submodule(path)
    return {
        f"{path}.{name}".lstrip("."): value.detach().float().numpy()
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def _weights(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> Iterator[str]:
    for (name, x), (other, y) in _same_shapes(one, two):
        apart = np.abs(x.astype(np.float64) - y.astype(np.float64)) > 1e-6 * max(float(np.abs(x).max(initial=0)), 1e-30)
        count = int(apart.sum())
        if count and (count <= max(1, FEW * x.size) or x.size <= 8):
            at = tuple(int(k) for k in np.argwhere(apart)[0])
            yield (
                f"{name} and {other} {list(x.shape)} differ in {count} of {x.size} numbers, first at {list(at)}: "
                f"{x[at]:.6g} in A, {y[at]:.6g} in B"
            )


def _same_shapes(
    one: dict[str, np.ndarray], two: dict[str, np.ndarray]
) -> Iterator[tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]]:
    left = dict(two)
    for name, x in one.items():
        other = next((key for key, y in left.items() if y.shape == x.shape and y.dtype.kind == x.dtype.kind), None)
        if other is not None:
            yield (name, x), (other, left.pop(other))
