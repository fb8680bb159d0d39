"""Half precision: the network in float16, decode and suppression in float32; what that changes is said."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import SHAPES
from raw_heads import LAYOUTS, raw_model
from third_party_exports import Decoded, write

from fusenms import fuse, load, recognize
from fusenms.artifacts.fused import load_fused
from fusenms.cli import main
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError
from fusenms.fusion.backends import BACKENDS
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor
from fusenms.transforms.half_precision import nodes_after_weights, to_half
from fusenms.verification.agreement import agreement
from fusenms.verification.checks import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

HALF = onnx.TensorProto.FLOAT16


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return to_tensor([letterbox(read_image(SHAPES / f"shapes{i}.jpg"), 128, 128)[0] for i in (0, 1)])


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_equals_reference_and_finds_the_same(backend, images):
    fused = fuse(SHAPES / "shapes.pt", size=128, backend=backend, precision="fp16", images=images)
    assert fused.report, fused.report
    assert fused.metadata["fusenms.precision"] == "fp16"
    full = fuse(SHAPES / "shapes.pt", size=128, backend=backend, unverified=True)
    changed = agreement(full, fused, images)
    assert changed.before == changed.after == changed.same > 3
    assert 0 < changed.worst_box < 0.5
    assert changed.summary in fused.notes


def test_network_is_half_and_what_decides_is_not():
    fused = fuse(SHAPES / "shapes.pt", size=64, precision="fp16", unverified=True)
    types = {item.name: item.data_type for item in fused.model.graph.initializer}
    types |= {node.output[0]: types.get(node.input[0]) for node in fused.model.graph.node if node.op_type == "Identity"}
    for node in fused.model.graph.node:
        if node.op_type == "Conv":
            assert {types[name] for name in node.input[1:]} == {HALF}, node.name
        if node.name.startswith("fusenms/"):
            assert HALF not in {types.get(name) for name in node.input}, node.name
    assert {o.type.tensor_type.elem_type for o in fused.model.graph.output} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT32,
    }
    assert fused.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_decode_of_a_file_that_keeps_it_stays_float32(tmp_path):
    odd = Decoded()
    odd.strides = odd.strides * 1.01  # so that its decode is not known, and stays
    raw = load(write(odd, tmp_path / "m.onnx"))
    layout = recognize(raw)
    assert layout.decode_stage == "full"
    half = to_half(raw, layout)
    made = {name: node for node in half.model.graph.node for name in node.output}
    types = {item.name: item.data_type for item in half.model.graph.initializer}
    todo, seen = [layout.boxes.tensor], set()
    while todo:  # from the boxes back to the weights: nothing there is in half precision
        node = made.get(todo.pop())
        if node is None or node.name in seen or node.op_type in ("Conv", "Cast"):
            continue
        seen.add(node.name)
        assert HALF not in {types.get(name) for name in node.input}, node.name
        todo += node.input
    assert "Softmax" in {made[name].op_type for name in made if made[name].name in seen}
    fused = fuse(half, layout=layout, config=PostprocessConfig(score_threshold=0.01), backend="ort", unverified=True)
    assert verify(fused)


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("layout", ["masks", "keypoints", "oriented", "queries", "finished_rows", "anchor_boxes"])
def test_any_head_in_half_precision_equals_reference(layout):
    layout = LAYOUTS[layout]()
    report = verify(
        fuse(
            to_half(raw_model(layout), layout),
            layout=layout,
            config=PostprocessConfig(score_threshold=0.1),
            backend="ort",
            unverified=True,
        )
    )
    assert report, report


def test_one_class_head_stays_float32_as_a_mean_would():
    layout = LAYOUTS["distances"](1)
    assert nodes_after_weights(raw_model(layout).model)  # a convolution into one channel counts for none
    assert verify(
        fuse(
            to_half(raw_model(layout), layout),
            layout=layout,
            config=PostprocessConfig(),
            backend="ort",
            unverified=True,
        )
    )


def test_error_when_quantized_or_half_already(zoo):
    raw = load(zoo / "yolo11n_dynint8_320.onnx")
    with pytest.raises(ConfigError, match=r"is quantized \(ConvInteger, DynamicQuantizeLinear\)"):
        to_half(raw, recognize(raw))
    layout = LAYOUTS["distances"]()
    with pytest.raises(ConfigError, match="has weights in half precision already"):
        to_half(to_half(raw_model(layout), layout), layout)


def test_error_when_precision_is_unknown():
    with pytest.raises(ConfigError, match="precision is 'int4'; expected one of fp32, fp16"):
        fuse(SHAPES / "shapes.pt", size=64, precision="int4")


@pytest.mark.thorough
def test_command_line_says_what_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes((SHAPES / "shapes0.jpg").read_bytes())
    assert (
        main([str(SHAPES / "shapes.pt"), "--size", "128", "--precision", "fp16", "--images", "images", "-o", "f.onnx"])
        == 0
    )
    said = capsys.readouterr().out
    assert "float16 up to the head, float32 from there on" in said
    assert "detections in float32" in said
    assert load_fused("f.onnx").precision == "fp16"
    assert main(["verify", "f.onnx"]) == 0


@pytest.mark.parametrize(
    "weights", ["shapes/yolov8-p.pt", "shapes/rtdetr-p.pt", "shapes/yolo26-p-seg.pt", "nanodet_m_416.onnx"]
)
def test_typed_graph_builds(zoo, tmp_path, weights):
    """TensorRT-RTX is strongly typed, as TensorRT 11 is: a weight of the wrong type anywhere, and it refuses."""
    rtx = pytest.importorskip("fusenms.engines.rtx")
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
    from fusenms.engines.base import EngineSettings

    settings = {} if weights.endswith("onnx") else {"size": 256}
    fused = fuse(zoo / weights, backend="portable", precision="fp16", unverified=True, **settings)
    path = fused.save(tmp_path / "m.onnx", unverified=True)
    assert len(rtx.build_rtx(str(path), EngineSettings(batch=(1, 2, 8))).data) > 100_000
