"""What a detector family has to say of itself."""

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
    """A detector family. ``match`` looks at the probe and never edits; ``certain`` false accepts what only contradicts nothing.

    ``match(probe, certain)``: with ``certain`` the family must be shown by the probe; without (the user named
    the family) it is enough that nothing speaks against it. ``tasks`` are what its heads can be for. ``pixels`` and ``stretch`` are
    how networks of the family usually want their images.
    """

    name: str
    match: Callable[[Probe, bool], Layout | Mismatch]
    tasks: tuple[str, ...] = ("detect",)
    pixels: Pixels = field(default=PIXELS["rgb"])
    stretch: bool = False


def match_pairs(probe: Probe, judge: Callable[[Pair], Layout | Mismatch]) -> Layout | Mismatch:
    """What ``judge`` makes of two outputs as boxes and class scores: the one way to read them that it takes."""
    found = pairs(probe)
    if isinstance(found, str):
        return Mismatch(found)
    results = [judge(pair) for pair in found]
    layouts = [result for result in results if isinstance(result, Layout)]
    if len(layouts) > 1:
        return Mismatch("either output may be the boxes")
    return layouts[0] if layouts else results[0]
