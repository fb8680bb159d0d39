"""The definition of a backend: how it suppresses in the graph, how its graph is checked, where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from fusenms import contract
from fusenms.artifacts.fused import FusedModel
from fusenms.config import PostprocessConfig
from fusenms.fusion.candidates import CandidateTensors, Head, emit_candidates
from fusenms.graph.builder import INT32, Graph, Tensor


@dataclass(frozen=True)
class SelectionTensors:
    """The candidates that suppression keeps, best first: K rows per image, valid rows first.

    Attributes:
        valid: ``[B, K]`` bool.
        place: ``[B, K]`` int32, place of each row among the candidates; any existing place in rows that are not valid.
        boxes: ``[B, K, 4 or 5]`` float32, as `CandidateTensors.decode` gives them; arbitrary in rows that are not valid.
        labels: ``[B, K]`` int32; arbitrary in rows that are not valid.
        converged: ``[B, 1]`` int32, only with ``config.rounds``: 1 if the rounds were enough.
    """

    valid: Tensor
    place: Tensor
    boxes: Tensor
    labels: Tensor
    converged: Tensor | None = None


@dataclass(frozen=True)
class DetectionTensors:
    """Detections of every image, best first: K rows. Rows past the count are blank (0; labels and indices -1).

    Attributes:
        valid: ``[B, K]`` bool, True for rows in use, which come first.
        count: ``[B, 1]`` int32, number of rows in use.
        boxes: ``[B, K, 4 or 5]`` float32.
        scores: ``[B, K]`` float32.
        labels: ``[B, K]`` int32.
        indices: ``[B, K]`` int32, candidate numbers as defined in `fusenms.layout`.
        converged: as in `SelectionTensors`.
    """

    valid: Tensor
    count: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    indices: Tensor
    converged: Tensor | None = None


EmitDetections = Callable[[Graph, Head, PostprocessConfig], DetectionTensors]
"""Emit everything between a head and its detections."""


@dataclass(frozen=True)
class Backend:
    """One way to suppress.

    Attributes:
        name: the value of ``backend``.
        suffix: suffix of its files.
        suppresses_by: the operator that suppresses, for display.
        find: emits candidates, decoding, suppression and selection; raises UnsupportedByBackendError.
        to_standard: converts a model, or a part of it, for ONNX Runtime: plugins get a body of standard operators. For checking only.
        runs_on_onnxruntime: whether the file itself runs in ONNX Runtime.
        adaptive: whether the number of candidates may depend on the data; otherwise it is fixed.
        has_rounds: whether it supports `PostprocessConfig.rounds`.
        knows_oriented: whether it suppresses oriented boxes itself.
        has_runtime_thresholds: whether its thresholds can be inputs of the graph.
        in_float: converts a model whose plugin reads float16 head tensors to one that reads float32. For checking only.
    """

    name: str
    suffix: str
    suppresses_by: str
    find: EmitDetections
    to_standard: Callable[[onnx.ModelProto, FusedModel], onnx.ModelProto]
    runs_on_onnxruntime: bool
    adaptive: bool
    has_rounds: bool = False
    knows_oriented: bool = False
    has_runtime_thresholds: bool = False
    in_float: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model


def by_candidates(
    suppress: Callable[[Graph, CandidateTensors, PostprocessConfig], SelectionTensors], adaptive: bool
) -> EmitDetections:
    """Return a ``find`` that scores, selects and decodes candidates with tensor operators, and then calls ``suppress``."""

    def find(g: Graph, head: Head, config: PostprocessConfig) -> DetectionTensors:
        candidates = emit_candidates(g, head, config, adaptive)
        selection = suppress(g, candidates, config)
        valid = selection.valid
        scores = g.op("GatherElements", candidates.scores, selection.place, axis=1)
        blank = g.ints(contract.NO_LABEL)
        return DetectionTensors(
            valid,
            g.reduce("ReduceSum", g.cast(valid, INT32), 1, keepdims=True),
            g.where(g.unsqueeze(valid, 2), selection.boxes, g.floats(0.0)),
            g.where(valid, scores, g.floats(0.0)),
            g.where(valid, selection.labels, blank),
            g.where(valid, candidates.indices(selection.place), blank),
            selection.converged,
        )

    return find


def select(g: Graph, candidates: CandidateTensors, config: PostprocessConfig) -> SelectionTensors:
    """Emit the selection of a head that needs no suppression: at most K candidates, then blank rows."""
    assert candidates.count is not None and candidates.count <= config.max_detections
    boxes, labels, valid = candidates.decode(None)
    falling = g.const(np.arange(candidates.count, 0, -1)[None], np.float32)
    rank = g.where(valid, falling, g.floats(0.0))  # valid ones first
    if lacking := config.max_detections - candidates.count:
        rank = g.op("Pad", rank, g.const([0, 0, 0, lacking], np.int64), g.floats(0.0))
    rank, row = g.top_k(rank, g.const([config.max_detections], np.int64))
    valid = g.op("Greater", rank, g.floats(0.0))
    place = g.where(valid, row, g.ints(0))
    return SelectionTensors(
        valid, place, g.take_rows(boxes, place, 1, candidates.box_size), g.op("GatherElements", labels, place, axis=1)
    )


def one_class_each(g: Graph, scores: Tensor, labels: Tensor, valid: Tensor, classes: Tensor, class_axis: int) -> Tensor:
    """Place each score of ``[B, k]`` (or ``[1, k]``) at the class of its candidate; -1 elsewhere and for candidates that are not valid.

    ``classes`` int32 is ``[1, C, 1]`` with ``class_axis`` 1 and ``[1, 1, C]`` with 2. The result is ``[B, C, k]`` or ``[B, k, C]``.
    """
    own = g.op("Equal", g.unsqueeze(labels, class_axis), classes)
    masked = g.where(valid, scores, g.floats(-1.0))
    return g.where(own, g.unsqueeze(masked, class_axis), g.floats(-1.0))
