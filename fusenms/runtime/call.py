"""What one call of a detector asks for: thresholds, classes and the number of detections, within what the file was fused with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from fusenms.config import PostprocessConfig
from fusenms.errors import InputError
from fusenms.safety.text import printable

Label = int | str
"""A class: its number or its name."""


class CallFields(TypedDict, total=False):
    """The settings of one call."""

    score_threshold: float | Mapping[Label, float] | None
    labels: Sequence[Label] | None
    max_detections: int | None


@dataclass(frozen=True)
class Call:
    """Settings of one call, checked.

    Attributes:
        thresholds: ``[C]`` float32, a score threshold for each class; None: those of the file.
        classes: ``[C]`` bool, the classes that are wanted; None: all.
        rows: maximum number of detections in an image; None: that of the file.
    """

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
            wanted &= np.take(self.classes, labels, mode="clip")
        return np.flatnonzero(wanted)[: self.rows]


def checked_call(
    config: PostprocessConfig,
    class_names: Sequence[str],
    num_classes: int,
    *,
    score_threshold: Any = None,
    labels: Any = None,
    max_detections: Any = None,
) -> Call:
    """Check the settings of a call against those of the file.

    Raises:
        InputError: one is no number or no class of the file, or asks for more than the file gives.
    """

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
        for label, value in each.items():
            thresholds[number_of(label)] = _threshold(value, config.score_threshold)
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
    return Call(thresholds, classes, max_detections)


def _threshold(value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise InputError(f"score_threshold is {value!r}; expected a number from 0 to 1")
    if value < least:
        raise InputError(
            f"score_threshold is {value!r}; expected at least {least:g}, which the file was fused with: for less, fuse the weights again "
            "with a lower score_threshold"
        )
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
