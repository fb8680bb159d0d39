"""`RawHead`: the meaning of a raw model's head, and everything else that fusing needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusenms.artifacts.preprocessing import Pixels
from fusenms.layout import Layout, Tap


@dataclass(frozen=True, kw_only=True)
class RawHead:
    """The head of one raw model.

    Attributes:
        layout: meaning of the head's tensors.
        pixels: pixel format that the network expects.
        stretch: whether the network expects images stretched to its size instead of letterboxed.
        shapes: shape of each head tensor at the default image size, without the batch.
    """

    layout: Layout
    pixels: Pixels
    stretch: bool
    shapes: Mapping[str, tuple[int, ...]]

    def channels(self, tap: Tap) -> int:
        """Number of channels of the tensor that a tap belongs to."""
        return self.shapes[tap.tensor][tap.channel_axis - 1]

    def candidates(self, tap: Tap) -> int:
        """Number of candidates of the tensor that a tap belongs to."""
        return self.shapes[tap.tensor][tap.candidate_axis - 1]
