"""The head of an image, as the reference reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusenms import reference
from fusenms.layout import Layout
from fusenms.reference import Candidates, Floats


@dataclass(frozen=True)
class ImageHead:
    """Reads the head tensors of a run, ``[B, …]`` by name.

    Attributes:
        layout: meaning of the head.
        size: height and width of the model's input.
    """

    layout: Layout
    size: tuple[int, int]

    @property
    def each(self) -> int:
        """Number of images that the network sees for one image of the results."""
        return 1

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs of the graph beside the images."""
        return {}

    def candidates(self, head: Mapping[str, np.ndarray], image: int) -> Candidates:
        """All candidates of an image; see `fusenms.reference.candidates`."""
        return reference.candidates(head, image, self.layout, self.size)

    def keypoints(self, head: Mapping[str, np.ndarray], image: int, numbers: NDArray[np.int64]) -> Floats:
        """Keypoints of candidates of an image; see `fusenms.reference.keypoints`."""
        return reference.keypoints(head, image, self.layout, self.size, numbers)
