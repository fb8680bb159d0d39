"""Compares an exported network with PyTorch on unlike images, alone and together, and at several sizes.

1. PyTorch runs each image alone. This is the truth for everything below.
2. PyTorch runs images together, unless fusenms built the network, from modules that work on each image by itself.
3. ONNX Runtime runs the export at several batch sizes.

A trace has only one way through the code. Unlike images, batches and sizes show a branch that it has not taken.
"""

from __future__ import annotations

import linecache
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from torch import nn
from torch.jit._trace import TracerWarning

from fusenms.errors import SourceError, first_line
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import largest_difference, unlike_images

if TYPE_CHECKING:
    from fusenms.sources.network import Network

BATCHES = (1, 2, 3, 7)
TOLERANCE = 1e-3
"""Largest difference, absolute for values up to `FULL_SCALE`; float32 rounding gives about 1e-4 on logits of magnitude ten."""
FULL_SCALE = 10.0
USUAL_STEP = 32
DOCTOR = "fusenms.doctor(module, example) looks for the line of code"
Size = tuple[int, int]


@dataclass(frozen=True)
class Baked:
    """A place in the code of the network where the trace has taken a value as a constant."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}{f' `{code[:80]}`' if code else ''}: {self.what}"


def baked_in(caught: Sequence[warnings.WarningMessage]) -> tuple[Baked, ...]:
    """The tracer's warnings among those caught, each place once."""
    found: dict[tuple[str, int], Baked] = {}
    for item in caught:
        if issubclass(item.category, TracerWarning):
            said = str(item.message).split(" might cause ")[0].split(". ")[0]
            found.setdefault((item.filename, item.lineno), Baked(item.filename, item.lineno, said[:120]))
    return tuple(found.values())


def baked_text(baked: Sequence[Baked], most: int = 3) -> str:
    """Places that the trace has made constant, on one line; empty if there are none."""
    if not baked:
        return ""
    more = f" and {len(baked) - most} more" if len(baked) > most else ""
    return f"constant in the export: {'; '.join(map(str, baked[:most]))}{more}"


def step_of(network: Network, size: Size) -> int:
    """The step of the sizes at which the network is tried: its stride, or that of its layout, if the size is a multiple of it."""
    strides = getattr(network.layout.decode, "strides", (USUAL_STEP,))
    return network.stride if network.stride > 1 else math.gcd(*size, max(strides))


