"""The same detections in other runtimes: OpenVINO from PyPI, and onnxruntime from npm where that is there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHAPES
from test_portable import CASES, Tail, tied_case

from fusenms import fuse
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

sys.path.insert(0, str(ROOT / "tests" / "runtimes"))
import compare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

NODE = ROOT / ".node"
INSTALLED, _ = compare.runtimes(NODE)
HINT = "pip install openvino tract; npm install --ignore-scripts --prefix .node onnxruntime-node onnxruntime-web"
BACKENDS = {"ort": {}, "portable": {}, "rounds": {"rounds": 12}}


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["openvino", "tract", "onnxruntime-node", "onnxruntime-web"])
def test_detections_are_those_of_onnxruntime(tmp_path, name, backend):
    if name not in INSTALLED:
        pytest.skip(f"needs {name} ({HINT})")
    if (name, backend) == ("tract", "portable"):
        pytest.skip("tract 0.23 has no Loop; --rounds files run there")
    kind = "portable" if backend == "rounds" else backend
    path = fuse(SHAPES / "shapes.pt", size=256, backend=kind, **BACKENDS[backend]).save(tmp_path / "m.onnx")
    images = [letterbox(read_image(SHAPES / f"shapes{i}.jpg"), 256, 256)[0] for i in (0, 1)]
    row = compare.compare(path, name, INSTALLED[name], to_tensor(images))
    assert not row.note
    assert row.detections > 20
    assert row.differing == 0


@pytest.mark.skipif("openvino" not in INSTALLED, reason="needs openvino (pip install openvino)")
@pytest.mark.parametrize("config", [{}, {"rounds": 140}], ids=str)
def test_openvino_suppresses_every_scene_alike(tmp_path, config):
    """All but the tied one: OpenVINO 2026.4 imports TopK as not stable, so equal scores come in any order."""
    import onnx

    from fusenms.graph.model import cut_before

    rng = np.random.default_rng(9)
    tail = Tail(140, max_detections=140, **config)
    model = cut_before(tail.fused.model, {"head_boxes": (140, 4), "head_scores": (140, 3)})
    onnx.save(model, tmp_path / "tail.onnx")
    cases = [case(rng, 140) for case in CASES if case is not tied_case]
    boxes, scores = (np.stack(values).astype(np.float32) for values in zip(*cases, strict=True))
    expected = tail.run(boxes, scores)
    import openvino

    compiled = openvino.Core().compile_model(str(tmp_path / "tail.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = {
        key.any_name: np.array(value) for key, value in compiled({"head_boxes": boxes, "head_scores": scores}).items()
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    assert expected["num_detections"].sum() > 200


@pytest.mark.skipif("openvino" not in INSTALLED, reason="needs openvino (pip install openvino)")
@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_openvino_keeps_boxes_at_the_threshold(backend):
    """Boxes whose IoU is the threshold itself, equal boxes at 1, and boxes apart at 0. OpenVINO's operator alone drops them all."""
    import openvino

    from fusenms.graph.model import cut_before

    rng = np.random.default_rng(4)
    for part, whole in [
        (0, 1),
        (1, 10),
        (1, 4),
        (1, 3),
        (2, 5),
        (9, 20),
        (1, 2),
        (3, 5),
        (2, 3),
        (7, 10),
        (9, 10),
        (19, 20),
        (1, 1),
    ]:
        unit, left = rng.integers(1, 20), rng.integers(0, 500, 2)
        first = np.array([*left, left[0] + whole * unit, left[1] + 30])
        second = first.copy()
        second[2] = left[0] + part * unit
        if part == 0:
            second = np.add(first, (1000, 0, 1000, 0))
        boxes = np.stack((first, second))[None].astype(np.float32)
        scores = np.array([[[0.9], [0.8]]], np.float32)
        tail = Tail(2, classes=1, backend=backend, iou_threshold=part / whole, max_detections=2)
        model = cut_before(tail.fused.model, {"head_boxes": (2, 4), "head_scores": (2, 1)})
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        found = compiled({"head_boxes": boxes, "head_scores": scores})
        kept = {key.any_name: np.array(value) for key, value in found.items()}["num_detections"]
        assert kept == tail.run(boxes, scores)["num_detections"] == 2, (part, whole)


def test_a_difference_is_seen(tmp_path):
    """The comparison can fail."""
    path = fuse(SHAPES / "shapes.pt", size=256).save(tmp_path / "m.onnx")
    images = to_tensor([letterbox(read_image(SHAPES / "shapes0.jpg"), 256, 256)[0]])
    from fusenms.artifacts.fused import load_fused
    from fusenms.graph.session import OnnxRuntimeRunner

    def shifted(file: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
        outputs = OnnxRuntimeRunner(load_fused(file).model).infer(batch)
        return outputs | {"boxes": outputs["boxes"] + 0.5}

    row = compare.compare(path, "shifted", shifted, images)
    assert row.differing == row.detections > 0
