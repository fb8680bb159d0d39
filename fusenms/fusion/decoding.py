"""Decode terms of the head to boxes, keypoints and masks, in the graph, for some candidates only."""

from __future__ import annotations

from functools import partial

import numpy as np

from fusenms.artifacts.raw import ImageInput
from fusenms.graph.builder import FLOAT, INT32, INT64, Graph, Tensor
from fusenms.layout import (
    AnchorDeltas,
    BoxFormat,
    Decoded,
    Distances,
    Gridded,
    GridOffsets,
    Layout,
    PointOffsets,
    TanhOffsets,
    anchors_per_cell,
    cells_along,
    has_anchors_last,
)


def decode_boxes(
    g: Graph, layout: Layout, image: ImageInput, terms: Tensor, index: Tensor, angle: Tensor | None = None
) -> Tensor:
    """Emit the decoding of some candidates' boxes.

    Args:
        terms: the box channels of the candidates, ``[B, k, channels]`` float32.
        index: the candidate numbers, ``[B, k]`` int32.
        angle: for oriented boxes, the angle channel ``[B, k, 1]`` float32.

    Returns:
        boxes ``[B, k, 4]`` float32, xyxy in pixels of the input; `order_corners` sets negative sizes to zero. Oriented boxes are
        ``[B, k, 5]``: cx, cy, w, h in pixels and the angle in radians.
    """
    decode = layout.decode
    if angle is not None:
        return _oriented(g, layout, image, terms, index, angle)
    if isinstance(decode, Decoded):
        boxes = _corners(g, terms) if decode.format is BoxFormat.CXCYWH else terms
        return g.op("Mul", boxes, _sides(g, image, 4)) if decode.normalized else boxes
    cell, stride, slot = _locate(g, decode, image, index)
    if isinstance(decode, Distances):
        return _around(g, decode, cell, _distances(g, decode, terms), stride)
    offset, extent = g.slice(terms, 2, 0, 2), g.slice(terms, 2, 2, 4)
    if isinstance(decode, PointOffsets):
        return _corners(g, g.concat([g.op("Add", offset, _points(g, cell, decode.point, stride)), extent], 2))
    if isinstance(decode, AnchorDeltas):
        if decode.y_first:
            offset, extent = (g.op("Gather", pair, g.const([1, 0], np.int32), axis=2) for pair in (offset, extent))
        sizes = np.array([pair for level in decode.anchors for pair in level])
        anchor = g.op("Gather", g.const(sizes, np.float32), slot, axis=0)
        offset, extent = (
            pair if variance == 1 else g.op("Mul", pair, g.floats(variance))
            for pair, variance in zip((offset, extent), decode.variances, strict=True)
        )
        if decode.log_limit is not None:  # no Min, which may ignore NaN
            limit = g.floats(decode.log_limit)
            extent = g.where(g.op("Less", limit, extent), limit, extent)
        center = g.op("Add", g.op("Mul", offset, anchor), _points(g, cell, decode.point, stride))
        return _corners(g, g.concat([center, g.op("Mul", g.op("Exp", extent), anchor)], 2))
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


def order_corners(g: Graph, layout: Layout, boxes: Tensor) -> Tensor:
    """Emit decoded boxes with negative sizes set to zero, so that every runtime gives such a box IoU 0.

    This hides a high corner of -infinity: whether a box is finite has to be asked before.
    """
    if layout.angle is not None or not isinstance(
        layout.decode, (Decoded, Distances, PointOffsets)
    ):  # no negative sizes
        return boxes
    low = g.slice(boxes, 2, 0, 2)
    return g.concat([low, g.op("Max", low, g.slice(boxes, 2, 2, 4))], 2)


