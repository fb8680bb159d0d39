"""`Layout`: everything that a raw head means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.contract import Output, RuntimeInput
from fusenms.errors import ConfigError, SourceError
from fusenms.layout.box_decodes import BOX_DECODES, BoxDecode, BoxFormat, Decoded, Distances, GridOffsets, PointOffsets
from fusenms.layout.taps import Join, Tap, check_tap, is_finite, is_name, named, other_axis
from fusenms.layout.task_terms import AngleTerm, KeypointTerms, MaskTerms


class Activation(str, Enum):
    """How raw class scores (and objectness) become probabilities."""

    NONE = "none"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


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
        if not is_name(self.family):
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
            if not is_finite(weight) or not 0 <= weight <= 1:
                raise ConfigError(f"objectness_weight is {weight!r}; expected a number from 0 to 1")
            if self.objectness is None:
                raise ConfigError("objectness_weight requires objectness, which this head does not have")
        for name, kind in (("activation", Activation), ("decode", BOX_DECODES)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of fusenms.layout: {named(kind)}")
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
            check_tap(name, tap, channels)
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
        cells = isinstance(self.decode, Distances | GridOffsets | PointOffsets)
        if self.keypoints is not None and self.keypoints.factor is not None and not cells:
            raise ConfigError(
                "keypoints with a factor require the cells of Distances, GridOffsets or PointOffsets; decoded ones have no factor"
            )
        if self.angle is not None and not (
            (isinstance(self.decode, Distances) and not self.decode.pixels)
            or (
                isinstance(self.decode, Decoded)
                and self.decode.format is BoxFormat.CXCYWH
                and not self.decode.normalized
            )
        ):
            raise ConfigError("an angle requires Distances in strides, or Decoded boxes as BoxFormat.CXCYWH in pixels")

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

    def runtime_inputs(self, config: PostprocessConfig) -> tuple[RuntimeInput, ...]:
        """Every optional input of a model fused with these settings.

        A head that needs no suppression has no IoU threshold. A head that gives labels itself does not show its number of classes, so
        that it has one score threshold and no class mask.
        """
        if not config.runtime_thresholds:
            return ()
        floats, classes = np.dtype(np.float32), self.num_classes
        lengths = (1, classes) if classes else (1,)
        inputs = [RuntimeInput(contract.SCORE_THRESHOLD, floats, lengths, config.score_threshold)]
        if self.suppress:
            inputs.append(RuntimeInput(contract.IOU_THRESHOLD, floats, (1,), config.iou_threshold))
        if classes:
            inputs.append(RuntimeInput(contract.CLASS_MASK, np.dtype(np.bool_), (classes,), True))
        return tuple(inputs)

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


def _tap(values: dict[str, Any] | None) -> Tap | None:
    return None if values is None else Tap(**values)


def _terms(kind: type[Any], tap: str, values: dict[str, Any] | None) -> Any:
    if values is not None and kind is KeypointTerms and "numbers" in values:  # the name of `dims` in 0.1.0
        values = {"dims" if name == "numbers" else name: value for name, value in values.items()}
    return None if values is None else kind(**values | {tap: Tap(**values[tap])})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
