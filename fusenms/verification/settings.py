"""What verification feeds the optional inputs of a model: several ways, so that an input without effect, or with a wrong one, is seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fusenms import contract
from fusenms.artifacts.fused import FusedModel
from fusenms.config import PostprocessConfig, Thresholds
from fusenms.layout import Layout


@dataclass(frozen=True)
class Setting:
    """The thresholds of a run, with a name for messages."""

    name: str
    thresholds: Thresholds

    def inputs(self, layout: Layout, config: PostprocessConfig) -> dict[str, np.ndarray]:
        """What they are as inputs: those that the model has."""
        mask = self.thresholds.class_mask or (True,) * layout.num_classes
        values = {
            contract.SCORE_THRESHOLD: self.thresholds.score,
            contract.IOU_THRESHOLD: (self.thresholds.iou,),
            contract.CLASS_MASK: mask,
        }
        return {given.name: np.array(values[given.name], given.dtype) for given in layout.runtime_inputs(config)}

    def without(self, name: str, config: PostprocessConfig) -> Thresholds:
        """The thresholds with the default of an input."""
        field = {contract.SCORE_THRESHOLD: "score", contract.IOU_THRESHOLD: "iou", contract.CLASS_MASK: "class_mask"}[
            name
        ]
        return replace(self.thresholds, **{field: getattr(Thresholds.of(config), field)})


def settings(fused: FusedModel) -> tuple[Setting, ...]:
    """The ways in which the optional inputs of a model are fed; none if it has none."""
    if not fused.layout.runtime_inputs(fused.config):
        return ()
    return tuple(_ways(Thresholds.of(fused.config), fused.layout.num_classes, fused.layout.suppress))


def _ways(default: Thresholds, classes: int, suppress: bool) -> Iterator[Setting]:
    """Each input alone, all at once, and the ends of the ranges. ``classes`` is 0 if the head does not show it."""
    far = 0.5 if abs(default.score[0] - 0.5) > 0.2 else 0.1
    low = (min(default.score[0], 0.3),)
    yield Setting(f"score_threshold {far:g}", Thresholds((far,), default.iou))
    for iou in ((0.2, 0.7) if abs(default.iou - 0.45) < 0.2 else (0.45,)) if suppress else ():
        yield Setting(f"iou_threshold {iou:g}", Thresholds(low, iou))
    yield Setting("score_threshold 0, iou_threshold 1", Thresholds((0.0,), 1.0))
    yield Setting("score_threshold 1, iou_threshold 0", Thresholds((1.0,), 0.0))
    if not classes:
        return
    odd, none = (tuple(bool(test) for test in tests) for tests in ([i % 2 for i in range(classes)], [0] * classes))
    each = tuple(np.resize([0.3, 0.05, 0.5, 0.0, 0.15, 1.0, 0.7], classes).tolist())
    yield Setting("class_mask of every second class", Thresholds(low, default.iou, odd if classes > 1 else none))
    yield Setting("class_mask of no class", Thresholds(low, default.iou, none))
    yield Setting("a score_threshold for each class", Thresholds(each, default.iou))
    most = tuple(i % 3 != 1 for i in range(classes))
    yield Setting("all inputs, a score_threshold for each class", Thresholds(each[::-1], 0.6, most))
