"""`LoadOptions`: everything that can be said about how weights are read."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.errors import ConfigError
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How weights are read, checked on construction.

    Attributes:
        size: input size in pixels, one side or (height, width); None: what the weights say, or 640.
        dynamic_size: leave height and width open.
        opset: ONNX operator set of an export; None: 17.
        make_dynamic: open the frozen batch of an `.onnx`, where that is shown to be safe.
        one_to_many: of a checkpoint with two heads (YOLOv10, YOLO26) take the one that needs suppression.
        pixels: what the network wants for pixels, a name of `fusenms.artifacts.preprocessing.PIXELS` or a `Pixels`; None: what the
            weights say, or what is usual in the family. The fused model takes RGB from 0 to 1 in any case.
        stretch: images are stretched to the model's size rather than letterboxed; None: as for ``pixels``.
        example: of an `nn.Module`: a batch of images ``[B, 3, height, width]`` of the size that it works at.
        layout: of an `nn.Module`: what it returns.
        class_names: of an `nn.Module`: its classes; empty: class0, class1, …
        limits: bounds on what a file may cost, and on each run of its graph.
        isolate: read a file in a child process, whose memory and time are limited too.

    Raises:
        ConfigError: a value is out of its range.

    Example:
        >>> from fusenms import LoadOptions
        >>> LoadOptions(size=(480, 640)).sides
        (480, 640)
    """

    size: int | tuple[int, int] | None = None
    dynamic_size: bool = False
    opset: int | None = None
    make_dynamic: bool = False
    one_to_many: bool = False
    pixels: str | Pixels | None = field(default=None, metadata={"choices": tuple(PIXELS)})
    stretch: bool | None = None
    example: Any = None
    layout: Layout | None = None
    class_names: Sequence[str] = ()
    limits: Limits = DEFAULT_LIMITS
    isolate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pixels, str) and self.pixels not in PIXELS:
            raise ConfigError(f"pixels is {self.pixels!r}; expected one of {', '.join(PIXELS)}, or a Pixels")
        most = self.limits.max_image_side
        if self.sides is not None and max(self.sides) > most:
            height, width = self.sides
            raise ConfigError(
                f"size is {height}x{width}; expected at most {most} a side, or a higher max_image_side in limits"
            )

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of ``size`` in pixels."""
        if self.size is None:
            return None
        sides = tuple(self.size) if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        whole = all(isinstance(s, numbers.Integral) and not isinstance(s, bool) and s > 0 for s in sides)
        if len(sides) != 2 or not whole:
            raise ConfigError(f"size is {self.size!r}; expected one side or (height, width), in pixels")
        return int(sides[0]), int(sides[1])

    @property
    def preprocessing(self) -> Pixels | None:
        """``pixels`` as a value."""
        return PIXELS[self.pixels] if isinstance(self.pixels, str) else self.pixels

    @property
    def given(self) -> list[str]:
        """Names of the options that are not their default."""
        return [item.name for item in fields(self) if not _is_default(getattr(self, item.name), item.default)]


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, tuple, list, Limits)) and value == default)


class LoadFields(TypedDict, total=False):
    """The fields of `LoadOptions` as keywords."""

    size: int | tuple[int, int] | None
    dynamic_size: bool
    opset: int | None
    make_dynamic: bool
    one_to_many: bool
    pixels: str | Pixels | None
    stretch: bool | None
    example: Any
    layout: Layout | None
    class_names: Sequence[str]
    limits: Limits
    isolate: bool
