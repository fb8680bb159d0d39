"""Outputs by level: what each holds, and whether its distances are in strides or in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusenms.artifacts.raw import ImageInput
from fusenms.heads.probe import Probe, Sample, are_probabilities, as_probabilities
from fusenms.layout import Activation, Join, Tap, cells_along

STRIDES = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Level:
    """One output of one level: its values ``[n, C]``. ``axis`` is the channel axis in a `Join`."""

    tensor: str
    stride: int
    axis: int
    values: np.ndarray


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


def group_levels(levels: Sequence[Level]) -> list[list[Level]] | None:
    """Group outputs by what they hold: one of each level, finest first, all with the same channels and axis; None if levels differ.

    The groups are sorted by the number of channels.
    """
    strides = sorted({level.stride for level in levels})
    by_stride = [[level for level in levels if level.stride == stride] for stride in strides]
    if not levels or any(len(some) != len(by_stride[0]) for some in by_stride):
        return None
    rows = [sorted(some, key=lambda level: (level.values.shape[1], level.axis)) for some in by_stride]
    groups = [list(group) for group in zip(*rows, strict=True)]
    alike = all(len({(level.values.shape[1], level.axis) for level in group}) == 1 for group in groups)
    return groups if alike else None


def score_box_groups(probe: Probe) -> tuple[list[Level], list[Level], list[Level]] | str:
    """Return the groups of three outputs a level: class scores, a score of one channel, and four box channels; or why there are none."""
    shapes = [list(sample.value.shape) for sample in probe.samples]
    levels = [level for sample in probe.samples if (level := read_level(probe, sample)) is not None]
    groups = group_levels(levels) if len(levels) == len(shapes) else None
    expected = f"found outputs of shape {shapes}; expected for each level class scores, one of 4 channels and one of 1"
    if groups is None or len(groups) != 3:
        return expected
    by_width = {group[0].values.shape[1]: group for group in groups}
    if len(by_width) == 2 and set(by_width) == {1, 4}:  # one class
        ones = [group for group in groups if group[0].values.shape[1] == 1]
        if len(ones) == 2 and np.array_equal(values_of(ones[0]), values_of(ones[1])):
            return "its two outputs of one channel a level are the same"
        return (ones[0], ones[1], by_width[4]) if len(ones) == 2 else f"{expected}, with another number of classes"
    if len(by_width) < 3 or not {1, 4} < set(by_width):
        return expected
    (classes,) = (group for width, group in by_width.items() if width not in (1, 4))
    return classes, by_width[1], by_width[4]


def join_group(tensor: str, group: Sequence[Level]) -> Join:
    """The head tensor of a group."""
    return Join(tensor, tuple(level.tensor for level in group), group[0].axis, group[0].values.shape[1])


def whole_tap(join: Join) -> Tap:
    """All channels of a joined tensor."""
    return Tap(join.tensor, join.channel_axis, 0, join.channels)


def values_of(group: Sequence[Level]) -> np.ndarray:
    """Values ``[N, C]`` of a group."""
    return np.concatenate([level.values for level in group])


def in_pixels(distances: Sequence[np.ndarray], strides: Sequence[int], image: ImageInput) -> bool | None:
    """Whether distances, given by level, are in pixels (True) or in strides (False); None if nothing shows it.

    On the coarsest level, the two differ the most: distances in pixels, taken for strides, reach far beyond the image, and distances in
    strides, taken for pixels, lie within the cell. Only one of these can be so.
    """
    stride = max(strides)
    middle = float(np.median(np.abs(distances[list(strides).index(stride)])))
    beyond, within = middle * stride > max(image.height, image.width), middle < stride / 2
    return None if beyond == within else beyond


def activation_of(scores: np.ndarray) -> Activation:
    """How scores become probabilities: not at all, if they are from 0 to 1; otherwise by a sigmoid."""
    return Activation.NONE if are_probabilities(scores) else Activation.SIGMOID


def not_classes(values: np.ndarray) -> str | None:
    """Return why these are not class scores; None if they may be. Most class scores are near 0."""
    probabilities = as_probabilities(values)
    if np.isfinite(values).all() and probabilities.mean() < 0.1:
        return None
    return f"found class scores of {probabilities.mean():.2g} on average, as probabilities; expected most near 0"


def not_distances(values: np.ndarray) -> str | None:
    """Return why these are not distances; None if they may be: the channels are four times the bins, and not all values are from 0 to 1."""
    if values.shape[1] % 4:
        return f"found {values.shape[1]} channels of distances; expected four times the number of bins"
    if are_probabilities(values):
        return "found only values from 0 to 1 among the distances"
    return None
