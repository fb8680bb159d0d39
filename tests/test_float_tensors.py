"""Files whose images have the channels last, or whose inputs and outputs are float16 or uint8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from raw_heads import OnnxRuntimeRunner
from third_party import SIZE, YoloNas, write

from fusenms import fuse, load
from fusenms.errors import SourceError
from fusenms.graph.session import Session


def changed(path, kind=TensorProto.FLOAT, channels_last=False, outputs=TensorProto.FLOAT):
    """A detector that takes images of another type or order, and returns another type."""
    model = onnx.load(write(YoloNas(), path))
    graph, nodes, tensor = model.graph, [], "raw"
    graph.input[0].name, inner = tensor, graph.input[0].name
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [tensor], ["float"], to=TensorProto.FLOAT))
        tensor = "float"
    if kind == TensorProto.UINT8:
        graph.initializer.append(helper.make_tensor("most", TensorProto.FLOAT, [], [255.0]))
        nodes.append(helper.make_node("Div", [tensor, "most"], ["part"]))
        tensor = "part"
    perm = [0, 3, 1, 2] if channels_last else [0, 1, 2, 3]
    nodes.append(helper.make_node("Transpose", [tensor], [inner], perm=perm))
    old = list(graph.node)
    del graph.node[:]
    for node in old:
        node.output[:] = [f"{name}_float" if name in ("output0", "output1") else name for name in node.output]
        node.input[:] = [f"{name}_float" if name in ("output0", "output1") else name for name in node.input]
    casts = [helper.make_node("Cast", [f"output{i}_float"], [f"output{i}"], to=outputs) for i in (0, 1)]
    graph.node.extend([*nodes, *old, *casts])
    shape = ["batch", SIZE, SIZE, 3] if channels_last else ["batch", 3, SIZE, SIZE]
    graph.input[0].CopyFrom(helper.make_tensor_value_info("raw", kind, shape))
    for entry in graph.output:
        entry.type.tensor_type.elem_type = outputs
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


CASES = {
    "channels last": ({"channels_last": True}, "images are channels first, not last (raw): converted inside"),
    "float16": ({"kind": TensorProto.FLOAT16}, "images are float32, not float16: converted inside"),
    "uint8": ({"kind": TensorProto.UINT8}, "images are float32, not uint8: converted inside"),
    "uint8, channels last": (
        {"kind": TensorProto.UINT8, "channels_last": True},
        "images are channels first, not last (raw) and float32, not uint8: converted inside",
    ),
    "float16 outputs": ({"outputs": TensorProto.FLOAT16}, "outputs output0, output1 are cast to float32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_conversion_becomes_part_of_the_graph(tmp_path, case):
    settings, said = CASES[case]
    path = changed(tmp_path / "m.onnx", **settings)
    fused = fuse(path, score_threshold=0.01, max_detections=84, iou_threshold=1.0)
    assert fused.report, fused.report
    assert said in fused.notes
    (entry,) = fused.model.graph.input
    sides = [dim.dim_value or dim.dim_param for dim in entry.type.tensor_type.shape.dim]
    assert (entry.type.tensor_type.elem_type, sides) == (TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    image = (np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE)) / 255).astype(np.float32)
    found = OnnxRuntimeRunner(fused.model).infer(image)
    boxes, scores = (value[0].astype(np.float64) for value in run_as_it_is(path, image, **settings))
    best = np.argsort(-scores.max(1), kind="stable")[: int(found["num_detections"][0, 0])]
    assert len(best) > 5
    near = np.abs(np.sort(found["scores"][0, : len(best)]) - np.sort(scores.max(1)[best])).max()
    assert near < 2e-3
    for box in found["boxes"][0, : len(best)]:
        assert np.abs(boxes - box).max(1).min() < 0.1


def run_as_it_is(path, image, kind=TensorProto.FLOAT, channels_last=False, outputs=TensorProto.FLOAT):
    """The outputs of the file itself, given what it takes."""
    given = image.transpose(0, 2, 3, 1) if channels_last else image
    given = np.round(given * 255) if kind == TensorProto.UINT8 else given
    return Session(onnx.load(path), source="file").run({"raw": given.astype(helper.tensor_dtype_to_np_dtype(kind))})


def test_uint8_takes_values_to_255(tmp_path):
    assert str(load(changed(tmp_path / "m.onnx", kind=TensorProto.UINT8)).pixels) == "RGB from 0 to 255"


def test_error_when_images_are_of_another_type(tmp_path):
    path = changed(tmp_path / "m.onnx", kind=TensorProto.INT64)
    with pytest.raises(SourceError, match="is INT64; expected FLOAT, FLOAT16, DOUBLE, UINT8"):
        load(path)
