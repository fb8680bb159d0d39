"""What only a GPU can show; `make test-gpu` runs it, and where there is none it fails.

Only TensorRT-RTX is skipped, on a GPU that it does not run on.

docs/gpu.md says on which GPU it ran, with which versions, and what it found.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from driver import Gpu
from kernels import KernelRunner, on_gpu
from on_engines import on_cuda, on_library, replayed
from other_runtimes import ties_in_any_order, verified_on, verify_on
from raw_heads import LAYOUTS, fused_model

from fusenms import FusedModel, PostprocessConfig, fuse
from fusenms.artifacts.raw import ImageInput
from fusenms.engines.base import EngineSettings
from fusenms.engines.nvidia import Library
from fusenms.engines.rtx import build_rtx, load_rtx
from fusenms.engines.running import EngineRunner, compare_engine
from fusenms.engines.tensorrt import build_tensorrt, load_tensorrt
from fusenms.fusion.backends.plugin import INPUTS, settings_of
from fusenms.fusion.candidates import Head
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import Rows, candidates, postprocess
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor
from fusenms.verification import verify
from fusenms.verification.agreement import agreement_of
from fusenms.verification.synthetic_heads import Stage, heads

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "zoo"
BATCH = EngineSettings(batch=(1, 2, 8), compute_capabilities=("current",))
PRECISIONS = ["fp32", "fp16"]
WEIGHTS = {
    **{f"shapes/{name}": 256 for name in ("yolov8-p", "yolo26-p", "rtdetr-p", "yolov8-p-seg", "yolov8-p-pose", "yolov8-p-obb")},
    "yolov5n": 640, "derived/yolov8n": 640, "derived/yolov8n-seg": 640,
}  # fmt: skip


@pytest.fixture(scope="module")
def rtx() -> Library:
    """TensorRT-RTX. It does not run on GPUs of compute capability 9.0, for one: data centers have TensorRT."""
    gpu = Gpu()
    capability = tuple(gpu.attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    gpu.close()
    library = load_rtx()
    known = [name for name in library.module.ComputeCapability.__members__ if name.startswith("SM")]
    if capability < (12, 0) and f"SM{capability[0]}{capability[1]}" not in known:
        pytest.skip(
            f"{library.name} does not run on compute capability {capability[0]}.{capability[1]}: {', '.join(known)}"
        )
    return library


def fused_from(name: str, backend: str, precision: str = "fp32", **settings: object) -> FusedModel:
    return fuse(
        ZOO / f"{name}.pt", size=WEIGHTS[name], backend=backend, precision=precision, unverified=True, **settings
    )


def images_for(name: str) -> np.ndarray:
    """Images with objects that the weights know, ``[n, 3, size, size]``."""
    folder = ZOO / ("shapes/images" if "shapes" in name else "photos")
    files = sorted(folder.glob("val*.jpg" if "shapes" in name else "*.jpg"))
    return to_tensor([letterbox(read_image(file), WEIGHTS[name], WEIGHTS[name])[0] for file in files])


def nearly_all_the_same(path: Path, name: str) -> None:
    """An engine and its file find the same objects at each batch size."""
    for batch, found in compare_engine(path, images=images_for(name)):
        assert found.before >= 2 * batch, found.summary
        assert found.same >= 0.98 * found.before, f"batch {batch}: {found.summary}"
        assert found.worst_box < 2, f"batch {batch}: {found.summary}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_rtx_engine_finds_what_its_file_finds(rtx, tmp_path, name, precision):
    fused = fused_from(name, "portable", precision)
    build_rtx(str(fused.save(tmp_path / "m.onnx", unverified=True)), BATCH).save(tmp_path / "m.rtx")
    nearly_all_the_same(tmp_path / "m.rtx", name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_rtx_engine_is_verified(rtx, name, precision):
    report = verify_on(fused_from(name, "portable", precision), on_library(rtx), images_for(name))
    assert report, str(report)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rtx_engine_is_verified_for_every_layout(rtx, layout):
    report = verify_on(fused_model(LAYOUTS[layout](), "portable"), on_library(rtx))
    assert report, str(report)


def test_engine_with_rounds_runs_as_a_cuda_graph(rtx, tmp_path):
    name = "shapes/yolov8-p"
    fused = fused_from(name, "portable", rounds=12)
    engine = build_rtx(str(fused.save(tmp_path / "m.onnx", unverified=True)), BATCH)
    runner, images = EngineRunner(engine, rtx), images_for(name)[:8]
    for outputs in (runner.infer(images), replayed(runner, images)):
        found = agreement_of(fused, images, fused, outputs)
        assert found.before == found.after == found.same > 20, found.summary


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["ort", "portable"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_onnxruntime_on_cuda_is_verified(name, backend, precision):
    fused, images = fused_from(name, backend, precision), images_for(name)
    with ties_in_any_order():
        report = verify_on(fused, on_cuda, images)
    assert report, str(report)
    found = agreement_of(fused, images[:8], fused, on_cuda(fused.model).infer(images[:8]))
    assert found.same >= 0.98 * found.before > 4, found.summary


@pytest.mark.parametrize("backend", ["ort", "portable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnxruntime_on_cuda_is_verified_for_every_layout(layout, backend):
    with ties_in_any_order():
        report = verify_on(fused_model(LAYOUTS[layout](), backend), on_cuda)
    assert report, str(report)


@pytest.mark.parametrize(("backend", "precision"), [("trt", "fp32"), ("plugin", "fp32"), ("plugin", "fp16")])
def test_tensorrt_engine_with_a_plugin_finds_what_its_file_finds(tmp_path, backend, precision):
    name = "shapes/yolov8-p"
    fused = fused_from(name, backend, precision)
    path = fused.save(tmp_path / "m.onnx", unverified=True)
    build_tensorrt(str(path), EngineSettings(batch=(1, 2, 8))).save(tmp_path / "m.engine")
    nearly_all_the_same(tmp_path / "m.engine", name)
    report = verify_on(fused, on_library(load_tensorrt()), images_for(name))
    assert report, str(report)


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
def test_plugin_kernels_equal_the_reference(layout):
    run = on_gpu()

    def opened(model):
        has_node = any(node.op_type == "FusedNMS" for node in model.graph.node)
        return KernelRunner(model, run) if has_node else OnnxRuntimeRunner(model)

    with verified_on("plugin", opened):
        report = verify(fused_model(LAYOUTS[layout](), "plugin", indices=True))
    assert report, str(report)
