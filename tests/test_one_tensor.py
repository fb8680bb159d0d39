"""All rows in one tensor, as other people's readers have them: what the file holds, and that it is proven and read again."""

from __future__ import annotations

import ast

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from conftest import SHAPES
from onnx import numpy_helper
from test_verification import LAYOUTS, SETTINGS, fused_model

from fusenms import Detector, FusedModel, fuse, inspect, load_fused, verify
from fusenms.artifacts import one_tensor
from fusenms.errors import ConfigError, SourceError
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import probe_image

pytestmark = pytest.mark.usefixtures("shared_exports")

IMAGE = SHAPES / "shapes0.jpg"
PRESET = "ultralytics"


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    return fuse(SHAPES / "shapes.pt", output_preset=PRESET)


@pytest.fixture(scope="module")
def path(fused, tmp_path_factory):
    return fused.save(tmp_path_factory.mktemp("one") / "shapes.onnx")


def test_file_has_one_output_of_final_rows(path, fused):
    session = onnxruntime.InferenceSession(str(path))
    assert [(entry.name, entry.shape[1:]) for entry in session.get_outputs()] == [("output0", [300, 6])]
    assert (
        session.get_outputs()[0].shape[0] is None
    )  # a name would make Ultralytics take it for a model of any image size
    metadata = session.get_modelmeta().custom_metadata_map
    assert (metadata["batch"], metadata["end2end"], ast.literal_eval(metadata["args"])) == (
        "1",
        "True",
        {"dynamic": False},
    )
    images = probe_image(*(fused.image.height, fused.image.width)).repeat(2, 0)
    (rows,) = session.run(None, {"images": images})
    usual = OnnxRuntimeRunner(fuse(SHAPES / "shapes.pt").model).infer(images)
    for i in range(2):
        count = usual["num_detections"][i, 0]
        expected = np.column_stack((usual["boxes"][i], usual["scores"][i], usual["labels"][i]))
        np.testing.assert_array_equal(rows[i], expected)
        assert (rows[i, count:, 4] == 0).all() and (rows[i, count:, 5] == -1).all()
    assert (rows[..., 5] >= 0).any()


def test_detector_reads_it_as_any_other(path):
    with Detector(path) as one, Detector(fuse(SHAPES / "shapes.pt")) as usual:
        a, b = one(IMAGE)[0], usual(IMAGE)[0]
    assert len(a) > 5
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("dynamic", [False, True])
def test_loaded_and_saved_again_it_is_the_same(tmp_path, dynamic):
    path = fuse(SHAPES / "shapes.pt", output_preset=PRESET, dynamic_size=dynamic).save(tmp_path / "a.onnx")
    again = load_fused(path)
    second = again.save(tmp_path / "b.onnx", unverified=True)
    one, two = onnx.load(path), onnx.load(second)
    assert len(one.graph.node) == len(two.graph.node)
    assert one.graph.output == two.graph.output
    assert bool(one.graph.output[0].type.tensor_type.shape.dim[0].dim_param) == dynamic
    assert inspect(path).kind == "fused"


@pytest.mark.covering(default=2, quick=0)
@pytest.mark.parametrize("backend", ["ort", "portable", "trt"])
@pytest.mark.parametrize("layout", ["masks", "keypoints", "oriented", "decoded"])
def test_every_task_is_proven(layout, backend):
    fused = fused_model(LAYOUTS[layout](), backend, **SETTINGS, output_preset=PRESET)
    report = verify(fused)
    assert report, report
    standard = OnnxRuntimeRunner(fused.model).infer if backend != "trt" else None
    if standard is not None:
        images = probe_image(fused.image.height, fused.image.width)
        rows = OnnxRuntimeRunner(one_tensor.cut(fused.model, fused.layout, False)).infer(images)
        found = one_tensor.taken_apart(rows, fused.layout, fused.config)
        for name, value in standard(images).items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            assert found[name].dtype == value.dtype


@pytest.mark.parametrize("opset", [11, 12, 13, 18])
def test_rows_are_taken_apart_in_every_opset(fused, opset):
    """Files of others have old ones, in which the axes of a sum are an attribute."""
    model = onnx.parser.parse_model(f"""<ir_version: 6, opset_import: ["" : {opset}]>
      rows (float[batch, 300, 6] given) => (float[batch, 300, 6] output0) {{ output0 = Identity (given) }}""")
    whole = one_tensor.with_contract(model, fused.layout, fused.config)
    rows = np.random.default_rng(0).random((3, 300, 6), np.float32)
    rows[:, :, 5] = np.where(np.arange(300) < [[0], [7], [300]], 2, -1)
    found = OnnxRuntimeRunner(whole).infer(rows)
    assert found["num_detections"].tolist() == [[0], [7], [300]]
    for name, value in one_tensor.taken_apart({"output0": rows}, fused.layout, fused.config).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(("column", "by"), [(0, 1.0), (4, 0.01), (5, 1.0)])
def test_wrong_column_is_found(fused, column, by):
    """The tensor is proven, not only what it is made of."""
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    add = np.zeros(6, np.float32)
    add[column] = by
    model.graph.initializer.append(numpy_helper.from_array(add, "by"))
    for node in model.graph.node:
        if "output0" in node.output:
            node.output[0] = "before"
    at = next(i for i, node in enumerate(model.graph.node) if "before" in node.output)
    model.graph.node.insert(at + 1, onnx.helper.make_node("Add", ["before", "by"], ["output0"]))
    assert not verify(FusedModel(**{**fused.__dict__, "model": model}))


@pytest.mark.parametrize("settings", [{"indices": True}, {"rounds": 5}, {"masks": "prototype"}])
def test_error_when_there_is_no_place_for_an_output(settings):
    with pytest.raises(ConfigError, match="has no place for them"):
        fuse(SHAPES / "shapes.pt", output_preset=PRESET, **settings)


def test_error_when_the_tensor_is_not_as_the_metadata_say(path, tmp_path):
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 7
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(SourceError, match=r"expected output0 \[B, 300, 6\].*fuse the model again"):
        load_fused(tmp_path / "bad.onnx")
