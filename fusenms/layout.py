"""`Layout`: what the raw head of a detector means, as plain data.

A layout names the earliest tensors of the head and says how scores and boxes are decoded from them. Every fused file stores its layout,
so a file can be verified without its source.

Candidates of a gridded head are numbered by level, then anchor, then row, then column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.contract import Output
from fusenms.errors import ConfigError, SourceError

MOST_CHANNELS = 2**24
"""Limit on the channels of one head tensor. float32 holds every integer up to this one."""
LARGEST_STRIDE = 2**16
"""Pixels."""
LARGEST = float(np.finfo(np.float32).max)
"""Limit on the magnitude of numbers that become constants of the graph."""


class Activation(str, Enum):
    """How raw class scores (and objectness) become probabilities."""

    NONE = "none"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class BoxFormat(str, Enum):
    """Box format: corners, or center and size."""

    XYXY = "xyxy"
    CXCYWH = "cxcywh"


def cells_along(side: int, stride: int) -> int:
    """Number of cells of one level along a side of the input (both in pixels). The last cell may extend past the edge."""
    return -(-side // stride)


def other_axis(axis: int) -> int:
    """Return the other axis of a head tensor ``[B, …, …]``: 2 for 1, and 1 for 2."""
    return 3 - axis


@dataclass(frozen=True)
class Tap:
    """A range of channels of a head tensor ``[B, C, N]`` (``channel_axis`` 1) or ``[B, N, C]`` (``channel_axis`` 2).

    ``tensor`` is the tensor's name in the graph. The channels run from ``start`` up to but not including ``stop``.
    """

    tensor: str
    channel_axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not _is_name(self.tensor):
            raise ConfigError(f"tap of {self.tensor!r}; expected the name of a tensor")
        whole = all(type(value) is int for value in (self.channel_axis, self.start, self.stop))
        if not whole or self.channel_axis not in (1, 2) or not 0 <= self.start < self.stop <= MOST_CHANNELS:
            raise ConfigError(
                f"tap of {self.tensor!r}: axis {self.channel_axis!r}, channels {self.start!r} to {self.stop!r}; expected axis 1 or 2, and "
                f"channels with 0 <= start < stop <= {MOST_CHANNELS}"
            )

    @property
    def channels(self) -> int:
        return self.stop - self.start

    @property
    def candidate_axis(self) -> int:
        """Axis of the candidates: the one that does not hold the channels."""
        return other_axis(self.channel_axis)


@dataclass(frozen=True)
class Decoded:
    """The four box channels are decoded boxes, in pixels of the model's input or ``normalized`` to its size."""

    kind: ClassVar[str] = "decoded"
    format: BoxFormat
    normalized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, BoxFormat):
            raise ConfigError(f"format is {self.format!r}; expected one of fusenms.layout: {_named(BoxFormat)}")


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
        if not _is_finite(self.point):
            raise ConfigError(f"point is {self.point!r}; expected a finite number")
        if not isinstance(self.values, tuple) or not all(map(_is_finite, self.values)):
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
        if not all(_is_finite(side) and np.float32(side) > 0 for side in sides):
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


@dataclass(frozen=True)
class MaskTerms:
    """Instance masks: the M ``coefficients`` of a candidate weight the M ``prototypes`` ``[B, M, h, w]`` of the image.

    The mask is where the weighted sum is above 0, inside the candidate's box. A pixel of the prototypes covers a rectangle of the input.
    Source: Bolya et al., "YOLACT", 2019.
    """

    coefficients: Tap
    prototypes: str

    def __post_init__(self) -> None:
        _check_tap("coefficients", self.coefficients)
        if not _is_name(self.prototypes):
            raise ConfigError(
                f"prototypes is {self.prototypes!r}; expected the name of a tensor [batch, M, height, width]"
            )


@dataclass(frozen=True)
class KeypointTerms:
    """Keypoints: the channels of ``values`` hold x, y and, with ``dims`` 3, the visibility of each point in turn.

    With a ``factor``: position = (factor * t + cell + point) * stride, with the cells of the layout's box decode; the visibility is the
    sigmoid of its channel. Without a factor: positions are in pixels of the input, and the visibility is a probability.
    """

    values: Tap
    dims: int
    factor: float | None = None
    point: float = 0.0

    def __post_init__(self) -> None:
        _check_tap("values", self.values)
        if type(self.dims) is not int or self.dims not in (2, 3) or self.values.channels % self.dims:
            raise ConfigError(
                f"keypoints of {self.dims!r} numbers in {self.values.channels} channels; expected 2 or 3 (x, y, visibility) each"
            )
        for name in ("factor", "point"):
            value = getattr(self, name)
            if not (name == "factor" and value is None) and not _is_finite(value):
                raise ConfigError(f"{name} of keypoints is {value!r}; expected a finite number")

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
        _check_tap("value", self.value, 1)
        if not isinstance(self.sigmoid, bool):
            raise ConfigError(f"sigmoid is {self.sigmoid!r}; expected True or False")


