"""`Evaluation`: what `fusenms.evaluate` returns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusenms.config import PostprocessConfig
from fusenms.evaluation.scoring import Scores
from fusenms.safety.files import write_atomically

TOLERANCE = 1e-4
"""Of the difference between the mAP of a fused model and that of the raw model with the reference."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a detector finds the objects of a set of images.

    Attributes:
        file: what was evaluated.
        truth: what the ground truth was read from.
        images: number of images that were evaluated.
        objects: number of objects in them, crowds left out.
        matched: how classes and categories were matched.
        config: settings of the post-processing.
        suppress: whether boxes that overlap are suppressed; False for end-to-end heads.
        scores: ``boxes``, and ``masks`` or ``keypoints`` if model and ground truth have them, to their metrics.
        raw_scores: the same of the raw model with the reference as post-processing; empty if it was not asked for.
        failed: path and reason of each image that could not be read. Their objects do not count.
        notes: what else limits the result.
        results: all detections as COCO writes results.
        seconds: time that the model took, with scaling images and boxes, without reading images.
    """

    file: str
    truth: str
    images: int
    objects: int
    matched: str
    config: PostprocessConfig
    suppress: bool
    scores: Mapping[str, Scores]
    raw_scores: Mapping[str, Scores]
    failed: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    results: Sequence[Mapping[str, Any]] = field(repr=False)
    seconds: float

    @property
    def boxes(self) -> Scores:
        """The metrics of the boxes."""
        return self.scores["boxes"]

    @property
    def map50_95(self) -> float:
        """mAP of the boxes, over the IoU thresholds 0.5, 0.55, …, 0.95."""
        return self.boxes.map50_95

    @property
    def map50(self) -> float:
        """mAP of the boxes, at IoU 0.5."""
        return self.boxes.map50

    @property
    def raw_difference(self) -> float | None:
        """The largest difference of a metric between the fused and the raw model; None if it was not asked for."""
        if not self.raw_scores:
            return None
        return max(
            abs((value or 0.0) - (self.raw_scores[kind].metrics[name] or 0.0))
            for kind, scores in self.scores.items()
            for name, value in scores.metrics.items()
        )

    @property
    def equals_raw(self) -> bool:
        """Whether no metric differs from that of the raw model by more than `TOLERANCE`; True if it was not asked for."""
        return self.raw_difference is None or self.raw_difference <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the results."""
        return {
            "file": self.file,
            "truth": self.truth,
            "images": self.images,
            "objects": self.objects,
            "matched": self.matched,
            "config": self.config.to_dict(),
            "suppress": self.suppress,
            "scores": {kind: scores.to_dict() for kind, scores in self.scores.items()},
            "raw_scores": {kind: scores.to_dict() for kind, scores in self.raw_scores.items()},
            "raw_difference": self.raw_difference,
            "failed": [{"image": path, "reason": reason} for path, reason in self.failed],
            "notes": list(self.notes),
            "detections": len(self.results),
            "seconds": self.seconds,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the results as JSON, which COCO's tools read, and return the path.

        Raises:
            SourceError: the path cannot be written.
        """
        return write_atomically(Path(path), "".join(self._json()).encode())

    def _json(self) -> Iterator[str]:
        yield "["
        for i, row in enumerate(self.results):
            yield (",\n" if i else "\n") + json.dumps(row)
        yield "\n]\n"
