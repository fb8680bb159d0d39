"""Small files from which attacks and fuzzing start, made with onnx only: a third-party YOLOv8-like file, raw and fused."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, STRIDES, CLASSES = 64, (8, 16, 32), 3
CELLS = sum((SIZE // stride) ** 2 for stride in STRIDES)


def third_party(batch: int | str = "batch", side: int | str = SIZE) -> onnx.ModelProto:
    """A decoded YOLOv8-like head ``[batch, 4 + classes, cells]`` after one convolution for each level, with metadata."""
    rng = np.random.default_rng(5)
    nodes, weights, levels, centers, strides = [], [], [], [], []

    def constant(name: str, values: object, dtype: type) -> str:
        weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    channels = 4 + CLASSES
    constant("flat", [0, channels, -1], np.int64)
    for stride in STRIDES:
        kernel = rng.normal(0, 1 / stride, (channels, 3, stride, stride))
        bias = np.concatenate((np.zeros(4), np.full(CLASSES, -4.0)))
        given = ["images", constant(f"w{stride}", kernel, np.float32), constant(f"b{stride}", bias, np.float32)]
        nodes.append(helper.make_node("Conv", given, [f"map{stride}"], name=f"conv{stride}", strides=[stride] * 2))
        nodes.append(helper.make_node("Reshape", [f"map{stride}", "flat"], [f"level{stride}"], name=f"reshape{stride}"))
        levels.append(f"level{stride}")
        y, x = np.mgrid[: SIZE // stride, : SIZE // stride]
        centers.append((np.stack((x, y)).reshape(2, -1) + 0.5) * stride)
        strides.append(np.full((1, x.size), stride))
    constant("centers", np.concatenate(centers, 1)[None], np.float32)
    constant("steps", np.concatenate(strides, 1)[None], np.float32)
    constant("parts", [2, 2, CLASSES], np.int64)
    nodes += [
        helper.make_node("Concat", levels, ["head"], name="join", axis=2),
        helper.make_node("Split", ["head", "parts"], ["xy", "wh", "logits"], name="split", axis=1),
        helper.make_node("Tanh", ["xy"], ["xy1"], name="tanh"),
        helper.make_node("Add", ["xy1", "centers"], ["center"], name="add"),
        helper.make_node("Sigmoid", ["wh"], ["wh1"], name="sizes"),
        helper.make_node("Mul", ["wh1", "steps"], ["size"], name="mul"),
        helper.make_node("Sigmoid", ["logits"], ["scores"], name="sigmoid"),
        helper.make_node("Concat", ["center", "size", "scores"], ["output0"], name="output", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [batch, channels, CELLS])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    names = str({i: f"class {i}" for i in range(CLASSES)})
    helper.set_model_props(model, {"names": names, "stride": "32", "task": "detect", "imgsz": str([SIZE, SIZE])})
    return model


@cache
def fused_bytes(backend: str = "ort") -> bytes:
    """The content of the same file, fused and saved."""
    import fusenms

    with tempfile.TemporaryDirectory() as folder:
        raw, path = Path(folder) / "raw.onnx", Path(folder) / "fused.onnx"
        raw.write_bytes(third_party().SerializeToString())
        fusenms.fuse(os.fspath(raw), backend=backend, unverified=True).save(path, unverified=True)
        return path.read_bytes()


def metadata(model: onnx.ModelProto, **values: str) -> None:
    """Set entries of the metadata. Write a dot in a key as two underscores."""
    helper.set_model_props(
        model,
        {entry.key: entry.value for entry in model.metadata_props}
        | {key.replace("__", "."): value for key, value in values.items()},
    )
