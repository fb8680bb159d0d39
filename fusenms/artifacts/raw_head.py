"""`RawHead`: what a raw model's head means, with all else that fusing needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusenms.artifacts.preprocessing import Pixels
from fusenms.layout import Layout, Tap


@dataclass(frozen=True, kw_only=True)
class RawHead:
    """The head of one raw model.

    Attributes:
        layout: what its tensors mean.
        pixels: what the network wants for pixels.
        stretch: whether it wants images stretched to its size rather than letterboxed.
        shapes: of each head tensor at the default image size, without the batch.
    """

    layout: Layout
    pixels: Pixels
    stretch: bool
    shapes: Mapping[str, tuple[int, ...]]

    def channels(self, tap: Tap) -> int:
        """Channels of the tensor that a tap is a part of."""
        return self.shapes[tap.tensor][tap.channel_axis - 1]

    def candidates(self, tap: Tap) -> int:
        """Candidates of the tensor that a tap is a part of."""
        return self.shapes[tap.tensor][tap.candidate_axis - 1]
