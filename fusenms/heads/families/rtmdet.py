"""RTMDet, before its decode: per level class logits and distances in pixels, which its network already multiplies by the stride.

Distances are measured from the low corner of each cell. Source: open-mmlab/mmdetection, `RTMDetHead` and `MlvlPointGenerator` (offset 0).
"""

from __future__ import annotations

from dataclasses import replace

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.families.levels import match_levels
from fusenms.heads.level_outputs import in_pixels, read_level
from fusenms.heads.probe import Probe
from fusenms.layout import Distances, Layout

NAME = "rtmdet"
STRIDES = (8, 16, 32)


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize levels of classes and of distances in pixels."""
    layout = match_levels(probe, False, NAME)
    if isinstance(layout, Mismatch):
        return layout
    decode, parts = layout.decode, layout.joins[0].parts
    assert isinstance(decode, Distances)
    if decode.bins != 1 or len(layout.joins) != 2:
        return Mismatch(f"found {decode.bins} bins; expected plain distances, apart from the classes")
    by_name = {sample.tensor: read_level(probe, sample) for sample in probe.samples}
    distances = [level.values for part in parts if (level := by_name[part]) is not None]
    pixels = in_pixels(distances, decode.strides, probe.raw.image)
    if pixels is False or (certain and pixels is None):
        return Mismatch("nothing shows that its distances are in pixels, not in strides")
    if certain and decode.strides != STRIDES:
        return Mismatch(f"found strides {list(decode.strides)}; expected {list(STRIDES)}")
    return replace(layout, decode=replace(decode, pixels=True, point=0.0))


RTMDET = HeadSpec(NAME, match, pixels=PIXELS["bgr255-imagenet"])
