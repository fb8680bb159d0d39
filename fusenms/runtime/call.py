"""What one call of a detector asks for: thresholds, classes and the number of detections, within what the file was fused with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from fusenms.config import PostprocessConfig
from fusenms.contract import CLASS_MASK, IOU_THRESHOLD, SCORE_THRESHOLD
from fusenms.errors import InputError
from fusenms.layout import Layout
from fusenms.safety.text import printable

MOST_CLASSES = 4096
"""Of a file that does not say how many it has."""
Label = int | str
"""A class: its number or its name."""


class CallFields(TypedDict, total=False):
    """The settings of one call."""

    score_threshold: float | Mapping[Label, float] | None
    iou_threshold: float | None
    labels: Sequence[Label] | None
    max_detections: int | None


@dataclass(frozen=True)
class Call:
    """Settings of one call, checked.

    Attributes:
        inputs: what the optional inputs of the graph are fed (`PostprocessConfig.runtime_thresholds`).
        thresholds: ``[C]`` float32, a score threshold for each class; None: those of the file.
        classes: ``[C]`` bool, the classes that are wanted; None: all.
        rows: maximum number of detections in an image; None: that of the file.
    """

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: np.ndarray | None = None
    classes: np.ndarray | None = None
    rows: int | None = None

    def choose(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Numbers of the rows of an image that are wanted, of its scores and labels ``[n]``.

        Suppression never lets a worse row decide about a better one, so those above a threshold are those of a file that was fused with it.
        """
        wanted = np.ones(len(scores), bool)
        if self.thresholds is not None:
            wanted &= scores > np.take(self.thresholds, labels, mode="clip")
        if self.classes is not None:
            wanted &= np.take(self.classes, labels, mode="clip") & (labels < len(self.classes))
        return np.flatnonzero(wanted)[: self.rows]


def checked_call(
    layout: Layout,
    config: PostprocessConfig,
    class_names: Sequence[str],
    *,
    score_threshold: Any = None,
    iou_threshold: Any = None,
    labels: Any = None,
    max_detections: Any = None,
) -> Call:
    """Check the settings of a call against those of the file. Optional inputs of the graph are fed; else, rows are chosen of what it gives.

    Raises:
        InputError: one is no number or no class of the file, or asks for more than the file gives.
    """
    given = {entry.name: entry for entry in layout.runtime_inputs(config)}
    num_classes = layout.num_classes or len(class_names) or MOST_CLASSES

    def number_of(label: Any) -> int:
        if isinstance(label, str) and label in class_names:
            return list(class_names).index(label)
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool) and 0 <= label < num_classes:
            return int(label)
        some = f", the names {printable(', '.join(class_names[:8]))}{', …' if len(class_names) > 8 else ''}"
        raise InputError(
            f"found the class {printable(repr(label))}; expected a number from 0 to {num_classes - 1}{some if class_names else ''}"
        )

    thresholds = None
    if score_threshold is not None:
        each = (
            score_threshold
            if isinstance(score_threshold, Mapping)
            else dict.fromkeys(range(num_classes), score_threshold)
        )
        thresholds = np.full(num_classes, config.score_threshold, np.float32)
        least = 0.0 if SCORE_THRESHOLD in given else config.score_threshold
        for label, value in each.items():
            thresholds[number_of(label)] = _number("score_threshold", value, least)
    classes = None
    if labels is not None:
        if isinstance(labels, str) or not hasattr(labels, "__iter__"):
            raise InputError(f"labels is {printable(repr(labels))}; expected a list of classes, as ['person', 2]")
        classes = np.zeros(num_classes, bool)
        classes[[number_of(label) for label in labels]] = True
    if max_detections is not None and not (_is_whole(max_detections) and 1 <= max_detections <= config.max_detections):
        raise InputError(
            f"max_detections is {max_detections!r}; expected a whole number from 1 to {config.max_detections}, which the file was fused "
            "with: for more, fuse the weights again with a larger max_detections"
        )
    if iou_threshold is not None and IOU_THRESHOLD not in given:
        why = f"has it built in ({config.iou_threshold:g})" if layout.suppress else "has no suppression"
        raise InputError(
            f"found iou_threshold, but the file {why}; leave it out, or fuse the weights again with runtime_thresholds=True"
        )
    inputs = {}
    if iou_threshold is not None:
        inputs[IOU_THRESHOLD] = np.array([_number("iou_threshold", iou_threshold, 0.0)], np.float32)
    if thresholds is not None and SCORE_THRESHOLD in given:
        each_class = num_classes in given[SCORE_THRESHOLD].lengths
        inputs[SCORE_THRESHOLD] = thresholds if each_class else thresholds.min(keepdims=True)
        thresholds = None if each_class else thresholds
    if classes is not None and CLASS_MASK in given:
        inputs[CLASS_MASK], classes = classes, None
    return Call(inputs, thresholds, classes, max_detections)


def _number(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; expected a number from 0 to 1")
    if value < least:
        raise InputError(
            f"{name} is {value!r}; expected at least {least:g}, which the file was fused with: for less, fuse the weights again with a "
            "lower one, or with runtime_thresholds=True"
        )
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
