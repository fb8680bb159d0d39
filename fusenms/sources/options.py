"""`LoadOptions`: all options for reading weights."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.errors import ConfigError
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits

DYNAMIC = "dynamic"
"""Value of `LoadOptions.batch`: the batch must be dynamic."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for reading weights, checked on construction.

    Attributes:
        size: input size in pixels, one side or (height, width); None: the size that the weights state, or 640.
        dynamic_size: make height and width dynamic.
        opset: ONNX operator set of an export; None: 17.
        batch: number of images in a run of the fused model: ``dynamic``, or a fixed number, for engines and NPUs with static shapes; None:
            dynamic. The frozen batch of an `.onnx` is made dynamic if a check shows that this is safe, and otherwise stays as it is.
        make_dynamic: deprecated; the same as ``dynamic`` for ``batch``.
        one_to_many: use the head that needs suppression, of a checkpoint with two heads (YOLOv10, YOLO26).
        pixels: pixel values that the network expects, a name of `fusenms.artifacts.preprocessing.PIXELS` or a `Pixels`; None: as the
            weights state, or as usual for the family. The fused model always takes RGB from 0 to 1.
        stretch: stretch images to the input size instead of letterboxing them; None: as the weights state, or as usual for the family.
        ignore: names of outputs of an `.onnx` that mean nothing for its detections; they are left out.
        example: for an `nn.Module`: a batch of images ``[B, 3, height, width]`` at its input size.
        layout: for an `nn.Module`: the layout of the tensors that it returns; for a raw `.onnx` given to `fusenms.fuse`: that of its head,
            instead of recognizing it.
        class_names: for an `nn.Module`: its class names; empty: class0, class1, …
        limits: bounds on the cost of a file, and on each run of its graph.
        isolate: read a file in a child process with limits on memory and time.

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
    batch: int | str | None = None
    make_dynamic: bool = False
    one_to_many: bool = False
    pixels: str | Pixels | None = field(default=None, metadata={"choices": tuple(PIXELS)})
    stretch: bool | None = None
    ignore: Sequence[str] = ()
    example: Any = None
    layout: Layout | None = None
    class_names: Sequence[str] = ()
    limits: Limits = DEFAULT_LIMITS
    isolate: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.batch, numbers.Integral) and not isinstance(self.batch, bool) and self.batch > 0
        if self.batch is not None and self.batch != DYNAMIC and not whole:
            raise ConfigError(
                f"batch is {self.batch!r}; expected {DYNAMIC!r}, or a fixed number of images of at least 1"
            )
        if self.make_dynamic and self.batch not in (None, DYNAMIC):
            raise ConfigError(f"batch is {self.batch!r}, but make_dynamic is set; leave make_dynamic out")
        if isinstance(self.pixels, str) and self.pixels not in PIXELS:
            raise ConfigError(f"pixels is {self.pixels!r}; expected one of {', '.join(PIXELS)}, or a Pixels")
        if isinstance(self.ignore, str):
            raise ConfigError(f"ignore is {self.ignore!r}; expected a list of names of outputs")
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
    def asked_batch(self) -> int | str | None:
        """``batch``, with the deprecated ``make_dynamic``."""
        if self.make_dynamic:
            return DYNAMIC
        return self.batch if self.batch is None or isinstance(self.batch, str) else int(self.batch)

    @property
    def preprocessing(self) -> Pixels | None:
        """``pixels`` as a `Pixels`."""
        return PIXELS[self.pixels] if isinstance(self.pixels, str) else self.pixels

    @property
    def given(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [item.name for item in fields(self) if not _is_default(getattr(self, item.name), item.default)]


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return default is not None and tuple(value) == default
    return value is default or (isinstance(value, (bool, Limits)) and value == default)


class LoadFields(TypedDict, total=False):
    """The fields of `LoadOptions` as keywords."""

    size: int | tuple[int, int] | None
    dynamic_size: bool
    opset: int | None
    batch: int | str | None
    make_dynamic: bool
    one_to_many: bool
    pixels: str | Pixels | None
    stretch: bool | None
    ignore: Sequence[str]
    example: Any
    layout: Layout | None
    class_names: Sequence[str]
    limits: Limits
    isolate: bool
