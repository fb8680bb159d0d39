"""`Run`: something that runs on images, whose inner tensors can be read: a PyTorch module, an ONNX graph, an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

FLOAT32, FLOAT16, BFLOAT16, INT8 = 2.0**-24, 2.0**-11, 2.0**-8, 2.0**-8
"""Unit roundoff of each precision: the largest relative error of one rounding."""
PRECISIONS = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8}
IMAGES = 0
"""The number of the place that holds the images, in every run."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor that a run makes, and what makes it.

    Attributes:
        number: its place in the topological order; the images are number 0.
        name: name of the tensor.
        operator: type of the operator, such as ``Conv`` or ``aten::convolution``.
        node: name of the node; empty if it has none.
        module: path of the module in PyTorch; empty if it is not known.
        inputs: numbers of the places that it is computed from. Weights and sizes are no places.
    """

    number: int
    name: str
    operator: str = ""
    node: str = ""
    module: str = ""
    inputs: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = self.node or self.module or self.name
        return f"{self.operator} {where}"


Read = Callable[[np.ndarray], list[np.ndarray]]
"""Runs one image ``[1, 3, height, width]`` and returns the values of the places that it was made for, each of one image."""


class Run(Protocol):
    """Something that runs on images.

    Attributes:
        source: its name, for messages.
        places: its tensors in topological order. All of them depend on the images.
        outputs: numbers of its outputs by name.
        unit: unit roundoff of its precision.
        readable: numbers of the places whose values can be read.
        jitters: whether it can be run with jitter.
    """

    source: str
    places: list[Place]
    outputs: dict[str, int]
    unit: float
    readable: list[int]
    jitters: bool

    def reader(self, numbers: Sequence[int], jitter: float = 0.0) -> Read:
        """Return a function that runs an image and reads places.

        Args:
            jitter: multiply each result of a computation by a random number from 1 - jitter to 1 + jitter, to see how rounding grows.
        """

    def bytes_of(self, number: int) -> int:
        """Memory that the values of a place need, as far as it is known."""
