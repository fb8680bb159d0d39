"""mAP of a network before and after it was quantized, on the same images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.report import counted
from fusenms.evaluation import evaluate
from fusenms.evaluation.coco import read_coco
from fusenms.evaluation.result import Evaluation
from fusenms.evaluation.scoring import library
from fusenms.evaluation.yolo import read_yolo
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits


@dataclass(frozen=True)
class MapBetween:
    """Two evaluations on the same images."""

    before: Evaluation
    after: Evaluation

    @property
    def points(self) -> float:
        """mAP50-95 after, less that before, in percentage points."""
        return 100 * (self.after.map50_95 - self.before.map50_95)

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"mAP50-95 {100 * self.before.map50_95:.2f} -> {100 * self.after.map50_95:.2f} ({self.points:+.2f} points), "
            f"mAP50 {100 * self.before.map50:.2f} -> {100 * self.after.map50:.2f}, on {counted(self.after.images, 'image')} with "
            f"{counted(self.after.objects, 'object')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "images": self.after.images,
            "objects": self.after.objects,
            "map50_95": [self.before.map50_95, self.after.map50_95],
            "map50": [self.before.map50, self.after.map50],
        }


def check_truth(
    *,
    coco: str | os.PathLike[str] | None = None,
    yolo: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Read the ground truth, and nothing else, so that it fails before a network is quantized. Errors: as `evaluate`."""
    library()
    if coco is not None:
        read_coco(Path(coco), None, limits)
    if yolo is not None:
        read_yolo(Path(yolo), limits)


def map_between(
    before: RawModel,
    after: RawModel,
    layout: Layout,
    *,
    coco: str | os.PathLike[str] | None = None,
    yolo: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> MapBetween:
    """Evaluate two networks with the same head on the same ground truth, with settings that are right for mAP. Errors: as `evaluate`."""
    first, second = (evaluate(raw, coco=coco, yolo=yolo, layout=layout, progress=progress) for raw in (before, after))
    return MapBetween(first, second)
