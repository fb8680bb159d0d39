"""Exact greedy suppression with plain tensor operators: no NMS operator, no plugin, no shape that depends on the data.

It serves runtimes without `NonMaxSuppression` and without plugins (TensorRT-RTX), and CUDA graphs.

Candidates are sorted, best first. Let M[i, j] = 1 if j < i, both candidates have the same class, and their IoU is above the threshold.
Greedy suppression is the unique solution of

    keep = valid and not (M keep > 0)

because row i depends only on the rows before it: row 0 is settled at once, then row 1, and so on. The solution is found by iteration:

1. Start from any ``keep``.
2. Replace ``keep`` by the right side. After n rounds, every candidate that ends a chain of at most n rivals is right.
3. Repeat until a round changes nothing. All candidates are then right.

docs/concepts/portable-nms.md has the proof and the cost.

M is never built as a whole. Candidates are taken in blocks, the best first. A block is compared with the boxes kept so far, at most
``max_detections`` of them, and with itself. Memory therefore does not grow with the square of the candidates, and the blocks end as soon as
no image can gain another detection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from fusenms.artifacts.fused import FusedModel
from fusenms.config import PostprocessConfig
from fusenms.fusion.backends.base import Backend, SelectionTensors, by_candidates
from fusenms.fusion.backends.iou import oriented_limit, overlap_oriented, overlap_upright, upright_limit
from fusenms.fusion.candidates import CandidateTensors
from fusenms.fusion.thresholds import iou_threshold
from fusenms.graph.builder import FLOAT, INT32, Graph, Tensor

BLOCK, UNROLLED_BLOCK = 64, 960
"""Limits on the candidates of a block: with a `Loop`, whose blocks cost little, and unrolled, where each block makes the graph longer."""


def suppress(g: Graph, candidates: CandidateTensors, config: PostprocessConfig) -> SelectionTensors:
    """Emit suppression and selection. Candidates are decoded block by block.

    Without ``config.rounds``, `Loop` nodes run until nothing changes. With it, this number of rounds is unrolled for every block, and an
    extra output says which images have converged.
    """
    assert candidates.count is not None
    count = math.ceil(candidates.count / (BLOCK if config.rounds is None else UNROLLED_BLOCK))
    limit = (oriented_limit if candidates.oriented else upright_limit)(g, iou_threshold(g, config))
    blocks = _Blocks(g, candidates, config, limit, candidates.count, math.ceil(candidates.count / count))
    if config.rounds is None and count > 1:
        found, converged = blocks.while_any_is_open(count), None
    else:
        found, converged = blocks.one(g.ints(0), None)
        for i in range(1, count):
            found, settled = blocks.one(g.ints(i), found)
            converged = g.op("Mul", converged, settled)
    boxes = g.op("Transpose", g.slice(found, 1, 0, candidates.box_size), perm=[0, 2, 1])
    rank = blocks.row(found, blocks.rank)
    valid = g.op("Greater", rank, g.floats(0.0))
    place = g.where(valid, g.op("Sub", g.ints(candidates.count), g.cast(rank, INT32)), g.ints(0))
    labels = g.cast(blocks.row(found, blocks.label), INT32)
    return SelectionTensors(valid, place, boxes, labels, None if config.rounds is None else converged)


@dataclass(frozen=True)
class _Blocks:
    """Emits the processing of blocks of ``size`` candidates, ``total`` in all.

    The selection so far is passed on as *found*, ``[B, box + 2, max_detections]`` float32, the best first: box, label, rank. A rank is
    ``total`` minus the candidate's place (exact, because both are far below 2^24), and 0 in columns that are not in use. ``limit`` is the
    IoU threshold, as its test takes it.
    """

    g: Graph
    candidates: CandidateTensors
    config: PostprocessConfig
    limit: Tensor
    total: int
    size: int

    @property
    def label(self) -> int:
        """Row of *found* that holds the labels."""
        return self.candidates.box_size

    @property
    def rank(self) -> int:
        return self.label + 1

    def row(self, found: Tensor, i: int) -> Tensor:
        """Row ``[B, n]`` of *found* ``[B, box + 2, n]``."""
        return self.g.op("Gather", found, self.g.ints(i), axis=1)

    def one(self, number: Tensor, found: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return *found* after block ``number`` (int32 scalar), and ``[B, 1]`` int32: 1 if the block has converged."""
        g, most = self.g, self.config.max_detections
        place = g.op("Add", g.op("Mul", number, g.ints(self.size)), g.const(np.arange(self.size), np.int32))
        inside = g.op("Less", place, g.ints(self.total))
        place = g.where(inside, place, g.ints(self.total - 1))
        boxes, labels, valid = self.candidates.decode(place)
        alive = g.op("And", valid, inside)
        own = g.concat([boxes, g.unsqueeze(g.cast(labels, FLOAT), 2)], 2)  # [B, b, box + 1]
        across = g.op("Transpose", own, perm=[0, 2, 1])
        everyone = across if found is None else g.concat([g.slice(found, 1, 0, self.rank), across], 2)
        rivals = self._rivals(own, everyone)  # in the selection so far, then in the block itself
        if found is not None:
            selection = g.op("Greater", self.row(found, self.rank), g.floats(0.0))
            alive = g.op("And", alive, g.op("Not", self._any(g.slice(rivals, 2, 0, most), selection)))
            rivals = g.slice(rivals, 2, most, most + self.size)
        earlier = g.op("Less", g.unsqueeze(place, 0), g.unsqueeze(place, 1))
        keep, settled = self._settle(alive, g.op("And", rivals, earlier))
        rank = g.op("Mul", keep, g.cast(g.op("Sub", g.ints(self.total), place), FLOAT))
        rows = g.concat([across, g.unsqueeze(rank, 1)], 1)
        if found is not None:
            rows = g.concat([found, rows], 2)
        elif self.size < most:
            rows = g.op("Pad", rows, g.const([0, 0, 0, 0, 0, most - self.size], np.int64), g.floats(0.0))
        _, order = g.top_k(self.row(rows, self.rank), g.const([most], np.int64))
        wide = g.op("Expand", g.unsqueeze(order, 1), g.const([1, self.rank + 1, 1], np.int64))
        return g.op("GatherElements", rows, wide, axis=2), settled

    def while_any_is_open(self, count: int) -> Tensor:
        """Return *found* after all blocks. The loop ends when no image can gain another row."""
        g, most = self.g, self.config.max_detections
        passing = g.cast(self.candidates.passing, FLOAT)
        last = g.reduce("ReduceSum", passing, 1)  # [B]: passing ones come first
        start = g.unsqueeze(g.slice(passing, 1, 0, 1), 2)
        nothing = g.op("Mul", start, g.const(np.zeros((1, self.rank + 1, most)), np.float32))

        def step(i: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
            number = g.cast(i, INT32)
            found, _ = self.one(number, found)
            spare = g.op("Less", g.reduce("ReduceMin", self.row(found, self.rank), 1), g.floats(0.5))
            reach = g.reduce("ReduceMax", g.where(spare, last, g.floats(0.0)), 0)
            done = g.op("Mul", g.op("Add", number, g.ints(1)), g.ints(self.size))
            return g.op("Greater", reach, g.cast(done, FLOAT)), found

        return g.loop(count, g.const(True, np.bool_), nothing, ("batch", self.rank + 1, most), step)

    def _settle(self, alive: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Iterate. Return ``[B, size]`` float32: 1 for kept candidates; and ``[B, 1]`` int32: 1 if the last round changed nothing."""
        g = self.g

        def once(keep: Tensor) -> tuple[Tensor, Tensor]:
            free = g.op("Not", self._any(rivals, g.op("Greater", keep, g.floats(0.5))))
            after = g.cast(g.op("And", alive, free), FLOAT)
            return after, g.reduce("ReduceMax", g.op("Abs", g.op("Sub", after, keep)), 1, keepdims=True)

        keep = g.cast(alive, FLOAT)
        if self.config.rounds is not None:
            for _ in range(self.config.rounds):
                keep, change = once(keep)
            return keep, g.cast(g.op("Less", change, g.floats(0.5)), INT32)

        def step(_: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
            after, change = once(keep)
            return g.op("Greater", g.reduce("ReduceMax", g.reduce("ReduceMax", change, 1), 0), g.floats(0.5)), after

        return g.loop(self.size + 1, g.const(True, np.bool_), keep, ("batch", self.size), step), g.ints(1)

    def _rivals(self, own: Tensor, others: Tensor) -> Tensor:
        """Whether boxes and labels ``[B, b, box + 1]`` and others ``[B, box + 1, n]`` overlap too much and share their class:
        ``[B, b, n]`` bool."""
        g, overlap = self.g, overlap_oriented if self.candidates.oriented else overlap_upright
        *box, label = g.split(own, 2, self.label + 1)  # [B, b, 1]
        *other, other_label = g.split(others, 1, self.label + 1)  # [B, 1, n]
        close = overlap(g, box, other, self.limit)
        if self.config.class_agnostic or self.candidates.num_classes == 1:
            return close
        return g.op("And", close, g.op("Equal", label, other_label))

    def _any(self, rivals: Tensor, keep: Tensor) -> Tensor:
        """Whether one of the rivals ``[B, b, n]`` bool of each candidate is kept (``keep``: ``[B, n]`` bool): ``[B, b]`` bool."""
        g = self.g
        hits = g.cast(g.op("And", rivals, g.unsqueeze(keep, 1)), FLOAT)
        return g.op("Greater", g.reduce("ReduceMax", hits, 2), g.floats(0.5))


def to_standard(model: onnx.ModelProto, _: FusedModel) -> onnx.ModelProto:
    """Return the model unchanged."""
    return model


PORTABLE = Backend(
    "portable",
    ".portable.onnx",
    "tensor operators",
    by_candidates(suppress, adaptive=False),
    to_standard,
    runs_on_onnxruntime=True,
    adaptive=False,
    has_rounds=True,
    has_runtime_thresholds=True,
    knows_oriented=True,
)
