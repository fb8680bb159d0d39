"""Detections as COCO writes results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fusenms.evaluation.scoring import encode_mask
from fusenms.runtime import Detections


def results_of(found: Detections, image: int, categories: Mapping[int, int]) -> list[dict[str, Any]]:
    """Results of one image: image_id, category_id, bbox (left, top, width, height in pixels), score; segmentation and keypoints if the
    model has them. Classes without a category are left out.

    Args:
        image: its number, at least 1.
        categories: class number to category.
    """
    boxes = np.concatenate((found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]), 1).astype(np.float64)
    rows = []
    for i, (box, score, label) in enumerate(zip(boxes, found.scores, found.labels.tolist(), strict=True)):
        if label not in categories:
            continue
        row: dict[str, Any] = {
            "image_id": image, "category_id": categories[label], "bbox": box.round(3).tolist(), "score": float(str(score))
        }  # fmt: skip
        if len(found.masks):
            row["segmentation"] = encode_mask(found.masks[i])
        if found.keypoints.shape[1]:
            row["keypoints"] = _keypoints(found.keypoints[i])
        rows.append(row)
    return rows


def _keypoints(points: np.ndarray) -> list[float]:
    """Keypoints as x, y, visibility, …; the visibility is 1 if the model gives none."""
    full = points if points.shape[1] == 3 else np.concatenate((points, np.ones_like(points[:, :1])), 1)
    return full.astype(np.float64).round(3).ravel().tolist()
