"""Heads with separate, undecoded levels, as in exports for NPUs: distances and class scores for each level.

A level has two outputs, distances ``[B, 4 * bins, rows, columns]`` and classes ``[B, C, rows, columns]``, or one output with both,
in either order; behind these, keypoints, if the file's metadata says so. Channels may come last, and a level may be flat:
``[B, rows * columns, C]``. Classes are logits or probabilities. Distances are in strides.
Additional outputs with one channel (sums of scores, for thresholding) are ignored.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import (
    Level,
    activation_of,
    group_levels,
    in_pixels,
    join_group,
    not_classes,
    not_distances,
    read_level,
    values_of,
    whole_tap,
)
from fusenms.heads.probe import Probe, width_of
from fusenms.heads.task_outputs import task_channels
from fusenms.layout import Activation, Distances, KeypointTerms, Layout, Tap

NAME, GFL_NAME = "levels", "gfl"
DISTANCES, CLASSES = "fusenms/head_distances", "fusenms/head_classes"
NANODET_BINS = 8
USUAL_BINS = 16
GFL_BINS = 17
KNOWN_BINS = (1, NANODET_BINS, USUAL_BINS, GFL_BINS)
"""Other numbers may be anchors: nine of them have 36 channels of boxes."""
MOST_BELOW = 0.1
"""Part of the distances that may be below 0, without bins. Measured on YOLO26: 0.01 at most."""
JOINED = ((USUAL_BINS, False), (USUAL_BINS, True), (1, False), (1, True))
"""Bins of a distance, and whether classes come first, in one output for each level. Only the first is taken where nothing but the number of
class names shows it."""


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize levels of distances and classes."""
    layout = match_levels(probe, certain, NAME)
    if isinstance(layout, Layout) and is_nanodet(layout):
        return Mismatch(f"found {NANODET_BINS} bins and class probabilities, as NanoDet has them")
    return layout


