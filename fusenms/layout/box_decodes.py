"""Box decodes: how the box terms of a head become boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from fusenms.errors import ConfigError
from fusenms.layout.taps import MOST_CHANNELS, is_finite, named

LARGEST_STRIDE = 2**16
"""Pixels."""
MOST_ANCHORS = 4096
"""Limit on the candidates of a cell."""


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
    """Distances from a point of the cell to left, top, right and bottom, in units of the stride or, with ``pixels``, in pixels.

    Each distance is a distribution over ``bins`` values, in ``4 * bins`` adjacent channels. With one bin, the channel is the distance.
    ``point`` is the origin within the cell: 0.5 is its center, 0 its low corner (NanoDet-Plus). The bins have the values 0, 1, 2, …
    unless ``values`` gives others, as in quantized weights. A cell has ``anchors`` candidates, all from the same point (SCRFD has 2); with
    ``anchors_last``, those of a cell lie side by side.
    Sources: Tian et al., "FCOS", 2019; Li et al., "Generalized Focal Loss", 2020.
    """

    kind: ClassVar[str] = "distances"
    strides: tuple[int, ...]
    bins: int
    point: float = 0.5
    values: tuple[float, ...] = ()
    pixels: bool = False
    anchors: int = 1
    anchors_last: bool = False

    def __post_init__(self) -> None:
        _check_strides(self.strides)
        _check_anchors((self.anchors,), 1)
        _check_flags(self, "pixels", "anchors_last")
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
        _check_sizes(self.anchors, len(self.strides), "the same number of")


@dataclass(frozen=True)
class AnchorDeltas:
    """Deltas to anchor boxes: center = t * v0 * anchor + (cell + point) * stride; size = exp(t * v1) * anchor, with ``variances`` (v0, v1).

    ``anchors[level]`` lists (width, height) in pixels; their number may differ between levels. With ``anchors_last``, the anchors of a cell
    lie side by side. With ``y_first``, the channels are y, x, height, width (EfficientDet). A t * v1 above ``log_limit`` counts as that
    (RetinaNet); None: no limit.
    Sources: Ren et al., "Faster R-CNN", 2015; variances: Liu et al., "SSD", 2016; Lin et al., "RetinaNet", 2017.
    """

    kind: ClassVar[str] = "anchor_deltas"
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    point: float = 0.5
    variances: tuple[float, float] = (1.0, 1.0)
    anchors_last: bool = True
    y_first: bool = False
    log_limit: float | None = None

    def __post_init__(self) -> None:
        _check_strides(self.strides)
        _check_sizes(self.anchors, len(self.strides), "some")
        _check_flags(self, "anchors_last", "y_first")
        if not is_finite(self.point):
            raise ConfigError(f"point is {self.point!r}; expected a finite number")
        if not is_pair(self.variances) or not all(
            is_finite(value) and np.float32(value) > 0 for value in self.variances
        ):
            raise ConfigError(f"variances is {self.variances!r}; expected two finite numbers above 0")
        if self.log_limit is not None and not is_finite(self.log_limit):
            raise ConfigError(f"log_limit is {self.log_limit!r}; expected a finite number or None")


@dataclass(frozen=True)
class PointOffsets:
    """Offsets to a point of the cell: center = t + (cell + point) * stride; size = t, all in pixels.

    ``anchors[level]`` is the number of candidates of a cell. With ``anchors_last``, they lie side by side.
    Source: Bazarevsky et al., "BlazeFace", 2019.
    """

    kind: ClassVar[str] = "point_offsets"
    strides: tuple[int, ...]
    anchors: tuple[int, ...]
    point: float = 0.5
    anchors_last: bool = True

    def __post_init__(self) -> None:
        _check_strides(self.strides)
        _check_anchors(self.anchors, len(self.strides))
        _check_flags(self, "anchors_last")
        if not is_finite(self.point):
            raise ConfigError(f"point is {self.point!r}; expected a finite number")


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


Gridded = Distances | AnchorBoxes | AnchorDeltas | PointOffsets | GridOffsets | TanhOffsets
"""Boxes relative to the cells of the levels."""
BoxDecode = Decoded | Gridded
BOX_DECODES: tuple[type[BoxDecode], ...] = (
    Decoded, Distances, AnchorBoxes, AnchorDeltas, PointOffsets, GridOffsets, TanhOffsets,
)  # fmt: skip


def anchors_per_cell(decode: Gridded) -> tuple[int, ...]:
    """Number of candidates of a cell, for each level."""
    if isinstance(decode, (AnchorBoxes, AnchorDeltas)):
        return tuple(map(len, decode.anchors))
    if isinstance(decode, PointOffsets):
        return decode.anchors
    return (decode.anchors if isinstance(decode, Distances) else 1,) * len(decode.strides)


def candidates_per_level(decode: Gridded, height: int, width: int) -> tuple[int, ...]:
    """Number of candidates of each level, for an input of this size in pixels."""
    return tuple(
        anchors * cells_along(height, stride) * cells_along(width, stride)
        for anchors, stride in zip(anchors_per_cell(decode), decode.strides, strict=True)
    )


def turned_around(decode: Gridded) -> Gridded:
    """Return the same decode with its levels in reverse order."""
    if isinstance(decode, AnchorBoxes):
        return replace(decode, strides=decode.strides[::-1], anchors=decode.anchors[::-1])
    if isinstance(decode, AnchorDeltas):
        return replace(decode, strides=decode.strides[::-1], anchors=decode.anchors[::-1])
    if isinstance(decode, PointOffsets):
        return replace(decode, strides=decode.strides[::-1], anchors=decode.anchors[::-1])
    return replace(decode, strides=decode.strides[::-1])


def has_anchors_last(decode: Gridded) -> bool:
    """Whether the candidates of a cell lie side by side, instead of all cells of an anchor."""
    return isinstance(decode, (Distances, AnchorDeltas, PointOffsets)) and decode.anchors_last


def _check_strides(strides: Any) -> None:
    whole = isinstance(strides, tuple) and all(type(stride) is int for stride in strides)
    if not whole or not strides or not all(1 <= stride <= LARGEST_STRIDE for stride in strides):
        raise ConfigError(
            f"strides is {strides!r}; expected whole numbers of pixels from 1 to {LARGEST_STRIDE}, one for each level"
        )


def _check_sizes(anchors: Any, levels: int, number: str) -> None:
    """Anchor boxes: for each level a tuple of (width, height), ``number`` of them in words."""
    good = isinstance(anchors, tuple) and len(anchors) == levels
    good = good and all(isinstance(level, tuple) and level and all(map(is_pair, level)) for level in anchors)
    if not good or (number != "some" and len(set(map(len, anchors))) > 1):
        raise ConfigError(f"anchors is {anchors!r}; expected for each of {levels} strides {number} (width, height)")
    if not all(is_finite(side) and np.float32(side) > 0 for level in anchors for pair in level for side in pair):
        raise ConfigError(f"anchors is {anchors!r}; expected each width and height finite and above 0, in pixels")


def _check_anchors(anchors: Any, levels: int) -> None:
    """Numbers of anchors, one for each level."""
    whole = isinstance(anchors, tuple) and all(type(count) is int for count in anchors)
    if not whole or len(anchors) != levels or not all(1 <= count <= MOST_ANCHORS for count in anchors):
        raise ConfigError(
            f"anchors is {anchors!r}; expected {levels} whole numbers from 1 to {MOST_ANCHORS}, one for each level"
        )


def _check_flags(decode: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(decode, name), bool):
            raise ConfigError(f"{name} is {getattr(decode, name)!r}; expected True or False")


def is_pair(value: Any) -> bool:
    """Whether a value is a tuple of two numbers."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, (int, float)) for side in value)
