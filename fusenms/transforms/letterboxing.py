"""Images of frames, in the graph: letterboxed or stretched, in order, scaled to 0 to 1.

Sizes are those of `fusenms.runtime.placement`. For one size they are constants. For any size the graph computes them, in float64 and in
the same order, so that they are rounded alike; ONNX rounds halves to even, as Python does. Resize has the half-pixel centers of OpenCV's
``INTER_LINEAR`` and no antialiasing. It works in float32, because runtimes differ in how they round a resized uint8; Round follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.artifacts.frames import NV12, Frames
from fusenms.artifacts.raw import ImageInput
from fusenms.graph.builder import DOUBLE, FLOAT, INT64, Graph, Tensor

GREY, FULL = 114, 255
"""Color around a letterboxed frame, and the highest value of a color."""
LIGHT, RED, GREEN, BLUE = 1.164, 1.596, (-0.391, -0.813), 2.018
"""Factors of BT.601: of brightness; of V for red; of U and V for green; of U for blue."""


@dataclass(frozen=True)
class Place:
    """Where frames lie in the model's input, as tensors. None: nothing to do.

    Attributes:
        inner: height and width of the scaled frame, ``[2]`` int64.
        pads: rows above, columns left, rows below, columns right, ``[2]`` int64 each pair.
        offset, gain: of x and y, ``[2]`` float32.
        limit: width and height of the frame, ``[2]`` float32.
    """

    inner: Tensor | None
    pads: tuple[Tensor, Tensor] | None
    offset: Tensor
    gain: Tensor
    limit: Tensor


def in_colors(g: Graph, frames: Frames, given: Tensor) -> Tensor:
    """Emit frames ``[B, height, width, 3]``: as they are given, or of NV12 in whole colors, float32.

    NV12 is converted as OpenCV's ``COLOR_YUV2RGB_NV12`` does: by BT.601, with brightness from 16 on, and each pair of colors for two by
    two pixels.
    """
    if frames.channels != NV12:
        return given
    rows = g.slice(g.op("Shape", given), 0, 1, 2)
    end = (
        g.const([frames.height], np.int64)
        if frames.height
        else g.op("Sub", rows, g.op("Div", rows, g.const([3], np.int64)))
    )
    light = g.cast(g.slice_at(given, 1, g.const([0], np.int64), end), FLOAT)
    pairs = g.reshape(g.cast(g.slice_at(given, 1, end, rows), FLOAT), 0, 0, -1, 2)
    none: Any = None if g.opset >= 13 else g.const([], np.float32)
    each = g.op(
        "Resize", pairs, none, g.const([1, 2, 2, 1], np.float32), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    blue, red = (g.op("Sub", g.slice(each, 3, i, i + 1), g.floats(128)) for i in (0, 1))
    lit = g.op("Mul", g.op("Max", g.op("Sub", g.unsqueeze(light, 3), g.floats(16)), g.floats(0)), g.floats(LIGHT))
    green = g.op("Add", g.op("Mul", blue, g.floats(GREEN[0])), g.op("Mul", red, g.floats(GREEN[1])))
    colors = [g.op("Mul", red, g.floats(RED)), green, g.op("Mul", blue, g.floats(BLUE))]
    whole = g.op("Round", g.op("Add", lit, g.concat(colors, 3)))
    return g.op("Min", g.op("Max", whole, g.floats(0)), g.floats(FULL))


def fixed_place(g: Graph, image: ImageInput, height: int, width: int) -> Place:
    """The place of frames of one size."""
    ratios = image.height / height, image.width / width
    target = np.array((image.height, image.width))
    scaled = np.array([max(1, round(side * min(ratios))) for side in (height, width)])
    inner = target if image.stretch else scaled
    start = np.array(
        [round((whole - part) / 2 - 0.1) for whole, part in zip(target.tolist(), inner.tolist(), strict=True)]
    )
    end = target - inner - start
    return Place(
        None if tuple(inner) == (height, width) else g.const(inner, np.int64),
        (g.const(start, np.int64), g.const(end, np.int64)) if start.any() or end.any() else None,
        g.const(start[::-1], np.float32),
        g.const((inner / (height, width))[::-1], np.float32),
        g.const((width, height), np.float32),
    )


def computed_place(g: Graph, image: ImageInput, sides: Tensor) -> Place:
    """The place of frames of any size: height and width are ``sides`` ``[2]`` float64."""

    def number(*values: float) -> Tensor:
        return g.const(values, np.float64)

    def x_first(pair: Tensor) -> Tensor:
        return g.cast(g.op("Gather", pair, g.const([1, 0], np.int64), axis=0), FLOAT)

    target = number(image.height, image.width)
    if image.stretch:
        return Place(g.cast(target, INT64), None, g.floats(0, 0), x_first(g.op("Div", target, sides)), x_first(sides))
    gain = g.reduce("ReduceMin", g.op("Div", target, sides), 0, keepdims=True)
    inner = g.op("Max", g.op("Round", g.op("Mul", sides, gain)), number(1))
    left_over = g.op("Sub", target, inner)
    start = g.op("Round", g.op("Sub", g.op("Mul", left_over, number(0.5)), number(0.1)))
    pads = g.cast(start, INT64), g.cast(g.op("Sub", left_over, start), INT64)
    return Place(g.cast(inner, INT64), pads, x_first(start), x_first(g.op("Div", inner, sides)), x_first(sides))


def sides_of(g: Graph, frames: Tensor) -> Tensor:
    """Height and width of frames ``[B, height, width, 3]``, ``[2]`` float64."""
    return g.cast(g.slice(g.op("Shape", frames), 0, 1, 3), DOUBLE)


def to_images(g: Graph, image: ImageInput, channels: str, given: Tensor, place: Place) -> Tensor:
    """Emit images ``[B, 3, height, width]`` float32, RGB, 0 to 1, from frames whose colors are in the order of ``channels``."""
    value: Tensor = g.cast(given, FLOAT)
    if place.inner is not None:
        batch = g.slice(g.op("Shape", given), 0, 0, 1)
        sizes = g.concat([batch, place.inner, g.const([3], np.int64)], 0)
        value = g.op("Round", _resize(g, value, sizes))
    value = g.op("Transpose", value, perm=[0, 3, 1, 2])
    if channels == "bgr":
        value = g.op("Gather", value, g.const([2, 1, 0], np.int64), axis=1)
    if place.pads is not None:
        none = g.const([0, 0], np.int64)
        start, end = place.pads
        value = g.op("Pad", value, g.concat([none, start, none, end], 0), g.const(GREY, np.float32), mode="constant")
    whole = g.reshape(value, 0, 3, image.height, image.width)  # the network's shapes stay known
    return g.op("Div", whole, g.floats(FULL))


def _resize(g: Graph, value: Tensor, sizes: Tensor) -> Tensor:
    """Resize ``[B, height, width, 3]``. Before opset 13, a node that has sizes has empty inputs before them."""
    none: Any = None if g.opset >= 13 else g.const([], np.float32)
    return g.op("Resize", value, none, none, sizes, mode="linear", coordinate_transformation_mode="half_pixel")
