"""Verify a model that takes frames: what lies before and after it, and the whole.

The model between is taken out of the graph and verified as any other. Here, at each size of frames:

1. What lies *before*, from frames to images, runs on noise, and each color is compared with `letterboxed`.
2. What lies *after*, from boxes and keypoints to those in the frame, runs on made-up rows, and each number is compared with `in_frame`.
3. The *whole* runs on images. Its rows are those of the model between on what lies before, mapped by `in_frame`; and each is the same
   object, with the same class, as a row of the model between on `letterboxed` images.

Of a model that cuts frames into tiles, what lies before are the images of all tiles and their places, and what lies after only clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.frames import NV12
from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.report import Check
from fusenms.boxes import pairwise_iou, pairwise_probiou
from fusenms.errors import RunError, first_line
from fusenms.fusion.backends import get_backend
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.transforms.frames import Parts, of_input
from fusenms.transforms.letterboxing import FULL
from fusenms.transforms.tiles import PLACES
from fusenms.verification.letterboxing import Outputs, Place, Size, as_frames, in_colors, in_frame, letterboxed, resized
from fusenms.verification.tiles import TiledHead, tiled_images, tiles_of

MOST_LEVELS, MOST_MEAN = 1.01, 0.1
"""Limits on the difference of a color, in levels of 255: of each, and of the mean. float32 and float64 round few colors differently."""
SAME_IOU = 0.99
"""Rows of one class with at least this IoU are the same. Others are close calls, if a color was rounded differently."""
NEAR = 0.02
"""Pixels. Boxes whose coordinates differ by no more than this are the same too."""
WHOLE_SIZES, WHOLE_TILED = 6, 3
"""Number of sizes at which the whole runs, the second with tiles. The parts around it, which are fast, run at all sizes."""


def sizes_of(fused: FusedModel) -> list[Size]:
    """Sizes of frames to run: the only one, or many, whose scale, rounding and border differ. The first are run as a whole."""
    assert fused.image.frames is not None
    if fused.image.frames.size is not None:
        return [fused.image.frames.size]
    height, width = fused.image.height, fused.image.width
    odd = [(1080, 811), (333, 500), (719, 1279), (height + 1, width - 1), (97, 61), (2 * height, 2 * width)]
    rng = np.random.default_rng(7)
    some = [(int(h), int(w)) for h, w in rng.integers(1, 700, (9, 2))]
    sizes = [*odd, (height, width), (1, 1), (1, 301), (449, 2)]
    if fused.image.frames.tiles is None:
        sizes += some
    if fused.image.frames.channels == NV12:
        sizes = [(h + h % 2, w + w % 2) for h, w in sizes]
    return sizes


def verify_frames(
    fused: FusedModel, made_of: Parts, images: np.ndarray, progress: Callable[[str, int, int], None]
) -> list[Check]:
    """Compare a model that takes frames with the model between, at each size, on noise, made-up rows and images.

    Args:
        images: ``[n, 3, height, width]`` float32, RGB, 0 to 1; scaled to the sizes.
    """
    run = _FrameRun(fused, made_of)
    sizes, checks = sizes_of(fused), list[Check]()
    for step, size in enumerate(sizes):
        progress("frames", step, len(sizes))
        try:
            checks += run.around(size)
            if step < (WHOLE_SIZES if run.frames.tiles is None else WHOLE_TILED):
                checks += run.whole(size, images)
        except RunError as error:
            problem = f"does not run: {first_line(error)}"
            checks.append(Check(batch=run.batch, image=0, case=_case(size), frame=size, problems=(problem,)))
    run.close()
    return checks


def _case(size: Size) -> str:
    return f"frame {size[0]}x{size[1]}"


class _FrameRun:
    """The open parts of a model that takes frames."""

    def __init__(self, fused: FusedModel, made_of: Parts) -> None:
        assert fused.image.frames is not None
        self.fused, self.frames, self.batch = fused, fused.image.frames, fused.image.batch or 2
        self.boxes, self.image = fused.config.output_names[1], fused.image.tensor
        models = (made_of.before, made_of.core.model, made_of.after, fused.model)
        self.before, self.core, self.after, self.all = map(self._open, models)

    def _open(self, model: onnx.ModelProto) -> OnnxRuntimeRunner:
        fused = self.fused
        standard = get_backend(fused.backend).to_standard(model, fused)
        return OnnxRuntimeRunner(standard, source=fused.source, max_seconds=fused.limits.max_run_seconds)

    def close(self) -> None:
        for runner in (self.before, self.core, self.after, self.all):
            runner.close()

    def around(self, size: Size) -> Iterator[Check]:
        """What lies before, on noise; what lies after, on made-up rows."""
        rng = np.random.default_rng(size[0] * 7919 + size[1])
        noise = rng.integers(0, 256, (self.batch, *self.frames.shape(*size)), dtype=np.uint8)
        yield self._check(size, self._levels(noise, self._images(noise)))
        rows, counts = self._rows(rng), rng.integers(1, self.fused.config.max_detections + 1, (self.batch, 1), np.int32)
        counts[0] = self.fused.config.max_detections
        given = {of_input(name): value for name, value in rows.items()} | {self.fused.config.output_names[0]: counts}
        if self.frames.tensor in self.after.inputs:
            given[self.frames.tensor] = noise
        found = self.after.run(given)
        problems, worst = self._apart(found, rows, counts, size)
        yield self._check(size, problems, worst_box=worst)

    def whole(self, size: Size, images: np.ndarray) -> Iterator[Check]:
        """The whole, on images scaled to the size, every other one mirrored."""
        some = images[np.arange(self.batch) % len(images)]  # a copy
        some[1::2] = some[1::2, ..., ::-1]
        colors = np.rint(resized(some, size) * FULL).astype(np.uint8).transpose(0, 2, 3, 1)
        frames = as_frames(colors, self.frames.channels)
        observed, inputs = self.all.infer(frames), self._images(frames)
        exact, truth = self._core(inputs), self._truth(frames)
        expected = self._core(truth)
        count, _, scores, labels = self.fused.config.output_names
        problems = self._levels(frames, inputs)
        for name in (count, scores, labels):
            if not np.allclose(observed[name], exact[name], rtol=0, atol=1e-5):
                problems.append(f"{name} differs from that of the model between on the same images")
        apart, worst = self._apart(observed, exact, exact[count], size)
        yield self._check(size, [*problems, *apart], worst_box=worst)
        mapped = in_frame(expected, self.fused.layout, self.boxes, self._place(size))
        apart_by = np.abs(inputs[self.image] - truth[self.image]).max((1, 2, 3))
        equal = apart_by.reshape(self.batch, -1).max(1) * FULL < 0.5
        for i in range(self.batch):
            yield self._same(size, i, observed, expected | mapped, bool(equal[i]))

    def _images(self, frames: np.ndarray) -> Outputs:
        """What the graph makes of frames: images, and the places of tiles."""
        return self.before.run({self.frames.tensor: frames})

    def _truth(self, frames: np.ndarray) -> Outputs:
        """What the reference makes of them, float32."""
        image, channels, tiles = self.fused.image, self.frames.channels, self.frames.tiles
        if tiles is None:
            return {self.image: (letterboxed(frames, image, channels) / FULL).astype(np.float32)}
        cut = tiles_of(in_colors(frames, channels).shape[1:3], tiles, image)
        images = (tiled_images(frames, cut, image, channels) / FULL).astype(np.float32)
        return {self.image: images, **TiledHead(self.fused.layout, (image.height, image.width), tuple(cut)).inputs}

    def _core(self, inputs: Outputs) -> Outputs:
        """The results of the model between."""
        return self.core.run(inputs)

    def _place(self, size: Size) -> Place:
        """Where results of the model between lie in the frame. Those of tiles are in its pixels already."""
        return Place.of(*size, self.fused.image) if self.frames.tiles is None else Place(*size, size, 0, 0)

    def _levels(self, frames: np.ndarray, made: Outputs) -> list[str]:
        """How images that the graph made differ from `letterboxed`, and the places of tiles from theirs."""
        expected = self._truth(frames)
        if PLACES in expected and not np.allclose(made[PLACES], expected[PLACES], rtol=1e-6, atol=1e-3):
            return ["places of tiles differ from the reference"]
        images, truth = made[self.image], expected[self.image] * np.float64(FULL)
        if images.shape != truth.shape:
            return [f"images of {list(images.shape)} are made of frames; expected {list(truth.shape)}"]
        apart = np.abs(images.astype(np.float64) * FULL - truth)
        worst, mean = float(apart.max()), float(apart.mean())
        if worst <= MOST_LEVELS and mean <= MOST_MEAN:
            return []
        place = ", ".join(map(str, np.unravel_index(int(apart.argmax()), apart.shape)))
        return [
            f"images made of frames differ from the reference by {worst:.1f} of 255 at [{place}], {mean:.2g} in the mean"
        ]

    def _rows(self, rng: np.random.Generator) -> Outputs:
        """Boxes and keypoints in and around the model's input."""
        image, rows = self.fused.image, (self.batch, self.fused.config.max_detections)
        reach = np.array((image.width, image.height))
        points = [rng.uniform(-0.2, 1.2, (*rows, 2)) * reach for _ in range(2)]
        boxes = np.concatenate((np.minimum(*points), np.maximum(*points)), -1)
        layout = self.fused.layout
        if layout.angle is not None:
            boxes = np.concatenate((points[0], boxes[..., 2:] - boxes[..., :2], rng.uniform(-2, 2, (*rows, 1))), -1)
        made = {self.boxes: boxes.astype(np.float32)}
        if layout.keypoints is not None:
            own = rng.uniform(-0.2, 1.2, (*rows, layout.keypoints.count, layout.keypoints.dims))
            own[..., :2] *= reach
            made[contract.KEYPOINTS] = own.astype(np.float32)
        return made

    def _apart(self, found: Outputs, rows: Outputs, counts: np.ndarray, size: Size) -> tuple[list[str], float]:
        """How boxes and keypoints that the graph mapped differ from `in_frame`, and by how much; rows past the count are zeros."""
        problems, worst = [], 0.0
        used = np.arange(self.fused.config.max_detections) < counts
        limit = 1e-4 + 4e-6 * max(size)
        expected = in_frame(rows, self.fused.layout, self.boxes, self._place(size))
        for name, values in expected.items():
            difference = np.abs(found[name][used] - values[used])
            most = float(difference.max(initial=0.0))
            worst = max(worst, most)
            if not most <= limit:
                problems.append(
                    f"{name} of the frame differ from the reference by {most:.3g} px; expected at most {limit:.2g}"
                )
            if found[name][~used].any():
                problems.append(f"{name} past num_detections are not zeros")
        return problems, worst

    def _same(self, size: Size, number: int, observed: Outputs, expected: Outputs, equal: bool) -> Check:
        """Pair the rows of an image by class and IoU. If the model was given ``equal`` colors, every row has to be the same; else most."""
        one, two = self._of(observed, number), self._of(expected, number)
        iou = (pairwise_iou if one[0].shape[1] == 4 else pairwise_probiou)(one[0], two[0])
        near = np.abs(one[0][:, None] - two[0][None]).max(2, initial=0) <= NEAR  # a box clipped to a line has no IoU
        iou = np.where(one[1][:, None] == two[1][None], np.where(near, 1.0, iou), 0)
        paired: list[float] = []
        for row in range(len(iou)):
            if iou.shape[1] and iou[row].max() >= SAME_IOU:
                column = int(iou[row].argmax())
                paired.append(float(iou[row, column]))
                iou[:, column] = 0
        moved = max(len(one[1]), len(two[1])) - len(paired)
        problems = []
        if moved > (0 if equal else len(paired) + 1):
            problems.append(
                f"{len(one[1])} rows, and {len(two[1])} on letterboxed images, of which only {len(paired)} are the same (IoU {SAME_IOU})"
            )
        return self._check(
            size, problems, number, detections=len(one[1]), close_calls=moved, worst_iou=min(paired, default=1.0)
        )

    def _of(self, outputs: Outputs, number: int) -> tuple[np.ndarray, np.ndarray]:
        count, boxes, _, labels = (outputs[name][number] for name in self.fused.config.output_names)
        used = int(count[0])
        return boxes[:used].astype(np.float64), labels[:used]

    def _check(
        self, size: Size, problems: list[str], image: int = 0, worst_box: float = 0.0, detections: int = 0, close_calls: int = 0,
        worst_iou: float = 1.0,
    ) -> Check:  # fmt: skip
        return Check(
            batch=self.batch, image=image, case=_case(size), frame=size, problems=tuple(problems), worst_box=worst_box,
            detections=detections, close_calls=close_calls, worst_iou=worst_iou,
        )  # fmt: skip
