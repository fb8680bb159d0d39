"""`Network`: a PyTorch detector, ready for export."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fusenms.artifacts.preprocessing import Pixels
from fusenms.layout import Layout


@dataclass(frozen=True)
class Network:
    """A PyTorch detector, ready for export.

    Attributes:
        module: the network, in evaluation mode, float32, on the CPU. It takes ``[B, 3, height, width]`` and returns the tensors that
            ``layout.sources`` names, in that order.
        layout: the meaning of these tensors.
        class_names, task, source: as in `RawModel`.
        size: default input size (height, width), in pixels.
        stride: height and width must be multiples of it, in pixels.
        open_size: whether the network works at sizes other than the traced one.
        pixels, stretch, notes: as in `RawModel`.
        examples: images ``[n, 3, height, width]`` to compare on, beside those of fusenms.
        rebuilt: whether it consists of modules of fusenms only, which have no branch on values and treat each image by itself.
    """

    module: nn.Module
    layout: Layout
    class_names: tuple[str, ...]
    task: str
    source: str
    size: tuple[int, int]
    stride: int
    open_size: bool = True
    pixels: Pixels | None = None
    stretch: bool | None = None
    notes: tuple[str, ...] = ()
    examples: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.float32))
    rebuilt: bool = False
