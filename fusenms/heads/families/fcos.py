"""FCOS and heads like it, before their decode: per level class scores, four distances and a centerness.

Three outputs a level: ``[B, C, rows, columns]``, ``[B, 4, rows, columns]`` and ``[B, 1, rows, columns]``, in any order. Implementations
differ in the score, in the unit of the distances and in the point that these are measured from, and a file does not show which one it is:

- `fcos`, the authors' own: the square root of class times centerness; distances from the center of the cell, in strides or in pixels.
- `fcos-torchvision`: the same score; distances from the low corner, in strides.
- `fcos-mmdet`: class times centerness; distances from the center, in strides or in pixels.

Source: Tian et al., "FCOS", 2019; tianzhi0549/FCOS, pytorch/vision `FCOS`, open-mmlab/mmdetection `FCOSHead`.
"""

from __future__ import annotations

from functools import partial

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import activation_of, in_pixels, join_group, score_box_groups, values_of, whole_tap
from fusenms.heads.probe import Probe
from fusenms.layout import Distances, Layout

CLASSES, CENTERNESS, DISTANCES = "fusenms/head_classes", "fusenms/head_centerness", "fusenms/head_distances"


def match(
    probe: Probe, certain: bool, *, name: str, point: float, weight: float | None, strides_only: bool
) -> Layout | Mismatch:
    """Recognize levels of classes, distances and a centerness."""
    groups = score_box_groups(probe)
    if isinstance(groups, str):
        return Mismatch(groups)
    classes, centerness, boxes = groups
    distances = values_of(boxes)
    if (distances < 0).any():
        return Mismatch(f"found distances from {distances.min():.3g}; expected none below 0")
    strides = tuple(level.stride for level in boxes)
    pixels = in_pixels([level.values for level in boxes], strides, probe.raw.image)
    if strides_only and (pixels or (certain and pixels is None)):
        return Mismatch("nothing shows that its distances are in strides, as expected")
    if not strides_only and pixels is None:
        return Mismatch("nothing shows whether its distances are in pixels or in strides; describe them by a layout")
    activations = {activation_of(values_of(group)) for group in (classes, centerness)}
    if len(activations) > 1:
        return Mismatch("either class scores or the centerness had a sigmoid already")
    names = probe.raw.class_names
    if names and len(names) != classes[0].values.shape[1]:
        return Mismatch(f"found {classes[0].values.shape[1]} classes, but {len(names)} class names in the metadata")
    joins = (join_group(DISTANCES, boxes), join_group(CLASSES, classes), join_group(CENTERNESS, centerness))
    box_tap, class_tap, centerness_tap = map(whole_tap, joins)
    decode = Distances(strides, 1, point=point, pixels=bool(pixels))
    return Layout(name, box_tap, class_tap, centerness_tap, activations.pop(), decode, joins, objectness_weight=weight)


def _spec(name: str, point: float, weight: float | None, strides_only: bool, pixels: str) -> HeadSpec:
    matching = partial(match, name=name, point=point, weight=weight, strides_only=strides_only)
    return HeadSpec(name, matching, pixels=PIXELS[pixels])


FCOS = _spec("fcos", 0.5, 0.5, False, "bgr255-imagenet")
FCOS_TORCHVISION = _spec("fcos-torchvision", 0.0, 0.5, True, "imagenet")
FCOS_MMDET = _spec("fcos-mmdet", 0.5, None, False, "bgr255-imagenet")
