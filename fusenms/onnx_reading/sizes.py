"""Evaluates the nodes with which exporters compute one shape from another, in NumPy, on short vectors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

MOST = 4096
"""Maximum number of elements of an input or a result."""
Values = Mapping[str, np.ndarray]


def compute(node: onnx.NodeProto, values: Values, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray | None:
    """Compute the output of a node. Return None if its inputs are unknown, or if its operator is not one that computes sizes.

    Args:
        values: values of the known tensors, by name.
        shapes: shapes of the tensors with known shapes, by name.
    """
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1 or not node.input:
        return None
    if node.op_type in ("Shape", "Size") and not node.attribute:
        shape = shapes.get(node.input[0])
        value = None if shape is None else np.array(shape if node.op_type == "Shape" else math.prod(shape), np.int64)
        return value
    operator = OPERATORS.get(node.op_type)
    given = [values.get(name) for name in node.input if name]
    if operator is None or any(value is None or value.size > MOST or value.dtype.kind not in "iufb" for value in given):
        return None
    attributes = {attribute.name: attribute for attribute in node.attribute}
    try:
        with np.errstate(all="ignore"):
            result = operator(attributes, *given)
    except (
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        ArithmeticError,
    ):  # the graph cannot run; ONNX Runtime reports this later
        return None
    return result if result.size <= MOST else None


def _axis(attributes: Mapping[str, Any]) -> int:
    return int(attributes["axis"].i) if "axis" in attributes else 0


def _cast(attributes: Mapping[str, Any], value: np.ndarray) -> np.ndarray:
    from onnx import helper

    kind = helper.tensor_dtype_to_np_dtype(attributes["to"].i)
    if kind.kind not in "iufb":
        raise TypeError
    return value.astype(kind)


def _gather(attributes: Mapping[str, Any], value: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.asarray(np.take(value, places, _axis(attributes))) if value.ndim == 1 else _no()


def _slice(
    _: Mapping[str, Any], value: np.ndarray, start: np.ndarray, stop: np.ndarray, *more: np.ndarray
) -> np.ndarray:
    if value.ndim != 1 or start.size != 1 or stop.size != 1:
        _no()
    return value[int(start.ravel()[0]) : int(stop.ravel()[0]) : int(more[1].ravel()[0]) if len(more) > 1 else 1]


def _flat(attributes: Mapping[str, Any], value: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return value.reshape(-1) if value.ndim == 0 else _no()


def _single(attributes: Mapping[str, Any], value: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return value.reshape(()) if value.shape == (1,) else _no()


def _divide(_: Mapping[str, Any], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not b.all():
        _no()
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype) if a.dtype.kind == "i" else a / b


def _no() -> Any:
    raise ValueError("not a computation of sizes")


OPERATORS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": lambda _, a: a,
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": _divide,
    "Neg": lambda _, a: -a,
    "Abs": lambda _, a: np.abs(a),
    "Floor": lambda _, a: np.floor(a),
    "Ceil": lambda _, a: np.ceil(a),
    "Min": lambda _, a, *others: np.minimum.reduce([a, *others]),
    "Max": lambda _, a, *others: np.maximum.reduce([a, *others]),
    "Concat": lambda attributes, *parts: (
        np.concatenate(parts, _axis(attributes)) if sum(p.size for p in parts) <= MOST else _no()
    ),
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _flat,
    "Squeeze": _single,
}
"""Operators with which exporters compute sizes. Each function takes the attributes and the inputs and returns the result."""