@dataclass(frozen=True)
class Join:
    """A head tensor that fusing builds from tensors of the model, usually one per level, only by reshaping and concatenating.

    With ``channel_axis`` 2, a part is ``[B, anchors, rows, columns, C]`` or ``[B, n, C]``; with 1, it is ``[B, C, rows, columns]`` or
    ``[B, C, n]``. Parts of another dtype are cast to float32.
    """

    tensor: str
    parts: tuple[str, ...]
    channel_axis: int
    channels: int

    def __post_init__(self) -> None:
        parts = isinstance(self.parts, tuple) and self.parts and all(map(_is_name, self.parts))
        if not _is_name(self.tensor) or not parts:
            raise ConfigError(
                f"join of {self.parts!r} into {self.tensor!r}; expected names of tensors, at least one part"
            )
        whole = type(self.channel_axis) is int and type(self.channels) is int
        if not whole or self.channel_axis not in (1, 2) or not 1 <= self.channels <= MOST_CHANNELS:
            raise ConfigError(
                f"join of {self.tensor!r}: axis {self.channel_axis!r}, {self.channels!r} channels; expected axis 1 or 2, and 1 to "
                f"{MOST_CHANNELS} channels"
            )

    @property
    def candidate_axis(self) -> int:
        """Axis of the candidates, along which the parts are concatenated."""
        return other_axis(self.channel_axis)

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """Shape that each part is reshaped to: 0 copies the batch, -1 is inferred."""
        return (0, -1, self.channels) if self.channel_axis == 2 else (0, self.channels, -1)


