"""`Frames` and `Tiles`: what a model that takes frames is given, and what it cuts out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CHANNELS = ("rgb", "bgr", "nv12")
"""Forms of a frame: two orders of its colors, or brightness and colors apart, as video decoders give them."""
NV12 = "nv12"
MOST_TILES = 1024
"""A limit on files of unknown origin; memory ends before it."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of a frame, which the network sees as images of one batch: ``rows`` x ``columns`` of one size, that overlap.

    The tile's height is that of the frame divided by ``1 + (rows - 1) * (1 - overlap)``, rounded up, and its width alike. The first tile
    begins and the last one ends with the frame; those between are spread evenly.

    Attributes:
        rows, columns: number of tiles.
        overlap: share of a tile that the next one covers too, from 0 to below 1.
        whole: whether the whole frame is seen too, after the tiles. Objects larger than a tile are then found.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from fusenms import Tiles
        >>> tiles = Tiles(2, 3, whole=True)
        >>> print(tiles, "·", tiles.count)
        2x3 tiles that overlap by 0.2, and the whole frame · 7
    """

    rows: int
    columns: int
    overlap: float = 0.2
    whole: bool = False

    def __post_init__(self) -> None:
        if not all(type(number) is int and 1 <= number <= MOST_TILES for number in (self.rows, self.columns)):
            raise ValueError(f"tiles are {self.rows!r} x {self.columns!r}; expected whole numbers of rows and columns")
        if not 2 <= self.rows * self.columns <= MOST_TILES:
            raise ValueError(f"tiles are {self.rows} x {self.columns}; expected 2 to {MOST_TILES} in all")
        if type(self.overlap) not in (int, float) or not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap!r}; expected a number from 0 to below 1")
        if type(self.whole) is not bool:
            raise ValueError(f"whole is {self.whole!r}; expected True or False")

    @property
    def count(self) -> int:
        """Number of images that are made of a frame."""
        return self.rows * self.columns + self.whole

    def __str__(self) -> str:
        size = f"{self.rows}x{self.columns} tiles that overlap by {self.overlap:g}"
        return f"{size}, and the whole frame" if self.whole else size


@dataclass(frozen=True)
class Frames:
    """The input of a model that takes frames: uint8 ``[B, height, width, 3]``, letterboxed or stretched inside.

    NV12 frames are ``[B, height * 3 / 2, width]``: a row of brightness for each row of pixels, then a row for each two, with a pair of
    colors (U, V) for each two by two pixels. Their sides are even.

    Attributes:
        height, width: size of every frame in pixels; None for both: any size, one for all frames of a batch.
        channels: order of the colors of a frame, rgb or bgr; or nv12.
        tensor: name of the input.
        tiles: what is cut out of each frame, instead of the whole; None: nothing.
    """

    height: int | None = None
    width: int | None = None
    channels: str = "rgb"
    tensor: str = "frames"
    tiles: Tiles | None = None

    def __post_init__(self) -> None:
        sides = (self.height, self.width)
        if sides != (None, None) and not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(
                f"frames are of {self.height!r} x {self.width!r}; expected positive numbers of pixels, or None twice"
            )
        if self.channels not in CHANNELS:
            raise ValueError(f"channels is {self.channels!r}; expected one of {', '.join(map(repr, CHANNELS))}")
        if self.channels == NV12 and any(side is not None and side % 2 for side in sides):
            raise ValueError(f"frames are of {self.height} x {self.width}; expected even sides of NV12 frames")
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"tensor is {self.tensor!r}; expected a name")
        if self.tiles is not None and not isinstance(self.tiles, Tiles):
            raise ValueError(f"tiles is {self.tiles!r}; expected Tiles, or None")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None: any."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def shape(self, height: Any, width: Any) -> tuple[Any, ...]:
        """Shape of a frame of a size. A name for the height of NV12 frames is the name of its rows of both kinds."""
        if self.channels != NV12:
            return (height, width, 3)
        return (height * 3 // 2 if isinstance(height, int) else height, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Frames that are not cut have no entry for tiles, as in files written before there were any."""
        values = asdict(self)
        if self.tiles is None:
            del values["tiles"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Frames:
        """Build from plain values.

        Raises:
            TypeError, ValueError: the values do not fit.
        """
        tiles = _mapping(values).get("tiles")
        return cls(**{**values, "tiles": None if tiles is None else Tiles(**_mapping(tiles))})

    def __str__(self) -> str:
        size = "any size" if self.size is None else f"{self.height}x{self.width}"
        cut = "" if self.tiles is None else f", cut into {self.tiles}"
        return f"{self.channels.upper()} frames of {size}{cut}"


def _mapping(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"found a {type(values).__name__}; expected a mapping")
    return values
