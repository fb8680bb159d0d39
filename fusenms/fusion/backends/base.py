"""What a backend is: how it suppresses in the graph, how its graph is checked, how it is run."""

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
    """What suppression keeps of the candidates, best first: K rows per image, the valid ones first.

    Attributes:
        valid: ``[B, K]`` bool.
        place: ``[B, K]`` int32, where each stands among the candidates; some place where a row is not valid.
        boxes: ``[B, K, 4 or 5]`` float32, as `CandidateTensors.decode` gives them; anything where a row is not valid.
        labels: ``[B, K]`` int32; the same.
        converged: ``[B, 1]`` int32, with ``config.rounds``: 1 where those were enough.
    """

    valid: Tensor
    place: Tensor
    boxes: Tensor
    labels: Tensor
    converged: Tensor | None = None


@dataclass(frozen=True)
class DetectionTensors:
    """Detections of every image, best first: K rows, blank past the count (0; labels and indices -1).

    Attributes:
        valid: ``[B, K]`` bool: rows that are in use; they stand first.
        count: ``[B, 1]`` int32.
        boxes: ``[B, K, 4 or 5]`` float32.
        scores: ``[B, K]`` float32.
        labels: ``[B, K]`` int32.
        indices: ``[B, K]`` int32, the candidates' numbers, as `fusenms.layout` counts them.
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
"""Emit all that lies between a head and its detections."""


@dataclass(frozen=True)
class Backend:
    """One way to suppress.

    Attributes:
        name: what ``backend`` says.
        suffix: of the files it makes.
        suppresses_by: the operator, for people.
        find: emit candidates, decoding, suppression and selection; raises UnsupportedByBackendError.
        to_standard: a model, or a part of it, for ONNX Runtime: plugins get a body of standard operators, for checking only.
        runs_on_onnxruntime: whether the file itself runs there.
        adaptive: whether the number of candidates may depend on the data; else it is fixed.
        has_rounds: whether `PostprocessConfig.rounds` means something to it.
        knows_oriented: whether it suppresses oriented boxes itself.
        in_float: the model with the head's tensors in float32, for checking, where the file has them in float16 for the plugin.
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
    in_float: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model


def by_candidates(
    suppress: Callable[[Graph, CandidateTensors, PostprocessConfig], SelectionTensors], adaptive: bool
) -> EmitDetections:
    """Score, select and decode candidates by tensor operators, then suppress."""

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
    """The selection of a head that needs no suppression: its candidates, at most K, then blank rows."""
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
    """Scores ``[B, k]`` (or ``[1, k]``), each at its own class, -1 elsewhere and where a candidate is not valid.

    ``classes`` int32 is ``[1, C, 1]`` or ``[1, 1, C]``, by ``class_axis`` (1 or 2); so is the result, ``[B, C, k]`` or ``[B, k, C]``.
    """
    own = g.op("Equal", g.unsqueeze(labels, class_axis), classes)
    masked = g.where(valid, scores, g.floats(-1.0))
    return g.where(own, g.unsqueeze(masked, class_axis), g.floats(-1.0))
