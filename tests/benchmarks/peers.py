"""Other ways to get from a detector's decoded head to detections, for timing beside fusenms.

Packages are used where they install; published graph recipes without a package are rebuilt here in our own words. Each
works on the decoded head ``[B, 4 + C, N]`` (cx, cy, w, h in pixels, then class probabilities), with the same thresholds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import compose, parser

SCORE, IOU, ROWS = 0.25, 0.45, 300
HEAD = "head"

# Center and size to corners as one product, shared by the recipes.
_CORNERS = f"""
  rows = Transpose <perm = [0, 2, 1]> ({HEAD})
  zero = Constant <value = int64[1] {{0}}> ()
  four = Constant <value = int64[1] {{4}}> ()
  last = Constant <value = int64[1] {{2}}> ()
  far = Constant <value = int64[1] {{100000}}> ()
  coded = Slice (rows, zero, four, last)
  turn = Constant <value = float[4, 4] {{1, 0, 1, 0, 0, 1, 0, 1, -0.5, 0, 0.5, 0, 0, -0.5, 0, 0.5}}> ()
  boxes = MatMul (coded, turn)
  classes = Slice (rows, four, far, last)
  most = Constant <value = int64[1] {{{ROWS}}}> ()
  iou = Constant <value = float[1] {{{IOU}}}> ()
  score = Constant <value = float[1] {{{SCORE}}}> ()
"""

_RECIPES = {
    # One class per box, boxes of different classes moved apart, one list of rows for the whole batch (after the
    # end-to-end export of WongKinYiu/yolov7).
    "YOLOv7-style end-to-end": """
      best = ReduceMax <axes = [2], keepdims = 1> (classes)
      label = ArgMax <axis = 2, keepdims = 1> (classes)
      label_float = Cast <to = 1> (label)
      apart = Constant <value = float {4096.0}> ()
      offset = Mul (label_float, apart)
      moved = Add (boxes, offset)
      best_row = Transpose <perm = [0, 2, 1]> (best)
      picks = NonMaxSuppression (moved, best_row, most, iou, score)
      columns = Constant <value = int64[2] {0, 2}> ()
      place = Gather <axis = 1> (picks, columns)
      picked_boxes = GatherND (boxes, place)
      picked_scores = GatherND (best, place)
      picked_labels = GatherND (label_float, place)
      result = Concat <axis = 1> (picked_boxes, picked_scores, picked_labels)
    """,
    # Every class of every box straight into the operator (after the export of Deci-AI/super-gradients, flat format).
    "super-gradients-style": """
      class_rows = Transpose <perm = [0, 2, 1]> (classes)
      picks = NonMaxSuppression (boxes, class_rows, most, iou, score)
      box_columns = Constant <value = int64[2] {0, 2}> ()
      box_place = Gather <axis = 1> (picks, box_columns)
      picked_boxes = GatherND (boxes, box_place)
      picked_scores_flat = GatherND (class_rows, picks)
      one = Constant <value = int64[1] {1}> ()
      picked_scores = Unsqueeze (picked_scores_flat, one)
      result = Concat <axis = 1> (picked_boxes, picked_scores)
    """,
    # The best 30,000 pairs of box and class, classes moved apart; one image only (after LibreYOLO 1.6's embedded NMS).
    "LibreYOLO-style (batch 1 only)": """
      flat_shape = Constant <value = int64[1] {-1}> ()
      flat = Reshape (classes, flat_shape)
      limit = Constant <value = int64[1] {30000}> ()
      top, index = TopK <axis = 0> (flat, limit)
      sizes = Shape (classes)
      count = Gather <axis = 0> (sizes, last)
      anchor = Div (index, count)
      label = Mod (index, count)
      label_float = Cast <to = 1> (label)
      one = Constant <value = int64[1] {1}> ()
      column = Unsqueeze (label_float, one)
      apart = Constant <value = float {4096.0}> ()
      offset = Mul (column, apart)
      image = Squeeze (boxes, zero)
      chosen = Gather <axis = 0> (image, anchor)
      moved = Add (chosen, offset)
      moved_batch = Unsqueeze (moved, zero)
      axes = Constant <value = int64[2] {0, 1}> ()
      top_batch = Unsqueeze (top, axes)
      picks = NonMaxSuppression (moved_batch, top_batch, most, iou, score)
      row = Gather <axis = 1> (picks, last)
      flat_row = Reshape (row, flat_shape)
      result = Gather <axis = 0> (chosen, flat_row)
    """,
}


def recipe(name: str, classes: int, count: int) -> onnx.ModelProto:
    """A recipe as a model from the decoded head to its result."""
    batch = 1 if "batch 1" in name else "batch"
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    tail (float[{batch}, {4 + classes}, {count}] {HEAD}) => (float[rows, columns] result) {{ {_CORNERS} {_RECIPES[name]} }}"""
    return parser.parse_model(text)


