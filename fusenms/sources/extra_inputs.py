"""Replaces the inputs of models that scale their own boxes: the size of the images, or the factor by which they were scaled.

A fused model takes only images and returns boxes in pixels of its input, so such an input becomes a constant. Runs with changed values
show its meaning:

1. If the boxes grow with the input, they are scaled by the size. The axis that grows shows the order of height and width.
2. If the boxes shrink, they are divided by a factor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fusenms.errors import SourceError, first_line
from fusenms.graph.session import Session
from fusenms.limits import Limits

NUMBERS: dict[int, Any] = {TensorProto.INT64: np.int64, TensorProto.INT32: np.int32, TensorProto.FLOAT: np.float32}
SEEN = 1000.0
"""The size that the runs are given. It must be exact in float and large enough that boxes are not clipped at it."""


def fill_extra_inputs(
    path: Path, model: onnx.ModelProto, image: str, shape: tuple[int, int, int], limits: Limits
) -> tuple[list[str], bool]:
    """Replace every input except the images by a constant, in place.

    Args:
        image: name of the image input.
        shape: batch, height and width of the image input, in pixels.
        limits: bounds on each run.

    Returns:
        a note for each input, and whether an input was the size of the images.

    Raises:
        SourceError: an input has another shape, or an unknown meaning.
    """
    constants = {item.name for item in model.graph.initializer}
    extra = [entry for entry in model.graph.input if entry.name not in constants and entry.name != image]
    notes = []
    for entry in extra:
        found = [dim.dim_value or dim.dim_param or "?" for dim in entry.type.tensor_type.shape.dim]
        number = NUMBERS.get(entry.type.tensor_type.elem_type)
        if len(found) != 2 or found[1] != 2 or number is None:
            raise SourceError(
                f"{path}: found an input {entry.name} {found} beside the images; expected none, or numbers [batch, 2]: "
                "the size of the images, or the factor by which they were scaled. Export the model without it"
            )
    batch, height, width = shape
    meanings = []
    for entry in extra:  # find all meanings before an input is replaced
        others = {other.name: np.full((batch, 2), SEEN) for other in extra if other is not entry}
        meanings.append(_meaning(path, model, image, shape, entry, others, limits))
    for entry, meaning in zip(extra, meanings, strict=True):
        values = {"factor": (1, 1), "height, width": (height, width), "width, height": (width, height)}[meaning]
        notes.append(f"input {entry.name} is {meaning} of the images: constant {values[0]}, {values[1]}")
        _fill(model, entry, image, np.array([values], NUMBERS[entry.type.tensor_type.elem_type]))
        model.graph.input.remove(entry)
    return notes, any(meaning != "factor" for meaning in meanings)


def _meaning(
    path: Path, model: onnx.ModelProto, image: str, shape: tuple[int, int, int], entry: onnx.ValueInfoProto,
    others: dict[str, np.ndarray], limits: Limits,
) -> str:  # fmt: skip
    """The meaning of an input, from its effect on the boxes: "factor", "height, width" or "width, height"."""
    kinds = {
        e.name: NUMBERS[e.type.tensor_type.elem_type] for e in model.graph.input if e.name in (entry.name, *others)
    }
    values = np.random.default_rng(7).random((shape[0], 3, *shape[1:]), dtype=np.float32)
    try:
        session = Session(model, source=path.name, max_seconds=limits.max_run_seconds)
        boxes = []
        for told in ((SEEN, SEEN), (2 * SEEN, SEEN), (SEEN, 2 * SEEN)):
            given = {
                name: value.astype(kinds[name])
                for name, value in (others | {entry.name: np.array([told] * shape[0])}).items()
            }
            outputs = session.run({image: values, **given})
            boxes.append(next(value for value in outputs if value.ndim == 3 and value.shape[2] == 4)[0])
    except (SourceError, StopIteration) as error:
        said = first_line(error) if isinstance(error, SourceError) else "no output holds boxes [batch, candidates, 4]"
        raise SourceError(
            f"{path}: the meaning of its input {entry.name} is unknown ({said}); expected the size of the images, or the factor by which "
            "they were scaled. Export the model without it"
        ) from error
    at, first, second = boxes

    def ratio(changed: np.ndarray, axis: int) -> float:
        some = np.abs(at[:, axis::2]) > 1e-3 * np.abs(at).max()
        return float(np.median(changed[:, axis::2][some] / at[:, axis::2][some])) if some.any() else 1.0

    grown = [[round(ratio(changed, axis), 3) for axis in (0, 1)] for changed in (first, second)]
    if grown == [[2, 1], [1, 2]]:
        return "width, height"
    if grown in ([[1, 2], [2, 1]], [[1, 1], [1, 1]]):  # in the second case the input has no effect
        return "height, width"
    if grown in ([[0.5, 1], [1, 0.5]], [[1, 0.5], [0.5, 1]]):
        return "factor"
    raise SourceError(
        f"{path}: its input {entry.name} [batch, 2] scales x and y of the boxes by {grown} when either number is doubled; expected "
        "the size of the images, or the factor by which they were scaled. Export the model without it"
    )


def _fill(model: onnx.ModelProto, entry: onnx.ValueInfoProto, image: str, values: np.ndarray) -> None:
    """Add nodes that compute the input's tensor: the values, repeated for each image."""
    name = entry.name
    model.graph.initializer.extend([
        numpy_helper.from_array(values, f"{name}_values"),
        numpy_helper.from_array(np.array([0], np.int64), f"{name}_first"),
        numpy_helper.from_array(np.array([1], np.int64), f"{name}_one"),
    ])  # fmt: skip
    nodes = [
        helper.make_node("Shape", [image], [f"{name}_shape"]),
        helper.make_node("Gather", [f"{name}_shape", f"{name}_first"], [f"{name}_batch"], axis=0),
        helper.make_node("Concat", [f"{name}_batch", f"{name}_one"], [f"{name}_target"], axis=0),
        helper.make_node("Expand", [f"{name}_values", f"{name}_target"], [name]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
