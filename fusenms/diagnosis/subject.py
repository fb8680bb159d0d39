"""A module that is examined: the images that it is run on, what it gives for them, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusenms.diagnosis.findings import Diagnosis, Finding, Place
from fusenms.diagnosis.places import forward_place, function_of
from fusenms.diagnosis.watching import Event, Watch
from fusenms.graph.unlike_images import largest_difference, unlike_images
from fusenms.sources.module import flattened

TOLERANCE = 1e-4
"""Largest difference that is rounding, relative to the largest value of a tensor."""
ROUNDING = 1e-5
"""A change of the image, relative to its values, that does no more than the rounding of some layers."""
STEP = 32
"""The other sizes are this many pixels larger, or twice as many."""
BATCHES = (1, 3)
Size = tuple[int, int]


class _Flat(nn.Module):
    """A module that returns the tensors of another one, as a flat tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(flattened(self.module(images))[0].values())


@dataclass
class Subject:
    """A module, and what the checks found.

    Attributes:
        module: takes images ``[B, 3, height, width]`` float32.
        operators: what it calls on ``base``, and where first; filled by its first run.
        explained: respects (content, batch, size) in which a finding already explains that the export differs.
    """

    module: nn.Module
    size: Size
    sizes: bool
    source: str
    opset: int
    operators: dict[str, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    dynamic: dict[str, str] = field(default_factory=dict)
    explained: set[str] = field(default_factory=set)

    @cached_property
    def forward(self) -> Place:
        """Where its forward is defined."""
        return forward_place(self.module)

    @cached_property
    def flat(self) -> nn.Module:
        """The module, with its outputs as a flat tuple."""
        return _Flat(self.module).eval()

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """One image of each kind, ``[1, 3, height, width]``."""
        return {kind: torch.from_numpy(values)[None] for kind, values in unlike_images(*self.size).items()}

    @cached_property
    def base(self) -> Tensor:
        """The batch of two that everything is compared with."""
        return self.images["patches"].repeat(2, 1, 1, 1)

    def diagnosis(self) -> Diagnosis:
        """What was found, each place once."""
        seen, kept = set(), []
        for finding in self.findings:  # the first one at a place is the most certain one
            if finding.kind == "batch-mixing" and finding.place == self.forward and self._explains_mixing():
                continue
            key = (finding.file, finding.line) if finding.line else finding.message
            if key not in seen or finding.kind == "output-structure":
                seen.add(key)
                kept.append(finding)
        return Diagnosis(findings=tuple(kept), dynamic=self.dynamic)

    def add(self, kind: str, place: Place, message: str, remedy: str = "", explains: str = "") -> None:
        """Add a finding, and the respect in which it explains that the export differs."""
        self.findings.append(Finding.at(kind, place, message, remedy))
        if explains:
            self.explained.add(explains)

    def run(self, images: Tensor) -> list[np.ndarray]:
        """Every tensor that the module gives for images ``[B, 3, height, width]``."""
        with torch.no_grad():
            return tensors(self.module(images))

    def steady(self, images: Tensor) -> bool:
        """Whether rounding leaves the results as they are. Where queries are chosen by their scores, it may exchange them."""
        plain, generator = self.run(images), torch.Generator().manual_seed(0)
        noises = (torch.empty_like(images).uniform_(-ROUNDING, ROUNDING, generator=generator) for _ in range(3))
        return all(alike(self.run(images * (1 + noise)), plain) for noise in noises)

    def events(self) -> Sequence[Event]:
        """What a run on ``base`` does that a trace does not see."""
        with torch.no_grad(), Watch() as watch:
            self.module(self.base)
        return watch.events

    def inputs(self) -> Iterator[tuple[str, str, Tensor]]:
        """Respect, its words, and images that differ from the base in that respect."""
        for kind in ("dark", "bright", "noise"):
            yield "content", "for another image", self.images[kind].repeat(2, 1, 1, 1)
        for factor, words in ((255.0, "for an image of large values"), (-1.0, "for an image below 0")):
            yield "content", words, factor * self.images["noise"].repeat(2, 1, 1, 1)
        for batch in BATCHES:
            yield "batch", f"for a batch of {batch}", self.images["patches"].repeat(batch, 1, 1, 1)
        if self.sizes:
            for height, width in self._other_sizes():
                image = torch.from_numpy(unlike_images(height, width)["patches"])[None]
                yield "size", f"at {height}x{width}", image.repeat(2, 1, 1, 1)

    def _other_sizes(self) -> list[Size]:
        return [(self.size[0] + STEP, self.size[1] + 2 * STEP), (self.size[0] + 2 * STEP, self.size[1])]

    def _explains_mixing(self) -> bool:
        """Whether something of the whole batch, which the trace keeps, is used in forward: a branch, a number, its length."""
        function = function_of(self.forward)
        kinds = ("control-flow", "detached-data", "baked-constant")
        return any(finding.kind in kinds and function_of(finding.place) == function for finding in self.findings)


def alike(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    """Whether two runs give the same, up to rounding."""
    if len(got) != len(expected):
        return False
    return not expected or largest_difference(list(got), list(expected)).share <= TOLERANCE


def tensors(found: Any) -> list[np.ndarray]:
    """Every tensor in what a module returns, in the order of the export."""
    return [tensor.detach().cpu().numpy() for tensor in flattened(found)[0].values()]
