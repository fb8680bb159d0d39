"""The comparison of two targets: images, tensors, outputs, detections, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.comparison.alignment import candidates, distances, kind_of, largest_share, sketch
from fusenms.comparison.engine_run import EngineRun
from fusenms.comparison.hints import differences
from fusenms.comparison.onnx_run import OnnxRun
from fusenms.comparison.result import Comparison, Parting, Row
from fusenms.comparison.runs import FLOAT32, Place, Run
from fusenms.comparison.targets import Size, Target, read_both
from fusenms.comparison.tracing import OnProgress, Side, State, Tracing
from fusenms.config import PostprocessConfig
from fusenms.errors import FusenmsError, HeadError, InputError, first_line
from fusenms.graph.unlike_images import unlike_images
from fusenms.limits import Limits
from fusenms.pipeline import fuse
from fusenms.runtime.example_images import example_images
from fusenms.runtime.placement import load_tensor
from fusenms.verification.agreement import Agreement, agreement, agreement_of

MOST_TRACED = 2
"""Images on which all tensors are compared: those on which the outputs differ most."""
NEAR = 0.3
"""Results of one operator with other weights are not farther from each other than this share of the largest value."""
FIRST = 8
"""Tensors that show whether two runs expect the same pixels."""
WITH_WEIGHTS = ("conv", "convtranspose", "gemm", "matmul")
WORST_BOX, WORST_SCORE = 0.05, 1e-3
"""Detections of float32 that are equal differ by less than this, in pixels and in score."""
WORST_BOX_COARSE, WORST_SCORE_COARSE = 2.0, 0.02
"""The same in half precision and in engines."""


def compare_targets(
    a: object,
    b: object,
    *,
    images: np.ndarray | Path | None,
    size: Size | None,
    unit: float | None,
    limits: Limits,
    progress: OnProgress,
) -> Comparison:
    """Compare two targets. Arguments, result and errors are those of `fusenms.compare`."""
    comparing = _Comparing(*read_both(a, b, size, limits), limits, progress)
    if unit is not None:
        comparing.unit = unit
    return comparing.run(images)


class _Comparing:
    """One comparison."""

    def __init__(self, one: Target, two: Target, size: Size, limits: Limits, progress: OnProgress) -> None:
        self.targets, self.size, self.limits, self.progress = (one, two), size, limits, progress
        self.notes: list[str] = []
        known = [target.pixels for target in (one, two) if target.pixels is not None]
        if not known:
            self.notes.append("the pixels that the files expect are not known: they are given RGB from 0 to 1")
        usual = known[0] if known else PIXELS["rgb"]
        self.runs = [target.open(size, target.pixels or usual, limits) for target in self.targets]
        for i in (1, 0):
            other = self.targets[1 - i].pixels or usual
            if self.targets[i].assumed and other != self.targets[i].pixels:
                self.runs[i] = self._likelier(self.runs[1 - i], self.runs[i], self.targets[i].open(size, other, limits))
                break
        self.unit = max(run.unit for run in self.runs)

    def run(self, given: np.ndarray | Path | None) -> Comparison:
        images = self._images(given)
        a, b = self.runs
        tracing = Tracing(a, b, images[self._most_different(images)], unit=self.unit, progress=self.progress)
        tracing.align()
        paired = self._paired_outputs(tracing)
        states = {
            side: {name: own.state(number) for name, number in own.run.outputs.items()}
            for side, own in (("A", tracing.a), ("B", tracing.b))
        }
        left = [[name for name, state in states[side].items() if state is not State.EQUAL] for side in "AB"]
        apart = [pair for pair in paired if tracing.gaps[pair].state is State.APART]
        detections = self._detections(images, needed=bool(left[0] or left[1]) and not apart)
        alike = None if detections is None else self._alike(detections)
        inside = not left[0] or not left[1]
        parting = self._parting(tracing, left, alike)
        equal = (
            not apart
            and (inside if alike is None else alike)
            and not _shown(parting, inside)
            and not self._overflow(tracing)
        )
        if equal:
            parting = None
        if equal and detections is None:
            for side, names, other in (("A", left[0], "B"), ("B", left[1], "A")):
                self.notes += [f"output {name} of {side} has no counterpart in {other}: not compared" for name in names]
        self.notes += _hidden(tracing) if equal else []
        self.notes += [
            f"output {a.places[i].name}: rounding of this precision may change it by {100 * tracing.gaps[i, j].tolerance:.0f} % "
            "of its largest value, so that it decides nothing"
            for i, j in paired
            if tracing.gaps[i, j].state is State.UNSTABLE
        ]
        return Comparison(
            a=self.targets[0].name,
            b=self.targets[1].name,
            images=len(images),
            equal=equal,
            parting=parting,
            rows=_rows(tracing),
            outputs=tuple(self._output_texts(tracing, paired)),
            tensors=(_counts(tracing.a), _counts(tracing.b)),
            detections=detections,
            notes=tuple(self.notes),
        )

    def _likelier(self, other: Run, *tried: Run) -> Run:
        """Of one file opened for several pixel formats, the run whose first tensors are nearest to those of the other run."""
        image = self._images(None)[:1]
        first = [sketch(value) for value in other.reader(other.readable[:FIRST])(image)]
        best = []
        for run in tried:
            sketches = [sketch(value) for value in run.reader(run.readable[:FIRST])(image)]
            pairs = candidates(dict(enumerate(first)), dict(enumerate(sketches)))
            best.append(min((float(distances([first[i]], [sketches[j]])[0, 0]) for i, j in pairs), default=1.0))
        return tried[int(np.argmin(best))]

    # Images.

    def _images(self, given: np.ndarray | Path | None) -> np.ndarray:
        height, width = self.size
        if isinstance(given, np.ndarray):
            if given.ndim != 4 or given.shape[1:] != (3, height, width) or given.dtype != np.float32 or not len(given):
                raise InputError(
                    f"found images {given.dtype}{list(given.shape)}; expected float32 [n, 3, {height}, {width}], n at least 1"
                )
            return given
        if given is not None:
            return load_tensor(given, height, width, any(target.stretch for target in self.targets), self.limits)
        found = [] if (own := example_images(height, width)) is None else [own]
        return np.concatenate([*found, unlike_images(height, width)["patches"][None]])

    def _most_different(self, images: np.ndarray) -> list[int]:
        """Numbers of the images on which the outputs of the runs differ most, and of others if they are fewer."""
        if len(images) <= MOST_TRACED:
            return list(range(len(images)))
        pairs = _same_outputs(*self.runs)
        if not pairs:
            return list(range(MOST_TRACED))
        reads = [run.reader([pair[i] for pair in pairs]) for i, run in enumerate(self.runs)]
        gaps = []
        for number, image in enumerate(images):
            self.progress("images", number, len(images))
            one, two = (read(image[None]) for read in reads)
            gaps.append(max(largest_share(x, y) for x, y in zip(one, two, strict=True)))
        return sorted(np.argsort(-np.array(gaps), kind="stable")[:MOST_TRACED].tolist())

    # Outputs.

    def _paired_outputs(self, tracing: Tracing) -> list[tuple[int, int]]:
        """Outputs of the same meaning: of one name, or else of one size."""
        pairs = _same_outputs(*self.runs)
        sketches = tracing.a.sketches, tracing.b.sketches
        rest = [[n for n in run.outputs.values() if n not in [p[i] for p in pairs]] for i, run in enumerate(self.runs)]
        for number in rest[0]:
            fits = [other for other in rest[1] if sketches[0][number].shape == sketches[1][other].shape]
            if len(fits) == 1 and tracing.a.state(number) is not State.EQUAL:
                pairs.append((number, fits[0]))
                rest[1].remove(fits[0])
        tracing.compare(pairs)
        return pairs

    def _output_texts(self, tracing: Tracing, paired: Sequence[tuple[int, int]]) -> list[str]:
        lines, of_a = [], dict(paired)
        for name, number in tracing.a.run.outputs.items():
            other = tracing.a.equal.get(number, of_a.get(number))
            if other is None:
                lines.append(f"A {name}: no counterpart in B")
                continue
            gap, place = tracing.gaps[number, other], tracing.b.run.places[other]
            lines.append(f"A {name} · B {place.name}: {gap.state.value}, {gap.error:.1e} of {gap.tolerance:.1e}")
        held = {*of_a.values(), *tracing.a.equal.values()}
        for name, number in tracing.b.run.outputs.items():
            if number in held:
                continue
            other = tracing.b.equal.get(number)
            found = "no counterpart in A" if other is None else f"equal to A {tracing.a.run.places[other].name}"
            lines.append(f"B {name}: {found}")
        return lines

    # Detections.

    def _detections(self, images: np.ndarray, needed: bool) -> Agreement | None:
        """Compare detections if one of the targets gives some, or if the tensors alone cannot say whether the outputs mean the same."""
        one, two = self.targets
        config = two.config or one.config
        if config is None and not needed:
            return None
        models: list[FusedModel | EngineRun] = []
        for target, run in zip(self.targets, self.runs, strict=True):
            try:
                models.append(run if isinstance(run, EngineRun) else self._fused(target, config))
            except FusenmsError as error:
                self.notes.append(f"detections were not compared: {first_line(error)}")
                return None
        found = self._agreement(models, images)
        if found is not None and not found.before and not found.after:
            raise InputError(
                f"there are no detections in these {len(images)} images, so nothing was compared; choose others with images"
            )
        return found

    def _fused(self, target: Target, config: PostprocessConfig | None) -> FusedModel:
        """The target as a fused model, with these settings if it has none itself.

        Raises:
            HeadError: it is no detector that can be fused.
        """
        if target.fused is not None:
            return target.fused
        if target.weights is None:
            raise HeadError(f"{target.name} is no detector that fusenms can fuse")
        config = config or PostprocessConfig()
        return fuse(target.weights, size=self.size, config=config, unverified=True)

    def _agreement(self, models: Sequence[FusedModel | EngineRun], images: np.ndarray) -> Agreement | None:
        one, two = models
        if isinstance(one, FusedModel) and isinstance(two, FusedModel):
            return agreement(one, two, images)
        engine, other = (one, two) if isinstance(one, EngineRun) else (two, one)
        config = self.targets[0 if engine is one else 1].config
        if config is None or not isinstance(engine, EngineRun) or not isinstance(other, FusedModel):
            return None
        rows = [engine.infer(image[None]) for image in images]
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return agreement_of(other, images, replace(other, config=config), outputs)

    def _alike(self, found: Agreement) -> bool:
        coarse = self.unit > FLOAT32
        box, score = (WORST_BOX_COARSE, WORST_SCORE_COARSE) if coarse else (WORST_BOX, WORST_SCORE)
        same = found.before == found.after == found.same
        return same and found.worst_box <= box and found.worst_score <= score

    # Where they part.

    def _overflow(self, tracing: Tracing) -> bool:
        """Whether a tensor of one run is not finite and stands where the other's is, whatever the outputs are."""
        bad = [_not_finite(side) for side in (tracing.a, tracing.b)]
        if not any(bad):
            return False
        tracing.pair_rest(
            (bad[0] + list(tracing.a.run.outputs.values()), bad[1] + list(tracing.b.run.outputs.values()))
        )
        a, b = tracing.a, tracing.b
        if any(
            side.run.places[n].operator == "Cast"
            for side, some in zip((a, b), bad, strict=True)
            for n in _overflows(side, some)
        ):
            return True  # a mask may hold infinities, a conversion makes none
        return any(b.near.get(j) is not None and a.sketches[b.near[j]].finite for j in bad[1]) or any(
            a.near.get(i) is not None and b.sketches[a.near[i]].finite for i in bad[0]
        )

    def _parting(self, tracing: Tracing, left: list[list[str]], alike: bool | None) -> Parting | None:
        sides = (tracing.a, tracing.b)
        ends = [[side.run.outputs[name] for name in names] for side, names in zip(sides, left, strict=True)]
        if not ends[0] and not ends[1] and alike is False:  # the heads are equal and the detections are not
            ends = [_graph_outputs(side.run) for side in sides]
        ends = [end + _not_finite(side) for side, end in zip(sides, ends, strict=True)]
        regions = tracing.pair_rest((ends[0], ends[1]))
        return _first(tracing, regions)


