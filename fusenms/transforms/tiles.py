"""Tiles of frames, in the graph: cut out, made into images of one batch, and where each of them lies in its frame.

The images of a batch are those of the first frame, row by row, then its whole if `Tiles.whole`, then those of the second. Sizes follow
`Tiles`. For one size of frames they are constants; for any size the graph computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusenms.artifacts.frames import Frames, Tiles
from fusenms.artifacts.raw import ImageInput
from fusenms.graph.builder import FLOAT, INT64, Graph, Tensor
from fusenms.transforms.letterboxing import Place, computed_place, fixed_place, sides_of, to_images

PLACES = "fusenms/tiles/places"
"""Name of the tensor ``[tiles, 4]`` float32 that maps a point of a tile's image to the frame: scale of x and y, then shift of x and y."""


Spans = list[tuple[Tensor, Tensor]]
"""Start and stop of each tile along a side, ``[1]`` int64 each."""


@dataclass(frozen=True)
class Cuts:
    """How frames are cut, as tensors.

    Attributes:
        size: height and width of a tile, ``[2]`` int64.
        rows, columns: their spans.
        corners: x and y of each tile's first pixel, ``[rows * columns, 2]`` float32.
        tile, whole: where a tile and the whole frame lie in the model's input.
    """

    size: Tensor
    rows: Spans
    columns: Spans
    corners: Tensor
    tile: Place
    whole: Place


def cuts(g: Graph, image: ImageInput, frames: Frames, given: Tensor) -> Cuts:
    """Emit what depends on the size of the frames ``given`` alone."""
    assert frames.tiles is not None
    return (
        _computed(g, image, frames.tiles, given) if frames.size is None else _fixed(g, image, frames.tiles, frames.size)
    )


def tile_images(g: Graph, image: ImageInput, frames: Frames, given: Tensor, made: Cuts) -> Tensor:
    """Emit the images of all tiles, ``[B * tiles, 3, height, width]`` float32."""
    assert frames.tiles is not None
    bands = [g.slice_at(given, 1, *span) for span in made.rows]
    cut = [g.unsqueeze(g.slice_at(band, 2, *span), 1) for band in bands for span in made.columns]
    shape = g.concat([g.const([-1], np.int64), made.size, g.const([3], np.int64)], 0)
    each = g.op("Reshape", g.concat(cut, 1), shape)
    tiles = to_images(g, image, frames.channels, each, made.tile)
    if not frames.tiles.whole:
        return tiles
    sides = 3, image.height, image.width
    whole = g.unsqueeze(to_images(g, image, frames.channels, given, made.whole), 1)
    return g.reshape(g.concat([g.reshape(tiles, -1, len(cut), *sides), whole], 1), -1, *sides)


def places(g: Graph, tiles: Tiles, made: Cuts) -> Tensor:
    """Emit `PLACES`."""
    parts = [_mapping(g, made.tile, made.corners, tiles.rows * tiles.columns)]
    if tiles.whole:
        parts.append(_mapping(g, made.whole, g.const([[0, 0]], np.float32), 1))
    return g.concat(parts, 0)


def _fixed(g: Graph, image: ImageInput, tiles: Tiles, size: tuple[int, int]) -> Cuts:
    (height, rows), (width, columns) = (
        _cut(side, count, tiles.overlap) for side, count in zip(size, (tiles.rows, tiles.columns), strict=True)
    )
    spans = [
        [(g.const([start], np.int64), g.const([start + length], np.int64)) for start in starts]
        for starts, length in ((rows, height), (columns, width))
    ]
    corners = g.const([(x, y) for y in rows for x in columns], np.float32)
    place = fixed_place(g, image, height, width), fixed_place(g, image, *size)
    return Cuts(g.const((height, width), np.int64), spans[0], spans[1], corners, *place)


def _cut(side: int, count: int, overlap: float) -> tuple[int, list[int]]:
    """Length of a tile along a side of a frame, and where each of ``count`` tiles starts."""
    length = int(np.ceil(side / (1 + (count - 1) * (1 - overlap))))
    return length, [i * (side - length) // max(1, count - 1) for i in range(count)]


def _computed(g: Graph, image: ImageInput, tiles: Tiles, given: Tensor) -> Cuts:
    counts, sides = (tiles.rows, tiles.columns), sides_of(g, given)
    share = g.const([1 + (count - 1) * (1 - tiles.overlap) for count in counts], np.float64)
    lengths = g.op("Ceil", g.op("Div", sides, share))
    size, left = g.cast(lengths, INT64), g.cast(g.op("Sub", sides, lengths), INT64)
    spans, starts = [], []
    for axis, count in enumerate(counts):
        length, rest = (g.slice(pair, 0, axis, axis + 1) for pair in (size, left))
        steps = g.op("Mul", g.const(np.arange(count), np.int64), rest)
        start = g.op("Div", steps, g.const([max(1, count - 1)], np.int64))
        each = [g.slice(start, 0, i, i + 1) for i in range(count)]
        spans.append([(one, g.op("Add", one, length)) for one in each])
        starts.append(g.reshape(g.cast(start, FLOAT), -1, 1))
    numbers = [g.const(index.ravel(), np.int64) for index in np.indices(counts)]
    corners = g.concat([g.op("Gather", starts[axis], numbers[axis], axis=0) for axis in (1, 0)], 1)
    return Cuts(size, spans[0], spans[1], corners, computed_place(g, image, lengths), computed_place(g, image, sides))


def _mapping(g: Graph, place: Place, corners: Tensor, count: int) -> Tensor:
    """Rows of `PLACES` for ``count`` images with the same place, whose tiles start at ``corners`` ``[count, 2]`` (x, y)."""
    scale = g.op("Div", g.floats(1, 1), place.gain)
    shift = g.op("Sub", corners, g.op("Mul", place.offset, scale))
    return g.concat([g.op("Mul", g.const(np.ones((count, 1)), np.float32), scale), shift], 1)
