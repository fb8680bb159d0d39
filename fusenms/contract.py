"""The contract of every fused model: output names, dtypes and shapes, and the metadata keys. Each is defined only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

NUM_DETECTIONS: Final = "num_detections"
BOXES: Final = "boxes"
SCORES: Final = "scores"
LABELS: Final = "labels"
CONVERGED: Final = "converged"
INDICES: Final = "indices"
MASK_COEFFICIENTS: Final = "mask_coefficients"
PROTOTYPES: Final = "prototypes"
MASKS: Final = "masks"
KEYPOINTS: Final = "keypoints"
NO_LABEL: Final = -1  # label of the rows past num_detections


@dataclass(frozen=True)
class Output:
    """One output: ``shape`` uses ``B`` (batch, dynamic), ``K`` (``max_detections``), ``h`` and ``w`` (of the prototypes)."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[str | int, ...]

    def shape_for(
        self, batch: str | int, max_detections: int, height: str | int = "h", width: str | int = "w"
    ) -> tuple[str | int, ...]:
        """The shape with ``B``, ``K``, ``h`` and ``w`` filled in; all but ``K`` may be symbols."""
        sizes: dict[str | int, str | int] = {"B": batch, "K": max_detections, "h": height, "w": width}
        return tuple(sizes.get(dim, dim) for dim in self.shape)


OUTPUTS: Final = (
    Output(NUM_DETECTIONS, np.dtype(np.int32), ("B", 1)),
    Output(BOXES, np.dtype(np.float32), ("B", "K", 4)),
    Output(SCORES, np.dtype(np.float32), ("B", "K")),
    Output(LABELS, np.dtype(np.int32), ("B", "K")),
)

CONVERGED_OUTPUT: Final = Output(CONVERGED, np.dtype(np.int32), ("B", 1))
"""Present if suppression runs a fixed number of rounds: 1 if they were enough, 0 if the rows of the image may be wrong."""

INDICES_OUTPUT: Final = Output(INDICES, np.dtype(np.int32), ("B", "K"))
"""Present on request: the candidate number of each row, as defined in `fusenms.layout`; -1 past num_detections."""

SCORE_THRESHOLD: Final = "score_threshold"
IOU_THRESHOLD: Final = "iou_threshold"
CLASS_MASK: Final = "class_mask"


@dataclass(frozen=True)
class RuntimeInput:
    """One optional input, a vector. If nothing is fed, the runtime takes its default, an initializer of the same name.

    ``lengths`` are those that it may have, that of the default first. ``value`` is each number of the default.
    """

    name: str
    dtype: np.dtype[np.generic]
    lengths: tuple[int, ...]
    value: float | bool

    @property
    def default(self) -> np.ndarray:
        """The default, ``[lengths[0]]``."""
        return np.full(self.lengths[0], self.value, self.dtype)

    @property
    def shape(self) -> tuple[str | int, ...]:
        """The declared shape: a symbol if there are several lengths."""
        return (self.lengths[0] if len(set(self.lengths)) == 1 else f"{self.name}_length",)


MASK_KINDS: Final = ("coefficients", "prototype")
"""Mask outputs of a model: coefficients and prototypes, or the masks at the size of the prototypes."""

OUTPUT_PRESETS: Final[dict[str, tuple[str, str, str, str]]] = {
    "fusenms": (NUM_DETECTIONS, BOXES, SCORES, LABELS),
    "tensorrt": ("num_detections", "detection_boxes", "detection_scores", "detection_classes"),
    "deepstream": ("num_dets", "det_boxes", "det_scores", "det_classes"),
    "yolov7": ("num_dets", "det_boxes", "det_scores", "det_classes"),
    "ultralytics": (NUM_DETECTIONS, BOXES, SCORES, LABELS),
}
"""Output names that existing consumers parse, in the order of `OUTPUTS`. All other outputs keep the names of fusenms."""
ONE_TENSOR: Final = "ultralytics"
"""The preset whose file has all rows in one tensor (`fusenms.artifacts.one_tensor`); the names are those in memory."""

# Metadata keys of fusenms.
PREFIX: Final = "fusenms."
"""Of the metadata that only a fused file has."""
KEY_VERSION: Final = "fusenms.version"
KEY_BACKEND: Final = "fusenms.backend"
KEY_LAYOUT: Final = "fusenms.layout"
KEY_CONFIG: Final = "fusenms.config"
KEY_IMAGE: Final = "fusenms.image"
KEY_DECODE: Final = "fusenms.decode"
KEY_PRECISION: Final = "fusenms.precision"
KEY_SUPPRESSION: Final = "fusenms.suppression"
KEY_SOURCE: Final = "fusenms.source"
KEY_NOTES: Final = "fusenms.notes"
KEY_VERIFICATION: Final = "fusenms.verification"
KEY_NCNN: Final = "fusenms.ncnn"
"""SHA-256 of the files of ncnn that a tail belongs to."""
# Metadata keys of Ultralytics, written so that its tools still read the file.
KEY_NAMES: Final = "names"
KEY_STRIDE: Final = "stride"
KEY_TASK: Final = "task"
KEY_IMGSZ: Final = "imgsz"
KEY_KEYPOINTS: Final = "kpt_shape"
KEY_BATCH: Final = "batch"
KEY_END_TO_END: Final = "end2end"
KEY_ARGUMENTS: Final = "args"
"""These three only if the file has all rows in one tensor."""

UNVERIFIED: Final = "unverified"
"""Value of `KEY_VERIFICATION` in a file that was written without verification."""
