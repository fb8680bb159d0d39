"""Verify a fused model: run it in ONNX Runtime at several batch sizes and compare every row with the reference.

Two runs are compared:

1. The *whole* model runs on images. The head's tensors are outputs too, so the reference works on exactly the values that the tail got.
2. The *tail*, cut out of the model after its head, runs on synthetic heads (`synthetic_heads`): random, dense, empty, tied, at the
   thresholds, crowded, unusable.

Optional inputs (`PostprocessConfig.runtime_thresholds`) are first left out, so that their defaults are compared, and then fed in several
ways (`settings`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.frames import Frames
from fusenms.artifacts.fused import FusedModel, load_fused
from fusenms.artifacts.report import Check, Report
from fusenms.config import Thresholds
from fusenms.errors import FusenmsError, InputError, RunError, SourceError, first_line
from fusenms.fusion.backends import get_backend
from fusenms.graph.model import cut_before, with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import probe_image
from fusenms.reference import Candidates, Expected, Rows, matches, postprocess
from fusenms.transforms.frames import parts
from fusenms.verification.diagnosis import explain
from fusenms.verification.frames import sizes_of, verify_frames
from fusenms.verification.image_heads import ImageHead
from fusenms.verification.settings import Setting, settings
from fusenms.verification.synthetic_heads import SYNTHETIC_HEADS, Stage, heads
from fusenms.verification.task_outputs import task_output_differences
from fusenms.verification.tiles import TiledHead, tiles_of

BATCHES = (1, 2, 7)
MOST_TILES = 24
"""Images of a run above which no further batch size is run: they take memory."""
THREADS = 2
"""Images that the reference works on at the same time."""
OnProgress = Callable[[str, int, int], None]
"""Called with the name of the step, the number of units done, and the total number."""


def verify(
    model: FusedModel | str | os.PathLike[str],
    *,
    images: np.ndarray | None = None,
    batches: Sequence[int] | None = None,
    progress: OnProgress | None = None,
) -> Report:
    """Compare a fused model with the reference.

    Args:
        model: a fused model, or the path of its file.
        images: ``[n, 3, height, width]`` float32 (RGB, 0 to 1, at the model's size); default: one test image.
        batches: batch sizes to run; default: 1, 2 and 7, or the only one of a model with a fixed batch.
        progress: called for each step.

    Raises:
        SourceError: the file cannot be read, or lacks the head's tensors.
        InputError: the images or batch sizes do not fit the model.

    Example:
        >>> import fusenms
        >>> fused = fusenms.fuse("yolov8n.pt", size=64, unverified=True)
        >>> report = fusenms.verify(fused, batches=(1, 3))
        >>> bool(report), report.batches
        (True, (1, 3))
    """
    fused = model if isinstance(model, FusedModel) else load_fused(model)
    if fused.image.frames is not None:
        return _verify_frames(fused, fused.image.frames, images, batches, progress)
    return _verify(fused, None, images, batches, progress)


def _verify(
    fused: FusedModel, read: ImageHead | None, images: np.ndarray | None, batches: Sequence[int] | None, progress: OnProgress | None
) -> Report:  # fmt: skip
    """Verify a model that takes images. ``read`` reads its head; None: image by image."""
    fixed = fused.image.batch
    batches = (usual_batches(read) if fixed is None else (fixed,)) if batches is None else batches
    if not isinstance(batches, Sequence) or not batches or any(not isinstance(b, int) or b < 1 for b in batches):
        raise InputError(f"batches are {batches!r}; expected at least one whole number, each at least 1")
    if fixed is not None and set(batches) != {fixed}:
        raise InputError(f"batches are {list(batches)}, but the model has a fixed batch of {fixed}; leave batches out")
    sizes = [(fused, images_for(fused, images))]
    if fused.image.dynamic_size:  # also another size, which moves the candidates
        image = fused.image
        other = replace(image, height=image.height + image.stride, width=image.width + 2 * image.stride)
        sizes.append((replace(fused, image=other), probe_image(other.height, other.width)))
    checks: list[Check] = []
    unshown: tuple[str, ...] = ()
    for sized, own in sizes:
        try:
            verification = _Verification(sized, progress, read)
            checks += verification.run(own, tuple(batches), settings(sized) if sized is fused else ())
            unshown = verification.unshown if sized is fused else unshown
        except FusenmsError:
            raise
        except Exception as error:  # graph and layout may come from a file of unknown origin
            message = f"the layout in the metadata does not fit the head's tensors ({type(error).__name__}: {first_line(error)})"
            raise SourceError(f"{message}; the file was changed after it was written: fuse the model again") from error
    return Report(tuple(checks), tuple(batches), unshown)


def usual_batches(read: ImageHead | None) -> tuple[int, ...]:
    """Batch sizes to run. A frame of many tiles is a large batch by itself."""
    return tuple(batch for batch in BATCHES if batch <= 2 or batch * (1 if read is None else read.each) <= MOST_TILES)


def _verify_frames(
    fused: FusedModel, frames: Frames, images: np.ndarray | None, batches: Sequence[int] | None,
    progress: OnProgress | None,
) -> Report:  # fmt: skip
    """Verify the model that frames are letterboxed for, and then the frames."""
    made_of, read = parts(fused), None
    if frames.tiles is not None:
        size = (fused.image.height, fused.image.width)
        read = TiledHead(fused.layout, size, tuple(tiles_of(sizes_of(fused)[0], frames.tiles, fused.image)))
    report = _verify(made_of.core, read, images, batches, progress)
    checks = verify_frames(fused, made_of, images_for(made_of.core, images), progress or (lambda *_: None))
    return replace(report, checks=(*report.checks, *checks))


def verify_tail(fused: FusedModel, shapes: Mapping[str, tuple[int, ...]], progress: OnProgress | None = None) -> Report:
    """Compare what comes after the head with the reference, on synthetic heads, for a network that nothing here runs.

    Args:
        shapes: shapes of the head's tensors at the default size, without the batch.
    """
    batches = BATCHES if fused.image.batch is None else (fused.image.batch,)
    verification = _Verification(fused, progress)
    checks = verification.run_tail(dict(shapes), batches, settings(fused))
    return Report(tuple(checks), batches, verification.unshown)


def images_for(fused: FusedModel, images: np.ndarray | None) -> np.ndarray:
    """Check the images, or return one test image if there are none.

    Raises:
        InputError: the images do not fit the model.
    """
    size = (fused.image.height, fused.image.width)
    if images is None:
        return probe_image(*size)
    if (
        not isinstance(images, np.ndarray)
        or images.ndim != 4
        or images.shape[1:] != (3, *size)
        or images.dtype != np.float32
        or not len(images)
    ):
        found = f"{images.dtype}{list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"found images {found}; expected float32 [n, 3, {size[0]}, {size[1]}], n at least 1")
    return images


@dataclass(frozen=True)
class _Referred:
    """One image: the observed rows, all candidates of its head, and what the reference expects."""

    observed: Rows
    found: Candidates
    expected: Expected


class _Verification:
    """One verification: its runners and the checks collected so far."""

    def __init__(self, fused: FusedModel, progress: OnProgress | None, read: ImageHead | None = None) -> None:
        self.read = read or ImageHead(fused.layout, (fused.image.height, fused.image.width))
        self.fused, self.layout, self.config = fused, fused.layout, fused.config
        self.backend = get_backend(fused.backend)
        self.model = self.backend.in_float(fused.model)
        self.progress = progress or (lambda *_: None)
        self.checks: list[Check] = []
        self.setting: Setting | None = None
        self.shown: set[str] = set()

    @property
    def unshown(self) -> tuple[str, ...]:
        """Optional inputs that changed nothing in any run."""
        return tuple(given.name for given in self.layout.runtime_inputs(self.config) if given.name not in self.shown)

    @property
    def thresholds(self) -> Thresholds:
        """Those of the current run."""
        return Thresholds.of(self.config) if self.setting is None else self.setting.thresholds

    def _check(self, **values: Any) -> None:
        """Add a check."""
        self.checks.append(Check(**values, setting="" if self.setting is None else self.setting.name))

    def run(self, images: np.ndarray, batches: tuple[int, ...], fed: Sequence[Setting]) -> list[Check]:
        produced = {name for node in self.model.graph.node for name in node.output}
        if lost := [name for name in self.layout.tensors if name not in produced]:
            raise SourceError(
                f"the file lacks the head's tensors {', '.join(lost)} that its metadata names; "
                "it was changed after it was written: fuse the model again"
            )
        whole = self._open(with_outputs(self.model, self.layout.tensors))
        starts = [(b, 0) for b in batches] + [(max(batches), i) for i in range(max(batches), len(images), max(batches))]
        shapes = self._on_images(whole, images, starts)
        for self.setting in fed if shapes else ():
            self._on_images(whole, images, [(min(batches), 0)])
        self.setting = None
        whole.close()
        return self.run_tail(shapes, batches, fed) if shapes else self._judged()

    def run_tail(
        self, shapes: dict[str, tuple[int, ...]], batches: tuple[int, ...], fed: Sequence[Setting]
    ) -> list[Check]:
        tail = self._open(cut_before(self.model, shapes))
        self._on_synthetic_heads(tail, shapes, batches)
        for self.setting in fed:
            self._on_synthetic_heads(tail, shapes, (max(batches),))
        self.setting = None
        tail.close()
        return self._judged()

    def _judged(self) -> list[Check]:
        """The checks, with a problem if they show too little."""
        unsettled = sum(not check.converged for check in self.checks)
        if 2 * unsettled > len(self.checks):
            problem = f"{unsettled} of {len(self.checks)} images did not converge, so too little was compared: take more rounds"
            self.checks.append(Check(batch=0, image=0, case="all", problems=(problem,)))
        if not any(check.detections or check.problems for check in self.checks) and self.config.score_threshold < 1:
            problem = "no detection in any image or synthetic head: nothing was proven"
            self.checks.append(Check(batch=0, image=0, case="all", problems=(problem,)))
        return self.checks

    def _open(self, model: onnx.ModelProto) -> OnnxRuntimeRunner:
        limit = self.fused.limits.max_run_seconds
        return OnnxRuntimeRunner(
            self.backend.to_standard(model, self.fused), source=self.fused.source, max_seconds=limit
        )

    def _on_images(
        self, whole: OnnxRuntimeRunner, images: np.ndarray, starts: Sequence[tuple[int, int]]
    ) -> dict[str, tuple[int, ...]]:
        """Run batches of images: (size, first image). Return the shapes of the head's tensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for step, (batch, start) in enumerate(starts):
            self.progress("images", step, len(starts))
            numbers = (start + np.arange(batch * self.read.each)) % len(images)
            filled = images[numbers]
            outputs = self._infer(whole, {self.fused.image.tensor: filled}, batch, "image")
            if outputs is None:
                continue
            head = {name: outputs[name] for name in self.layout.tensors}
            shapes = {name: values.shape[1:] for name, values in head.items()}
            self._compare(head, outputs, tuple(f"image {number}" for number in numbers[:: self.read.each]))
        return shapes

    def _on_synthetic_heads(
        self, tail: OnnxRuntimeRunner, shapes: dict[str, tuple[int, ...]], batches: tuple[int, ...]
    ) -> None:
        """Run the tail on synthetic heads: each at every batch size, with a different one for each image."""
        tap = self.layout.classes
        count = shapes[tap.tensor][tap.candidate_axis - 1]
        stage = Stage(self.layout, self.config, self.fused.image, count, self.thresholds)
        names = tuple(SYNTHETIC_HEADS)
        each = self.read.each
        runs = [(batch, names[i : i + batch * each]) for batch in batches for i in range(0, len(names), batch * each)]
        for step, (batch, some) in enumerate(runs):
            self.progress("synthetic heads", step, len(runs))
            batch_names = tuple(np.resize(np.array(some), batch * each).tolist())
            head = heads(stage, batch_names, shapes, seed=batch)
            inputs = dict(head)
            if self.fused.image.tensor in tail.inputs:  # its shape determines the places of the candidates
                inputs[self.fused.image.tensor] = np.zeros(
                    (batch, 3, self.fused.image.height, self.fused.image.width), np.float32
                )
            cases = tuple(", ".join(batch_names[i : i + each]) for i in range(0, len(batch_names), each))
            outputs = self._infer(tail, inputs, batch, ", ".join(some))
            if outputs is not None:
                self._compare(head, outputs, cases)

    def _infer(
        self, runner: OnnxRuntimeRunner, inputs: dict[str, np.ndarray], batch: int, case: str
    ) -> dict[str, np.ndarray] | None:
        """Run. A failure or a wrong shape is recorded as a problem of the whole batch; the result is then None."""
        try:
            given = {} if self.setting is None else self.setting.inputs(self.layout, self.config)
            outputs = runner.run(inputs | given | self.read.inputs)
        except RunError as error:
            frozen = (
                " (the batch is frozen)"
                if batch > 1 and any(c.batch == 1 and not c.problems for c in self.checks)
                else ""
            )
            problem = f"does not run at batch {batch}{frozen}: {first_line(error)}"
            self._check(batch=batch, image=0, case=case, problems=(problem,))
            return None
        for name, output in self.layout.outputs(self.config):
            expected = output.shape_for(batch, self.config.max_detections, *self._prototype_sides(outputs, inputs))
            got = outputs.get(name)
            if got is None or got.shape != expected or got.dtype != output.dtype:
                found = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
                frozen = " (the batch is frozen)" if got is not None and got.shape[:1] != (batch,) else ""
                problem = f"output {name}: found {found}, expected {output.dtype}{list(expected)}{frozen}"
                self._check(batch=batch, image=0, case=case, problems=(problem,))
                return None
        return outputs

    def _compare(self, head: dict[str, np.ndarray], outputs: dict[str, np.ndarray], cases: tuple[str, ...]) -> None:
        """Check every image of a run. The reference works on `THREADS` images at a time, since all its candidates take memory."""
        first: Rows | None = None
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(cases), THREADS):
                numbers = range(start, min(start + THREADS, len(cases)))
                for i, referred in zip(numbers, pool.map(partial(self._refer, head, outputs), numbers), strict=True):
                    if referred is None:
                        self._check(batch=len(cases), image=i, case=cases[i], converged=False)
                        continue
                    self._judge(head, outputs, cases, i, referred, first)
                    first = referred.observed if first is None else first

    def _refer(self, head: dict[str, np.ndarray], outputs: dict[str, np.ndarray], i: int) -> _Referred | None:
        """The rows of an image and those of the reference; None if its rounds did not suffice."""
        if self.config.rounds is not None and contract.CONVERGED in outputs and outputs[contract.CONVERGED][i, 0] == 0:
            return None
        counts, boxes, scores, labels = (outputs[name] for name in self.config.output_names)
        count = int(np.clip(counts[i, 0], 0, len(scores[i])))
        observed = Rows(
            boxes[i, :count].astype(np.float64),
            scores[i, :count].astype(np.float64),
            labels[i, :count],
            outputs[contract.INDICES][i, :count] if self.config.indices else None,
        )
        found = self.read.candidates(head, i)
        return _Referred(observed, found, postprocess(found, self.config, observed, self.thresholds))

    def _judge(
        self, head: dict[str, np.ndarray], outputs: dict[str, np.ndarray], cases: tuple[str, ...], i: int, referred: _Referred,
        first: Rows | None,
    ) -> None:  # fmt: skip
        """Check one image. ``first`` are the rows of the first image of the batch."""
        counts, boxes, scores, labels = (outputs[name] for name in self.config.output_names)
        observed, found, expected = referred.observed, referred.found, referred.expected
        count = len(observed)
        self._note_effects(found, expected)
        problems = _differences(observed, expected)
        if counts[i, 0] != count:
            problems.append(f"num_detections is {counts[i, 0]}, outside of 0 to {len(scores[i])}")
        if np.any(boxes[i, count:]) or np.any(scores[i, count:]) or np.any(labels[i, count:] != contract.NO_LABEL):
            problems.append(f"rows past num_detections ({count}) are not blank (zeros, label {contract.NO_LABEL})")
        close_calls = expected.close_calls
        if not problems:
            others, doubtful = task_output_differences(self.read, head, outputs, i, self.config, expected)
            problems, close_calls = problems + others, close_calls + doubtful
        elif cause := self._explain(observed, expected, found, first):
            problems[0] += cause
        matched = min(len(observed), len(expected.rows)) if not problems else 0
        worst_box = float(np.abs(observed.boxes[:matched] - expected.rows.boxes[:matched]).max(initial=0))
        worst_score = float(np.abs(observed.scores[:matched] - expected.rows.scores[:matched]).max(initial=0))
        self._check(
            batch=len(cases),
            image=i,
            case=cases[i],
            detections=count,
            close_calls=close_calls,
            worst_box=worst_box,
            worst_score=worst_score,
            problems=tuple(problems),
        )

    def _note_effects(self, found: Candidates, expected: Expected) -> None:
        """Note the inputs without which other candidates would be expected."""
        if self.setting is None:
            return
        for name in self.unshown:
            other = postprocess(found, self.config, None, self.setting.without(name, self.config))
            if not np.array_equal(other.indices, expected.indices):
                self.shown.add(name)

    def _prototype_sides(self, outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> tuple[int, ...]:
        """Height and width of the head's prototypes; empty if it has none."""
        if self.layout.masks is None:
            return ()
        name = self.layout.masks.prototypes
        return (inputs if name in inputs else outputs)[name].shape[2:]

    def _explain(self, observed: Rows, expected: Expected, found: Candidates, first: Rows | None) -> str:
        cause = explain(observed, expected.rows, found, self.config, first, self.setting)
        return f" [{cause}]" if cause else ""


def _differences(observed: Rows, expected: Expected, most: int = 3) -> list[str]:
    """Describe each row that differs; only the first few in full."""
    rows, problems = expected.rows, []
    for row in range(max(len(observed), len(rows))):
        if row < min(len(observed), len(rows)) and matches(
            observed, row, rows.boxes[row], rows.scores[row], int(rows.labels[row])
        ):
            continue
        problems.append(f"row {row}: expected {_row_text(rows, row)}, got {_row_text(observed, row)}")
    if len(problems) > most:
        problems = [
            *problems[:most],
            f"and {len(problems) - most} more rows differ ({len(observed)} detections, expected {len(rows)})",
        ]
    return problems


def _row_text(rows: Rows, row: int) -> str:
    if row >= len(rows):
        return "no row"
    box = ", ".join(f"{v:.2f}" for v in rows.boxes[row])
    return f"label {rows.labels[row]} score {rows.scores[row]:.6f} box ({box})"
