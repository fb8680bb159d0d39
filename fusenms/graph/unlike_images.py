"""Test images that differ clearly, and the difference between two results of one network on them.

Images of one brightness cannot show a branch on the brightness, or that the images of a batch change each other's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-4
"""Largest difference by rounding in float32, relative to the largest value of a tensor."""


def unlike_images(height: int, width: int) -> dict[str, np.ndarray]:
    """Images ``[3, height, width]`` float32 by kind, always the same: patches, a dark one, noise, a bright one.

    Each has texture, because a uniform image gives many candidates the same score, and then the order of a top-k is arbitrary.
    """
    rng = np.random.default_rng(5)
    texture = [_patches(rng, height, width) for _ in range(3)]
    made = {
        "patches": 0.2 + 0.6 * texture[0],
        "dark": 0.08 * texture[1],
        "noise": rng.random((3, height, width)),
        "bright": 1 - 0.04 * texture[2],
    }
    return {kind: values.astype(np.float32) for kind, values in made.items()}


def _patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    patches = np.kron(rng.random((3, 8, 8)), np.ones((1, -(-height // 8), -(-width // 8))))[:, :height, :width]
    return np.clip(patches + rng.normal(0, 0.05, patches.shape), 0, 1)


MOST_ORDERED = 1000
"""Limit on the candidates that a top-k has ordered, as on queries. A head with more is compared in its order."""


@dataclass(frozen=True)
class Difference:
    """The largest difference: as a ``share`` of the largest value of its tensor, ``absolute``, and the number of the first tensor with one.

    A shape that differs, or a value that is not finite on one side only, is infinitely far.
    """

    share: float = 0.0
    absolute: float = 0.0
    tensor: int = 0


def largest_difference(
    got: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    candidate_axes: Sequence[int] | None = None,
    *,
    floor: float = 1e-9,
) -> Difference:
    """Return the largest difference between tensors ``[B, …]``. Its tensor is the first that differs by more than `ROUNDING`.

    Args:
        candidate_axes: for a head whose candidates a top-k has ordered: the axis of the candidates (1 or 2) of each tensor. Candidates
            with nearly equal scores may then be in any order.
        floor: the share is one of at least this value.
    """
    found = [_difference(a, b, i, floor) for i, (a, b) in enumerate(zip(got, expected, strict=True))]
    far = [one for one in found if one.share > ROUNDING]
    count = expected[0].shape[candidate_axes[0]] if candidate_axes is not None else 0
    if far and candidate_axes and count <= MOST_ORDERED and all(np.isfinite(one.share) for one in found):
        scales = [max(float(np.abs(value).max(initial=0)), floor) for value in expected]
        share = _share_in_any_order(got, expected, candidate_axes, scales)
        return Difference(share, share * max(scales), far[0].tensor)
    share, absolute = max(one.share for one in found), max(one.absolute for one in found)
    return Difference(share, absolute, far[0].tensor if far else 0)


def _difference(got: np.ndarray, expected: np.ndarray, tensor: int, floor: float) -> Difference:
    if got.shape != expected.shape:
        return Difference(np.inf, np.inf, tensor)
    if got.dtype == expected.dtype == np.float32:
        with np.errstate(invalid="ignore"):
            absolute = float(np.abs(got - expected).max(initial=0))
        if np.isfinite(absolute):  # then every value is
            scale = max(float(expected.max(initial=0)), -float(expected.min(initial=0)), floor)
            return Difference(absolute / scale, absolute, tensor)
    a, b = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    absolute = float(np.where(np.isnan(apart), np.inf, apart).max(initial=0))
    scale = max(float(np.abs(b[np.isfinite(b)]).max(initial=0)), floor)
    return Difference(absolute / scale, absolute, tensor)


def _share_in_any_order(
    got: Sequence[np.ndarray], expected: Sequence[np.ndarray], candidate_axes: Sequence[int], scales: Sequence[float]
) -> float:
    """Largest difference between a candidate and the nearest one on the other side."""
    worst = 0.0
    for image in range(len(got[0])):
        one, other = (_rows(side, image, candidate_axes, scales) for side in (got, expected))
        for rows, others in ((one, other), (other, one)):
            worst = max(worst, *(float(np.abs(others - row).max(1).min()) for row in rows))
    return worst


def _rows(
    tensors: Sequence[np.ndarray], image: int, candidate_axes: Sequence[int], scales: Sequence[float]
) -> np.ndarray:
    """The candidates of an image as rows ``[N, channels]``, each tensor divided by its scale."""
    parts = []
    for value, axis, scale in zip(tensors, candidate_axes, scales, strict=True):
        rows = value[image] if axis == 1 else value[image].T
        parts.append(rows.astype(np.float64) / scale)
    return np.concatenate(parts, 1)
