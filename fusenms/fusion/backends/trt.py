"""Suppression by one TensorRT `EfficientNMS_TRT` plugin node, for TensorRT 8.5 to 11.

The plugin is deprecated upstream since TensorRT 10.12. Its name and its contract appear only in this file.
Facts from its published source (plugin/efficientNMSPlugin, TensorRT open source), and their consequences:

- It sorts by float32 score, and equal scores come in any order. A float32 sigmoid makes different logits equal, and sometimes swaps them.
  The plugin is therefore given *ranks* as scores: 1 for the best candidate, and 1/8192 less for each next one. Ranks are exact in float32
  and never equal. The output scores of the plugin then identify the candidates that it kept, and the true scores and all other values are
  gathered with them.
- It keeps scores >= score_threshold. The threshold was applied before; candidates below it have no rank.
- It drops boxes with IoU >= iou_threshold. The next float above the threshold is emitted.
- Every class of every box is a candidate. Only the selected class of each box has a rank.
- It looks at the best 5000 candidates (2000 on Jetson TX1 and TX2). At most 3840 get here.
- Below a score_threshold of 0.007, it sorts everything and counts rows that it had filtered out. The threshold on ranks is higher.
- It swaps the corners of boxes of negative size. There are none, see `decoding`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import parser

from fusenms.artifacts.fused import FusedModel
from fusenms.config import MAX_CANDIDATES_LIMIT, PostprocessConfig
from fusenms.errors import UnsupportedByBackendError
from fusenms.fusion.backends.base import Backend, SelectionTensors, by_candidates, one_class_each
from fusenms.fusion.candidates import CandidateTensors
from fusenms.graph.builder import INT32, Graph

PLUGIN = "EfficientNMS_TRT"
DOMAIN = "TRT"
RANKS = 8192  # ranks are multiples of 1 / RANKS


def suppress(g: Graph, candidates: CandidateTensors, config: PostprocessConfig) -> SelectionTensors:
    """Emit the plugin node on ranks. Its output ranks identify the candidates that it kept.

    Raises:
        UnsupportedByBackendError: more candidates than TensorRT's TopK takes.
    """
    assert candidates.count is not None
    if candidates.count > MAX_CANDIDATES_LIMIT:
        raise UnsupportedByBackendError(
            f"backend trt: found {candidates.count} candidates; TensorRT's TopK takes at most {MAX_CANDIDATES_LIMIT}: "
            f"lower max_candidates to {MAX_CANDIDATES_LIMIT}"
        )
    g.import_domain(DOMAIN, 1)
    decoded, own, alive = candidates.decode(None)
    classes = g.const(np.arange(candidates.num_classes).reshape(1, 1, -1), np.int32)
    ranks = g.const(1 - np.arange(candidates.count)[None] / RANKS, np.float32)
    count, boxes, kept_ranks, labels = g.add(
        PLUGIN,
        [decoded, one_class_each(g, ranks, own, alive, classes, 2)],
        4,
        domain=DOMAIN,
        plugin_version="1",
        plugin_namespace="",
        background_class=-1,
        box_coding=0,
        class_agnostic=int(config.class_agnostic),
        iou_threshold=_above(config.iou_threshold),
        max_output_boxes=config.max_detections,
        score_activation=0,
        score_threshold=0.25,  # ranks are above 0.5; candidates without a rank have -1
    )
    for tensor, dtype in ((count, np.int32), (boxes, np.float32), (kept_ranks, np.float32), (labels, np.int32)):
        tensor.dtype = dtype
    valid = g.op("Less", g.const(np.arange(config.max_detections)[None], np.int32), count)
    place = g.op("Mul", g.op("Sub", g.floats(1.0), kept_ranks), g.floats(float(RANKS)))
    return SelectionTensors(valid, g.cast(g.where(valid, place, g.floats(0.0)), INT32), boxes, labels)


def _above(threshold: float) -> float:
    """Return a float32 just above the threshold, but no denormal, which a GPU may treat as zero.

    The plugin suppresses from its threshold on, and divides by an approximation: of boxes whose IoU is exactly the threshold it may find
    an IoU that is two units in the last place above it. So its threshold is four to eight of these units above ours.
    """
    return float(np.float32(max(threshold * (1 + 2**-21), float(np.finfo(np.float32).tiny))))


BODY_OPSET = 12
# Only operators whose text is the same in every opset from 12 on, because the function runs at the opset of its model.
_BODY = """
<domain: "TRT", opset_import: ["" : OPSET]>
EfficientNMS_TRT
<score_threshold, iou_threshold, max_output_boxes, background_class, score_activation, box_coding, class_agnostic,
 plugin_version, plugin_namespace>
