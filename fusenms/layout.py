"""`Layout`: what the raw head of a detector means, as plain data.

A layout names the head's tensors at their earliest tap and says how scores and boxes come out of
them. It is written into every fused file, so a file can be verified without its source.

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
"""Of one head tensor. float32 counts exactly up to here."""
LARGEST_STRIDE = 2**16
"""Pixels."""
LARGEST = float(np.finfo(np.float32).max)
"""Of the numbers that become constants of the graph."""


class Activation(str, Enum):
    """How raw class scores (and objectness) become probabilities."""

    NONE = "none"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class BoxFormat(str, Enum):
    """Corners, or center and size."""

    XYXY = "xyxy"
    CXCYWH = "cxcywh"


def cells_along(side: int, stride: int) -> int:
    """Cells of one level along a side of the input, both in pixels; the last one may reach over the edge."""
    return -(-side // stride)


def other_axis(axis: int) -> int:
    """Of a head tensor ``[B, …, …]``: axis 2 for 1, 1 for 2."""
    return 3 - axis


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
        if not _is_name(self.tensor):
            raise ConfigError(f"tap of {self.tensor!r}; expected the name of a tensor")
        whole = all(type(value) is int for value in (self.channel_axis, self.start, self.stop))
        if not whole or self.channel_axis not in (1, 2) or not 0 <= self.start < self.stop <= MOST_CHANNELS:
            raise ConfigError(
                f"tap of {self.tensor!r}: axis {self.channel_axis!r}, channels {self.start!r} to {self.stop!r}; expected axis 1 or 2, and "
                f"a start from 0 on that is below the stop, which is at most {MOST_CHANNELS}"
            )

    @property
    def channels(self) -> int:
        return self.stop - self.start

    @property
    def candidate_axis(self) -> int:
        """Where the candidates are: the axis that does not have the channels."""
        return other_axis(self.channel_axis)


@dataclass(frozen=True)
class Decoded:
    """The four box channels are finished boxes, in pixels of the model's input or ``normalized`` to its size."""

    kind: ClassVar[str] = "decoded"
    format: BoxFormat
    normalized: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, BoxFormat):
            raise ConfigError(f"format is {self.format!r}; expected one of fusenms.layout: {_named(BoxFormat)}")


