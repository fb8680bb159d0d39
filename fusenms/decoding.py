"""Box terms of chosen candidates to boxes, in the graph. What is not chosen is never decoded."""

from __future__ import annotations

import numpy as np

from fusenms.artifacts import ImageInput
from fusenms.graph import FLOAT, INT32, Graph, Tensor
from fusenms.layout import (
    AnchorBoxes,
    BoxFormat,
    Decoded,
    Distances,
    Gridded,
    GridOffsets,
    Layout,
    TanhOffsets,
    cells_along,
)


def decode_boxes(g: Graph, layout: Layout, image: ImageInput, terms: Tensor, index: Tensor) -> Tensor:
    """Emit the decoding of chosen candidates.

    Args:
        terms: the box channels of the candidates, ``[B, k, channels]`` float32.
        index: their numbers, ``[B, k]`` int32.

    Returns:
        boxes ``[B, k, 4]`` float32, xyxy in pixels of the input, the high corner never below the low one.
    """
    decode = layout.decode
    if isinstance(decode, Decoded):
        boxes = _corners(g, terms) if decode.format is BoxFormat.CXCYWH else terms
        return _ordered(g, g.op("Mul", boxes, _sides(g, image, 4)) if decode.normalized else boxes)
    cell, stride, slot = _locate(g, decode, image, index)
    if isinstance(decode, Distances):
        distance: Tensor = terms
        if decode.bins > 1:
            spread = g.op("Softmax", g.reshape(terms, 0, 0, 4, decode.bins), axis=3)
            bins = g.const(np.arange(decode.bins), np.float32)  # no MatMul: TensorRT-RTX has none in float32 for Turing
            distance = g.reduce("ReduceSum", g.op("Mul", spread, bins), 3)
        return _ordered(g, _around(g, cell, distance, stride, decode.point))
    offset, extent = g.slice(terms, 2, 0, 2), g.slice(terms, 2, 2, 4)
    if isinstance(decode, GridOffsets):
        size = g.op("Mul", g.op("Exp", extent), stride)
    elif isinstance(decode, TanhOffsets):
        offset = g.op("Tanh", offset)
        size = g.op("Mul", g.op("Sigmoid", extent), _sides(g, image, 2))
    else:
        offset = g.op("Sub", g.op("Mul", g.op("Sigmoid", offset), g.floats(2.0)), g.floats(0.5))
        factor = g.op("Mul", g.op("Sigmoid", extent), g.floats(2.0))
        anchors = g.const(np.asarray(decode.anchors).reshape(-1, 2), np.float32)
        size = g.op("Mul", g.op("Mul", factor, factor), g.op("Gather", anchors, slot, axis=0))
    center = g.op("Mul", g.op("Add", offset, cell), stride)
    return _corners(g, g.concat([center, size], 2))


def _around(g: Graph, cell: Tensor, distance: Tensor, stride: Tensor, point: float) -> Tensor:
    """Distances from a point of the cell to corners."""
    center = g.op("Add", cell, g.floats(point)) if point else cell
    low = g.op("Sub", center, g.slice(distance, 2, 0, 2))
    high = g.op("Add", center, g.slice(distance, 2, 2, 4))
    return g.op("Mul", g.concat([low, high], 2), stride)


def _corners(g: Graph, boxes: Tensor) -> Tensor:
    """Center and size to corners."""
    center, half = g.slice(boxes, 2, 0, 2), g.op("Mul", g.slice(boxes, 2, 2, 4), g.floats(0.5))
    return g.concat([g.op("Sub", center, half), g.op("Add", center, half)], 2)


def _ordered(g: Graph, boxes: Tensor) -> Tensor:
    """Make a negative size zero, so that every runtime gives the box IoU 0."""
    low = g.slice(boxes, 2, 0, 2)
    return g.concat([low, g.op("Max", low, g.slice(boxes, 2, 2, 4))], 2)


def _sides(g: Graph, image: ImageInput, count: int) -> Tensor:
    """Width, height (and both again) of the input in pixels, ``[count]`` float32."""
    if not image.dynamic_size:
        return g.const(np.resize([image.width, image.height], count), np.float32)
    shape = g.cast(g.op("Shape", g.tensor(image.tensor)), FLOAT)
    return g.op("Gather", shape, g.const(np.resize([3, 2], count), np.int32), axis=0)


def _locate(g: Graph, decode: Gridded, image: ImageInput, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each candidate stands on the grid.

    Candidates are numbered by level, anchor, row, column.

    Returns:
        cell ``[B, k, 2]`` float32 (column, row); stride ``[B, k, 1]`` float32; slot ``[B, k]`` int32 (level * anchors + anchor).
    """
    anchors = len(decode.anchors[0]) if isinstance(decode, AnchorBoxes) else 1
    columns, cells = _level_sizes(g, decode.strides, image)
    level: Tensor | None = None
    start: Tensor = g.ints(0)
    starts = [start]
    for i in range(1, len(decode.strides)):
        count = g.op("Gather", cells, g.ints(i - 1), axis=0)
        start = g.op("Add", start, g.op("Mul", count, g.ints(anchors)) if anchors > 1 else count)
        starts.append(start)
        reached = g.cast(g.op("Not", g.op("Less", index, start)), INT32)
        level = reached if level is None else g.op("Add", level, reached)
    if level is None:
        level = g.op("Sub", index, index)
    first = g.op("Gather", g.concat([g.reshape(s, 1) for s in starts], 0), level, axis=0)
    local = g.op("Sub", index, first)
    slot = level
    if anchors > 1:
        per_anchor = g.op("Gather", cells, level, axis=0)
        anchor = g.op("Div", local, per_anchor)
        local = g.op("Sub", local, g.op("Mul", anchor, per_anchor))
        slot = g.op("Add", g.op("Mul", level, g.ints(anchors)), anchor)
    width = g.op("Gather", columns, level, axis=0)
    row = g.op("Div", local, width)
    column = g.op("Sub", local, g.op("Mul", row, width))
    cell = g.concat([g.unsqueeze(g.cast(x, FLOAT), 2) for x in (column, row)], 2)
    stride = g.op("Gather", g.const(decode.strides, np.float32), level, axis=0)
    return cell, g.unsqueeze(stride, 2), slot


def _level_sizes(g: Graph, strides: tuple[int, ...], image: ImageInput) -> tuple[Tensor, Tensor]:
    """Columns and cells of each level, ``[levels]`` int32: constants, or computed from the picture's open size."""
    if not image.dynamic_size:
        columns = [cells_along(image.width, s) for s in strides]
        return g.const(columns, np.int32), g.const(
            [cells_along(image.height, s) * c for s, c in zip(strides, columns, strict=True)], np.int32
        )
    sides = g.cast(g.op("Shape", g.tensor(image.tensor)), INT32)
    height, width = g.slice(sides, 0, 2, 3), g.slice(sides, 0, 3, 4)
    reach = g.const([s - 1 for s in strides], np.int32)
    columns, rows = (g.op("Div", g.op("Add", side, reach), g.const(strides, np.int32)) for side in (width, height))
    return columns, g.op("Mul", columns, rows)
