"""Heads with separate, undecoded levels, as in exports for NPUs: distances and class scores for each level.

A level has two outputs, distances ``[B, 4 * bins, rows, columns]`` and classes ``[B, C, rows, columns]``, or one output with both,
distances first; behind these, keypoints, if the file's metadata says so. Channels may come last, and a level may be flat:
``[B, rows * columns, C]``. Classes are logits or probabilities.
Additional outputs with one channel (sums of scores, for thresholding) are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.probe import Probe, Sample, are_probabilities, as_probabilities, width_of
from fusenms.heads.task_outputs import task_channels
from fusenms.layout import Activation, Distances, Join, KeypointTerms, Layout, Tap, cells_along

NAME, GFL_NAME = "levels", "gfl"
DISTANCES, CLASSES = "fusenms/head_distances", "fusenms/head_classes"
STRIDES = (4, 8, 16, 32, 64, 128)
NANODET_BINS = 8
USUAL_BINS = 16
GFL_BINS = 17
KNOWN_BINS = (1, NANODET_BINS, USUAL_BINS, GFL_BINS)
"""Other numbers may be anchors: nine of them have 36 channels of boxes."""


@dataclass(frozen=True)
class Level:
    """One output of one level: its values ``[n, C]``. ``axis`` is the channel axis in a `Join`."""

    tensor: str
    stride: int
    axis: int
    values: np.ndarray


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
    wide = [level for level in levels if level.values.shape[1] > 1 or len(levels) <= 6]
    strides = sorted({level.stride for level in wide})
    if len(levels) != len(shapes) or len(wide) not in (len(strides), 2 * len(strides)) or len(wide) < 2:
        return Mismatch(
            f"found outputs of shape {shapes}; expected distances and class scores for each level, in one or two outputs"
        )
    by_stride = [[level for level in wide if level.stride == stride] for stride in strides]
    if any(len(some) != len(by_stride[0]) for some in by_stride):
        return Mismatch(f"found outputs of shape {shapes}; expected the same number of outputs for each level")
    groups = _groups(by_stride)
    if groups is None:
        return Mismatch(f"found outputs of shape {shapes}; expected the same channels in every level")
    if len(groups) == 1:
        return _match_joined(probe, certain, name, groups[0])
    return _match_apart(probe, certain, name, groups)


def read_level(probe: Probe, sample: Sample) -> Level | None:
    """Read an output ``[1, C, rows, columns]``, ``[1, rows, columns, C]``, ``[1, n, C]`` or ``[1, C, n]`` as a level, if it is one."""
    shape, image = sample.value.shape, probe.raw.image
    for stride in STRIDES:
        rows, columns = cells_along(image.height, stride), cells_along(image.width, stride)
        if len(shape) == 4 and shape[2:] == (rows, columns):
            return Level(sample.tensor, stride, 1, sample.value[0].reshape(shape[1], -1).T)
        if len(shape) == 4 and shape[1:3] == (rows, columns):
            return Level(sample.tensor, stride, 2, sample.value[0].reshape(-1, shape[3]))
        if len(shape) == 3 and rows * columns in shape[1:] and shape[1] != shape[2]:
            axis = 2 if shape[1] == rows * columns else 1
            return Level(sample.tensor, stride, axis, sample.value[0] if axis == 2 else sample.value[0].T)
    return None


def _groups(by_stride: Sequence[Sequence[Level]]) -> list[list[Level]] | None:
    """Group the outputs of all levels by channels and axis; None if the levels differ in them."""
    kinds = sorted({(level.values.shape[1], level.axis) for level in by_stride[0]})
    groups = [[x for level in by_stride for x in level if (x.values.shape[1], x.axis) == kind] for kind in kinds]
    if all(len(group) == len(by_stride) for group in groups) and sum(map(len, groups)) == sum(map(len, by_stride)):
        return groups
    return None


def _match_joined(probe: Probe, certain: bool, name: str, group: list[Level]) -> Layout | Mismatch:
    """Match one output per level: 4 * 16 channels of distances, then the classes."""
    width, start = group[0].values.shape[1], 4 * USUAL_BINS
    names, extra = probe.raw.class_names, task_channels(probe, [])
    if isinstance(extra, Mismatch):
        return extra
    stop = width - extra
    if stop <= start or (names and len(names) != stop - start):
        classes = f"{len(names)} of classes" if names else "those of the classes"
        points = f" and {extra} of keypoints" if extra else ""
        return Mismatch(f"found {width} channels per level; expected {start} of distances, then {classes}{points}")
    values = np.concatenate([level.values for level in group])
    if reason := _not_classes(values[:, start:stop]) or _not_distances(values[:, :start]):
        return Mismatch(reason)
    widths = [width_of(part, len(group[0].values)) for part in probe.samples[0].parts if part.ndim > 2]
    if certain and not names and widths != [start, stop - start]:
        return Mismatch(
            f"nothing shows that {width} channels per level are {start} of distances and {width - start} of classes, and not three anchors "
            f"or classes first (no class names; joined from {widths or 'unknown'} channels); if they are, say family={name!r}"
        )
    join = Join(DISTANCES, tuple(level.tensor for level in group), group[0].axis, width)

    def tap(first: int, last: int) -> Tap:
        return Tap(join.tensor, join.channel_axis, first, last)

    decode = Distances(tuple(level.stride for level in group), USUAL_BINS)
    shape = probe.keypoints if extra else None
    terms = None if shape is None else KeypointTerms(tap(stop, width), shape[1], factor=2.0)
    activation = _activation(values[:, start:stop])
    return Layout(name, tap(0, start), tap(start, stop), None, activation, decode, (join,), keypoints=terms)


def _match_apart(probe: Probe, certain: bool, name: str, groups: list[list[Level]]) -> Layout | Mismatch:
    """Match two outputs per level. Their values, and the number of class names if there are any, show which output is which."""
    if probe.raw.task != "detect":
        return Mismatch(f"the file says that its task is {probe.raw.task!r}; expected 'detect'")
    found, reasons = [], []
    for distances, classes in (groups, groups[::-1]):
        widths = distances[0].values.shape[1], classes[0].values.shape[1]
        far, near = (np.concatenate([level.values for level in some]) for some in (distances, classes))
        names = probe.raw.class_names
        reason = _not_distances(far) or _not_classes(near)
        if certain and not reason and widths[0] // 4 not in KNOWN_BINS:
            reason = (
                f"found {widths[0]} channels of boxes and {widths[1]} of classes, which may be those of several anchors; if they are "
                f"{widths[0] // 4} bins a side, say family={name!r}"
            )
        if names and len(names) != widths[1]:
            reason = f"found {widths[1]} classes, but {len(names)} class names in the metadata"
        reasons.append(reason)
        if reason is None:
            joins = tuple(
                Join(tensor, tuple(level.tensor for level in some), some[0].axis, width)
                for tensor, some, width in zip((DISTANCES, CLASSES), (distances, classes), widths, strict=True)
            )
            decode = Distances(tuple(level.stride for level in distances), widths[0] // 4)
            boxes, scores = (Tap(join.tensor, join.channel_axis, 0, join.channels) for join in joins)
            found.append(Layout(name, boxes, scores, None, _activation(near), decode, joins))
    if len(found) == 1:
        return found[0]
    if found:
        return Mismatch("either output may be the class scores")
    return Mismatch("; with the outputs exchanged, ".join(filter(None, reasons)))


def _activation(classes: np.ndarray) -> Activation:
    return Activation.NONE if are_probabilities(classes) else Activation.SIGMOID


def _not_classes(values: np.ndarray) -> str | None:
    """Return why these are not class scores; None if they may be. Most class scores are near 0."""
    probabilities = as_probabilities(values)
    if np.isfinite(values).all() and probabilities.mean() < 0.1:
        return None
    return f"found class scores of {probabilities.mean():.2g} on average, as probabilities; expected most near 0"


def _not_distances(values: np.ndarray) -> str | None:
    """Return why these are not distances; None if they may be: the channels are four times the bins, and not all values are from 0 to 1."""
    if values.shape[1] % 4:
        return f"found {values.shape[1]} channels of distances; expected four times the number of bins"
    if are_probabilities(values):
        return "found only values from 0 to 1 among the distances"
    return None


LEVELS = HeadSpec(NAME, match, tasks=("detect", "pose"))
GFL = HeadSpec(GFL_NAME, match_low_corners, pixels=PIXELS["imagenet"])
