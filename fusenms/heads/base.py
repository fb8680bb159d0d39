"""What a detector family has to say of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusenms.artifacts import PIXELS, Pixels
from fusenms.heads.evidence import Evidence
from fusenms.layout import Layout


@dataclass(frozen=True)
class Mismatch:
    """Why a family does not fit, as a clause: "found …; expected …"."""

    reason: str


@dataclass(frozen=True)
class HeadSpec:
    """A detector family. ``match`` looks at the evidence and never edits; ``certain`` false accepts what only contradicts nothing.

    ``match(evidence, certain)``: with ``certain`` the family must be shown by the evidence; without (the user named
    the family) it is enough that nothing speaks against it. ``pixels`` and ``stretch`` are how networks of the family usually want
    their pictures.
    """

    name: str
    match: Callable[[Evidence, bool], Layout | Mismatch]
    pixels: Pixels = field(default=PIXELS["rgb"])
    stretch: bool = False
