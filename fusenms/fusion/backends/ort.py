"""Suppression by one standard ONNX `NonMaxSuppression` node for any batch size, for ONNX Runtime and other standard runtimes."""

from __future__ import annotations

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel
from fusenms.config import PostprocessConfig
from fusenms.fusion.backends.base import Backend, SelectionTensors, by_candidates, one_class_each
from fusenms.fusion.candidates import CandidateTensors
from fusenms.graph.builder import FLOAT, INT32, Graph, Tensor


def suppress(g: Graph, candidates: CandidateTensors, config: PostprocessConfig) -> SelectionTensors:
    """Emit suppression and selection.

    1. The operator gets ranks as scores: k for the best candidate, 1 for the last one. Its order is then the order of the candidates, even
       if a float32 sigmoid changes the order of scores that are almost equal. Its score rows are only the classes that occur.
    2. The operator lists its picks by image, then class, then score. They are scattered back onto the candidates.
    3. The first K picked candidates of each image are taken.
    """
    boxes, labels, valid = candidates.decode(None)
    rank = _descending(g, candidates)
    if config.class_agnostic or candidates.num_classes == 1:
        scores = g.unsqueeze(g.where(valid, rank, g.floats(-1.0)), 1)
    else:
        scores = one_class_each(g, rank, labels, valid, _present(g, labels, candidates.num_classes), 1)
    most = g.const([config.max_detections], np.int64)
    nothing = g.op("Mul", rank, g.floats(0.0))
    if config.iou_threshold < 1:
        limits = (g.const([just_above(config.iou_threshold)], np.float32), g.const([-0.5], np.float32))
        picks = g.op("NonMaxSuppression", boxes, scores, most, *limits)  # rows of (image, class, candidate)
        places = g.concat([g.slice(picks, 1, 0, 1), g.slice(picks, 1, 2, 3)], 1)
        picked = g.op("ScatterND", nothing, places, g.op("GatherND", rank, places))
    else:  # no IoU is larger; OpenVINO would drop boxes that are equal
        picked = g.where(valid, rank, nothing)
    if (
        candidates.count is None or candidates.count < config.max_detections
    ):  # fewer candidates than rows: pad with blank rows
        lacking = config.max_detections - (candidates.count or 0)
        picked = g.op("Pad", picked, g.const([0, 0, 0, lacking], np.int64), g.floats(0.0))
    value, row = g.top_k(picked, most)
    valid = g.op("Greater", value, g.floats(0.0))
    row = g.where(valid, row, g.ints(0))
    return SelectionTensors(valid, row, g.take_rows(boxes, row, 1, 4), g.op("GatherElements", labels, row, axis=1))


def just_above(threshold: float) -> np.float32:
    """The next float32 number above an IoU threshold.

    The standard suppresses above the threshold, OpenVINO 2026.4 at the threshold too. With the next number, both keep a box whose IoU is
    the threshold itself; only an IoU that is one rounding error above it is decided otherwise. It is a normal number, since a runtime may
    take others for 0.
    """
    above = np.nextafter(np.float32(threshold), np.float32(2))
    return np.maximum(above, np.finfo(np.float32).tiny)


def _present(g: Graph, labels: Tensor, num_classes: int) -> Tensor:
    """The classes that occur among the candidates of the batch, ``[1, C, 1]`` int32, at least one."""
    flat = g.reshape(labels, -1)
    seen = g.op("ScatterElements", g.const(np.zeros(num_classes), np.int32), flat, g.op("Add", flat, g.ints(1)))
    return g.reshape(g.cast(g.op("NonZero", seen), INT32), 1, -1, 1)


def _descending(g: Graph, candidates: CandidateTensors) -> Tensor:
    """``[B, k]`` float32: k, k - 1, …, 1 in each row (exact, since k is far below 2^24)."""
    ones = g.cast(g.op("Equal", candidates.scores, candidates.scores), FLOAT)
    if candidates.count is not None:
        return g.op("Mul", ones, g.const(np.arange(candidates.count, 0, -1)[None], np.float32))
    return g.op("CumSum", ones, g.const(1, np.int64), reverse=1)


def to_standard(model: onnx.ModelProto, _: FusedModel) -> onnx.ModelProto:
    """Return the model unchanged."""
    return model


ORT = Backend(
    "ort",
    ".ort.onnx",
    "NonMaxSuppression",
    by_candidates(suppress, adaptive=True),
    to_standard,
    runs_on_onnxruntime=True,
    adaptive=True,
)
