"""Check what a layout says against what the network gives: its scores, its boxes, and how these move with the image.

A layout comes from a family's match, from a checkpoint, or is written by hand. The graph and the reference both follow it, so that they
agree on a wrong one too. What is checked here needs no objects in an image and no trained weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.errors import AmbiguousHeadError, HeadError, LayoutContradictedError
from fusenms.heads.accounting import channels_left_over
from fusenms.heads.anchors_agree import Agreement, compare_anchors
from fusenms.heads.coarse_scores import coarse_scores
from fusenms.heads.cuts import Cuts, cut_objects
from fusenms.heads.keypoints_in_boxes import KeypointsInBoxes, keypoints_in_boxes
from fusenms.heads.mirror import SMALLEST, Look, Shown, check_mirror, mirrored
from fusenms.heads.motion import Motion, Slide, measure_motion, slide
from fusenms.heads.probe import are_normalized, are_probabilities, channels_of, sum_to_one
from fusenms.layout import (
    Activation,
    BoxFormat,
    Decoded,
    Distances,
    GridOffsets,
    Layout,
    PointOffsets,
    Tap,
    anchors_per_cell,
    candidates_per_level,
)
from fusenms.onnx_reading import untrusted

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


def check_meaning(
    raw: RawModel, head: RawHead, images: Sequence[np.ndarray] = (), strict: bool = False, guessed: bool = False
) -> tuple[str, ...]:
    """Compare a layout with what the network gives. Return what is shown and what is assumed, a line for each.

    Args:
        images: images of real objects: ``[1, 3, height, width]`` float32 each, RGB, 0 to 1, of the model's size.
        strict: refuse what finds no objects again in the mirror images of these.
        guessed: the layout comes from shapes and values alone; nobody named the family. Bare box terms by level that no image shows are
            refused then.

    Raises:
        LayoutContradictedError: the network contradicts the layout.
        AmbiguousHeadError: ``guessed``, and nothing shows what the box terms are.
        HeadError: ``strict``, and no object is found again; or the file is quantized so that no score is left.
        SourceError: the model does not run.
    """
    with untrusted(raw.source, "checking its layout", trusted=raw.layout is not None):
        if reason := _wrong_count(raw, head):
            raise LayoutContradictedError(f"{raw.source}: read as {head.layout.family}, but {reason}")
        if reason := coarse_scores(raw.model, head.layout):
            raise HeadError(f"{raw.source}: {reason}")
        large = min(raw.image.height, raw.image.width) >= SMALLEST
        found = slide(raw, head, mirrored(images))
        if reason := _contradiction(found):
            raise LayoutContradictedError(
                f"{raw.source}: read as {head.layout.family}, but {reason}; give another family, or a layout that says so"
            )
        motion = measure_motion(found)
    if motion.contradicted:
        raise LayoutContradictedError(
            f"{raw.source}: read as {head.layout.family}, but its boxes do not move with the image "
            f"({'; '.join(map(str, motion.levels))}).{_fitting(motion)}"
        )
    left = channels_left_over(head.layout, found.before)
    lines = [_geometry(motion), _pixels(raw, head), *([f"left over: {left}"] if left else [])]
    anchors: Agreement | None = None
    cuts: Cuts | None = None
    points: KeypointsInBoxes | None = None
    seen = Shown("not shown on images: there are none", False)
    if images:
        with untrusted(raw.source, "checking its layout", trusted=raw.layout is not None):
            seen = check_mirror(found, images, contradict=large, grid=motion.grid)
            if seen.shown and large:
                anchors = compare_anchors(found.more[::2], head.layout, (raw.image.height, raw.image.width))
                look = Look(found, head.layout, head.pixels)
                cuts = cut_objects(look, images, found.more[::2])
                if head.layout.keypoints is not None:
                    points = keypoints_in_boxes(look, found.more)
    if cuts is not None and cuts.too_small:
        raise LayoutContradictedError(
            f"{raw.source}: read as {head.layout.family}, but what is left of {len(cuts.errors)} cut objects ends {-cuts.error:.0%} of its "
            "size before the cut, so that its boxes are smaller than objects are (half sizes?); give another family, or a layout that says "
            "so"
        )
    if points is not None and points.contradicted:
        raise LayoutContradictedError(
            f"{raw.source}: read as {head.layout.family}, but {points.part:.0%} of the keypoints of {points.objects} objects lie in their "
            "boxes, so that they are in another order, in other units or something else; give a layout that says so"
        )
    if anchors is not None and anchors.contradicted:
        raise LayoutContradictedError(
            f"{raw.source}: read as {head.layout.family}, but its anchors see the same objects in sizes that differ by a factor of "
            f"{np.exp(anchors.unlike):.2g} ({anchors.compared} comparisons); give the anchors that it was trained with"
        )
    if images:
        lines.append(seen.line)
    lines += [str(one) for one in (anchors, cuts, points) if one is not None and str(one)]
    if guessed and not seen.shown and _bare(head.layout):
        family, width = head.layout.family, head.layout.boxes.channels
        raise AmbiguousHeadError(
            f"{raw.source}: may be {family}, but its {width} box channels by level may be distances, offsets, deltas or class scores, in "
            f"any order, and that is {seen.line}; if it is {family}, say family={family!r}, or give images of objects that it knows "
            "(images)"
        )
    if strict and not (images and seen.shown):
        why = f" ({seen.line})" if images else ""
        raise HeadError(
            f"{raw.source}: read as {head.layout.family}, but that is not shown on images{why}; give images of objects that it knows "
            "(images), or leave out strict"
        )
    return tuple(lines)


def _bare(layout: Layout) -> bool:
    """Whether nothing but the shapes of levels says what the boxes are: four channels without bins or anchors, or as many as classes."""
    decode = layout.decode
    if isinstance(decode, PointOffsets):
        return True
    bins = decode.bins if isinstance(decode, Distances) else 1 if isinstance(decode, GridOffsets) else 0
    alike = layout.boxes.channels == layout.classes.channels
    return bool(layout.joins) and (bins == 1 or (bins > 1 and alike))


def _wrong_count(raw: RawModel, head: RawHead) -> str | None:
    """Return how the number of candidates contradicts the cells that the layout has; None if it does not."""
    decode, image = head.layout.decode, raw.image
    if isinstance(decode, Decoded):
        return None
    count, expected = head.candidates(head.layout.boxes), sum(candidates_per_level(decode, image.height, image.width))
    if count == expected:
        return None
    strides, each = ", ".join(map(str, decode.strides)), sorted(set(anchors_per_cell(decode)))
    return (
        f"it has {count} candidates, and {' or '.join(map(str, each))} for each cell of strides {strides} are {expected} at "
        f"{image.height}x{image.width}; give a layout with the strides of its levels"
    )


def _fitting(motion: Motion) -> str:
    if not motion.fitting:
        return (
            " No other order of its levels and no other box format fits either; give another family, a layout, or other pixels "
            "if those are wrong"
        )
    return f" They do if read as {' or '.join(motion.fitting)}; give a layout that says so"


def _geometry(motion: Motion) -> str:
    if not motion.shown:
        return f"geometry assumed: {motion.reason}"
    levels = ", ".join(str(level.stride) for level in motion.levels)
    worst = max(level.center * level.stride for level in motion.levels)
    return f"geometry shown: boxes move with the image (stride {levels}: within {worst:.1g} px)"


def _pixels(raw: RawModel, head: RawHead) -> str:
    how = f"{head.pixels}{', stretched' if head.stretch else ''}"
    if raw.pixels is not None:
        return f"pixels as stated: {how}"
    return f"pixels assumed for {head.layout.family}: {how}"


def _contradiction(found: Slide) -> str | None:
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
