"""NanoDet and PicoDet: distances in 8 bins and class probabilities, in separate levels or in one output (NanoDet-Plus).

NanoDet-Plus gives ``[B, N, C + 32]``, classes first, and measures distances from the low corner of each cell. Earlier releases measure from
the center, as PicoDet does, which has a level more, flat levels, and takes RGB. Sources: RangiLyu/nanodet, `get_single_level_center_point`
(earlier) and `get_single_level_center_priors` (Plus); PaddlePaddle/PaddleDetection, `PicoHead`.
"""

from __future__ import annotations

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.families.levels import NANODET_BINS, is_nanodet, match_levels
from fusenms.heads.probe import Probe, are_probabilities, width_of
from fusenms.layout import Activation, Distances, Layout, Tap

NAME, PICODET_NAME = "nanodet", "picodet"
PICODET_STRIDES = (8, 16, 32, 64)
CHANNELS = 4 * NANODET_BINS


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize either form."""
    if len(probe.samples) == 1:
        return _match_plus(probe, certain)
    layout = match_levels(probe, certain, NAME)
    if isinstance(layout, Layout) and not is_nanodet(layout):
        return Mismatch(f"expected {NANODET_BINS} bins and class probabilities")
    if isinstance(layout, Layout) and certain and _has_levels_of_picodet(layout):
        return Mismatch(f"found the strides of {PICODET_NAME}, which takes other pixels")
    return layout


def match_picodet(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize four levels, whose classes are probabilities."""
    layout = match_levels(probe, certain, PICODET_NAME)
    if isinstance(layout, Layout) and not (is_nanodet(layout) and (not certain or _has_levels_of_picodet(layout))):
        return Mismatch(f"expected {NANODET_BINS} bins, class probabilities and strides {list(PICODET_STRIDES)}")
    return layout


def _has_levels_of_picodet(layout: Layout) -> bool:
    assert isinstance(layout.decode, Distances)
    return layout.decode.strides == PICODET_STRIDES


def _match_plus(probe: Probe, certain: bool) -> Layout | Mismatch:
    sample = probe.samples[0]
    shape = list(sample.value.shape)
    strides = probe.strides(1, shape[1]) if len(shape) == 3 else None
    classes = shape[-1] - CHANNELS
    if strides is None or classes < 1:
        return Mismatch(f"found an output of shape {shape}; expected [batch, candidates, classes + {CHANNELS}]")
    rows, names = sample.value[0], probe.raw.class_names
    if names and len(names) != classes:
        return Mismatch(
            f"found {classes} channels before {CHANNELS} of distances, but {len(names)} class names in the metadata"
        )
    if not are_probabilities(rows[:, :classes]) or are_probabilities(rows[:, classes:]):
        return Mismatch(f"expected {classes} class probabilities, then {CHANNELS} logits of distances")
    widths = [width_of(part, shape[1]) for part in sample.parts if part.ndim > 1]
    if certain and not names and widths != [classes, CHANNELS]:
        return Mismatch(
            f"nothing shows where the classes end (no class names; joined from {widths or 'unknown'} channels); "
            f"if the last {CHANNELS} channels are distances, say family={NAME!r}"
        )
    boxes, scores = Tap(sample.tensor, 2, classes, classes + CHANNELS), Tap(sample.tensor, 2, 0, classes)
    return Layout(NAME, boxes, scores, None, Activation.NONE, Distances(strides, NANODET_BINS, point=0.0))


NANODET = HeadSpec(NAME, match, pixels=PIXELS["bgr255-imagenet"])
PICODET = HeadSpec(PICODET_NAME, match_picodet, pixels=PIXELS["imagenet"], stretch=True)