def recipes() -> list[str]:
    return list(_RECIPES)


def joined(raw: onnx.ModelProto, tail: onnx.ModelProto) -> onnx.ModelProto:
    """The raw model with a tail behind it."""
    head = next(entry.name for entry in tail.graph.input if entry.name != "images")
    copy = onnx.ModelProto()
    copy.CopyFrom(tail)
    copy.ir_version = raw.ir_version
    prefixed = compose.add_prefix(copy, "tail_")
    return compose.merge_models(raw, prefixed, io_map=[(raw.graph.output[0].name, f"tail_{head}")])


def opencv_batched(head: np.ndarray) -> list[Any]:
    """`cv2.dnn.NMSBoxesBatched` on each image of a decoded head, candidates chosen with NumPy."""
    import cv2

    found = []
    for image in head:
        best = image[4:].max(0)
        keep = np.flatnonzero(best > SCORE)
        labels = image[4:, keep].argmax(0)
        boxes = image[:4, keep].T
        corners = np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]), 1)
        picks = (
            cv2.dnn.NMSBoxesBatched(corners.tolist(), best[keep].tolist(), labels.tolist(), SCORE, IOU)
            if len(keep)
            else []
        )
        found.append((boxes[picks], best[keep][picks], labels[picks]) if len(picks) else None)
    return found


def ultralytics_predict() -> Callable[[np.ndarray], Any]:
    """The NMS that Ultralytics' predict runs in PyTorch on the decoded head. Raises ImportError where it is missing."""
    import torch
    from ultralytics.utils.nms import non_max_suppression

    return lambda head: non_max_suppression(torch.from_numpy(head), SCORE, IOU, max_det=ROWS)


def torchvision_batched() -> Callable[[np.ndarray], Any]:
    """`torchvision.ops.batched_nms` image by image. Raises ImportError or RuntimeError where it is missing."""
    import torch
    from torchvision.ops import batched_nms

    def run(head: np.ndarray) -> list[Any]:
        found = []
        for image in torch.from_numpy(head):
            best, label = image[4:].max(0)
            keep = best > SCORE
            center, half = image[:2, keep].T, image[2:4, keep].T / 2
            boxes = torch.cat((center - half, center + half), 1)
            picks = batched_nms(boxes, best[keep], label[keep], IOU)[:ROWS]
            found.append((boxes[picks], best[keep][picks], label[keep][picks]))
        return found

    return run


def export_ultralytics(checkpoint: Path, batch: int, size: int, target: Path) -> onnx.ModelProto:
    """Ultralytics' own ONNX export with ``nms=True``, for one batch size (it unrolls the batch).

    It needs `torchvision::nms`; where torchvision does not load (its wheel needs a PyTorch with CUDA), that one
    operator is declared here, with the ONNX form that torchvision gives it. Raises ImportError where ultralytics is missing.
    """
    _declare_torchvision_nms()
    from ultralytics import YOLO

    copy = target / f"ultralytics{batch}.pt"
    copy.write_bytes(checkpoint.read_bytes())
    settings = {
        "dynamic": True,
        "batch": batch,
        "opset": 17,
        "simplify": False,
        "conf": SCORE,
        "iou": IOU,
        "imgsz": size,
    }
    return onnx.load(YOLO(copy).export(format="onnx", nms=True, **settings))


def _declare_torchvision_nms() -> None:
    try:
        import torchvision.ops  # noqa: F401

        return
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
    import importlib.machinery
    import types

    import torch
    from torch.onnx import symbolic_helper as helper

    if "torchvision" in sys.modules:
        return
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    package, ops = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    package.ops, package.__version__, ops.nms = (
        ops,
        "0.0",
        lambda boxes, scores, iou: torch.ops.torchvision.nms(boxes, scores, iou),
    )
    for module in (package, ops):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    from ultralytics.utils.nms import TorchNMS

    torch.library.impl("torchvision::nms", "CPU")(lambda boxes, scores, iou: TorchNMS.nms(boxes, scores, iou))

    @helper.parse_args("v", "v", "f")
    def symbolic(g: Any, boxes: Any, scores: Any, iou: float) -> Any:
        boxes, scores = helper._unsqueeze_helper(g, boxes, [0]), helper._unsqueeze_helper(g, scores, [0, 1])
        most, limit = (g.op("Constant", value_t=torch.tensor([v])) for v in (sys.maxsize, iou))
        picks = g.op("NonMaxSuppression", boxes, scores, most, limit)
        column = g.op("Gather", picks, g.op("Constant", value_t=torch.tensor([2])), axis_i=1)
        return helper._squeeze_helper(g, column, [1])

    torch.onnx.register_custom_op_symbolic("torchvision::nms", symbolic, 11)