def decode_keypoints(g: Graph, layout: Layout, image: ImageInput, terms: Tensor, index: Tensor) -> Tensor:
    """Emit the decoding of some candidates' keypoints.

    Args:
        terms: the keypoint channels of the candidates, ``[B, k, P * D]`` float32.
        index: as for `decode_boxes`.

    Returns:
        ``[B, k, P, D]`` float32: x, y in pixels of the input, and the visibility from 0 to 1 if D is 3.
    """
    points = layout.keypoints
    assert points is not None
    values = g.reshape(terms, 0, 0, points.count, points.dims)
    if points.factor is None:
        return values
    assert isinstance(layout.decode, Distances | GridOffsets | PointOffsets)
    cell, stride, _ = _locate(g, layout.decode, image, index)
    places = g.slice(values, 3, 0, 2)
    if points.factor != 1:
        places = g.op("Mul", places, g.floats(points.factor))
    if points.pixels:
        places = g.op("Add", places, g.unsqueeze(_points(g, cell, points.point, stride), 2))
    else:
        origin = g.op("Add", cell, g.floats(points.point)) if points.point else cell
        places = g.op("Mul", g.op("Add", places, g.unsqueeze(origin, 2)), g.unsqueeze(stride, 2))
    return places if points.dims == 2 else g.concat([places, g.op("Sigmoid", g.slice(values, 3, 2, 3))], 3)


ROWS = 32
"""Number of masks that are made at once if their total number is fixed."""


def assemble_masks(
    g: Graph, image: ImageInput, coefficients: Tensor, prototypes: Tensor, boxes: Tensor, valid: Tensor, rows: int,
    sides: tuple[int, ...] | None, adaptive: bool, branches: bool,
) -> Tensor:  # fmt: skip
    """Emit the masks of detections, at the size of the prototypes. Memory use grows with the number of rows in use.

    A pixel is in the mask if the weighted sum is above 0 (its sigmoid above a half) and the pixel's low corner is in the box, as in
    Ultralytics.

    Args:
        coefficients: ``[B, K, M]`` float32; ``prototypes`` are ``[B, M, h, w]`` float32.
        boxes: ``[B, K, 4]`` float32, xyxy in pixels of the input; ``valid`` is ``[B, K]`` bool, valid rows first.
        rows: K.
        sides: h and w; None if they are open.
        adaptive: make as many masks as the image with the most detections has. Otherwise make `ROWS` at once.
        branches: skip rows that are not in use, by `If` nodes. Otherwise make all masks; control flow then does not depend on the data.

    Returns:
        ``[B, K, h, w]`` bool; all False past the detections.
    """
    size = g.op("Shape", prototypes)
    tall_wide = g.slice(size, 0, 2, 4) if sides is None else g.const(sides, np.int64)
    flat = g.reshape(prototypes, 0, 0, -1)
    inside = [_within(g, image, boxes, size, sides, axis) for axis in (0, 1)]

    def made(start: Tensor, stop: Tensor) -> Tensor:
        """Masks of these rows, ``[B, n, h, w]`` bool."""
        some, *within, wanted = (g.slice_at(x, 1, start, stop) for x in (coefficients, *inside, valid))
        sums = g.op("Reshape", g.op("MatMul", some, flat), g.concat([g.const([0, 0], np.int64), tall_wide], 0))
        within[0] = g.op("And", within[0], g.unsqueeze(g.unsqueeze(wanted, 2), 3))
        return g.op("And", g.op("Greater", sums, g.floats(0.0)), g.op("And", *within))

    def blank(count: Tensor) -> Tensor:
        """This number of empty masks, ``[B, count, h, w]`` bool."""
        return g.op("Expand", g.const(False, np.bool_), g.concat([g.slice(size, 0, 0, 1), count, tall_wide], 0))

    most = g.reduce("ReduceMax", g.reduce("ReduceSum", g.cast(valid, INT32), 1), 0)
    if adaptive:
        used = g.reshape(g.cast(most, INT64), 1)
        return g.concat([made(g.const([0], np.int64), used), blank(g.op("Sub", g.const([rows], np.int64), used))], 1)
    parts = []
    for start in range(0, rows, ROWS):
        ends = [g.const([end], np.int64) for end in (start, min(start + ROWS, rows))]
        count = g.const([min(ROWS, rows - start)], np.int64)
        if not branches:
            parts.append(made(*ends))
            continue
        in_use = g.op("Greater", most, g.ints(start))
        parts.append(g.if_else(in_use, partial(made, *ends), partial(blank, count), np.bool_))
    return g.concat(parts, 1) if len(parts) > 1 else parts[0]


