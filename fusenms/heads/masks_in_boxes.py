"""Whether the masks of objects lie in their boxes: evidence for mask coefficients, their order, and prototypes.

Masks are compared before they are cut at the box. Those of the right coefficients fill much of it and little around it; those of others
are as large beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusenms.heads.mirror import Head, Look

SCORE = 0.5
"""Objects with a better score count."""
LEAST_CELLS = 8
"""Cells of the prototypes that a box must have on each side."""
AROUND = 0.25
"""Of the box's sides, how wide the band around it is."""
FEWEST = 5
LEAST, CLEARLY = 0.15, 0.45
"""Part of the box that is filled, less that of the band, in the median: less than the first contradicts, more than the second shows.
Measured on four segmenters: 0.50 to 0.66 on images of their objects; coefficients in another order or negated, prototypes turned, flipped
or behind a sigmoid: -0.61 to 0.44, nearly all below 0.2."""


@dataclass(frozen=True)
class MasksInBoxes:
    """Of each object, which part of its box and of the band around it is in its mask: ``inside`` and ``beside`` ``[n]``."""

    inside: np.ndarray
    beside: np.ndarray

    @property
    def judged(self) -> bool:
        return len(self.inside) >= FEWEST

    @property
    def contrast(self) -> float:
        """The median difference."""
        return float(np.median(self.inside - self.beside))

    @property
    def contradiction(self) -> str | None:
        """What contradicts the layout, as a clause; None if nothing does."""
        if not self.judged or self.contrast >= LEAST:
            return None
        return (
            f"the masks of {len(self.inside)} objects fill {np.median(self.inside):.0%} of their boxes and {np.median(self.beside):.0%} "
            "around them, so that their coefficients or prototypes are in another order or something else; give a layout that says so"
        )

    def __str__(self) -> str:
        """A line for the user."""
        if not self.judged:
            return "masks assumed: too few objects show them"
        shown = "shown" if self.contrast > CLEARLY else "assumed"
        return (
            f"masks {shown}: those of {len(self.inside)} objects fill {np.median(self.inside):.0%} of their boxes, and "
            f"{np.median(self.beside):.0%} around them"
        )


def masks_in_boxes(look: Look, heads: Iterable[Head]) -> MasksInBoxes:
    """Look at the masks of what a detector finds.

    Args:
        heads: values of the head on images; the layout has masks.
    """
    parts = [
        part
        for values in heads
        for box, score, mask in zip(*look.masks(values), strict=True)
        if score >= SCORE and (part := _parts(box, mask)) is not None
    ]
    inside, beside = np.array(parts).reshape(-1, 2).T
    return MasksInBoxes(inside, beside)


def _parts(box: np.ndarray, mask: np.ndarray) -> tuple[float, float] | None:
    """Which part of a box (xyxy in cells) and of the band around it is in a mask ``[h, w]``; None if it is too small, or has no band."""
    if not np.isfinite(box).all():
        return None
    low, high = np.ceil(box[:2]), np.ceil(box[2:])
    band = np.ceil(AROUND * (high - low))
    within, around = _cut(mask, low, high), _cut(mask, low - band, high + band)
    if min(within.shape) < LEAST_CELLS or around.size == within.size:
        return None
    return float(within.mean()), float((around.sum() - within.sum()) / (around.size - within.size))


def _cut(mask: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The cells from ``low`` to ``high`` (x, y) that are in the image."""
    size = mask.shape[::-1]
    (x1, y1), (x2, y2) = np.clip(low, 0, size).astype(int), np.clip(high, 0, size).astype(int)
    return mask[y1:y2, x1:x2]
