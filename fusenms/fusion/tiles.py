"""Candidates of tiles: those of all tiles of a frame are those of one image, and lie in pixels of the frame.

The network sees tiles as images, so its head tensors are ``[B * tiles, …]``. `joined` makes them ``[B, …]`` with the candidates of a
frame's tiles one after the other. Candidate ``n`` of the frame is then candidate ``n % each`` of tile ``n // each``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusenms.graph.builder import Graph, Tensor
from fusenms.layout import Layout
from fusenms.transforms.tiles import PLACES

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TiledCandidates:
    """What tells where the candidates of a frame lie.

    Attributes:
        tiles: number of tiles of a frame.
        each: number of candidates of a tile.
    """

    tiles: int
    each: int

    def split(self, g: Graph, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Tile, and number in the tile, of candidates ``[B, n]`` int32."""
        each = g.ints(self.each)
        tile = g.op("Div", numbers, each)
        return tile, g.op("Sub", numbers, g.op("Mul", tile, each))

    def to_frame(self, g: Graph, boxes: Tensor, tile: Tensor, oriented: bool) -> Tensor:
        """Boxes ``[B, n, 4 or 5]`` in pixels of a tile's image to those of the frame; ``tile`` is ``[B, n]`` int32."""
        place = g.op("Gather", g.tensor(PLACES), tile, axis=0)
        scale, shift = g.slice(place, 2, 0, 2), g.slice(place, 2, 2, 4)
        if not oriented:
            return g.op("Add", g.op("Mul", boxes, g.concat([scale, scale], 2)), g.concat([shift, shift], 2))
        center = g.op("Add", g.op("Mul", g.slice(boxes, 2, 0, 2), scale), shift)
        return g.concat([center, g.op("Mul", g.slice(boxes, 2, 2, 4), scale), g.slice(boxes, 2, 4, 5)], 2)

    def points_to_frame(self, g: Graph, points: Tensor, tile: Tensor, dims: int) -> Tensor:
        """Keypoints ``[B, n, P, dims]`` in pixels of a tile's image to those of the frame."""
        place = g.unsqueeze(g.op("Gather", g.tensor(PLACES), tile, axis=0), 2)
        moved = g.op("Add", g.op("Mul", g.slice(points, 3, 0, 2), g.slice(place, 3, 0, 2)), g.slice(place, 3, 2, 4))
        return moved if dims == 2 else g.concat([moved, g.slice(points, 3, 2, dims)], 3)


def joined(
    g: Graph, layout: Layout, widths: Mapping[str, int], tiled: TiledCandidates
) -> tuple[Layout, dict[str, int]]:
    """Emit the head tensors with the candidates of all tiles of a frame; return layout and numbers of channels by their names."""
    g.add_input(PLACES, np.float32, (tiled.tiles, 4))
    names = {}
    for tap in layout.taps:
        if tap.tensor in names:
            continue
        name, width, head = f"fusenms/tiles/{tap.tensor}", widths[tap.tensor], g.tensor(tap.tensor)
        if tap.channel_axis == 1:
            split = g.op("Transpose", g.reshape(head, -1, tiled.tiles, width, tiled.each), perm=[0, 2, 1, 3])
            whole = g.reshape(split, 0, width, tiled.tiles * tiled.each)
        else:
            whole = g.reshape(head, -1, tiled.tiles * tiled.each, width)
        g.name(whole, name)
        names[tap.tensor] = name
    return layout.renamed(names), {names[old]: width for old, width in widths.items()}
