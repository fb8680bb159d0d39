"""Task outputs of a third-party head: mask coefficients, keypoints or an angle. The file's metadata and its outputs say which."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusenms.heads.base import Mismatch
from fusenms.heads.probe import Probe, Sample
from fusenms.layout import AngleTerm, KeypointTerms, MaskTerms, Tap

TASKS = ("detect", "segment", "pose", "obb")


def task_channels(probe: Probe, maps: list[Sample]) -> int | Mismatch:
    """Return the number of channels of a candidate beyond box and classes."""
    task = probe.raw.task
    if maps and task in ("detect", "segment"):  # a file without metadata counts as detect
        prototypes = maps[0].value
        if prototypes.dtype != np.float32:
            return Mismatch(f"the prototypes {list(prototypes.shape)} are {prototypes.dtype}; expected float32")
        return int(prototypes.shape[1])
    if task == "segment" or maps:
        return Mismatch(
            f"the file says that its task is {task!r}, and it has {len(maps)} outputs that may be prototypes"
        )
    if task == "pose":
        points = probe.keypoints
        if points is None:
            return Mismatch(
                "the file does not say how many keypoints it has; expected kpt_shape in its metadata, as [17, 3]"
            )
        return points[0] * points[1]
    return 1 if task == "obb" else 0


def task_terms(probe: Probe, tap: Tap | None, maps: list[Sample]) -> dict[str, Any]:
    """Return the meaning of these channels, as fields of a layout."""
    if tap is None:
        return {}
    if maps:
        return {"masks": MaskTerms(tap, maps[0].tensor)}
    if probe.raw.task == "pose" and probe.keypoints is not None:
        return {"keypoints": KeypointTerms(tap, probe.keypoints[1])}
    return {"angle": AngleTerm(tap)}


def not_terms(probe: Probe, rows: np.ndarray) -> str | None:
    """Return why the extra channels ``[N, channels]`` contradict the task that the file states; None if they may fit it."""
    if probe.raw.task == "pose" and probe.keypoints is not None and probe.keypoints[1] == 3:
        visibility = rows.reshape(len(rows), *probe.keypoints)[..., 2]
        if not ((visibility >= 0) & (visibility <= 1)).all():
            return (
                f"the file says that keypoints are {list(probe.keypoints)}, but every third of their numbers goes from "
                f"{visibility.min():.3g} to {visibility.max():.3g}; expected visibilities, from 0 to 1"
            )
    return None
