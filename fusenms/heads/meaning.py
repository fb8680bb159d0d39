"""Check what a layout says against what the network gives: its scores, its boxes, and how these move with the image.

A layout comes from a family's match, from a checkpoint, or is written by hand. The graph and the reference both follow it, so that they
agree on a wrong one too. What is checked here needs no objects in an image and no trained weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.raw_head import RawHead
from fusenms.errors import AmbiguousHeadError, HeadError, LayoutContradictedError
from fusenms.heads.accounting import channels_left_over
from fusenms.heads.anchors_agree import compare_anchors
from fusenms.heads.coarse_scores import coarse_scores
from fusenms.heads.cuts import cut_objects
from fusenms.heads.keypoints_in_boxes import keypoints_in_boxes
from fusenms.heads.masks_in_boxes import masks_in_boxes
from fusenms.heads.mirror import SMALLEST, Look, Shown, check_mirror, mirrored
from fusenms.heads.motion import Motion, Slide, measure_motion, slide
from fusenms.heads.values import contradicting_values
from fusenms.layout import (
    Decoded,
    Distances,
    GridOffsets,
    Layout,
    PointOffsets,
    anchors_per_cell,
    candidates_per_level,
)
from fusenms.onnx_reading import untrusted


class Measure(Protocol):
    """A measure of what is found on images. `str` gives a line for the user, empty if nothing could be judged."""

    @property
    def contradiction(self) -> str | None:
        """What contradicts the layout, as a clause; None if nothing does."""


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
        found = slide(raw, head, mirrored(images))
        if reason := contradicting_values(found):
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
    seen, measured = _look_at_images(raw, found, images, motion)
    lines += [*([seen.line] if images else []), *measured]
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


def _look_at_images(
    raw: RawModel, found: Slide, images: Sequence[np.ndarray], motion: Motion
) -> tuple[Shown, list[str]]:
    """Return what is found again in the mirror images, and a line for each measure of what is found.

    Raises:
        LayoutContradictedError: one of them contradicts the layout.
        SourceError: the model does not run.
    """
    layout, size = found.head.layout, (raw.image.height, raw.image.width)
    seen, large = Shown("not shown on images: there are none", False), min(size) >= SMALLEST
    measures: list[Measure | None] = []
    with untrusted(raw.source, "checking its layout", trusted=raw.layout is not None):
        if images:
            seen = check_mirror(found, images, contradict=large, grid=motion.grid)
        look, judged = Look(found, layout, found.head.pixels), found.more if seen.shown and large else []
        if judged:
            measures += [compare_anchors(judged[::2], layout, size), cut_objects(look, images, judged[::2])]
        if layout.keypoints is not None:
            measures.append(keypoints_in_boxes(look, judged))
        if layout.masks is not None:
            measures.append(masks_in_boxes(look, judged[::2]))
    lines = ["angle assumed: in radians, from x to y"] if layout.angle is not None else []
    for one in measures:
        if one is not None and one.contradiction:
            raise LayoutContradictedError(f"{raw.source}: read as {layout.family}, but {one.contradiction}")
        if one is not None and (line := str(one)):
            lines.append(line)
    return seen, lines


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
