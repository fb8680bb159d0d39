"""What only a GPU can show; `make test-gpu` runs it, and where there is none it fails: nothing here is skipped.

It has not been run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kernels import KernelRunner, on_gpu
from raw_heads import LAYOUTS, fused_model

from fusenms import PostprocessConfig, fuse
from fusenms.artifacts.raw import ImageInput
from fusenms.engines.base import EngineSettings
from fusenms.engines.rtx import build_rtx, load_rtx
from fusenms.engines.running import EngineRunner, compare_engine
from fusenms.fusion.backends import BACKENDS
from fusenms.fusion.backends.plugin import INPUTS, PLUGGED, settings_of
from fusenms.fusion.candidates import Head
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import Rows, candidates, postprocess
from fusenms.runtime.images import letterbox, read_image, to_tensor
from fusenms.verification import checks as verification
from fusenms.verification.agreement import agreement_of
from fusenms.verification.synthetic_heads import Stage, heads

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "zoo"
SHAPES = ROOT / "models" / "shapes"
BATCH = EngineSettings(batch=(1, 2, 8), compute_capabilities=("current",))
WEIGHTS = ["yolov8-p", "yolo26-p", "rtdetr-p", "yolov8-p-seg", "yolov8-p-pose", "yolov8-p-obb"]


def shape_images(size: int) -> np.ndarray:
    files = sorted((ZOO / "shapes" / "images").glob("val*.jpg"))
    return to_tensor([letterbox(read_image(file), size, size)[0] for file in files])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_rtx_engine_finds_what_its_file_finds(tmp_path, name, precision):
    fused = fuse(ZOO / "shapes" / f"{name}.pt", size=256, backend="portable", precision=precision, unverified=True)
    build_rtx(str(fused.save(tmp_path / "m.onnx", unverified=True)), BATCH).save(tmp_path / "m.rtx")
    for batch, found in compare_engine(tmp_path / "m.rtx", images=shape_images(256)):
        assert found.before > 5 * batch, found.summary
        assert found.same >= 0.98 * found.before, f"batch {batch}: {found.summary}"
        assert found.worst_box < 2, f"batch {batch}: {found.summary}"


def test_engine_with_rounds_needs_no_control_flow_and_finds_the_same(tmp_path):
    fused = fuse(ZOO / "shapes" / "yolov8-p.pt", size=256, backend="portable", rounds=12, unverified=True)
    engine = build_rtx(str(fused.save(tmp_path / "m.onnx", unverified=True)), BATCH)
    runner = EngineRunner(engine, load_rtx())
    images = shape_images(256)
    found = agreement_of(fused, images, fused, runner.infer(images))
    assert found.before == found.after == found.same > 40, found.summary


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnxruntime_on_cuda_finds_the_same(precision):
    fused = fuse(ZOO / "shapes" / "yolov8-p.pt", size=256, precision=precision, unverified=True)
    images = shape_images(256)
    got = OnnxRuntimeRunner(fused.model, ("CUDAExecutionProvider",)).infer(images)
    found = agreement_of(fused, images, fused, got)
    assert found.same >= 0.98 * found.before > 40, found.summary


@pytest.mark.parametrize(("backend", "precision"), [("trt", "fp32"), ("plugin", "fp32"), ("plugin", "fp16")])
def test_tensorrt_engine_with_a_plugin_finds_what_its_file_finds(tmp_path, backend, precision):
    from fusenms.engines.tensorrt import build_tensorrt

    fused = fuse(ZOO / "shapes" / "yolov8-p.pt", size=256, backend=backend, precision=precision, unverified=True)
    path = fused.save(tmp_path / "m.onnx", unverified=True)
    build_tensorrt(str(path), EngineSettings(batch=(1, 2, 8))).save(tmp_path / "m.engine")
    for batch, found in compare_engine(tmp_path / "m.engine", images=shape_images(256)):
        assert found.same >= 0.98 * found.before > 5 * batch, f"batch {batch}: {found.summary}"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"multi_label": True, "max_candidates": 9000}, {"class_agnostic": True, "max_detections": 1000}],
    ids=str,
)
def test_plugin_kernels_equal_the_reference_at_640_pixels(half, settings):
    layout = LAYOUTS["distances"](80)
    config, image = PostprocessConfig(**settings), ImageInput("images", 640, 640, 32)
    shapes = {"dist": (64, 8400), "logits": (80, 8400)}
    head = heads(Stage(layout, config, image, 8400), ("random", "dense", "ties", "crowded", "empty"), shapes, seed=1)
    head = {name: values.astype(np.float16 if half else np.float32) for name, values in head.items()}
    s = settings_of(Head(layout, image, {"dist": 64, "logits": 80}, None), config)
    given = dict.fromkeys(INPUTS, head["logits"]) | {"boxes": head["dist"]}
    got = on_gpu()(s, given, (640, 640))
    for i in range(len(head["logits"])):
        count = got["num_detections"][i, 0]
        rows = Rows(
            *(got[name][i, :count].astype(np.float64) for name in ("boxes", "scores")), got["labels"][i, :count]
        )
        expected = postprocess(candidates(head, i, layout, (640, 640)), config, rows)
        np.testing.assert_array_equal(got["indices"][i, :count], expected.indices)
        np.testing.assert_allclose(rows.boxes, expected.rows.boxes, atol=2e-3)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if LAYOUTS[name]().suppress])
def test_plugin_kernels_equal_the_reference(monkeypatch, layout):
    run, plain = on_gpu(), verification.OnnxRuntimeRunner
    monkeypatch.setitem(BACKENDS, "plugin", replace(PLUGGED, to_standard=lambda model, _: model))
    monkeypatch.setattr(
        verification,
        "OnnxRuntimeRunner",
        lambda model: (
            KernelRunner(model, run) if any(n.op_type == "FusedNMS" for n in model.graph.node) else plain(model)
        ),
    )
    report = verification.verify(fused_model(LAYOUTS[layout](), "plugin", indices=True))
    assert report, str(report)