def _first(tracing: Tracing, regions: tuple[list[int], list[int]]) -> Parting | None:
    """The first place in the second run whose inputs are all equal and whose result is not; else that in the first run."""
    a, b = tracing.a, tracing.b
    roots = b.roots(regions[1])
    bad = [] if _not_finite(a) else _overflows(b, regions[1])
    roots += [number for number in bad if number not in roots]
    paired = [j for j in roots if j in b.near and tracing.gaps[b.near[j], j].state is State.APART]
    if not roots:
        starts = a.roots(regions[0])
        if not starts:
            return None
        return Parting(a=a.run.places[starts[0]], b=None, a_since=_since(a, starts[0]), others=len(starts) - 1)
    first = min(paired, default=bad[0] if bad else roots[0])
    j = tracing.begins(first)
    i = b.equal.get(j, b.near.get(j))
    gap = tracing.gaps.get((i, j)) if i is not None else None
    return Parting(
        a=None if i is None else a.run.places[i],
        b=b.run.places[j],
        a_since=() if i is None else _since(a, i),
        b_since=_since(b, j),
        error=None if gap is None else gap.error,
        tolerance=0.0 if gap is None else gap.tolerance,
        hints=(
            *(["its result is not finite, and what it is computed from is"] if j in bad else []),
            *(() if i is None else (*_missing(a, i, b, j), *differences(a.run, i, b.run, j))),
        ),
        others=len(set(paired) - {first}),
    )


