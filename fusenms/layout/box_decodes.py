"""Box decodes: how the box terms of a head become boxes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from fusenms.errors import ConfigError
from fusenms.layout.taps import MOST_CHANNELS, is_finite, named

LARGEST_STRIDE = 2**16
"""Pixels."""


class BoxFormat(str, Enum):
    """Box format: corners, or center and size."""

    XYXY = "xyxy"
    CXCYWH = "cxcywh"


def cells_along(side: int, stride: int) -> int:
    """Number of cells of one level along a side of the input (both in pixels). The last cell may extend past the edge."""
    return -(-side // stride)


@dataclass(frozen=True)
class Decoded:
    """The four box channels are decoded boxes, in pixels of the model's input or ``normalized`` to its size."""

    kind: ClassVar[str] = "decoded"
    format: BoxFormat
    normalized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, BoxFormat):
            raise ConfigError(f"format is {self.format!r}; expected one of fusenms.layout: {named(BoxFormat)}")


@dataclass(frozen=True)
class Distances:
    """Distances from a point of the cell to left, top, right and bottom, in units of the stride (one anchor per cell).

    Each distance is a distribution over ``bins`` values, in ``4 * bins`` adjacent channels. With one bin, the channel is the distance.
    ``point`` is the origin within the cell: 0.5 is its center, 0 its low corner (NanoDet-Plus). The bins have the values 0, 1, 2, …
    unless ``values`` gives others, as in quantized weights.
    Source: Li et al., "Generalized Focal Loss", 2020.
    """

    kind: ClassVar[str] = "distances"
    strides: tuple[int, ...]
    bins: int
    point: float = 0.5
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_strides(self.strides)
        if type(self.bins) is not int or not 1 <= self.bins <= MOST_CHANNELS // 4:
            raise ConfigError(f"bins is {self.bins!r}; expected a whole number from 1 to {MOST_CHANNELS // 4}")
        if not is_finite(self.point):
            raise ConfigError(f"point is {self.point!r}; expected a finite number")
        if not isinstance(self.values, tuple) or not all(map(is_finite, self.values)):
            raise ConfigError(f"values is {self.values!r}; expected finite numbers, one for each bin")
        if self.values and len(self.values) != self.bins:
            raise ConfigError(
                f"values are {len(self.values)} numbers; expected one for each of {self.bins} bins, or none"
            )

    @property
    def bin_values(self) -> tuple[float, ...]:
        """Value of each bin."""
        return self.values or tuple(map(float, range(self.bins)))


@dataclass(frozen=True)
class AnchorBoxes:
    """Offsets to anchor boxes: center = (2 sigmoid(t) - 0.5 + cell) * stride; size = (2 sigmoid(t))^2 * anchor.

    ``anchors[level]`` lists (width, height) in pixels. Source: YOLOv5, release 6.
    """

    kind: ClassVar[str] = "anchor_boxes"
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]

    def __post_init__(self) -> None:
        _check_strides(self.strides)
        levels = self.anchors if isinstance(self.anchors, tuple) else ()
        sides = [
            side for level in levels if isinstance(level, tuple) for pair in level if _is_pair(pair) for side in pair
        ]
        count = len(levels[0]) if levels and isinstance(levels[0], tuple) else 0
        if (
            not count
            or len(levels) != len(self.strides)
            or len(sides) != 2 * count * len(levels)
            or {len(level) if isinstance(level, tuple) else 0 for level in levels} != {count}
        ):
            raise ConfigError(
                f"anchors is {self.anchors!r}; expected for each of {len(self.strides)} strides the same number of (width, height)"
            )
        if not all(is_finite(side) and np.float32(side) > 0 for side in sides):
            raise ConfigError(
                f"anchors is {self.anchors!r}; expected each width and height finite and above 0, in pixels"
            )


@dataclass(frozen=True)
class GridOffsets:
    """Offsets to the cell: center = (t + cell) * stride; size = exp(t) * stride (one anchor per cell). Source: YOLOX, 2021."""

    kind: ClassVar[str] = "grid_offsets"
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_strides(self.strides)


@dataclass(frozen=True)
class TanhOffsets:
    """Center = (tanh(t) + cell) * stride; size = sigmoid(t) * size of the input (one anchor per cell). Source: FastestDet, 2022."""

    kind: ClassVar[str] = "tanh_offsets"
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_strides(self.strides)


BoxDecode = Decoded | Distances | AnchorBoxes | GridOffsets | TanhOffsets
Gridded = Distances | AnchorBoxes | GridOffsets | TanhOffsets
BOX_DECODES: tuple[type[BoxDecode], ...] = (Decoded, Distances, AnchorBoxes, GridOffsets, TanhOffsets)


def _check_strides(strides: Any) -> None:
    whole = isinstance(strides, tuple) and all(type(stride) is int for stride in strides)
    if not whole or not strides or not all(1 <= stride <= LARGEST_STRIDE for stride in strides):
        raise ConfigError(
            f"strides is {strides!r}; expected whole numbers of pixels from 1 to {LARGEST_STRIDE}, one for each level"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, (int, float)) for side in value)
