"""`Layout`: what the raw head of a detector means, as plain data.

A layout names the earliest tensors of the head and says how scores and boxes are decoded from them. Every fused file stores its layout,
so a file can be verified without its source.

Candidates of a gridded head are numbered by level, then anchor, then row, then column; with ``anchors_last``, by level, row, column,
anchor.
"""

from fusenms.layout.box_decodes import (
    BOX_DECODES,
    AnchorBoxes,
    AnchorDeltas,
    BoxDecode,
    BoxFormat,
    Decoded,
    Distances,
    Gridded,
    GridOffsets,
    PointOffsets,
    TanhOffsets,
    anchors_per_cell,
    candidates_per_level,
    cells_along,
    has_anchors_last,
    turned_around,
)
from fusenms.layout.head import Activation, Layout
from fusenms.layout.taps import LARGEST, MOST_CHANNELS, Join, Tap, other_axis
from fusenms.layout.task_terms import AngleTerm, KeypointTerms, MaskTerms

__all__ = [
    "BOX_DECODES",
    "LARGEST",
    "MOST_CHANNELS",
    "Activation",
    "AnchorBoxes",
    "AnchorDeltas",
    "AngleTerm",
    "BoxDecode",
    "BoxFormat",
    "Decoded",
    "Distances",
    "GridOffsets",
    "Gridded",
    "Join",
    "KeypointTerms",
    "Layout",
    "MaskTerms",
    "PointOffsets",
    "TanhOffsets",
    "Tap",
    "anchors_per_cell",
    "candidates_per_level",
    "cells_along",
    "has_anchors_last",
    "other_axis",
    "turned_around",
]