def _overflows(side: Side, region: Sequence[int]) -> list[int]:
    """The first place of a region that is not finite although what it is computed from is; empty if there is none."""
    bad = {number for number in region if number in side.sketches and not side.sketches[number].finite}
    return [number for number in sorted(bad) if not bad.intersection(side.run.places[number].inputs)][:1]


def _missing(a: Side, i: int, b: Side, j: int) -> Iterator[str]:
    """What only the first run computes, before an operator that both have."""
    before = _since(a, i)[:-1]
    if before and kind_of(a.run.places[i]) == kind_of(b.run.places[j]) and len(_since(b, j)) == 1:
        yield f"missing in B: {' → '.join(map(str, before))}"


def _hidden(tracing: Tracing) -> list[str]:
    """Operators with weights whose results differ, although what comes of them is equal on these images: a ReLU may hide it."""
    a, b = tracing.a.run.places, tracing.b.run.places
    return [
        f"B {b[j]} differs by {gap.error:.1e} from A {a[i]}, and what is computed from it is equal on these images"
        for (i, j), gap in tracing.gaps.items()
        if i not in tracing.a.equal and j not in tracing.b.equal and gap.state is State.APART and gap.error < NEAR
        and kind_of(a[i]) == kind_of(b[j]) and kind_of(b[j]) in WITH_WEIGHTS
    ]  # fmt: skip