@dataclass(frozen=True)
class Layout:
    """The head of a detector.

    Attributes:
        family: name of the detector family.
        boxes: channels of the box terms.
        classes: channels of the class scores.
        objectness: channel of the objectness; None if the head has none.
        activation: how class scores and objectness become probabilities.
        decode: how box terms become boxes.
        suppress: False for an end-to-end head, which gives each object once, so that nothing is suppressed.
        joins: head tensors that the raw model has in parts; empty for a fused model, which has them whole.
        background: channel of the background class, which a softmax includes; None if there is none.
        labels: channel of the class numbers of an end-to-end head with finished rows; `classes` is then one channel, the score.
        objectness_weight: w, if the score is objectness^w * class^(1 - w); None: the score is their product.
        masks, keypoints, angle: task outputs; None if the head has none.

    Example:
        >>> from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap
        >>> layout = Layout(
        ...     family="yolov8",
        ...     boxes=Tap("output0", channel_axis=1, start=0, stop=4),
        ...     classes=Tap("output0", channel_axis=1, start=4, stop=84),
        ...     objectness=None,
        ...     activation=Activation.NONE,
        ...     decode=Decoded(BoxFormat.CXCYWH),
        ... )
        >>> layout.num_classes, layout.task
        (80, 'detect')
    """

    family: str
    boxes: Tap
    classes: Tap
    objectness: Tap | None
    activation: Activation
    decode: BoxDecode
    joins: tuple[Join, ...] = ()
    suppress: bool = True
    background: Tap | None = None
    labels: Tap | None = None
    objectness_weight: float | None = None
    masks: MaskTerms | None = None
    keypoints: KeypointTerms | None = None
    angle: AngleTerm | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.family):
            raise ConfigError(f"family is {self.family!r}; expected a name")
        if not isinstance(self.suppress, bool):
            raise ConfigError(f"suppress is {self.suppress!r}; expected True or False")
        if not isinstance(self.joins, tuple) or not all(isinstance(join, Join) for join in self.joins):
            raise ConfigError(f"joins is {self.joins!r}; expected a tuple of Join")
        taken = {part for join in self.joins for part in join.parts}
        for join in self.joins:
            if join.tensor in taken:
                raise ConfigError(
                    f"join into {join.tensor!r}: another tensor has that name; expected its own, as 'joined_{join.tensor}'"
                )
            taken.add(join.tensor)
        if (weight := self.objectness_weight) is not None:
            if not _is_finite(weight) or not 0 <= weight <= 1:
                raise ConfigError(f"objectness_weight is {weight!r}; expected a number from 0 to 1")
            if self.objectness is None:
                raise ConfigError("objectness_weight requires objectness, which this head does not have")
        for name, kind in (("activation", Activation), ("decode", BOX_DECODES)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of fusenms.layout: {_named(kind)}")
        wanted = {
            "boxes": 4 * getattr(self.decode, "bins", 1),
            "classes": None,
            "objectness": 1,
            "background": 1,
            "labels": 1,
        }
        for name, channels in wanted.items():
            tap = getattr(self, name)
            if tap is None and name not in ("boxes", "classes"):
                continue
            _check_tap(name, tap, channels)
        for name, terms in (("masks", MaskTerms), ("keypoints", KeypointTerms), ("angle", AngleTerm)):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), terms):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a {terms.__name__}")
        if self.masks is not None and self.angle is not None:
            raise ConfigError("masks are cut at upright boxes, so they cannot be combined with an angle")
        if self.labels is not None and (self.classes.channels != 1 or self.suppress):
            raise ConfigError(
                "labels require finished rows: expected one channel of classes (the score), and suppress=False"
            )
        softmax = self.activation is Activation.SOFTMAX
        if (self.background is not None and not softmax) or (self.objectness is not None and softmax):
            raise ConfigError("background requires Activation.SOFTMAX, and objectness excludes it")
        cells = isinstance(self.decode, Distances | GridOffsets)
        if self.keypoints is not None and self.keypoints.factor is not None and not cells:
            raise ConfigError(
                "keypoints with a factor require the cells of Distances or GridOffsets; decoded ones have no factor"
            )
        if self.angle is not None and not (
            isinstance(self.decode, Distances)
            or (
                isinstance(self.decode, Decoded)
                and self.decode.format is BoxFormat.CXCYWH
                and not self.decode.normalized
            )
        ):
            raise ConfigError("an angle requires Distances, or Decoded boxes as BoxFormat.CXCYWH in pixels")

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the head does not show it."""
        return self.classes.channels if self.labels is None else 0

    @property
    def task(self) -> str:
        """Task of the head in Ultralytics' terms: detect, segment, pose or obb (oriented boxes)."""
        if self.masks is not None:
            return "segment"
        return "pose" if self.keypoints is not None else "obb" if self.angle is not None else "detect"

    def outputs(self, config: PostprocessConfig) -> tuple[tuple[str, Output], ...]:
        """Every output of a model fused with these settings: its name and its `Output`."""
        number, *others = contract.OUTPUTS
        floats = np.dtype(np.float32)
        boxes = Output(contract.BOXES, floats, ("B", "K", 4 if self.angle is None else 5))
        own = [boxes if output.name == contract.BOXES else output for output in others]
        optional = [contract.CONVERGED_OUTPUT] if config.rounds is not None else []
        optional += [contract.INDICES_OUTPUT] if config.indices else []
        if self.masks is not None and config.masks == "prototype":
            optional.append(Output(contract.MASKS, np.dtype(np.bool_), ("B", "K", "h", "w")))
        elif self.masks is not None:
            count = self.masks.coefficients.channels
            optional.append(Output(contract.MASK_COEFFICIENTS, floats, ("B", "K", count)))
            optional.append(Output(contract.PROTOTYPES, floats, ("B", count, "h", "w")))
        if self.keypoints is not None:
            shape = ("B", "K", self.keypoints.count, self.keypoints.dims)
            optional.append(Output(contract.KEYPOINTS, floats, shape))
        named = zip(config.output_names, (number, *own), strict=True)
        return (*named, *((output.name, output) for output in optional))

    @property
    def every_class(self) -> bool:
        """Whether each class of a candidate counts by default, as in the papers of end-to-end heads.

        It is False for a softmax, whose classes exclude each other.
        """
        return not self.suppress and self.labels is None and self.activation is not Activation.SOFTMAX

    @property
    def decode_stage(self) -> str:
        """``late``: only the boxes of the best candidates are decoded. ``full``: the source decodes all boxes."""
        return "full" if isinstance(self.decode, Decoded) and not self.decode.normalized else "late"

    @property
    def box_taps(self) -> tuple[Tap, ...]:
        """Taps that are used to choose candidates and to decode their boxes."""
        angle = None if self.angle is None else self.angle.value
        every = (self.boxes, self.classes, self.objectness, self.background, self.labels, angle)
        return tuple(tap for tap in every if tap is not None)

    @property
    def taps(self) -> tuple[Tap, ...]:
        masks = () if self.masks is None else (self.masks.coefficients,)
        return (*self.box_taps, *masks, *(() if self.keypoints is None else (self.keypoints.values,)))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the head's tensors, each once. The prototypes of masks come last."""
        names = [tap.tensor for tap in self.taps] + ([] if self.masks is None else [self.masks.prototypes])
        return tuple(dict.fromkeys(names))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the raw model's tensors that form the head. A joined tensor is listed by its parts."""
        parts = {join.tensor: join.parts for join in self.joins}
        return tuple(name for tensor in self.tensors for name in parts.get(tensor, (tensor,)))

    @property
    def ordered_axes(self) -> tuple[int, ...] | None:
        """Axis of the candidates in each tensor of `sources`, for a head whose candidates a top-k may have ordered; None for others."""
        ordered = isinstance(self.decode, Decoded) and not self.suppress and not self.joins and self.masks is None
        return tuple(other_axis(self.channel_axis(name)) for name in self.sources) if ordered else None

    def renamed(self, names: Mapping[str, str]) -> Layout:
        """Return the layout with tensors renamed. ``names`` maps old names to new ones."""

        def tap(old: Tap | None) -> Any:
            return old and replace(old, tensor=names.get(old.tensor, old.tensor))

        masks, points, angle = self.masks, self.keypoints, self.angle
        return replace(
            self,
            **{name: tap(getattr(self, name)) for name in ("boxes", "classes", "objectness", "background", "labels")},
            joins=tuple(
                replace(join, parts=tuple(names.get(part, part) for part in join.parts)) for join in self.joins
            ),
            masks=masks and MaskTerms(tap(masks.coefficients), names.get(masks.prototypes, masks.prototypes)),
            keypoints=points and replace(points, values=tap(points.values)),
            angle=angle and replace(angle, value=tap(angle.value)),
        )

    def channel_axis(self, tensor: str) -> int:
        return next(tap.channel_axis for tap in self.taps if tap.tensor == tensor)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` reads."""
        values = asdict(self)
        values["activation"] = self.activation.value
        if isinstance(self.decode, Decoded):
            values["decode"]["format"] = self.decode.format.value
        values["decode"]["kind"] = self.decode.kind
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """Build from plain values, as `to_dict` returns them.

        Raises:
            SourceError: the values are not a layout.
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
                objectness=_tap(values["objectness"]),
                activation=Activation(values["activation"]),
                decode=kind(**decode),
                joins=tuple(Join(**join | {"parts": tuple(join["parts"])}) for join in values["joins"]),
                suppress=values["suppress"],
                background=_tap(values["background"]),
                labels=_tap(values["labels"]),
                objectness_weight=values["objectness_weight"],
                masks=_terms(MaskTerms, "coefficients", values.get("masks")),
                keypoints=_terms(KeypointTerms, "values", values.get("keypoints")),
                angle=_terms(AngleTerm, "value", values.get("angle")),
            )
        except (KeyError, TypeError, ValueError, StopIteration, OverflowError, RecursionError) as error:
            raise SourceError(
                f"the layout stored in the file is unreadable ({error!r}); export the model again"
            ) from error


def _check_tap(name: str, tap: Any, channels: int | None = None) -> None:
    if not isinstance(tap, Tap) or channels not in (None, tap.channels):
        found = f"has {tap.channels} channels" if isinstance(tap, Tap) else f"is {tap!r}"
        raise ConfigError(f"{name} {found}; expected a Tap{f' of {channels}' if channels else ''}")


def _check_strides(strides: Any) -> None:
    whole = isinstance(strides, tuple) and all(type(stride) is int for stride in strides)
    if not whole or not strides or not all(1 <= stride <= LARGEST_STRIDE for stride in strides):
        raise ConfigError(
            f"strides is {strides!r}; expected whole numbers of pixels from 1 to {LARGEST_STRIDE}, one for each level"
        )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, (int, float)) for side in value)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number in the range of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(abs(value) <= LARGEST)


def _named(kind: Any) -> str:
    return (
        ", ".join(k.__name__ for k in kind)
        if isinstance(kind, tuple)
        else ", ".join(f"{kind.__name__}.{k.name}" for k in kind)
    )


def _tap(values: dict[str, Any] | None) -> Tap | None:
    return None if values is None else Tap(**values)


def _terms(kind: type[Any], tap: str, values: dict[str, Any] | None) -> Any:
    if values is not None and kind is KeypointTerms and "numbers" in values:  # the name of `dims` in 0.1.0
        values = {"dims" if name == "numbers" else name: value for name, value in values.items()}
    return None if values is None else kind(**values | {tap: Tap(**values[tap])})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
