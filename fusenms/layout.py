"""`Layout`: what the raw head of a detector means, as plain data.

A layout names the head's tensors at their earliest tap and says how scores and boxes come out of
them. It is written into every fused file, so a file can be verified without its source.

Candidates of a gridded head are numbered by level, then anchor, then row, then column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, ClassVar

from fusenms.errors import SourceError


class Activation(str, Enum):
    """How raw class scores (and objectness) become probabilities."""

    NONE = "none"
    SIGMOID = "sigmoid"


class BoxFormat(str, Enum):
    """Corners, or center and size; both in pixels of the model's input."""

    XYXY = "xyxy"
    CXCYWH = "cxcywh"


@dataclass(frozen=True)
class Tap:
    """A run of channels of a head tensor ``[B, C, N]`` (``channel_axis`` 1) or ``[B, N, C]`` (``channel_axis`` 2).

    ``tensor`` is its name in the graph; ``start`` and ``stop`` bound the channels.
    """

    tensor: str
    channel_axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert self.channel_axis in (1, 2) and 0 <= self.start < self.stop, self

    @property
    def channels(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Decoded:
    """The four box channels are finished boxes."""

    kind: ClassVar[str] = "decoded"
    format: BoxFormat


@dataclass(frozen=True)
class Distances:
    """Distances from the cell's center to left, top, right, bottom in units of the stride (one anchor per cell).

    Each distance is a distribution over ``bins`` integers: ``4 * bins`` channels, side by side; with one bin, the number itself.
    Source: Li et al., "Generalized Focal Loss", 2020.
    """

    kind: ClassVar[str] = "distances"
    strides: tuple[int, ...]
    bins: int


@dataclass(frozen=True)
class AnchorBoxes:
    """Offsets to anchor boxes: center = (2 sigmoid(t) - 0.5 + cell) * stride; size = (2 sigmoid(t))^2 * anchor.

    ``anchors[level]`` lists (width, height) in pixels. Source: YOLOv5, release 6.
    """

    kind: ClassVar[str] = "anchor_boxes"
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]


BoxDecode = Decoded | Distances | AnchorBoxes
BOX_DECODES: tuple[type[Decoded] | type[Distances] | type[AnchorBoxes], ...] = (Decoded, Distances, AnchorBoxes)


@dataclass(frozen=True)
class Join:
    """A head tensor that fusing makes out of several of the model's, one for each level, by reshaping and joining alone.

    With ``channel_axis`` 2 a part is ``[B, anchors, rows, columns, C]`` or ``[B, n, C]``; with 1
    ``[B, C, rows, columns]`` or ``[B, C, n]``.
    """

    tensor: str
    parts: tuple[str, ...]
    channel_axis: int
    channels: int

    def __post_init__(self) -> None:
        assert self.channel_axis in (1, 2) and self.parts, self

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """What each part is reshaped to: 0 keeps the batch, -1 is what is left."""
        return (0, -1, self.channels) if self.channel_axis == 2 else (0, self.channels, -1)


@dataclass(frozen=True)
class Layout:
    """The head of a detector.

    Attributes:
        family: name of the detector family.
        boxes: where the box terms stand.
        classes: where the class scores stand.
        objectness: where the objectness stands, where the head has one (a single channel).
        activation: how class scores and objectness become probabilities.
        decode: how box terms become boxes.
        suppress: false where the head gives each object once (end-to-end), so that nothing is suppressed and every class of a
            candidate counts, as the papers of such heads have it.
        joins: head tensors that the raw model has in parts; none in a fused model, which has them whole.
    """

    family: str
    boxes: Tap
    classes: Tap
    objectness: Tap | None
    activation: Activation
    decode: BoxDecode
    joins: tuple[Join, ...] = ()
    suppress: bool = True

    @property
    def num_classes(self) -> int:
        return self.classes.channels

    @property
    def decode_stage(self) -> str:
        """``late``: boxes are decoded for chosen candidates only. ``full``: the source decodes all of them."""
        return "full" if isinstance(self.decode, Decoded) else "late"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(tap for tap in (self.boxes, self.classes, self.objectness) if tap is not None)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the head's tensors, each once."""
        return tuple(dict.fromkeys(tap.tensor for tap in self.taps))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the raw model's tensors that the head consists of, parts in place of what is joined of them."""
        parts = {join.tensor: join.parts for join in self.joins}
        return tuple(name for tensor in self.tensors for name in parts.get(tensor, (tensor,)))

    def channel_axis(self, tensor: str) -> int:
        return next(tap.channel_axis for tap in self.taps if tap.tensor == tensor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` reads."""
        values = asdict(self)
        values["activation"] = self.activation.value
        if isinstance(self.decode, Decoded):
            values["decode"]["format"] = self.decode.format.value
        values["decode"]["kind"] = self.decode.kind
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Build from plain values, as `to_dict` gives them.

        Raises:
            SourceError: the values are no layout.
        """
        try:
            decode = dict(values["decode"])
            kind = next(k for k in BOX_DECODES if k.kind == decode["kind"])
            del decode["kind"]
            if kind is Decoded:
                decode["format"] = BoxFormat(decode["format"])
            else:
                decode = {key: _tuples(value) for key, value in decode.items()}
            return cls(
                family=values["family"],
                boxes=Tap(**values["boxes"]),
                classes=Tap(**values["classes"]),
                objectness=Tap(**values["objectness"]) if values["objectness"] else None,
                activation=Activation(values["activation"]),
                decode=kind(**decode),
                joins=tuple(Join(**join | {"parts": tuple(join["parts"])}) for join in values["joins"]),
                suppress=bool(values["suppress"]),
            )
        except (KeyError, TypeError, ValueError, StopIteration, AssertionError) as error:
            raise SourceError(
                f"the layout stored in the file is unreadable ({error!r}); export the model again"
            ) from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
