"""Detections as COCO writes results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusenms.evaluation.scoring import encode_mask
from fusenms.runtime import Detections
from fusenms.runtime.masks import Masks


def results_of(found: Detections, image: int, categories: Mapping[int, int]) -> list[dict[str, Any]]:
    """Results of one image: as `Detections.to_coco`, with whole scores, which rank them, and masks by run lengths, which keep holes.

    Args:
        image: its number.
        categories: class number to category; classes without one are left out.
    """
    kept = found[[i for i, label in enumerate(found.labels.tolist()) if label in categories]]
    numbers = [categories.get(label, -1) for label in range(max(categories, default=-1) + 1)]
    rows = replace(kept, masks=Masks.none()).to_coco(image, numbers)
    for row, score in zip(rows, kept.scores, strict=True):
        row["score"] = float(str(score))
    for row, mask in zip(rows, kept.masks, strict=False):
        row["segmentation"] = encode_mask(mask)
    return rows
