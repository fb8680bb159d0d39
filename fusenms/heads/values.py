"""Whether the values of a head can be what a layout says: probabilities or logits, pixels or parts of the image."""

from __future__ import annotations

import numpy as np

from fusenms.heads.motion import Slide
from fusenms.heads.probe import are_normalized, are_probabilities, channels_of, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Distances, Tap, candidates_per_level

ROUNDING = 1e-3
"""How far a probability may lie outside 0 to 1, as those of float16 and of quantized networks do."""
MOST_SLOPE = 0.6
"""Limit on the growth of distances with the stride: 0 if they are in strides, 1 if they are in pixels. Only boxes that would reach
beyond the image count."""
NEARLY_ALL = 0.95
LOW_OBJECTNESS, FEWEST_WITHOUT_OBJECT, LEAST_SHARE = 0.01, 100, 0.01
"""Candidates that see no object have less objectness; so many are needed, and their best class scores are at least this part of it where
both were multiplied."""
FAR = 4.0
"""Most normalized boxes lie within this many sides of the image."""


def contradicting_values(found: Slide) -> str | None:
    """Return what in the values contradicts the layout, as a clause; None if nothing does."""
    return _wrong_scores(found) or _multiplied_already(found) or _wrong_boxes(found)


def _wrong_scores(found: Slide) -> str | None:
    layout = found.head.layout
    taps = [tap for tap in (layout.classes, layout.objectness) if tap is not None]
    values = np.concatenate([_channels(found, tap) for tap in taps], 1)
    values = values[np.isfinite(values).all(1)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if layout.activation is Activation.NONE:
        if low < -ROUNDING or high > 1 + ROUNDING:
            return f"its scores are from {low:.3g} to {high:.3g}, which are no probabilities (Activation.SIGMOID or SOFTMAX?)"
    elif layout.activation is Activation.SIGMOID:
        if are_probabilities(values) and high > low:
            return f"its scores are from {low:.3g} to {high:.3g}, so that they are probabilities already (Activation.NONE?)"
    elif layout.background is not None and sum_to_one(np.hstack((values, _channels(found, layout.background)))):
        return "its scores sum to 1, so that they are the result of a softmax already (Activation.NONE?)"
    return None


def _multiplied_already(found: Slide) -> str | None:
    """Whether the file has multiplied the class scores by the objectness, as a clause.

    Where a detector sees no object, its objectness is low and its class scores are whatever they are; multiplied, they are never above it.
    """
    layout = found.head.layout
    if layout.objectness is None or layout.activation is Activation.SOFTMAX:
        return None
    logits = layout.activation is Activation.SIGMOID
    scores, there = (
        (1 / (1 + np.exp(-values)) if logits else values).astype(np.float64)
        for values in (_channels(found, layout.classes).max(1), _channels(found, layout.objectness)[:, 0])
    )
    low = (there > 0) & (there < LOW_OBJECTNESS)
    share = scores[low] / there[low]
    if low.sum() < FEWEST_WITHOUT_OBJECT or (share > 1 + ROUNDING).any() or np.median(share) < LEAST_SHARE:
        return None
    return "its class scores are never above its objectness, so that they are multiplied by it already (a layout without objectness?)"


def _wrong_boxes(found: Slide) -> str | None:
    layout = found.head.layout
    terms = _channels(found, layout.boxes)
    finite = np.isfinite(terms).all(1)
    if finite.mean() < 0.5:
        return f"{1 - finite.mean():.0%} of its boxes are NaN or infinite on a test image"
    terms = terms[finite]
    decode = layout.decode
    if not len(terms) or not terms.any():
        return None
    far = float(np.median(np.abs(terms).max(1)))
    if isinstance(decode, Distances) and decode.bins == 1:
        return _wrong_distances(found, decode)
    if not isinstance(decode, Decoded):
        return None
    if decode.normalized and far > FAR:
        return f"its boxes reach {far:.3g} sides of the image, so that they are in pixels, not normalized"
    if not decode.normalized and layout.angle is None and _are_boxes(terms, decode) and are_normalized(terms):
        return f"its boxes are from {terms.min():.3g} to {terms.max():.3g}, so that they are normalized, not in pixels"
    return None


def _are_boxes(terms: np.ndarray, decode: Decoded) -> bool:
    """Whether nearly all of these channels ``[N, 4]`` are boxes that have an area; those of an untrained network may have none."""
    sizes = terms[:, 2:] - terms[:, :2] if decode.format is BoxFormat.XYXY else terms[:, 2:]
    return bool(np.ptp(terms) > 0 and np.mean((sizes > 0).all(1)) > NEARLY_ALL)


def _wrong_distances(found: Slide, decode: Distances) -> str | None:
    """Distances in strides are alike on all levels; those in pixels grow with the stride."""
    terms, image = _channels(found, found.head.layout.boxes), found.raw.image
    if (middle := float(np.median(terms))) < 0:
        return f"most of its distances are below 0 (median {middle:.3g})"
    counts = candidates_per_level(decode, image.height, image.width)
    parts = np.split(terms, np.cumsum(counts)[:-1])
    medians = [float(np.median(np.abs(part))) for part in parts]
    if len(medians) > 1 and min(medians) > 0:
        slope = float(np.polyfit(np.log(decode.strides), np.log(medians), 1)[0])
        if (
            not decode.pixels
            and slope > MOST_SLOPE
            and medians[-1] * decode.strides[-1] > max(image.height, image.width)
        ):
            each = ", ".join(f"{value:.3g}" for value in medians)
            return f"its distances grow with the stride (medians {each}), so that they are in pixels, not in strides"
    return None


def _channels(found: Slide, tap: Tap) -> np.ndarray:
    """The channels ``[N, C]`` of a tap, before the window moves."""
    return channels_of(found.before, tap).astype(np.float32)