(boxes, scores) => (num_detections, detection_boxes, detection_scores, detection_classes) {
  # filter: score >= threshold; below 0.007 ("dense" mode) filtered scores stay, as -32768
  threshold = Constant <value_float : float = @score_threshold> ()
  dense_below = Constant <value = float {0.007}> ()
  minus_infinity = Constant <value = float {-inf}> ()
  dropped = Constant <value = float {-32768.0}> ()
  is_dense = Less (threshold, dense_below)
  filtered = Where (is_dense, dropped, minus_infinity)
  passes = GreaterOrEqual (scores, threshold)
  eligible = Where (passes, scores, filtered)
  flat_shape = Constant <value = int64[2] {0, -1}> ()
  flat = Reshape (eligible, flat_shape)
  # sort, best 5000
  sizes = Shape (scores)
  axis2 = Constant <value = int64[1] {2}> ()
  axis1 = Constant <value = int64[1] {1}> ()
  classes = Gather <axis = 0> (sizes, axis2)
  flat_sizes = Shape (flat)
  elements = Gather <axis = 0> (flat_sizes, axis1)
  selected_most = Constant <value = int64[1] {5000}> ()
  selected = Min (elements, selected_most)
  top_scores, top_elements = TopK <axis = 1> (flat, selected)
  anchor = Div (top_elements, classes)
  class = Mod (top_elements, classes)
  four = Constant <value = int64[3] {1, 1, 4}> ()
  column_shape = Constant <value = int64[3] {0, -1, 1}> ()
  row_shape = Constant <value = int64[3] {0, 1, -1}> ()
  anchor_column = Reshape (anchor, column_shape)
  anchor_wide = Expand (anchor_column, four)
  top_boxes = GatherElements <axis = 1> (boxes, anchor_wide)
  # greedy suppression, IoU >= threshold: a strict comparison with the next float below, at most 1
  kept_threshold = Constant <value_float : float = @iou_threshold> ()
  just_below_one = Constant <value = float {0.99999994}> ()
  next_below = Mul (kept_threshold, just_below_one)
  most_iou = Constant <value = float {1.0}> ()
  strict_threshold = Min (next_below, most_iou)
  most = Constant <value_int : int = @max_output_boxes> ()
  agnostic = Constant <value_int : int = @class_agnostic> ()
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  is_aware = Equal (agnostic, zero)
  group = Where (is_aware, class, zero)
  class_count = ReduceMin <keepdims = 0> (classes)
  group_count = Where (is_aware, class_count, one)
  groups = Range (zero, group_count, one)
  group_row = Reshape (group, row_shape)
  group_shape = Constant <value = int64[3] {1, -1, 1}> ()
  group_column = Reshape (groups, group_shape)
  in_group = Equal (group_row, group_column)
  score_row = Reshape (top_scores, row_shape)
  lowest = Constant <value = float {-40000.0}> ()
  none = Constant <value = float {-100000.0}> ()
  group_scores = Where (in_group, score_row, none)
  picks = NonMaxSuppression (top_boxes, group_scores, elements, strict_threshold, lowest)
  columns = Constant <value = int64[2] {0, 2}> ()
  places = Gather <axis = 1> (picks, columns)
  # best max_output_boxes, in order of score
  picked_scores = GatherND (top_scores, places)
  top_shape = Shape (top_scores)
  blank = ConstantOfShape <value = float[1] {-inf}> (top_shape)
  kept = ScatterND (blank, places, picked_scores)
  one_element = Constant <value = int64[1] {1}> ()
  most_vector = Reshape (most, one_element)
  room = Constant <value = int64[3] {0, 0, 0}> ()
  pads = Concat <axis = 0> (room, most_vector)
  padded = Pad (kept, pads, minus_infinity)
  best, row = TopK <axis = 1> (padded, most_vector)
  written = Greater (best, minus_infinity)
  written_int = Cast <to = 6> (written)
  running = CumSum (written_int, one)
  last = Constant <value = int64[1] {-1}> ()
  num_detections = Gather <axis = 1> (running, last)
  safe_row = Where (written, row, zero)
  zero_float = Constant <value = float {0.0}> ()
  detection_scores = Where (written, best, zero_float)
  row_classes = GatherElements <axis = 1> (class, safe_row)
  row_classes_int = Cast <to = 6> (row_classes)
  zero_int = Cast <to = 6> (zero)
  detection_classes = Where (written, row_classes_int, zero_int)
  row_column = Reshape (safe_row, column_shape)
  row_wide = Expand (row_column, four)
  row_boxes = GatherElements <axis = 1> (top_boxes, row_wide)
  written_column = Reshape (written, column_shape)
  detection_boxes = Where (written_column, row_boxes, zero_float)
}
"""


def plugin_body(opset: int) -> onnx.FunctionProto:
    """Return the plugin as an ONNX function of standard operators that follows its published algorithm. For checking only."""
    lines = [line for line in _BODY.splitlines() if not line.strip().startswith("#")]
    return parser.parse_function("\n".join(lines).replace("OPSET", str(opset)))


def to_standard(model: onnx.ModelProto, _: FusedModel) -> onnx.ModelProto:
    """Return the model with a body for the plugin, so that ONNX Runtime can run it."""
    standard = onnx.ModelProto()
    standard.CopyFrom(model)
    entry = next(entry for entry in standard.opset_import if entry.domain in ("", "ai.onnx"))
    entry.version = opset = max(entry.version, BODY_OPSET)
    standard.functions.append(plugin_body(opset))
    standard.ir_version = max(standard.ir_version, 8)
    return standard


TRT = Backend(
    "trt",
    ".trt.onnx",
    PLUGIN,
    by_candidates(suppress, adaptive=False),
    to_standard,
    runs_on_onnxruntime=False,
    adaptive=False,
)