@dataclass(frozen=True)
class Distances:
    """Distances from a point of the cell to left, top, right, bottom in units of the stride (one anchor per cell).

    Each distance is a distribution over ``bins`` numbers: ``4 * bins`` channels, side by side; with one bin, the number itself.
    ``point`` is where in the cell they start: 0.5 at its center, 0 at its low corner (NanoDet-Plus). The numbers are 0, 1, 2, … but
    where ``values`` says others, as in weights that were quantized.
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
        """What each bin stands for."""
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
    """Masks of instances: M ``coefficients`` of a candidate weigh the M ``prototypes`` ``[B, M, h, w]`` of the image.

    The mask is where their sum is above 0, within the candidate's box; a pixel of the prototypes is a square of the input.
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
    """Keypoints: the channels of ``values`` are x, y and, with ``dims`` 3, the visibility of one point after the other.

    With a ``factor``: position = (factor * t + cell + point) * stride, as the cells of the layout's box decode have it, and visibility
    is a sigmoid. Without: finished, in pixels of the input, and the visibility a probability.
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
        """How many points there are."""
        return self.values.channels // self.dims


@dataclass(frozen=True)
class AngleTerm:
    """The angle of oriented boxes, one channel: radians, from x to y; with ``sigmoid``, (sigmoid(t) - 1/4) * pi.

    Of `Distances`, they are taken along the sides of the turned box; `Decoded` boxes are cx, cy, w, h of it.
    """

    value: Tap
    sigmoid: bool = False

    def __post_init__(self) -> None:
        _check_tap("value", self.value, 1)
        if not isinstance(self.sigmoid, bool):
            raise ConfigError(f"sigmoid is {self.sigmoid!r}; expected True or False")


@dataclass(frozen=True)
class Join:
    """A head tensor that fusing makes out of several of the model's, one for each level, by reshaping and joining alone.

    With ``channel_axis`` 2 a part is ``[B, anchors, rows, columns, C]`` or ``[B, n, C]``; with 1
    ``[B, C, rows, columns]`` or ``[B, C, n]``. Parts of another type become float32.
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
        """Where the candidates are, and the parts are joined."""
        return other_axis(self.channel_axis)

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
        suppress: false where the head gives each object once (end-to-end), so that nothing is suppressed.
        joins: head tensors that the raw model has in parts; none in a fused model, which has them whole.
        background: channel that says "nothing here", which a softmax counts among the classes.
        labels: of end-to-end heads that give finished rows, the class's number; `classes` is then one channel, the score.
        objectness_weight: w, where the score is objectness^w * class^(1 - w); None for their product.
        masks, keypoints, angle: of heads that give more of a candidate than its box.

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
        if (weight := self.objectness_weight) is not None:
            if not _is_finite(weight) or not 0 <= weight <= 1:
                raise ConfigError(f"objectness_weight is {weight!r}; expected a number from 0 to 1")
            if self.objectness is None:
                raise ConfigError("objectness_weight goes with objectness, which this head has not")
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
            raise ConfigError("masks end at upright boxes, so they do not go with an angle")
        if self.labels is not None and (self.classes.channels != 1 or self.suppress):
            raise ConfigError(
                "labels are of finished rows: expected one channel of classes, the score, and suppress=False"
            )
        softmax = self.activation is Activation.SOFTMAX
        if (self.background is not None and not softmax) or (self.objectness is not None and softmax):
            raise ConfigError("background goes with Activation.SOFTMAX, and objectness does not")
        if self.keypoints is not None and self.keypoints.factor is not None and not isinstance(self.decode, Distances):
            raise ConfigError("keypoints with a factor go with the cells of Distances; finished ones have none")
        if self.angle is not None and not (
            isinstance(self.decode, Distances)
            or (
                isinstance(self.decode, Decoded)
                and self.decode.format is BoxFormat.CXCYWH
                and not self.decode.normalized
            )
        ):
            raise ConfigError("an angle goes with Distances, or with Decoded boxes as BoxFormat.CXCYWH in pixels")

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 where the head does not show it."""
        return self.classes.channels if self.labels is None else 0

    @property
    def task(self) -> str:
        """What the head gives, in the words of Ultralytics: detect, segment, pose or obb (oriented boxes)."""
        if self.masks is not None:
            return "segment"
        return "pose" if self.keypoints is not None else "obb" if self.angle is not None else "detect"

    def outputs(self, config: PostprocessConfig) -> tuple[tuple[str, Output], ...]:
        """Every output of a model fused with these settings: its name, and what it is."""
        number, *others = contract.OUTPUTS
        floats = np.dtype(np.float32)
        boxes = Output(contract.BOXES, floats, ("B", "K", 4 if self.angle is None else 5))
        own = [boxes if spec.name == contract.BOXES else spec for spec in others]
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
        return (*named, *((spec.name, spec) for spec in optional))

    @property
    def every_class(self) -> bool:
        """Whether each class of a candidate counts, without being asked for: so the papers of end-to-end heads have it.

        Not of those with a softmax, whose classes exclude each other.
        """
        return not self.suppress and self.labels is None and self.activation is not Activation.SOFTMAX

    @property
    def decode_stage(self) -> str:
        """``late``: boxes are decoded for chosen candidates only. ``full``: the source decodes all of them."""
        return "full" if isinstance(self.decode, Decoded) and not self.decode.normalized else "late"

    @property
    def box_taps(self) -> tuple[Tap, ...]:
        """What candidates are chosen and their boxes decoded by."""
        angle = None if self.angle is None else self.angle.value
        every = (self.boxes, self.classes, self.objectness, self.background, self.labels, angle)
        return tuple(tap for tap in every if tap is not None)

    @property
    def taps(self) -> tuple[Tap, ...]:
        masks = () if self.masks is None else (self.masks.coefficients,)
        return (*self.box_taps, *masks, *(() if self.keypoints is None else (self.keypoints.values,)))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the head's tensors, each once; the prototypes of masks are the last."""
        names = [tap.tensor for tap in self.taps] + ([] if self.masks is None else [self.masks.prototypes])
        return tuple(dict.fromkeys(names))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the raw model's tensors that the head consists of, parts in place of what is joined of them."""
        parts = {join.tensor: join.parts for join in self.joins}
        return tuple(name for tensor in self.tensors for name in parts.get(tensor, (tensor,)))

    def renamed(self, names: Mapping[str, str]) -> Layout:
        """The same layout where tensors have other names: the new one by the old one."""

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
    """Whether it is a number that float32 holds."""
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
    if values is not None and kind is KeypointTerms and "numbers" in values:  # what `dims` was called in 0.1.0
        values = {"dims" if name == "numbers" else name: value for name, value in values.items()}
    return None if values is None else kind(**values | {tap: Tap(**values[tap])})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