def other_sizes(network: Network, size: Size) -> list[Size]:
    """Sizes for a network of dynamic size: smaller, higher, wider, and larger unless fusenms built the network. Sides are unequal."""
    step = step_of(network, size)
    small = tuple(max(step, side // 2 // step * step) for side in size)
    large = tuple(2 * side for side in size)
    sizes = [(small[0], small[1] + step), (large[0], small[1]), (small[0], large[1])]
    return sizes if network.rebuilt else [*sizes, (large[0], large[1] + step)]


def compare(network: Network, model: onnx.ModelProto, sizes: Sequence[Size], baked: Sequence[Baked]) -> float:
    """Return the largest absolute difference between ONNX Runtime and PyTorch.

    Args:
        sizes: sizes (height, width) in pixels. Every kind of image and every batch is tried at the last one, and one image at the others.

    Raises:
        SourceError: the network mixes the images of a batch, or the export does not run, or it differs from PyTorch.
    """
    session, worst = Session(model, source=network.source), 0.0
    if not session.inputs:
        cause = _cause(network, baked)
        raise SourceError(
            f"{network.source}: the exported network does not depend on the image, which the network does{cause}"
        )
    for size in sizes:
        worst = max(
            worst, _Comparison(network, session, size, baked).run(BATCHES if size == sizes[-1] else BATCHES[:1])
        )
    return worst


def run(module: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run a module without gradients."""
    with torch.no_grad():
        return tuple(module(images))


class _Comparison:
    """The comparison at one size."""

    def __init__(self, network: Network, session: Session, size: Size, baked: Sequence[Baked]) -> None:
        self.network, self.session, self.size, self.baked = network, session, size, baked
        self.images = unlike_images(*size) | {
            f"example {i}": image for i, image in enumerate(network.examples) if image.shape[1:] == size
        }
        self.kinds = list(self.images)
        self.alone: dict[str, list[np.ndarray]] = {}

    def run(self, batches: Sequence[int]) -> float:
        """Return the largest absolute difference at these batch sizes."""
        worst = 0.0
        for kinds in self._orders(batches):
            expected = self._expected(kinds)
            if len(kinds) > 1 and not self.network.rebuilt:
                self._compare(self._pytorch(kinds), expected, kinds, mixed=True)
            worst = max(worst, self._compare(self._onnx(kinds), expected, kinds))
        return worst

    def _orders(self, batches: Sequence[int]) -> Iterator[list[str]]:
        """Kinds of the images of each run. Each kind comes alone too, if the network may have a branch on values."""
        start = 0
        for batch in batches:
            if batch == 1 and not self.network.rebuilt:
                every = (
                    self.kinds
                    if len(batches) > 1
                    else [self.kinds[0], *(k for k in self.kinds if k.startswith("example"))]
                )
                yield from ([kind] for kind in every)
            else:
                yield [self.kinds[(start + i) % len(self.kinds)] for i in range(batch)]
                start += batch

    def _expected(self, kinds: list[str]) -> list[np.ndarray]:
        for kind in kinds:
            if kind not in self.alone:
                self.alone[kind] = self._pytorch([kind])
        return [np.concatenate(parts) for parts in zip(*(self.alone[kind] for kind in kinds), strict=True)]

    def _filled(self, kinds: list[str]) -> np.ndarray:
        return np.stack([self.images[kind] for kind in kinds])

    def _pytorch(self, kinds: list[str]) -> list[np.ndarray]:
        try:
            return [value.numpy() for value in run(self.network.module, torch.from_numpy(self._filled(kinds)))]
        except Exception as error:  # the module can raise any error
            raise SourceError(
                f"{self.network.source}: does not run on {self._place(kinds)} ({type(error).__name__}: {first_line(error)})"
            ) from error

    def _onnx(self, kinds: list[str]) -> list[np.ndarray]:
        try:
            return self.session.run({self.session.inputs[0]: self._filled(kinds)}, self.network.layout.sources)
        except SourceError as error:
            raise SourceError(
                f"{self.network.source}: the exported network does not run in ONNX Runtime on {self._place(kinds)} "
                f"({first_line(error)}){self._cause()}"
            ) from error

    def _compare(
        self, got: list[np.ndarray], expected: list[np.ndarray], kinds: list[str], mixed: bool = False
    ) -> float:
        """Return the largest absolute difference.

        Raises:
            SourceError: it is above rounding.
        """
        axes, worst = self.network.layout.ordered_axes, 0.0
        for i, kind in enumerate(kinds):
            one, other = ([value[i : i + 1] for value in side] for side in (got, expected))
            found = largest_difference(one, other, axes, floor=FULL_SCALE)
            worst = max(worst, found.absolute)
            if found.share <= TOLERANCE / FULL_SCALE and len(got[0]) == len(kinds):
                continue
            name, where = self.network.layout.sources[found.tensor], self._place(kinds, kind)
            if mixed:
                raise SourceError(
                    f"{self.network.source}: the network itself gives other results in a batch: {name} differs by {found.absolute:.2g} on "
                    f"{where} from the same image alone; expected at most {TOLERANCE:g}, for rounding. Remove what works across the "
                    f"images of a batch or depends on their number{self._cause()}"
                )
            raise SourceError(
                f"{self.network.source}: the exported network differs from PyTorch by {found.absolute:.2g} in {name}, on {where}; expected "
                f"at most {TOLERANCE:g}, for rounding{self._cause()}"
            )
        return worst

    def _place(self, kinds: list[str], kind: str | None = None) -> str:
        """The batch in words: size, number of images, kind of the image."""
        what = f"the image {kind or kinds[0]!r}" if len(kinds) == 1 or kind else "images"
        batch = f" in a batch of {len(kinds)}" if len(kinds) > 1 else " alone"
        return f"{what}{batch} at {self.size[0]}x{self.size[1]}"

    def _cause(self) -> str:
        return _cause(self.network, self.baked)


def _cause(network: Network, baked: Sequence[Baked]) -> str:
    advice = "" if network.rebuilt else f"; {DOCTOR}"
    return f"; {baked_text(baked)}{advice}" if baked else advice
