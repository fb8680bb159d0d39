"""The settings of the fused post-processing."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

from fusenms.contract import MASK_KINDS, ONE_TENSOR, OUTPUT_PRESETS
from fusenms.errors import ConfigError

MAX_CANDIDATES_LIMIT = 3840
"""The largest TopK that TensorRT builds (measured with TensorRT-RTX 1.7.1: 3840 builds, 3841 is refused)."""
MOST = 2**24
"""Limit on candidates, rows and rounds. Candidates are ranked in float32, which holds every integer up to this one."""


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """Settings of the fused post-processing, checked on construction.

    Attributes:
        score_threshold: keep candidates with score > this (0 to 1).
        iou_threshold: suppress a candidate whose IoU with a better one is > this (0 to 1).
        max_detections: output rows per image (K).
        max_candidates: number of best candidates per image that enter suppression.
        class_agnostic: suppress across classes, not only within a class.
        multi_label: make every class of a box above the threshold a candidate, not only the best class.
        rounds: number of suppression rounds that the ``portable`` backend unrolls; None: repeat until nothing changes. A number adds the
            output ``converged``.
        masks: mask outputs of a segmentation model: ``coefficients`` gives `mask_coefficients` and `prototypes`; ``prototype`` gives the
            masks at the size of the prototypes.
        indices: add the output `indices`, the candidate number of each row.
        output_preset: names of the first four outputs, a key of `fusenms.contract.OUTPUT_PRESETS`; ``ultralytics``: all rows in one output.
        runtime_thresholds: make the thresholds and a class mask optional inputs of the graph, `score_threshold`, `iou_threshold` and
            `class_mask`, whose defaults are these settings. Backends `ort` and `portable`.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from fusenms import PostprocessConfig
        >>> PostprocessConfig(score_threshold=0.4).max_detections
        300
        >>> PostprocessConfig(score_threshold=40)
        Traceback (most recent call last):
        fusenms.errors.ConfigError: score_threshold is 40; expected a number from 0 to 1
    """

    score_threshold: float = 0.25
    iou_threshold: float = 0.45
    max_detections: int = 300
    max_candidates: int = MAX_CANDIDATES_LIMIT
    class_agnostic: bool = False
    multi_label: bool = False
    rounds: int | None = None
    masks: str = field(default="coefficients", metadata={"choices": MASK_KINDS})
    indices: bool = False
    output_preset: str = field(default="fusenms", metadata={"choices": tuple(OUTPUT_PRESETS)})
    runtime_thresholds: bool = False

    def __post_init__(self) -> None:
        for name in ("score_threshold", "iou_threshold"):
            value = getattr(self, name)
            if not _within(value, numbers.Real, 0, 1):
                raise ConfigError(f"{name} is {value!r}; expected a number from 0 to 1")
            object.__setattr__(self, name, float(value))
        for name in ("max_detections", "max_candidates", "rounds"):
            value = getattr(self, name)
            if name == "rounds" and value is None:
                continue
            if not _within(value, numbers.Integral, 1, MOST):
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 1 to {MOST}")
            object.__setattr__(self, name, int(value))
        for name in ("class_agnostic", "multi_label", "indices", "runtime_thresholds"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.max_candidates < self.max_detections:
            raise ConfigError(
                f"max_candidates is {self.max_candidates}, less than max_detections {self.max_detections}; "
                "every detection is one of the candidates: raise max_candidates or lower max_detections"
            )
        for name, choices in (("masks", MASK_KINDS), ("output_preset", OUTPUT_PRESETS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")

        if self.output_preset == ONE_TENSOR and (self.indices or self.rounds is not None or self.masks == "prototype"):
            raise ConfigError(
                f"found indices, rounds or masks='prototype' with output_preset {ONE_TENSOR!r}, whose one output has no place "
                "for them; leave them out"
            )

    @property
    def output_names(self) -> tuple[str, str, str, str]:
        """Names of the first four outputs, in the order of the contract."""
        return OUTPUT_PRESETS[self.output_preset]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PostprocessConfig:
        """Build from plain values.

        Raises:
            ConfigError: the values are not a mapping from names, a name is unknown, or a value is out of range.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f"settings are {values!r}; expected a mapping from names to values")
        if "names" in values:  # the name of `output_preset` in 0.1.0
            values = {"output_preset" if name == "names" else name: value for name, value in values.items()}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown setting {', '.join(unknown)}; expected {', '.join(known)}")
        return cls(**values)


class ConfigFields(TypedDict, total=False):
    """The fields of `PostprocessConfig` as keywords."""

    score_threshold: float
    iou_threshold: float
    max_detections: int
    max_candidates: int
    class_agnostic: bool
    multi_label: bool
    rounds: int | None
    masks: str
    indices: bool
    output_preset: str
    runtime_thresholds: bool


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one run: those of the settings, or what its optional inputs are fed.

    Attributes:
        score: score thresholds: one for all classes, or one for each class.
        iou: IoU threshold.
        class_mask: whether each class counts; None: all do.
    """

    score: tuple[float, ...]
    iou: float
    class_mask: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, config: PostprocessConfig) -> Thresholds:
        """Those of the settings."""
        return cls((config.score_threshold,), config.iou_threshold)


def _within(value: Any, kind: Any, low: int, high: int) -> bool:
    """Whether a value is a number of this kind from low to high. NaN and booleans are not."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(low <= value <= high)
