"""Somebody's raw .onnx: inspect it, then fuse it."""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import fusenms


def write_raw(path: Path) -> Path:
    """A file such as an export of YOLOv8 has it: one output ``[batch, 4 + classes, candidates]``, for every image the same."""
    cells = [(x + 0.5, y + 0.5, s) for s in (8, 16, 32) for y in range(64 // s) for x in range(64 // s)]
    boxes = np.array([(x * s, y * s, 2 * s, 3 * s) for x, y, s in cells]).T
    scores = np.random.default_rng(0).random((3, len(cells))) ** 8
    weights = [
        numpy_helper.from_array(np.concatenate((boxes, scores))[None].astype(np.float32), "rows"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["mean", "last"], ["mean3"]),
        helper.make_node("Mul", ["mean3", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "rows"], ["output0"]),
    ]
    weights.append(numpy_helper.from_array(np.array([3], np.int64), "last"))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 7, len(cells)])
    graph = helper.make_graph(nodes, "raw", [images], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {"names": "{0: 'cat', 1: 'dog', 2: 'bird'}"})
    onnx.save(model, path)
    return path


file = Path(sys.argv[1]) if len(sys.argv) > 1 else write_raw(Path("raw.onnx"))
found = fusenms.inspect(file)
print(found.kind, *map(str, (*found.inputs, *found.outputs)), sep="\n")
if found.layout is None:
    sys.exit(found.reason)

fused = fusenms.fuse(file)
print(fused.layout.family, fused.report.summary)
print(fused.save("model.ort.onnx"))
