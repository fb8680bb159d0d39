"""FastestDet: one level; the score is objectness^0.6 * class^0.4.

One output ``[B, 5 + C, rows, columns]``: objectness, box terms, then a softmax over C classes. Source:
dog-qiuqiu/FastestDet, `handle_preds`.
"""

from __future__ import annotations

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch
from fusenms.heads.level_outputs import STRIDES
from fusenms.heads.probe import Probe, are_probabilities, sum_to_one
from fusenms.layout import Activation, Join, Layout, TanhOffsets, Tap, cells_along

NAME = "fastestdet"
WEIGHT = 0.6
HEAD = "fusenms/head"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize a single level of objectness, box terms and a softmax."""
    shapes, image = [list(sample.value.shape) for sample in probe.samples], probe.raw.image
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return Mismatch(f"found outputs of shape {shapes}; expected one [batch, 5 + classes, rows, columns]")
    sample, (_, width, rows, columns) = probe.samples[0], shapes[0]
    strides = [s for s in STRIDES if (cells_along(image.height, s), cells_along(image.width, s)) == (rows, columns)]
    if not strides or width < 7:
        return Mismatch(
            f"found an output of shape {shapes[0]}; expected [batch, 5 + classes, rows, columns] of one stride"
        )
    values = sample.value[0].reshape(width, -1).T
    if not are_probabilities(values[:, 0]) or not sum_to_one(values[:, 5:]):
        return Mismatch("expected objectness from 0 to 1, four box terms, and class scores that sum to 1")
    names = probe.raw.class_names
    if names and len(names) != width - 5:
        return Mismatch(f"found {width - 5} classes, but {len(names)} class names in the metadata")
    join = Join(HEAD, (sample.tensor,), 1, width)
    boxes, classes, objectness = (Tap(HEAD, 1, *span) for span in ((1, 5), (5, width), (0, 1)))
    decode = TanhOffsets((strides[0],))
    return Layout(NAME, boxes, classes, objectness, Activation.NONE, decode, (join,), objectness_weight=WEIGHT)


FASTESTDET = HeadSpec(NAME, match, pixels=PIXELS["bgr"], stretch=True)
