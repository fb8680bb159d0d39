"""Compare the outputs of a fused model beyond boxes, scores and labels with the reference: indices, masks, keypoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusenms import contract
from fusenms.config import PostprocessConfig
from fusenms.reference import (
    BOX_RELATIVE,
    KEYPOINT_TOLERANCE,
    SCORE_TOLERANCE,
    Expected,
    mask_coefficients,
    masks,
)
from fusenms.verification.image_heads import ImageHead


@dataclass(frozen=True)
class Wanted:
    """Expected values of an output for the valid rows, ``[n, …]``, and their tolerance."""

    name: str
    value: np.ndarray
    tolerance: np.ndarray
    close_calls: int = 0


def task_output_differences(
    read: ImageHead, head: dict[str, np.ndarray], outputs: dict[str, np.ndarray], image: int, config: PostprocessConfig,
    expected: Expected,
) -> tuple[list[str], int]:  # fmt: skip
    """Compare one image whose boxes, scores and labels are right. Return the differences as text, and the number of mask pixels that differ
    within rounding.

    Args:
        read: reads the head.
        head: the head's tensors, ``[B, …]`` by name; ``outputs`` are those of the model.
    """
    problems, close_calls, count, layout = [], 0, len(expected.indices), read.layout
    if layout.masks is not None and config.masks == "coefficients":
        got, own = outputs[contract.PROTOTYPES][image], head[layout.masks.prototypes][image]
        if not np.array_equal(got, own, equal_nan=True):
            problems.append("the prototypes are not the head's")
    for wanted in _wanted(read, head, outputs, image, config, expected):
        got, blank = outputs[wanted.name][image], contract.NO_LABEL if wanted.name == contract.INDICES else 0
        close_calls += wanted.close_calls
        rows, value = got[:count].astype(np.float64), wanted.value.astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = np.abs(rows - value) <= wanted.tolerance  # false for NaN
        apart = ~(near | (rows == value) | (np.isnan(rows) & np.isnan(value)))
        if apart.any():
            which = np.flatnonzero(apart.reshape(count, -1).any(1))
            problems.append(f"{wanted.name}: {len(which)} of {count} rows differ, the first is row {which[0]}")
        if np.any(got[count:] != blank):
            problems.append(f"{wanted.name}: rows past num_detections ({count}) are not blank ({blank})")
    return problems, close_calls


def _wanted(
    read: ImageHead, head: dict[str, np.ndarray], outputs: dict[str, np.ndarray], image: int, config: PostprocessConfig,
    expected: Expected,
) -> Iterator[Wanted]:  # fmt: skip
    numbers, exact, layout = expected.indices, np.zeros(1), read.layout
    if config.indices:
        yield Wanted(contract.INDICES, numbers, exact)
    if layout.masks is not None:
        coefficients = mask_coefficients(head, image, layout, numbers)
        if config.masks == "coefficients":
            yield Wanted(contract.MASK_COEFFICIENTS, coefficients, exact)
        else:
            inside, doubtful = masks(coefficients, head[layout.masks.prototypes][image], expected.rows.boxes, read.size)
            got = outputs[contract.MASKS][image, : len(numbers)]
            close_calls = int((doubtful & (got != inside)).sum())
            yield Wanted(contract.MASKS, np.where(doubtful, got, inside), exact, close_calls)
    if layout.keypoints is not None:
        points = read.keypoints(head, image, numbers)
        tolerance = KEYPOINT_TOLERANCE + BOX_RELATIVE * np.abs(points)
        tolerance[..., 2:] = SCORE_TOLERANCE
        yield Wanted(contract.KEYPOINTS, points, tolerance)
