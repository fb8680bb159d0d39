"""Task outputs of a head: masks, keypoints, and the angle of oriented boxes."""

from __future__ import annotations

from dataclasses import dataclass

from fusenms.errors import ConfigError
from fusenms.layout.taps import Tap, check_tap, is_finite, is_name


@dataclass(frozen=True)
class MaskTerms:
    """Instance masks: the M ``coefficients`` of a candidate weight the M ``prototypes`` ``[B, M, h, w]`` of the image.

    The mask is where the weighted sum is above 0, inside the candidate's box. A pixel of the prototypes covers a rectangle of the input.
    Source: Bolya et al., "YOLACT", 2019.
    """

    coefficients: Tap
    prototypes: str

    def __post_init__(self) -> None:
        check_tap("coefficients", self.coefficients)
        if not is_name(self.prototypes):
            raise ConfigError(
                f"prototypes is {self.prototypes!r}; expected the name of a tensor [batch, M, height, width]"
            )


@dataclass(frozen=True)
class KeypointTerms:
    """Keypoints: the channels of ``values`` hold x, y and, with ``dims`` 3, the visibility of each point in turn.

    With a ``factor``: position = (factor * t + cell + point) * stride, with the cells of the layout's box decode; with ``pixels`` it is
    factor * t + (cell + point) * stride. The visibility is the sigmoid of its channel. Without a factor: positions are in pixels of the
    input, and the visibility is a probability.
    """

    values: Tap
    dims: int
    factor: float | None = None
    point: float = 0.0
    pixels: bool = False

    def __post_init__(self) -> None:
        check_tap("values", self.values)
        if type(self.dims) is not int or self.dims not in (2, 3) or self.values.channels % self.dims:
            raise ConfigError(
                f"keypoints of {self.dims!r} numbers in {self.values.channels} channels; expected 2 or 3 (x, y, visibility) each"
            )
        for name in ("factor", "point"):
            value = getattr(self, name)
            if not (name == "factor" and value is None) and not is_finite(value):
                raise ConfigError(f"{name} of keypoints is {value!r}; expected a finite number")
        if not isinstance(self.pixels, bool) or (self.pixels and self.factor is None):
            raise ConfigError(
                f"pixels of keypoints is {self.pixels!r}; expected True or False, and True only with a factor"
            )

    @property
    def count(self) -> int:
        """Number of keypoints."""
        return self.values.channels // self.dims


@dataclass(frozen=True)
class AngleTerm:
    """The angle of oriented boxes, one channel: in radians, from x to y; with ``sigmoid``, (sigmoid(t) - 1/4) * pi.

    With `Distances`, the distances are measured along the sides of the rotated box. `Decoded` boxes are its cx, cy, w, h.
    """

    value: Tap
    sigmoid: bool = False

    def __post_init__(self) -> None:
        check_tap("value", self.value, 1)
        if not isinstance(self.sigmoid, bool):
            raise ConfigError(f"sigmoid is {self.sigmoid!r}; expected True or False")
