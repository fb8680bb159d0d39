"""Tails with suppression, as published recipes write them, behind the tiny networks of `third_party`. Rebuilt from the recipes' sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from third_party import Stranger, write

SCORE, IOU, ROWS = 0.05, 0.5, 20


class Tail:
    """Adds nodes to a model, in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.heads = [entry.name for entry in model.graph.output]

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"tail/const_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: list[str] | None = None, domain: str = "", **attributes: Any) -> str:
        names = outputs or [f"tail/{kind}_{len(self.graph.node)}"]
        node = helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes)
        self.graph.node.append(node)
        return names[0]

    def best(self, value: str, axis: int, keepdims: int) -> str:
        """The maximum, whose axes are an input from opset 18 on."""
        newer = next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")) >= 18
        if newer:
            return self.op("ReduceMax", value, self.const([axis]), keepdims=keepdims)
        return self.op("ReduceMax", value, axes=[axis], keepdims=keepdims)

    def outputs(self, **kinds: tuple[int, list[Any]]) -> onnx.ModelProto:
        del self.graph.output[:]
        self.graph.output.extend(helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items())
        return self.model


def tail_of(network: Stranger, path: Path, dynamic: bool = True) -> Tail:
    write(network, path, dynamic=dynamic)
    return Tail(onnx.load(path))


COUNTED = {
    "num_dets": (TensorProto.INT32, ["batch", 1]),
    "det_boxes": (TensorProto.FLOAT, ["batch", ROWS, 4]),
    "det_scores": (TensorProto.FLOAT, ["batch", ROWS]),
    "det_classes": (TensorProto.INT32, ["batch", ROWS]),
}


