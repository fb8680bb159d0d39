"""Anchor boxes, which a file does not show unless it decodes its boxes itself: named sets, and those that the user gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusenms.errors import ConfigError

Anchors = str | Sequence[float] | Sequence[Sequence[float]]
Sizes = tuple[tuple[tuple[float, float], ...], ...]
"""For each level, (width, height) in pixels."""

PYRAMID = (8, 16, 32, 64, 128)
"""Strides of RetinaNet and EfficientDet."""
YOLOV5 = (10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326)
YOLOV7 = (12, 16, 19, 36, 40, 28, 36, 75, 76, 55, 72, 146, 142, 110, 192, 243, 459, 401)


def _retinanet() -> tuple[float, ...]:
    """Three sizes of three shapes, rounded. Source: pytorch/vision, `_default_anchorgen` and `AnchorGenerator`."""
    found = []
    for first in (32, 64, 128, 256, 512):
        sizes = np.array([first, int(first * 2 ** (1 / 3)), int(first * 2 ** (2 / 3))], np.float32)
        for ratio in np.array([0.5, 1.0, 2.0], np.float32):
            height = np.sqrt(ratio)
            for size in sizes:
                half = np.round(np.array([size / height, size * height]) / 2)
                found += [float(side) for side in 2 * half]
    return tuple(found)


def _efficientdet() -> tuple[float, ...]:
    """Source: google/automl, `anchors.py`: scale 4, three octaves, three shapes."""
    shapes = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
    return tuple(
        4.0 * stride * 2 ** (octave / 3) * side
        for stride in PYRAMID
        for octave in range(3)
        for shape in shapes
        for side in shape
    )


SETS = {"yolov5": YOLOV5, "yolov7": YOLOV7, "retinanet": _retinanet(), "efficientdet": _efficientdet()}
"""Widths and heights in pixels, from the finest level to the coarsest, as many for each level."""


def flat_anchors(anchors: Anchors) -> tuple[float, ...]:
    """Return anchors as width, height, width, height, …

    Args:
        anchors: name of a set, or the numbers, maybe a list for each level.

    Raises:
        ConfigError: there is no such set, or these are not positive numbers in pairs.
    """
    if isinstance(anchors, str):
        if anchors not in SETS:
            raise ConfigError(
                f"anchors is {anchors!r}; expected widths and heights in pixels, or one of {', '.join(SETS)}"
            )
        return tuple(map(float, SETS[anchors]))
    try:
        numbers = np.asarray(anchors, np.float64).ravel()
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    with np.errstate(over="ignore"):
        usable = np.isfinite(numbers.astype(np.float32)) & (numbers.astype(np.float32) > 0)
    if not numbers.size or numbers.size % 2 or not usable.all():
        raise ConfigError(
            f"anchors is {anchors!r}; expected widths and heights in pixels above 0, as many for each level"
        )
    return tuple(numbers.tolist())


def by_level(anchors: Sequence[float], levels: int) -> Sizes | str:
    """Divide anchors among levels, the finest first; or return why that cannot be."""
    if len(anchors) % (2 * levels):
        return f"found {len(anchors) // 2} anchors for {levels} levels; expected as many for each level"
    pairs = list(zip(anchors[::2], anchors[1::2], strict=True))
    each = len(pairs) // levels
    return tuple(tuple(pairs[i * each : (i + 1) * each]) for i in range(levels))