def _shown(parting: Parting | None, inside: bool) -> bool:
    """Whether a place shows by itself that two networks differ, where their outputs have no counterparts: an operator with weights."""
    if inside or parting is None or parting.a is None or parting.b is None or parting.error is None:
        return False
    return kind_of(parting.a) == kind_of(parting.b) and kind_of(parting.a) in WITH_WEIGHTS


def _since(side: Side, number: int) -> tuple[Place, ...]:
    """The places from the last aligned ones up to this one."""
    return tuple(side.run.places[one] for one in side.region([number]))


def _same_outputs(a: object, b: object) -> list[tuple[int, int]]:
    one, two = (getattr(run, "outputs") for run in (a, b))  # noqa: B009
    return [(number, two[name]) for name, number in one.items() if name in two]


def _not_finite(side: Side) -> list[int]:
    return [number for number, found in side.sketches.items() if not found.finite and number not in side.equal]


def _graph_outputs(run: object) -> list[int]:
    if not isinstance(run, OnnxRun):
        return []
    model: onnx.ModelProto = run.model
    return [run.numbers[entry.name] for entry in model.graph.output if entry.name in run.numbers]


def _rows(tracing: Tracing) -> tuple[Row, ...]:
    a, b = tracing.a, tracing.b
    rows = []
    for j in b.run.readable:
        i = b.equal.get(j, b.near.get(j))
        if i is not None:
            gap = tracing.gaps[i, j]
            rows.append(
                Row(
                    a=a.run.places[i],
                    b=b.run.places[j],
                    error=gap.error,
                    tolerance=gap.tolerance,
                    state=gap.state.value,
                )
            )
    return tuple(rows)


def _counts(side: Side) -> tuple[int, int]:
    return len(side.run.readable), len(side.equal) - 1