def efficient(
    t: Tail,
    boxes: str,
    scores: str,
    domain: str = "TRT",
    operator: str = "EfficientNMS_TRT",
    more: tuple[str, ...] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """`EfficientNMS_TRT`: YOLOv8-TensorRT, TensorRT-YOLO, YOLOv7 ``--end2end`` (with ``box_coding=1``)."""
    given = {
        "score_threshold": SCORE,
        "iou_threshold": IOU,
        "max_output_boxes": ROWS,
        "background_class": -1,
        "box_coding": 0,
    }
    given |= {"score_activation": 0, "plugin_version": "1", **attributes}
    t.op(operator, boxes, scores, outputs=[*COUNTED, *more], domain=domain, **given)
    if domain:
        t.model.opset_import.append(helper.make_opsetid(domain, 1))
    return t.outputs(**COUNTED, **dict.fromkeys(more, (TensorProto.INT32, ["batch", ROWS])))


def batched(t: Tail, boxes: str, scores: str, **attributes: Any) -> onnx.ModelProto:
    """`BatchedNMSDynamic_TRT`: yolort and older samples."""
    given = {"shareLocation": 1, "backgroundLabelId": -1, "numClasses": 3, "topK": 100, "keepTopK": ROWS} | attributes
    given |= {"scoreThreshold": SCORE, "iouThreshold": IOU, "isNormalized": 0, "clipBoxes": 0}
    wide = t.op("Unsqueeze", boxes, t.const([2]))
    t.op("BatchedNMSDynamic_TRT", wide, scores, outputs=list(COUNTED), domain="TRT", **given)
    t.model.opset_import.append(helper.make_opsetid("TRT", 1))
    return t.outputs(**COUNTED)


def mmdeploy(t: Tail, boxes: str, scores: str) -> onnx.ModelProto:
    """`TRTBatchedNMS`: mmdeploy for TensorRT, boxes and scores in one output."""
    given = {"background_label_id": -1, "num_classes": 3, "topk": 100, "keep_topk": ROWS, "is_normalized": 0}
    given |= {"score_threshold": SCORE, "iou_threshold": IOU, "clip_boxes": 0, "return_index": 0}
    wide = t.op("Unsqueeze", boxes, t.const([2]))
    t.op("TRTBatchedNMS", wide, scores, outputs=["dets", "labels"], domain="mmdeploy", **given)
    t.model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    return t.outputs(dets=(TensorProto.FLOAT, ["batch", ROWS, 5]), labels=(TensorProto.INT32, ["batch", ROWS]))


def flat(t: Tail, boxes: str, scores: str, order: str = "score-last") -> onnx.ModelProto:
    """`NonMaxSuppression` over all classes, rows ``[n, 7]``: super-gradients, PINTO's model zoo (``score-middle``)."""
    by_class = t.op("Transpose", scores, perm=[0, 2, 1])
    picks = t.op(
        "NonMaxSuppression", boxes, by_class, t.const(50), t.const([IOU], np.float32), t.const([SCORE], np.float32)
    )
    image, label = (t.op("Gather", picks, t.const([column]), axis=1) for column in (0, 1))
    row_boxes = t.op("GatherND", boxes, t.op("Gather", picks, t.const([0, 2]), axis=1))
    row_scores = t.op("Unsqueeze", t.op("GatherND", by_class, picks), t.const([1]))
    image, label = (t.op("Cast", one, to=TensorProto.FLOAT) for one in (image, label))
    parts = (image, row_boxes, label, row_scores) if order == "score-last" else (image, label, row_scores, row_boxes)
    t.op("Concat", *parts, outputs=["rows"], axis=1)
    return t.outputs(rows=(TensorProto.FLOAT, ["n", 7]))


def offset(t: Tail, boxes: str, scores: str, agnostic: bool = False) -> onnx.ModelProto:
    """Boxes moved by their class, one row of scores, rows ``[n, 7]``: YOLOv7 ``--end2end --max-wh``."""
    best = t.best(scores, 2, 1)
    number = t.op("Cast", t.op("ArgMax", scores, axis=2, keepdims=1), to=TensorProto.FLOAT)
    moved = boxes if agnostic else t.op("Add", boxes, t.op("Mul", number, t.const([640], np.float32)))
    row = t.op("Transpose", best, perm=[0, 2, 1])
    picks = t.op(
        "NonMaxSuppression", moved, row, t.const(ROWS), t.const([IOU], np.float32), t.const([SCORE], np.float32)
    )
    place = t.op("Gather", picks, t.const([0, 2]), axis=1)
    image = t.op("Cast", t.op("Gather", picks, t.const([0]), axis=1), to=TensorProto.FLOAT)
    t.op("Concat", image, *(t.op("GatherND", one, place) for one in (boxes, number, best)), outputs=["output"], axis=1)
    return t.outputs(output=(TensorProto.FLOAT, ["n", 7]))


def unrolled(t: Tail, head: str, batch: int, classes: int) -> onnx.ModelProto:
    """One `NonMaxSuppression` for each image, rows ``[B, K, 6]``: Ultralytics ``nms=True``. ``head`` is ``[B, N, 4 + C]``, corners."""
    images = []
    for i in range(batch):
        rows = t.op("Gather", head, t.const(i), axis=0)
        boxes = t.op("Slice", rows, t.const([0]), t.const([4]), t.const([1]))
        scores = t.op("Slice", rows, t.const([4]), t.const([4 + classes]), t.const([1]))
        best = t.best(scores, 1, 0)
        number = t.op("ArgMax", scores, axis=1, keepdims=0)
        above = t.op("Transpose", t.op("NonZero", t.op("Greater", best, t.const(SCORE, np.float32))), perm=[1, 0])
        boxes, best, number = (t.op("GatherND", one, above) for one in (boxes, best, number))
        label = t.op("Unsqueeze", t.op("Cast", number, to=TensorProto.FLOAT), t.const([1]))
        moved = t.op("Add", boxes, t.op("Mul", label, t.const(7680, np.float32)))
        pair = t.op("Unsqueeze", moved, t.const([0])), t.op("Unsqueeze", best, t.const([0, 1]))
        picks = t.op("NonMaxSuppression", *pair, t.const([2**31]), t.const([IOU], np.float32))
        kept = t.op("Squeeze", t.op("Gather", picks, t.const([2]), axis=1), t.const([1]))
        kept = t.op("Slice", kept, t.const([0]), t.const([ROWS]), t.const([0]))
        found = t.op("Concat", boxes, t.op("Unsqueeze", best, t.const([1])), label, axis=1)
        found = t.op("Gather", found, kept, axis=0)
        room = t.op("Sub", t.const([ROWS]), t.op("Shape", kept))
        pads = t.op("Concat", t.const([0, 0]), room, t.const([0]), axis=0)
        images.append(t.op("Unsqueeze", t.op("Pad", found, pads), t.const([0])))
    t.op("Concat", *images, outputs=["detections"], axis=0)
    return t.outputs(detections=(TensorProto.FLOAT, [batch, ROWS, 6]))


def padded(t: Tail, boxes: str, scores: str) -> onnx.ModelProto:
    """Best boxes, `NonMaxSuppression`, a blank row, and the best rows, at most as many as there are: mmdeploy for ONNX Runtime."""
    best = t.best(scores, 2, 0)
    t.op("TopK", best, _lower(t, best, 1, 200), outputs=["tail/best", "tail/places"], axis=1)
    places = t.op("Unsqueeze", "tail/places", t.const([2]))
    boxes, scores = (t.op("GatherND", one, places, batch_dims=1) for one in (boxes, scores))
    by_class = t.op("Transpose", scores, perm=[0, 2, 1])
    picks = t.op(
        "NonMaxSuppression", boxes, by_class, t.const([200]), t.const([IOU], np.float32), t.const([SCORE], np.float32)
    )
    image, label = (t.op("Squeeze", t.op("Gather", picks, t.const([c]), axis=1), t.const([1])) for c in (0, 1))
    row_boxes = t.op("GatherND", boxes, t.op("Gather", picks, t.const([0, 2]), axis=1))
    row = t.op("Concat", row_boxes, t.op("Unsqueeze", t.op("GatherND", by_class, picks), t.const([1])), axis=1)
    count = t.op("Gather", t.op("Shape", scores), t.const(0))
    images = t.op("Unsqueeze", t.op("Range", t.const(0), count, t.const(1)), t.const([1]))
    own = t.op("Equal", t.op("Unsqueeze", image, t.const([0])), images)  # [B, n]
    rows = t.op(
        "Where", t.op("Unsqueeze", own, t.const([2])), t.op("Unsqueeze", row, t.const([0])), t.const([0], np.float32)
    )
    labels = t.op("Where", own, t.op("Unsqueeze", label, t.const([0])), t.const([-1]))
    one = t.op("Unsqueeze", count, t.const([0]))
    blank = t.op("ConstantOfShape", t.op("Concat", one, t.const([1, 5]), axis=0))
    rows = t.op("Concat", rows, blank, axis=1)
    labels = t.op(
        "Concat", labels, t.op("Cast", t.op("Gather", blank, t.const(0), axis=2), to=TensorProto.INT64), axis=1
    )
    by_score = t.op("Gather", rows, t.const(-1), axis=2)
    t.op("TopK", by_score, _lower(t, by_score, 1, ROWS), outputs=["tail/last", "tail/order"], axis=1)
    order = t.op("Unsqueeze", "tail/order", t.const([2]))
    t.op("GatherND", rows, order, outputs=["dets"], batch_dims=1)
    t.op("GatherND", labels, order, outputs=["labels"], batch_dims=1)
    return t.outputs(dets=(TensorProto.FLOAT, ["batch", "n", 5]), labels=(TensorProto.INT64, ["batch", "n"]))


def _lower(t: Tail, value: str, axis: int, most: int) -> str:
    """A constant, or the size of an axis if that is lower."""
    size = t.op("Gather", t.op("Shape", value), t.const(axis))
    return t.op("Reshape", t.op("Where", t.op("Less", t.const(most), size), t.const(most), size), t.const([1]))
