"""The definition of a detector family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.heads.probe import Pair, Probe, pairs
from fusenms.layout import Layout


@dataclass(frozen=True)
class Mismatch:
    """Why a family does not fit, as a clause: "found …; expected …"."""

    reason: str


@dataclass(frozen=True)
class HeadSpec:
    """A detector family.

    ``match(probe, certain)`` inspects the probe and changes nothing. With ``certain``, the probe must show that the family fits. Without it
    (the user named the family), it is enough that nothing contradicts the family. ``tasks`` are the tasks that its heads support.
    ``pixels`` and ``stretch`` are the family's usual pixel format and stretching.
    """

    name: str
    match: Callable[[Probe, bool], Layout | Mismatch]
    tasks: tuple[str, ...] = ("detect",)
    pixels: Pixels = field(default=PIXELS["rgb"])
    stretch: bool = False


def match_pairs(probe: Probe, judge: Callable[[Pair], Layout | Mismatch]) -> Layout | Mismatch:
    """Let ``judge`` try each way to read two outputs as boxes and class scores. Return the layout if exactly one way fits."""
    found = pairs(probe)
    if isinstance(found, str):
        return Mismatch(found)
    results = [judge(pair) for pair in found]
    layouts = [result for result in results if isinstance(result, Layout)]
    if len(layouts) > 1:
        return Mismatch("either output may be the boxes")
    return layouts[0] if layouts else results[0]
