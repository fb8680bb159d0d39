"""All rows in one tensor, as Ultralytics' own exports with NMS have them (`PostprocessConfig.output_preset` ``ultralytics``).

Only the file has this form. In memory, nodes behind the tensor take it apart into the outputs of the contract, so that whatever runs and
proves these proves the tensor too. Saving cuts the model at the tensor; loading adds the nodes again.

``output0`` is ``[B, K, 6 + ...]`` float32: x1, y1, x2, y2 in pixels of the input (oriented boxes: cx, cy, w, h), score, label, then mask
coefficients, keypoints or the angle. Rows past the detections have score 0 and label -1. ``output1`` are the prototypes of masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.errors import SourceError
from fusenms.graph.model import part_before
from fusenms.layout import Layout

if TYPE_CHECKING:
    import onnx

ROWS, PROTOTYPES = "output0", "output1"
BOX = 4
SCORE, LABEL, FIRST_OF_TASK = 4, 5, 6
"""Columns."""
_PREFIX = "one_tensor/"
"""Of the names of the nodes that take the tensor apart."""


def has_one_tensor(config: PostprocessConfig) -> bool:
    """Whether the file has all rows in one tensor."""
    return config.output_preset == contract.ONE_TENSOR


def tensors(layout: Layout) -> tuple[str, ...]:
    """Names of the outputs of the file."""
    return (ROWS,) if layout.masks is None else (ROWS, PROTOTYPES)


def width(layout: Layout) -> int:
    """Number of columns."""
    more = 0 if layout.angle is None else 1
    more += 0 if layout.masks is None else layout.masks.coefficients.channels
    return FIRST_OF_TASK + more + (0 if layout.keypoints is None else layout.keypoints.count * layout.keypoints.dims)


def cut(model: onnx.ModelProto, layout: Layout, dynamic_size: bool) -> onnx.ModelProto:
    """The model as its file has it: up to the tensor of rows.

    Ultralytics 8.4 takes a first output whose batch has a name for a model of any image size. That name is left out if the size is fixed.
    """
    model = part_before(model, tensors(layout))
    if not dynamic_size:
        model.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    return model


def with_contract(model: onnx.ModelProto, layout: Layout, config: PostprocessConfig) -> onnx.ModelProto:
    """The model with nodes that take the tensor of rows apart, and with the outputs of the contract.

    Raises:
        SourceError: the model has no such tensor, or one of another size.
    """
    import onnx
    from onnx import helper, numpy_helper

    found = {entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in model.graph.output}
    if list(found) != list(tensors(layout)) or found[ROWS][1:] != [config.max_detections, width(layout)]:
        raise SourceError(
            f"found outputs {found}; expected {ROWS} [B, {config.max_detections}, {width(layout)}] as the metadata say; fuse the model "
            "again"
        )
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    graph, made = whole.graph, 0

    def constant(values: object, dtype: type[np.generic]) -> str:
        nonlocal made
        made += 1
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), f"{_PREFIX}{made}"))
        return f"{_PREFIX}{made}"

    def op(kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        nonlocal made
        made += 1
        name = named or f"{_PREFIX}{made}"
        graph.node.append(helper.make_node(kind, inputs, [name], name=f"{_PREFIX}{kind}_{made}", **attributes))
        return name

    def columns(start: int, stop: int, named: str = "") -> str:
        return op("Slice", ROWS, *(constant([value], np.int64) for value in (start, stop, 2)), named=named)

    def one(column: int, named: str = "") -> str:
        return op("Reshape", columns(column, column + 1), constant([0, -1], np.int64), named=named)

    counts, boxes, scores, labels = config.output_names
    if layout.angle is None:
        columns(0, BOX, boxes)
    else:
        op("Concat", columns(0, BOX), columns(FIRST_OF_TASK, FIRST_OF_TASK + 1), named=boxes, axis=2)
    one(SCORE, scores)
    op("Cast", one(LABEL), named=labels, to=onnx.TensorProto.INT32)
    used = op("Cast", op("Greater", labels, constant(contract.NO_LABEL, np.int32)), to=onnx.TensorProto.INT32)
    if next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) < 13:
        op("ReduceSum", used, named=counts, axes=[1], keepdims=1)
    else:
        op("ReduceSum", used, constant([1], np.int64), named=counts, keepdims=1)
    if layout.masks is not None:
        columns(FIRST_OF_TASK, width(layout), contract.MASK_COEFFICIENTS)
        op("Identity", PROTOTYPES, named=contract.PROTOTYPES)
    if layout.keypoints is not None:
        shape = constant([0, 0, layout.keypoints.count, layout.keypoints.dims], np.int64)
        op("Reshape", columns(FIRST_OF_TASK, width(layout)), shape, named=contract.KEYPOINTS)
    sizes = {
        entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in graph.output
    }
    batch, sides = sizes[ROWS][0] or "batch", sizes.get(PROTOTYPES, ["h", "w"])[-2:]
    graph.value_info.extend(graph.output)  # so that `cut` knows them
    del graph.output[:]
    for name, output in layout.outputs(config):
        dims = output.shape_for(batch, config.max_detections, *sides)
        graph.output.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(output.dtype), list(dims))
        )
    return whole


def taken_apart(outputs: Mapping[str, np.ndarray], layout: Layout, config: PostprocessConfig) -> dict[str, np.ndarray]:
    """The outputs of the contract, of a runtime that gave those of the file: what `with_contract` does, in NumPy."""
    rows = outputs[ROWS]
    counts, boxes, scores, labels = config.output_names
    number = rows[..., LABEL].astype(np.int32)
    box = rows[..., :BOX] if layout.angle is None else rows[..., [0, 1, 2, 3, FIRST_OF_TASK]]
    used = (number > contract.NO_LABEL).sum(1, keepdims=True).astype(np.int32)
    found = {counts: used, boxes: box, scores: rows[..., SCORE], labels: number}
    rest = rows[..., FIRST_OF_TASK:]
    if layout.masks is not None:
        found |= {contract.MASK_COEFFICIENTS: rest, contract.PROTOTYPES: outputs[PROTOTYPES]}
    if layout.keypoints is not None:
        found[contract.KEYPOINTS] = rest.reshape(*rest.shape[:2], layout.keypoints.count, layout.keypoints.dims)
    return found