def _within(
    g: Graph, image: ImageInput, boxes: Tensor, size: Tensor, sides: tuple[int, ...] | None, axis: int
) -> Tensor:
    """Whether the low edge of each row (``axis`` 0) or column (1) of the prototypes is in the boxes: ``[B, K, h, 1]`` or
    ``[B, K, 1, w]`` bool."""
    low = 1 - axis  # y is the second coordinate
    shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
    if sides is None:
        count = g.op("Gather", size, g.const(2 + axis, np.int64), axis=0)
        along = g.cast(g.op("Range", g.const(0, np.int64), count, g.const(1, np.int64)), FLOAT)
        pixel = g.op("Div", g.op("Gather", _sides(g, image, 2), g.ints(low), axis=0), g.cast(count, FLOAT))
        edges: Tensor = g.reshape(g.op("Mul", along, pixel), *shape)
    else:
        pixels = (image.height, image.width)[axis] / sides[axis]
        edges = g.const((np.arange(sides[axis]) * pixels).reshape(shape), np.float32)
    start, stop = (g.unsqueeze(g.slice(boxes, 2, i, i + 1), 3) for i in (low, low + 2))  # [B, K, 1, 1]
    return g.op("And", g.op("Not", g.op("Less", edges, start)), g.op("Less", edges, stop))


def _oriented(g: Graph, layout: Layout, image: ImageInput, terms: Tensor, index: Tensor, angle: Tensor) -> Tensor:
    """Decode oriented boxes ``[B, k, 5]`` from their terms and the angle channel. Source of rotated distances: Ultralytics, dist2rbox."""
    assert layout.angle is not None
    if layout.angle.sigmoid:
        angle = g.op("Mul", g.op("Sub", g.op("Sigmoid", angle), g.floats(0.25)), g.floats(np.pi))
    decode = layout.decode
    if isinstance(decode, Decoded):
        return g.concat([terms, angle], 2)
    assert isinstance(decode, Distances)
    cell, stride, _ = _locate(g, decode, image, index)
    distance = _distances(g, decode, terms)
    low, high = g.slice(distance, 2, 0, 2), g.slice(distance, 2, 2, 4)
    shift = g.op("Mul", g.op("Sub", high, low), g.floats(0.5))
    x, y = g.slice(shift, 2, 0, 1), g.slice(shift, 2, 1, 2)
    sine, cosine = g.op("Sin", angle), g.op("Cos", angle)
    turned = g.concat(
        [
            g.op("Sub", g.op("Mul", x, cosine), g.op("Mul", y, sine)),
            g.op("Add", g.op("Mul", x, sine), g.op("Mul", y, cosine)),
        ],
        2,
    )
    center = g.op("Add", turned, g.op("Add", cell, g.floats(decode.point)))
    return g.concat([g.op("Mul", g.concat([center, g.op("Add", low, high)], 2), stride), angle], 2)


def _distances(g: Graph, decode: Distances, terms: Tensor) -> Tensor:
    """The four distances ``[B, k, 4]``, in units of the stride."""
    if decode.bins == 1:
        return terms
    spread = g.op("Softmax", g.reshape(terms, 0, 0, 4, decode.bins), axis=3)
    bins = g.const(decode.bin_values, np.float32)  # no MatMul: TensorRT-RTX has none in float32 for Turing
    return g.reduce("ReduceSum", g.op("Mul", spread, bins), 3)


