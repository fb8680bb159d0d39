"""DETR and YOLOS: a softmax over the classes and "no object", which is the last class; no suppression.

Two outputs: class logits (or their softmax) ``[B, queries, C + 1]`` and boxes ``[B, queries, 4]``, cx, cy, w, h normalized to the
input. The class of a query is its best one, as in the paper (Carion et al., 2020).
"""

from __future__ import annotations

from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads.base import HeadSpec, Mismatch, match_pairs
from fusenms.heads.probe import Pair, Probe, background_of, not_queries, sum_to_one
from fusenms.layout import Activation, BoxFormat, Decoded, Layout

NAME = "detr"


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """Recognize queries whose last class is "no object"."""
    return match_pairs(probe, lambda pair: _match_pair(probe, pair, certain))


def _match_pair(probe: Probe, pair: Pair, certain: bool) -> Layout | Mismatch:
    if reason := not_queries(pair.boxes):
        return Mismatch(reason)
    every = pair.scores.shape[1]
    names = probe.raw.class_names
    if every < 2 or (names and len(names) != every - 1):
        return Mismatch(
            f"found {every} classes{f' and {len(names)} class names' if names else ''}; expected one more, for no object"
        )
    if background_of(pair.scores) != every - 1 and (certain and not names):
        return Mismatch(
            f"the last class is not the best one of most queries, as the one for no object would be; if it is that one, say family={NAME!r}"
        )
    scores, last = pair.classes(0, every - 1), pair.classes(every - 1, every)
    decode = Decoded(BoxFormat.CXCYWH, normalized=True)
    if sum_to_one(pair.scores):
        return Layout(NAME, pair.box_tap, scores, None, Activation.NONE, decode, suppress=False)
    return Layout(NAME, pair.box_tap, scores, None, Activation.SOFTMAX, decode, suppress=False, background=last)


DETR = HeadSpec(NAME, match, pixels=PIXELS["imagenet"], stretch=True)
