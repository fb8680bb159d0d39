"""`Agreement`: the detections of two models of the same weights on the same images, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.report import counted
from fusenms.boxes import pairwise_iou, pairwise_probiou
from fusenms.fusion.backends import get_backend
from fusenms.graph.session import OnnxRuntimeRunner

SAME_OBJECT_IOU = 0.5
"""Two boxes of one class with at least this IoU are the same object."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on some images.

    Attributes:
        images: number of images.
        before, after: number of detections of each model.
        same: number of pairs of one class with an IoU of at least `SAME_OBJECT_IOU`; a detection is in at most one pair, the best first.
        worst_box: largest difference of a coordinate within a pair, in pixels of the model's input.
        worst_score: largest difference of the scores within a pair.
    """

    images: int
    before: int
    after: int
    same: int
    worst_box: float
    worst_score: float

    @property
    def drift(self) -> float:
        """Share of the detections that have no partner, of the model that has more of them; 0 if neither has any."""
        most = max(self.before, self.after)
        return 1 - self.same / most if most else 0.0

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"{counted(self.images, 'image')} · {self.before} detections in float32, {self.after} now, {self.same} the same · "
            f"worst box {self.worst_box:.2g} px, worst score {self.worst_score:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreement(before: FusedModel, after: FusedModel, images: Sequence[np.ndarray] | np.ndarray) -> Agreement:
    """Run both models in ONNX Runtime on images ``[3, height, width]`` float32 (RGB, 0 to 1), one by one, and compare them."""
    runner = OnnxRuntimeRunner(get_backend(after.backend).to_standard(after.model, after), source=after.source)
    rows = [runner.infer(_alone(after, image)) for image in images]
    runner.close()
    return agreement_of(
        before, images, after, {name: np.concatenate([row[name][:1] for row in rows]) for name in rows[0]}
    )


def agreement_of(
    before: FusedModel, images: Sequence[np.ndarray] | np.ndarray, after: FusedModel, outputs: dict[str, np.ndarray]
) -> Agreement:
    """The same, if the outputs of ``after`` on the images are known: ``[n, …]`` by name."""
    runner = OnnxRuntimeRunner(get_backend(before.backend).to_standard(before.model, before), source=before.source)
    counts, same, worst = [0, 0], 0, [0.0, 0.0]  # of each model; pairs; box and score
    for n, image in enumerate(images):
        one = _rows(before, runner.infer(_alone(before, image)))
        two = _rows(after, {name: value[n : n + 1] for name, value in outputs.items()})
        counts[0], counts[1] = counts[0] + len(one[1]), counts[1] + len(two[1])
        for i, j in _pairs(one, two):
            same += 1
            worst[0] = max(worst[0], float(np.abs(one[0][i, :4] - two[0][j, :4]).max()))
            worst[1] = max(worst[1], float(abs(one[1][i] - two[1][j])))
    runner.close()
    return Agreement(len(images), counts[0], counts[1], same, worst[0], worst[1])


def _alone(model: FusedModel, image: np.ndarray) -> np.ndarray:
    """A batch of the image alone; of copies of it, if the batch of the model is fixed."""
    return image[None].repeat(model.image.batch or 1, 0)


_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def _rows(model: FusedModel, outputs: dict[str, np.ndarray]) -> _Rows:
    count, *rows = (outputs[name] for name in model.config.output_names)
    boxes, scores, labels = (value[0, : int(count[0, 0])] for value in rows)
    return boxes.astype(np.float64), scores, labels


def _pairs(one: _Rows, two: _Rows) -> list[tuple[int, int]]:
    iou = (pairwise_iou if one[0].shape[1] == 4 else pairwise_probiou)(one[0], two[0])
    iou = np.where(one[2][:, None] == two[2][None], iou, 0)
    pairs = []
    for i in range(len(iou)):
        if iou.shape[1] and iou[i].max() >= SAME_OBJECT_IOU:
            j = int(iou[i].argmax())
            pairs.append((i, j))
            iou[:, j] = 0
    return pairs
