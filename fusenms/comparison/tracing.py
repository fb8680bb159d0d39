"""Compares two runs tensor by tensor, a few at a time, and finds the first place where they part.

1. Each tensor of both runs becomes a sketch. Pairs whose sketches are near are candidates.
2. Candidates are compared exactly. Tensors that are equal within rounding are aligned.
3. From each output that has no equal tensor on the other side, the way back ends at aligned tensors. The operators whose inputs are all
   aligned and whose result is not are where the runs part. The first of them is named.
4. What lies between is paired by order, shape and nearest values, to say how far the runs are from each other.

What is rounding is measured: a run whose operators are each off by a few roundings shows how far each tensor moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from fusenms.comparison.alignment import Sketch, candidates, distances, in_order, joined, largest_share, sketch
from fusenms.comparison.runs import FLOAT32, IMAGES, Read, Run

ROUNDINGS = 4
"""Size of the jitter behind each operator, in units of the precision."""
MARGIN = 8.0
"""Differences up to this many times what the jitter changes are rounding."""
SUSPICIOUS = 3.0
"""The same, for the question where a difference begins that is known to be none of rounding."""
LEAST = 16
"""Differences up to so many units of the precision are rounding, whatever the jitter changes."""
UNSTABLE = 0.3
"""A tensor that rounding may change by this share of its largest value says nothing: a top-k has ordered it, or a threshold has cut it."""
BUDGET = 256 * 2**20
"""Memory of the values that are held at once, in bytes."""
OnProgress = Callable[[str, int, int], None]


class State(Enum):
    """What is known of a tensor: it is equal to one of the other run, it is not, or rounding alone may change it."""

    EQUAL = "equal"
    APART = "apart"
    UNSTABLE = "unstable"


@dataclass(frozen=True)
class Gap:
    """How far a pair of tensors is apart, as shares of the largest value.

    Attributes:
        error: largest difference.
        tolerance: how much of that rounding can make.
        suspect: from here on, the difference is more than rounding usually makes.
    """

    error: float = 0.0
    tolerance: float = 0.0
    suspect: float = 0.0

    @property
    def state(self) -> State:
        if self.tolerance > UNSTABLE and np.isfinite(self.error):
            return State.UNSTABLE
        return State.EQUAL if self.error <= self.tolerance else State.APART


@dataclass
class Side:
    """One run in a comparison: the sketches of its tensors, which of them are aligned with which of the other run, and the gaps."""

    run: Run
    sketches: dict[int, Sketch] = field(default_factory=dict)
    unstable: set[int] = field(default_factory=set)
    equal: dict[int, int] = field(default_factory=lambda: {IMAGES: IMAGES})
    near: dict[int, int] = field(default_factory=dict)

    def state(self, number: int) -> State:
        if number in self.equal:
            return State.EQUAL
        return State.UNSTABLE if number in self.unstable or number not in self.sketches else State.APART

    def region(self, outputs: Sequence[int]) -> list[int]:
        """The tensors that are not aligned, from which there is a way to these outputs through none that is."""
        found, todo = set[int](), list(outputs)
        while todo:
            number = todo.pop()
            if number not in found and number not in self.equal:
                found.add(number)
                todo += self.run.places[number].inputs
        return sorted(found)

    def roots(self, region: Sequence[int]) -> list[int]:
        """Those of a region whose inputs are all aligned, if necessary with unstable tensors in between."""
        inside, before = set(region), dict[int, bool]()
        for number in region:  # in topological order
            before[number] = any(
                before[i] or self.state(i) is State.APART for i in self.run.places[number].inputs if i in inside
            )
        return [number for number in region if self.state(number) is State.APART and not before[number]]


class Tracing:
    """The comparison of two runs on some images ``[n, 3, height, width]``."""

    def __init__(
        self,
        a: Run,
        b: Run,
        images: np.ndarray,
        *,
        unit: float | None = None,
        budget: int | None = None,
        progress: OnProgress | None = None,
    ) -> None:
        self.a, self.b = Side(a), Side(b)
        self.images = [image[None] for image in images]
        self.budget, self.progress = budget or BUDGET, progress or (lambda *_: None)
        self.unit = unit or max(a.unit, b.unit)
        self.jitter = ROUNDINGS * self.unit
        self.jittered = self.b if b.jitters else self.a
        self.gaps: dict[tuple[int, int], Gap] = {}

    def align(self) -> None:
        """Pair the tensors that are equal within rounding."""
        for side in (self.a, self.b):
            self._sketch(side)
        pairs = candidates(self.a.sketches, self.b.sketches)
        for pair, gap in self.compare(pairs):
            if gap.state is State.EQUAL:
                i, j = pair
                for side, own, other in ((self.a, i, j), (self.b, j, i)):
                    held = side.equal.get(own)
                    pair_held = None if held is None else self.gaps[(own, held) if side is self.a else (held, own)]
                    if pair_held is None or gap.error < pair_held.error:
                        side.equal[own] = other

    def pair_rest(self, outputs: tuple[Sequence[int], Sequence[int]]) -> tuple[list[int], list[int]]:
        """Pair what lies before these outputs and is not aligned, and return the regions."""
        regions = self.a.region(outputs[0]), self.b.region(outputs[1])
        rows = [
            [(side.run.places[number], side.sketches[number]) for number in region if number in side.sketches]
            for side, region in zip((self.a, self.b), regions, strict=True)
        ]
        pairs = sorted(in_order(rows[0], rows[1]), key=lambda pair: pair[1])
        for i, j in pairs:
            self.a.near[i], self.b.near[j] = j, i
        self.compare(pairs)
        return regions

    def begins(self, number: int) -> int:
        """The place of the second run where the difference of this one begins: the first before it from which all are suspicious."""
        found, todo = {number}, [number] if self.unit <= FLOAT32 else []
        while todo:
            for before in self.b.run.places[todo.pop()].inputs:
                gap = self.gaps.get((self.b.equal.get(before, -1), before))
                if gap is not None and before not in found and gap.error > gap.suspect:
                    found.add(before)
                    todo.append(before)
        return min(found)

    def _sketch(self, side: Side) -> None:
        run, jittered = side.run, side is self.jittered
        sizes = [(run.bytes_of(number) * (2 if jittered else 1), number) for number in run.readable]
        groups = list(self._groups(sizes))
        for step, group in enumerate(groups):
            self.progress(f"reading {run.source}", step, len(groups))
            side.sketches |= dict(zip(group, self._sketches(run.reader(group)), strict=True))
            if not jittered or not run.jitters:
                continue
            for number, moved in zip(group, self._sketches(run.reader(group, self.jitter)), strict=True):
                found = side.sketches[number]
                if found.sizes != moved.sizes or distances([found], [moved])[0, 0] > UNSTABLE:
                    side.unstable.add(number)

    def _sketches(self, read: Read) -> list[Sketch]:
        """The sketch of each place, of all images, one image at a time."""
        by_image = [[sketch(value) for value in read(image)] for image in self.images]
        return [joined(parts) for parts in zip(*by_image, strict=True)]

    def _groups(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        """Items in order, so many at once as the budget allows; at least one."""
        group, used = list[int](), 0
        for size, item in sizes:
            if group and used + size > self.budget:
                yield group
                group, used = [], 0
            group.append(item)
            used += size
        if group:
            yield group

    def compare(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], Gap]]:
        """Compare pairs exactly; return each with its gap, and keep the gaps."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.gaps]
        sizes = [4 * (2 * max(self.a.sketches[i].sizes) + 2 * max(self.b.sketches[j].sizes)) for i, j in new]
        groups = list(self._groups(list(zip(sizes, range(len(new)), strict=True))))
        for step, group in enumerate(groups):
            self.progress("comparing", step, len(groups))
            some = [new[number] for number in group]
            self.gaps |= dict(zip(some, self._gaps(some), strict=True))
        return [(pair, self.gaps[pair]) for pair in pairs]

    def _gaps(self, pairs: Sequence[tuple[int, int]]) -> list[Gap]:
        """The gaps of some pairs, of which one image at a time is held."""
        numbers = [sorted({pair[side] for pair in pairs}) for side in (0, 1)]
        at = 0 if self.jittered is self.a else 1
        noisy = self.jittered.run
        reads = [self.a.run.reader(numbers[0]), self.b.run.reader(numbers[1])]
        reads.append(noisy.reader(numbers[at], self.jitter if noisy.jitters else 0.0))
        found: list[list[Gap]] = [[] for _ in pairs]
        for image in self.images:
            values = [dict(zip(numbers[side], reads[side](image), strict=True)) for side in (0, 1)]
            moved = dict(zip(numbers[at], reads[2](image), strict=True))
            noise = {number: largest_share(values[at][number], moved[number]) for number in numbers[at]}
            for pair, gaps in zip(pairs, found, strict=True):
                error, own, least = (
                    largest_share(values[0][pair[0]], values[1][pair[1]]),
                    noise[pair[at]],
                    LEAST * self.unit,
                )
                gaps.append(Gap(error, max(MARGIN * own, least), max(SUSPICIOUS * own, least / 2)))
        return [_worst(gaps) for gaps in found]


def _worst(gaps: Sequence[Gap]) -> Gap:
    """The gap that says most: one that is apart, then one that is equal, then the others."""
    order = {State.APART: 2, State.EQUAL: 1, State.UNSTABLE: 0}
    return max(gaps, key=lambda gap: (order[gap.state], gap.error / max(gap.tolerance, 1e-30)))
