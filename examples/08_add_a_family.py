"""A head that fusenms does not know, recognized by your own HeadSpec."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import fusenms
from fusenms.heads import HeadSpec, Mismatch, Probe
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap


def match(probe: Probe, certain: bool) -> Layout | Mismatch:
    """One output ``[batch, candidates, 4 + classes]``: three scores from 0 to 1, then x1, y1, x2, y2 in pixels."""
    if len(probe.samples) != 1 or probe.samples[0].value.ndim != 3:
        return Mismatch(f"found {len(probe.samples)} outputs; expected one [batch, candidates, scores and box]")
    tensor, values = probe.samples[0].tensor, probe.samples[0].value[0]
    scores, boxes = values[:, :-4], values[:, -4:]
    if not ((scores >= 0) & (scores <= 1)).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        return Mismatch("the first channels are no scores, or the last four no corners")
    last = values.shape[1]
    return Layout(
        family="scores-first",
        boxes=Tap(tensor, 2, last - 4, last),
        classes=Tap(tensor, 2, 0, last - 4),
        objectness=None,
        activation=Activation.NONE,
        decode=Decoded(BoxFormat.XYXY),
    )


SCORES_FIRST = HeadSpec("scores-first", match)

# A model with such a head: the same five candidates for every image.
rows = np.array([[0.9 / (i + 1), 0.1, 0.05, 8 * i, 8 * i, 8 * i + 20, 8 * i + 16] for i in range(5)], np.float32)
nodes = [
    helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2], keepdims=0),
    helper.make_node("ReduceMean", ["mean"], ["mean1"], axes=[1], keepdims=1),
    helper.make_node("Mul", ["mean1", "zero"], ["nothing"]),
    helper.make_node("Unsqueeze", ["nothing", "two"], ["nothing3"]),
    helper.make_node("Add", ["nothing3", "rows"], ["detections"]),
]
weights = [
    numpy_helper.from_array(rows[None], "rows"),
    numpy_helper.from_array(np.array(0, np.float32), "zero"),
    numpy_helper.from_array(np.array([2], np.int64), "two"),
]
images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])
output = helper.make_tensor_value_info("detections", TensorProto.FLOAT, ["batch", 5, 7])
graph = helper.make_graph(nodes, "raw", [images], [output], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "raw.onnx")

fused = fusenms.fuse("raw.onnx", heads=[SCORES_FIRST])
print(fused.layout.family, fused.report.summary)
fused.save("model.ort.onnx")
