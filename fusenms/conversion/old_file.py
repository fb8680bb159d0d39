"""Run a third-party file as it is, in ONNX Runtime: plugins get a body of standard operators, with the file's own attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fusenms.conversion.semantics import Semantics
from fusenms.conversion.suppressions import BATCHED, EFFICIENT, Found, attributes
from fusenms.errors import SuppressionError
from fusenms.fusion.backends.trt import BODY_OPSET, DOMAIN, plugin_body
from fusenms.graph.model import part_before
from fusenms.reference import Rows

PREFIX = "fusenms/old/"
"""Of the names of nodes and tensors in a copy that is only run."""
LOWEST = -(2.0**120)


def runnable(model: onnx.ModelProto, found: Found, semantics: Semantics) -> onnx.ModelProto:
    """The file as ONNX Runtime runs it. With a plugin, its outputs are the four of the plugin.

    `BatchedNMS` plugins get the body of `EfficientNMS_TRT` with their attributes: their limit for each class is not applied.
    """
    if not found.is_plugin:
        return model
    (node,) = found.nodes
    given, b = attributes(node), _Nodes()
    boxes, scores = node.input[0], node.input[1]
    if found.operator in BATCHED:
        values = {name.replace("_", "").lower(): value for name, value in given.items()}
        if not values.get("sharelocation", 1):
            raise SuppressionError(
                f"node {node.name!r} of type {node.op_type} has boxes of its own for each class; expected one box for all classes"
            )
        boxes = b.op("Reshape", boxes, b.const(np.array([0, -1, 4], np.int64)))
        background = values.get("backgroundlabelid", -1)
    else:
        background = given.get("background_class", -1)
        if given.get("score_activation", 0):
            scores = b.op("Sigmoid", scores)
        if given.get("box_coding", 0) == 1:
            boxes = b.op("MatMul", boxes, b.const(_CORNERS))
    boxes, scores = b.op("Cast", boxes, to=1), b.op("Cast", scores, to=1)
    if background >= 0:
        classes = b.op(
            "Range",
            b.const(np.int64(0)),
            b.op("Gather", b.op("Shape", scores), b.const(np.int64(2))),
            b.const(np.int64(1)),
        )
        scores = b.op(
            "Where", b.op("Equal", classes, b.const(np.int64(background))), b.const(np.float32(LOWEST)), scores
        )
    outputs = [f"{PREFIX}{name}" for name in ("count", "boxes", "scores", "labels")]
    b.nodes.append(
        helper.make_node(
            EFFICIENT, [boxes, scores], outputs, name=f"{PREFIX}nms", domain=DOMAIN, plugin_version="1", plugin_namespace="",
            score_threshold=float(semantics.score_threshold), iou_threshold=float(semantics.iou_threshold),
            max_output_boxes=int(semantics.max_detections or 100), background_class=-1, score_activation=0, box_coding=0,
            class_agnostic=int(semantics.class_agnostic),
        )
    )  # fmt: skip
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(b.nodes)
    copy.graph.initializer.extend(b.constants)
    part = part_before(copy, outputs)
    standard = next(entry for entry in part.opset_import if entry.domain in ("", "ai.onnx"))
    standard.version = max(standard.version, BODY_OPSET)
    kept = [entry for entry in part.opset_import if entry.domain in ("", "ai.onnx", "com.microsoft")]
    del part.opset_import[:]
    part.opset_import.extend([*kept, helper.make_opsetid(DOMAIN, 1)])
    part.functions.append(plugin_body(standard.version))
    part.ir_version = max(part.ir_version, 8)
    del part.graph.output[:]
    kinds = (onnx.TensorProto.INT32, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32)
    part.graph.output.extend(
        helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, kinds, strict=True)
    )
    return part


_CORNERS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]], np.float32)
"""Center and size to corners."""


class _Nodes:
    """Collects nodes and constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{PREFIX}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def const(self, value: np.ndarray | np.generic) -> str:
        name = f"{PREFIX}const_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def rows_of(outputs: Sequence[np.ndarray]) -> Rows | None:
    """The rows of the first image, in pixels or normalized as the file has them; None if the outputs are of no known form.

    Forms: counts, boxes, scores and labels; ``[B, K, 6 + ...]`` of corners, score and label; ``[n, 7]`` with the number of the image first;
    boxes, scores and labels of one image; ``[B, K, 5]`` and labels.
    """
    values = [np.asarray(value) for value in outputs]
    for read in (_counted, _one_tensor, _flat, _apart, _with_labels):
        if (found := read(values)) is not None:
            return found
    return None


def _rows(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Rows:
    return Rows(boxes.astype(np.float64), scores.astype(np.float64), labels.astype(np.int64))


def _counted(values: list[np.ndarray]) -> Rows | None:
    if len(values) < 4:
        return None
    counts = next((v for v in values if v.size == len(v) and v.dtype.kind in "iu"), None)
    boxes = next((v for v in values if v.ndim == 3 and v.shape[2] == 4), None)
    rest = [
        v for v in values if v.ndim == 2 and boxes is not None and v.shape[:2] == boxes.shape[:2] and v is not counts
    ]
    if counts is None or boxes is None or len(rest) != 2:
        return None
    scores, labels = rest if rest[0].dtype.kind == "f" and _scores(rest[0]) and not _whole(rest[0]) else rest[::-1]
    if rest[1].dtype.kind in "iu":
        scores, labels = rest
    count = int(counts.reshape(-1)[0])
    return _rows(boxes[0, :count], scores[0, :count], labels[0, :count])


def _one_tensor(values: list[np.ndarray]) -> Rows | None:
    if values[0].ndim != 3 or values[0].shape[2] < 6 or len(values) > 2:
        return None
    rows = values[0][0]
    rows = rows[rows[:, 4] > 0]
    if not (_whole(rows[:, 5]) and _scores(rows[:, 4])):
        return None
    return _rows(rows[:, :4], rows[:, 4], rows[:, 5])


def _flat(values: list[np.ndarray]) -> Rows | None:
    if len(values) != 1 or values[0].ndim != 2 or values[0].shape[1] != 7:
        return None
    rows = values[0][values[0][:, 0] == 0]
    for box, label, score in ((1, 5, 6), (1, 6, 5), (3, 1, 2)):
        if _whole(rows[:, label]) and _scores(rows[:, score]) and _corners(rows[:, box : box + 4]):
            return _rows(rows[:, box : box + 4], rows[:, score], rows[:, label])
    return None


def _apart(values: list[np.ndarray]) -> Rows | None:
    boxes = next((v for v in values if v.ndim == 2 and v.shape[1] == 4), None)
    rest = [v for v in values if v.ndim == 1]
    if len(values) != 3 or boxes is None or len(rest) != 2:
        return None
    labels = next((v for v in rest if v.dtype.kind in "iu"), None)
    scores = next((v for v in rest if v.dtype.kind == "f"), None)
    return None if labels is None or scores is None else _rows(boxes, scores, labels)


def _with_labels(values: list[np.ndarray]) -> Rows | None:
    rows = next((v for v in values if v.ndim == 3 and v.shape[2] == 5), None)
    labels = next((v for v in values if v.ndim == 2), None)
    if rows is None or labels is None or labels.shape != rows.shape[:2]:
        return None
    used = (rows[0, :, 4] > 0) & (labels[0] >= 0)
    return _rows(rows[0, used, :4], rows[0, used, 4], labels[0, used])


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.round(values)).all() and (values >= 0).all())


def _scores(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _corners(values: np.ndarray) -> bool:
    return bool((values[:, 2:] >= values[:, :2]).all())