def match_low_corners(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize levels whose distances are measured from the low corner of the cell, as those of GFL in mmdetection."""
    layout = match_levels(probe, certain, GFL_NAME)
    if not isinstance(layout, Layout):
        return layout
    assert isinstance(layout.decode, Distances)
    if certain and layout.decode.bins != GFL_BINS:
        return Mismatch(f"found {layout.decode.bins} bins; expected {GFL_BINS}")
    return replace(layout, decode=replace(layout.decode, point=0.0))


def is_nanodet(layout: Layout) -> bool:
    """Whether a layout is NanoDet's: it has 8 bins, and the sigmoid is in the file."""
    assert isinstance(layout.decode, Distances)
    return layout.decode.bins == NANODET_BINS and layout.activation is Activation.NONE


def match_levels(probe: Probe, certain: bool, name: str) -> Layout | Mismatch:
    """Recognize levels of distances and classes, of any family."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    levels = [level for sample in probe.samples if (level := read_level(probe, sample)) is not None]
    wide, strides = _without_sums(levels), {level.stride for level in levels}
    if len(levels) != len(shapes) or len(wide) not in (len(strides), 2 * len(strides)) or len(wide) < 2:
        return Mismatch(
            f"found outputs of shape {shapes}; expected distances and class scores for each level, in one or two outputs"
        )
    groups = group_levels(wide)
    if groups is None:
        return Mismatch(
            f"found outputs of shape {shapes}; expected as many outputs for each level, with the same channels in every level"
        )
    return (
        _match_joined(probe, certain, name, groups[0])
        if len(groups) == 1
        else _match_apart(probe, certain, name, groups)
    )


def _without_sums(levels: list[Level]) -> list[Level]:
    """Of three outputs a level, those that are no sums of scores: these have one channel, and for one class the values of the classes."""
    strides = {level.stride for level in levels}
    if len(levels) != 3 * len(strides):
        return levels
    narrow: dict[int, Level] = {}
    kept = []
    for level in levels:
        if level.values.shape[1] > 1:
            kept.append(level)
        elif level.stride not in narrow:
            narrow[level.stride] = level
        elif np.allclose(level.values, narrow[level.stride].values, rtol=0, atol=1e-6):
            kept.append(narrow[level.stride])
        else:
            return levels
    return kept


def _match_joined(probe: Probe, certain: bool, name: str, group: list[Level]) -> Layout | Mismatch:
    """Match one output per level: distances and classes in either order, then keypoints."""
    width, names, extra = group[0].values.shape[1], probe.raw.class_names, task_channels(probe, [])
    if isinstance(extra, Mismatch):
        return extra
    parts = [width_of(part, len(group[0].values)) for part in probe.samples[0].parts if part.ndim > 2]
    stop, values = width - extra, values_of(group)
    fitting, reasons, unshown, joined_so = [], [], False, []
    for bins, classes_first in JOINED:
        first = stop - 4 * bins if classes_first else 4 * bins
        if not 0 < first < stop:
            continue
        boxes, classes = ((first, stop), (0, first)) if classes_first else ((0, first), (first, stop))
        count = classes[1] - classes[0]
        if names and len(names) != count:
            continue
        if reason := not_classes(values[:, slice(*classes)]) or not_distances(values[:, slice(*boxes)]):
            reasons.append(reason)
        elif certain and parts != [first, stop - first] and not (names and (bins, classes_first) == JOINED[0]):
            unshown = True
        else:
            fitting.append((bins, boxes, classes))
            joined_so += [fitting[-1]] if parts == [first, stop - first] else []
    if (
        not certain and joined_so
    ):  # the family is named, and how the channels were joined says more than their usual order
        fitting = joined_so
    if not fitting or (certain and len(fitting) > 1):
        if fitting:
            return Mismatch(f"either end of {width} channels per level may be the distances; describe them by a layout")
        if unshown:
            return Mismatch(
                f"nothing shows that {width} channels per level are distances and classes, in which order, and not three anchors (no class "
                f"names; joined from {parts or 'unknown'} channels); if the first {4 * USUAL_BINS} are distances, say family={name!r}"
            )
        wanted = f"{len(names)} of classes" if names else "those of the classes"
        points = f" and {extra} of keypoints" if extra else ""
        expected = f"found {width} channels per level; expected {4 * USUAL_BINS} of distances, then {wanted}{points}"
        return Mismatch(reasons[0] if reasons else expected)
    (bins, boxes, classes), join = fitting[0], join_group(DISTANCES, group)
    if reason := _not_in_strides(probe, certain, bins, [level.values[:, slice(*boxes)] for level in group], group):
        return Mismatch(reason)

    def tap(span: tuple[int, int]) -> Tap:
        return Tap(join.tensor, join.channel_axis, *span)

    decode = Distances(tuple(level.stride for level in group), bins)
    shape = probe.keypoints if extra else None
    terms = None if shape is None else KeypointTerms(tap((stop, width)), shape[1], factor=2.0)
    activation = activation_of(values[:, slice(*classes)])
    return Layout(name, tap(boxes), tap(classes), None, activation, decode, (join,), keypoints=terms)


def _match_apart(probe: Probe, certain: bool, name: str, groups: list[list[Level]]) -> Layout | Mismatch:
    """Match two outputs per level. Their values, and the number of class names if there are any, show which output is which."""
    if probe.raw.task != "detect":
        return Mismatch(f"the file says that its task is {probe.raw.task!r}; expected 'detect'")
    found, reasons = [], []
    for distances, classes in (groups, groups[::-1]):
        far, near = values_of(distances), values_of(classes)
        widths, names = (far.shape[1], near.shape[1]), probe.raw.class_names
        reason = not_distances(far) or not_classes(near)
        below = float((far < 0).mean())
        if certain and not reason and widths[0] == 4 and below > MOST_BELOW:
            reason = (
                f"{below:.0%} of the box channels are below 0, so they may be deltas to an anchor; if they are distances, say "
                f"family={name!r}"
            )
        if certain and not reason and widths[0] // 4 not in KNOWN_BINS:
            reason = (
                f"found {widths[0]} channels of boxes and {widths[1]} of classes, which may be those of several anchors; if they are "
                f"{widths[0] // 4} bins a side, say family={name!r}"
            )
        if names and len(names) != widths[1]:
            reason = f"found {widths[1]} classes, but {len(names)} class names in the metadata"
        reason = reason or _not_in_strides(
            probe, certain, widths[0] // 4, [level.values for level in distances], distances
        )
        reasons.append(reason)
        if reason is None:
            joins = (join_group(DISTANCES, distances), join_group(CLASSES, classes))
            decode = Distances(tuple(level.stride for level in distances), widths[0] // 4)
            boxes, scores = map(whole_tap, joins)
            found.append(Layout(name, boxes, scores, None, activation_of(near), decode, joins))
    if len(found) == 1:
        return found[0]
    if found:
        return Mismatch("either output may be the class scores")
    return Mismatch("; with the outputs exchanged, ".join(filter(None, reasons)))


def _not_in_strides(
    probe: Probe, certain: bool, bins: int, distances: list[np.ndarray], group: list[Level]
) -> str | None:
    """Return why distances without bins are not in strides; None if they are, or may be."""
    if bins != 1 or not certain:
        return None
    pixels = in_pixels(distances, [level.stride for level in group], probe.raw.image)
    return "its distances are in pixels, not in strides" if pixels else None


LEVELS = HeadSpec(NAME, match, tasks=("detect", "pose"))
GFL = HeadSpec(GFL_NAME, match_low_corners, pixels=PIXELS["imagenet"])
