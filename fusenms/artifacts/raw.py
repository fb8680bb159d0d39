"""`RawModel`: a detector as ONNX, up to its raw head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fusenms.artifacts.frames import Frames
from fusenms.artifacts.preprocessing import Pixels
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ImageInput:
    """The image input of a model: float32 ``[B, 3, height, width]``, RGB, 0 to 1.

    ``height`` and ``width`` are the default size. With ``dynamic_size``, other multiples of ``stride`` work too. ``independent`` is False
    if the images of a batch change each other's results (dynamic quantization, whose ranges span the batch). With ``stretch``, images are
    stretched to the size, not letterboxed. ``batch`` is the batch size of a model with a fixed batch; None: the batch is dynamic.
    With ``frames``, the input of the graph is frames, and ``tensor`` is computed from them.
    """

    tensor: str
    height: int
    width: int
    stride: int
    dynamic_size: bool = False
    independent: bool = True
    stretch: bool = False
    batch: int | None = None
    frames: Frames | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive number of pixels")
        if self.batch is not None and (type(self.batch) is not int or self.batch < 1):
            raise ValueError(f"batch is {self.batch!r}; expected a positive number of images, or None")
        if not isinstance(self.tensor, str) or not self.tensor:
            raise ValueError(f"tensor is {self.tensor!r}; expected a name")
        for name in ("dynamic_size", "independent", "stretch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.frames is not None and not isinstance(self.frames, Frames):
            raise ValueError(f"frames is {self.frames!r}; expected Frames, or None")

    def to_dict(self) -> dict[str, Any]:
        """Plain values. A model that takes no frames has no entry for them, as in files written before there were any."""
        values = asdict(self)
        del values["frames"]
        return values if self.frames is None else values | {"frames": self.frames.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageInput:
        """Build from plain values.

        Raises:
            TypeError, ValueError: the values do not fit.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"found a {type(values).__name__}; expected a mapping")
        frames = values.get("frames")
        return cls(**{**values, "frames": None if frames is None else Frames.from_dict(frames)})


@dataclass(frozen=True, kw_only=True)
class RawModel:
    """A detector as ONNX, up to its raw head, with a dynamic batch or with a ``frozen_batch``.

    `fusenms.transforms.dynamic_batch` opens a frozen batch, or fixes it if ``batch`` (`LoadOptions.batch`) is a number. ``layout`` is set
    if the source knows it (an export of fusenms, a module described by hand); otherwise `fusenms.recognize` finds it. ``limits`` apply to
    a graph of unknown origin. ``not_run`` names operators that nothing here runs (``domain::operator``). ``precision`` is that of the
    network, "fp32" or "fp16". ``notes`` are lines for the user about how the model was made. ``pixels`` and ``stretch`` describe the images
    that the network expects; None: the default of its family.
    """

    model: onnx.ModelProto
    image: ImageInput
    class_names: tuple[str, ...]
    task: str
    source: str
    layout: Layout | None = None
    notes: tuple[str, ...] = ()
    pixels: Pixels | None = None
    stretch: bool | None = None
    frozen_batch: int | None = None
    batch: int | str | None = None
    precision: str = "fp32"
    not_run: tuple[str, ...] = ()
    limits: Limits = field(default=DEFAULT_LIMITS, compare=False, repr=False)