def _around(g: Graph, decode: Distances, cell: Tensor, distance: Tensor, stride: Tensor) -> Tensor:
    """Convert distances from a point of the cell to corners."""
    if decode.pixels:
        center = _points(g, cell, decode.point, stride)
    else:
        center = g.op("Add", cell, g.floats(decode.point)) if decode.point else cell
    low = g.op("Sub", center, g.slice(distance, 2, 0, 2))
    high = g.op("Add", center, g.slice(distance, 2, 2, 4))
    corners = g.concat([low, high], 2)
    return corners if decode.pixels else g.op("Mul", corners, stride)


def _points(g: Graph, cell: Tensor, point: float, stride: Tensor) -> Tensor:
    """The point of each cell, in pixels."""
    return g.op("Mul", g.op("Add", cell, g.floats(point)) if point else cell, stride)


def _corners(g: Graph, boxes: Tensor) -> Tensor:
    """Convert center and size to corners."""
    center, half = g.slice(boxes, 2, 0, 2), g.op("Mul", g.slice(boxes, 2, 2, 4), g.floats(0.5))
    return g.concat([g.op("Sub", center, half), g.op("Add", center, half)], 2)


def _sides(g: Graph, image: ImageInput, count: int) -> Tensor:
    """Width and height of the input in pixels, repeated to ``[count]`` float32."""
    if not image.dynamic_size:
        return g.const(np.resize([image.width, image.height], count), np.float32)
    shape = g.cast(g.op("Shape", g.tensor(image.tensor)), FLOAT)
    return g.op("Gather", shape, g.const(np.resize([3, 2], count), np.int32), axis=0)


def _locate(g: Graph, decode: Gridded, image: ImageInput, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Locate each candidate on the grid, in the order that `fusenms.layout` defines.

    Returns:
        cell ``[B, k, 2]`` float32 (column, row); stride ``[B, k, 1]`` float32; slot ``[B, k]`` int32, the anchor counted through the
        levels.
    """
    anchors = anchors_per_cell(decode)
    columns, cells = _level_sizes(g, decode.strides, image)
    level: Tensor | None = None
    start: Tensor = g.ints(0)
    starts = [start]
    for i in range(1, len(decode.strides)):
        count = g.op("Gather", cells, g.ints(i - 1), axis=0)
        several = anchors[i - 1]
        start = g.op("Add", start, g.op("Mul", count, g.ints(several)) if several > 1 else count)
        starts.append(start)
        reached = g.cast(g.op("Not", g.op("Less", index, start)), INT32)
        level = reached if level is None else g.op("Add", level, reached)
    if level is None:
        level = g.op("Sub", index, index)
    first = g.op("Gather", g.concat([g.reshape(s, 1) for s in starts], 0), level, axis=0)
    local = g.op("Sub", index, first)
    slot = level
    if max(anchors) > 1:
        if has_anchors_last(decode):
            each = g.op("Gather", g.const(anchors, np.int32), level, axis=0)
            local, anchor = _divided(g, local, each)
        else:
            anchor, local = _divided(g, local, g.op("Gather", cells, level, axis=0))
        before = g.const(np.cumsum([0, *anchors[:-1]]), np.int32)
        slot = g.op("Add", g.op("Gather", before, level, axis=0), anchor)
    row, column = _divided(g, local, g.op("Gather", columns, level, axis=0))
    cell = g.concat([g.unsqueeze(g.cast(x, FLOAT), 2) for x in (column, row)], 2)
    stride = g.op("Gather", g.const(decode.strides, np.float32), level, axis=0)
    return cell, g.unsqueeze(stride, 2), slot


def _divided(g: Graph, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and rest of a division of int32, neither of them negative."""
    quotient = g.op("Div", a, b)
    return quotient, g.op("Sub", a, g.op("Mul", quotient, b))


def _level_sizes(g: Graph, strides: tuple[int, ...], image: ImageInput) -> tuple[Tensor, Tensor]:
    """Number of columns and of cells of each level, ``[levels]`` int32: constants, or computed from a dynamic image size."""
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
