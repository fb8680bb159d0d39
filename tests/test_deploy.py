"""Kits for servers and other runtimes: what they say is what the file is, and what cannot run there is refused."""

from __future__ import annotations

import colorsys
import configparser
import hashlib
import importlib.util
import json
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import browser
import numpy as np
import onnx
import pytest
import tiny_onnx
from conftest import ROOT, SHAPES, write_segmenter
from packaging.requirements import Requirement

import fusenms
from fusenms.artifacts.fused import load_fused
from fusenms.cli import COMMANDS, build_parser, main
from fusenms.deployment import TARGETS, deploy, docker, openvino, web
from fusenms.engines.base import Engine, describe
from fusenms.errors import BackendUnavailableError, ConfigError, InputError, SourceError, UnsupportedByBackendError
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.runtime import Detector
from fusenms.runtime.openvino import IR, IR_METADATA, IR_WEIGHTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGES = [SHAPES / "shapes0.jpg", SHAPES / "shapes1.jpg"]
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs OpenVINO: pip install 'fusenms[openvino]'"
)


def tiny(folder: Path, name: str = "tiny.onnx", **settings: object) -> Path:
    """The tiny third-party file, fused with settings."""
    raw = folder / "raw.onnx"
    raw.write_bytes(tiny_onnx.third_party().SerializeToString())
    return fusenms.fuse(raw, unverified=True, **settings).save(folder / name, unverified=True)


def trained(raw: fusenms.RawModel, folder: Path, **settings: object) -> Path:
    """The embedded detector, fused with settings."""
    return fusenms.fuse(raw, unverified=True, **settings).save(folder / "shapes.ort.onnx", unverified=True)


@pytest.fixture(scope="module")
def shapes(shapes_raw, tmp_path_factory) -> Path:
    return trained(shapes_raw, tmp_path_factory.mktemp("fused"))


def engine_of(path: Path, folder: Path, batches=(1, 4, 8), builder: str = "TensorRT", open_batch: bool = True) -> Path:
    """A stand-in for an engine of a file: bytes that nothing runs, with the sidecar that a build writes."""
    model = onnx.load(path)
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    network = {
        "inputs": {model.graph.input[0].name: {k: [b, *dims] for k, b in zip(("min", "opt", "max"), batches, strict=True)}},
        "outputs": {
            entry.name: {
                "dtype": {1: "float", 6: "int32"}[entry.type.tensor_type.elem_type],
                "shape": [-1 if open_batch else batches[2], *(d.dim_value for d in entry.type.tensor_type.shape.dim[1:])],
            }
            for entry in model.graph.output
        },
    }  # fmt: skip
    info = describe(path, model, b"plan", {"name": builder, "version": "10.9"}, network)
    return Engine(b"plan", info).save(folder / f"{path.name.split('.')[0]}.trt.engine")[0]


# Triton


def model_config(folder: Path, name: str):
    """The configuration, read by Triton's own definition of it."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'tritonclient[grpc]'")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (folder / name / "config.pbtxt").read_text()
    assert text.isascii()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def check_triton(config, model: onnx.ModelProto) -> None:
    """Names, types, dims and rules of the configuration against the graph, as Triton's backend for ONNX Runtime checks them."""
    from tritonclient.grpc import model_config_pb2
    from tritonclient.utils import np_to_triton_dtype

    optional = {item.name for item in model.graph.initializer}
    batched = config.max_batch_size > 0
    for entries, found in ((model.graph.input, config.input), (model.graph.output, config.output)):
        assert [entry.name for entry in entries] == [tensor.name for tensor in found]
        for entry, tensor in zip(entries, found, strict=True):
            kind = np_to_triton_dtype(onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type))
            assert model_config_pb2.DataType.Name(tensor.data_type) == f"TYPE_{kind}"
            dims = [d.dim_value or -1 for d in entry.type.tensor_type.shape.dim]
            assert list(tensor.dims) == dims[int(batched) :]
            assert not batched or dims[0] == -1
            if entries is model.graph.input:
                assert tensor.optional == (entry.name in optional) and not (tensor.optional and batched)
    assert config.HasField("dynamic_batching") == (config.max_batch_size > 1)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 8),
        ({"indices": True, "backend": "portable", "rounds": 3}, 8),
        ({"output_preset": "ultralytics"}, 8),
        ({"output_preset": "deepstream"}, 8),
        ({"frames": (48, 80)}, 8),
        ({"frames": "dynamic", "frame_channels": "nv12"}, 8),
        ({"batch": 2}, 0),
        ({"runtime_thresholds": True}, 0),
    ],
    ids=str,
)
def test_triton_configuration_is_that_of_the_file(tmp_path, settings, most):
    path = tiny(tmp_path, "tiny.v2.onnx", **settings)
    written = deploy(path, tmp_path / "repository", target="triton")
    config = model_config(written.folder, "tiny")
    assert (config.name, config.platform, config.max_batch_size) == ("tiny", "onnxruntime_onnx", most)
    place = written.folder / "tiny" / "1" / "model.onnx"
    assert place.read_bytes() == path.read_bytes()
    check_triton(config, onnx.load(place))
    assert sorted(written.files) == sorted(file for file in written.folder.rglob("*") if file.is_file())


def test_triton_does_not_batch_images_that_depend_on_each_other(tmp_path):
    path = tiny(tmp_path)
    model = onnx.load(path)
    image = json.loads({item.key: item.value for item in model.metadata_props}["fusenms.image"])
    tiny_onnx.metadata(model, fusenms__image=json.dumps(image | {"independent": False}))
    onnx.save(model, path)
    written = deploy(path, tmp_path / "repository", target="triton")
    config = model_config(written.folder, "tiny")
    assert config.max_batch_size == 1
    check_triton(config, model)


def test_triton_names_classes_and_takes_the_batch_that_is_asked_for(tmp_path):
    names = ['a "b" \\', "größe", "\U0001f68c"]
    path = tiny(tmp_path)
    model = onnx.load(path)
    tiny_onnx.metadata(model, names=str(dict(enumerate(names))))
    onnx.save(model, path)
    written = deploy(path, tmp_path / "repository", target="triton", batch=32)
    config = model_config(written.folder, "tiny")
    assert config.max_batch_size == 32
    assert json.loads(config.parameters["names"].string_value) == names
    assert (written.folder / "tiny" / "labels.txt").read_text(encoding="utf-8").splitlines() == names


def test_triton_takes_engines(tmp_path):
    path = tiny(tmp_path, backend="trt")
    engine = engine_of(path, tmp_path)
    written = deploy(engine, tmp_path / "repository", target="triton")
    config = model_config(written.folder, "tiny")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 8)
    assert (written.folder / "tiny" / "1" / "model.plan").read_bytes() == b"plan"
    check_triton(config, onnx.load(path))
    with pytest.raises(ConfigError, match=r"batch is 16, but .* takes at most 8"):
        deploy(engine, tmp_path / "other", target="triton", batch=16)
    fixed = engine_of(path, tmp_path, (4, 4, 4), open_batch=False)
    config = model_config(deploy(fixed, tmp_path / "fixed", target="triton").folder, "tiny")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [4, 3, 64, 64])
    few = engine_of(path, tmp_path, (2, 4, 8))
    config = model_config(deploy(few, tmp_path / "few", target="triton").folder, "tiny")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [-1, 3, 64, 64])


def with_output(path: Path, name: str, operator: str, rank: int, kind: int, **attributes: object) -> Path:
    """The file with one more output, computed of the scores."""
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node(operator, ["scores"], [name], **attributes))
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, ["batch", 300][:rank]))
    onnx.save(model, path)
    return path


def test_triton_takes_further_outputs_of_the_file(tmp_path):
    """A number for each image is a tensor without dims, which Triton writes as one that it reshapes."""
    path = with_output(tiny(tmp_path), "best", "ReduceMax", 1, onnx.TensorProto.FLOAT, axes=[1], keepdims=0)
    config = model_config(deploy(path, tmp_path / "repository", target="triton").folder, "tiny")
    best = config.output[-1]
    assert (best.name, list(best.dims), best.HasField("reshape"), list(best.reshape.shape)) == ("best", [1], True, [])
    with_output(tiny(tmp_path), "wide", "Cast", 2, onnx.TensorProto.DOUBLE, to=onnx.TensorProto.DOUBLE)
    check_triton(model_config(deploy(path, tmp_path / "repository", target="triton").folder, "tiny"), onnx.load(path))


def test_outputs_that_the_file_declares_wrong_are_refused(tmp_path):
    path = with_output(tiny(tmp_path), "best", "ReduceMax", 2, onnx.TensorProto.FLOAT, axes=[1], keepdims=1)
    for target in ("triton", "web", "docker"):
        with pytest.raises(SourceError, match=r"best float32\[1, 1\], but declares best float32\[batch, 300\]"):
            deploy(path, tmp_path / "kit", target=target)
    with_output(tiny(tmp_path), "text", "Cast", 2, onnx.TensorProto.STRING, to=onnx.TensorProto.STRING)
    with pytest.raises(UnsupportedByBackendError, match="Triton has no type for text object"):
        deploy(path, tmp_path / "kit", target="triton")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    "outputs", [None, 3, [], {}, {"boxes": 1}, {"boxes": {"dtype": "x", "shape": [1]}}, {"boxes": {"dtype": "float"}}]
)
@pytest.mark.parametrize("target", ["triton", "deepstream"])
def test_sidecars_that_describe_no_outputs_are_refused(tmp_path, outputs, target):
    engine = engine_of(tiny(tmp_path, backend="trt"), tmp_path)
    sidecar = engine.with_name(f"{engine.name}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"outputs": outputs}))
    with pytest.raises(SourceError, match="its sidecar does not describe its outputs"):
        deploy(engine, tmp_path / "kit", target=target)


def test_triton_refuses_what_it_cannot_run(tmp_path):
    output = tmp_path / "repository"
    path = tiny(tmp_path, backend="trt")
    with pytest.raises(
        UnsupportedByBackendError, match="its backend is trt, which ONNX Runtime does not run, and Triton"
    ):
        deploy(path, output, target="triton")
    with pytest.raises(UnsupportedByBackendError, match="is an engine of TensorRT-RTX; Triton runs those of TensorRT"):
        deploy(engine_of(path, tmp_path, builder="TensorRT-RTX"), output, target="triton")
    spaced = shutil.copy(tiny(tmp_path), tmp_path / "my model.onnx")
    with pytest.raises(UnsupportedByBackendError, match="its name becomes that of the model"):
        deploy(spaced, output, target="triton")
    with pytest.raises(ConfigError, match=r"batch is 4, but .* has a fixed batch or optional inputs"):
        deploy(tiny(tmp_path, batch=2), output, target="triton", batch=4)
    assert not output.exists()


# DeepStream


def nvinfer(folder: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(folder / "config_infer.txt")
    assert parser.sections() == ["property", "class-attrs-all"]
    return dict(parser["property"]) | dict(parser["class-attrs-all"])


@pytest.mark.parametrize("backend", ["trt", "portable"])
def test_deepstream_configuration_is_that_of_the_file(tmp_path, backend):
    path = tiny(tmp_path, backend=backend, score_threshold=0.3, output_preset="deepstream")
    written = deploy(path, tmp_path / "kit", target="deepstream", batch=4)
    found = nvinfer(written.folder)
    assert (written.folder / found["onnx-file"]).read_bytes() == path.read_bytes()
    labels = (written.folder / found["labelfile-path"]).read_text().splitlines()
    fused = load_fused(path)
    assert tuple(labels) == fused.class_names and int(found["num-detected-classes"]) == len(labels)
    assert found["infer-dims"] == f"3;{fused.image.height};{fused.image.width}"
    assert [found[key] for key in ("maintain-aspect-ratio", "symmetric-padding", "model-color-format")] == [
        "1",
        "1",
        "0",
    ]
    scaled = float(found["net-scale-factor"]) * (255 - np.array(found["offsets"].split(";"), np.float64))
    np.testing.assert_allclose(scaled, 1, rtol=1e-12)
    assert [found[key] for key in ("network-type", "cluster-mode", "network-mode", "batch-size")] == [
        "0",
        "4",
        "0",
        "4",
    ]
    assert found["parse-bbox-func-name"] == "NvDsInferParseCustomEfficientNMS"
    assert np.float32(found["pre-cluster-threshold"]) == np.float32(0.3)
    outputs = [
        (e.name, e.type.tensor_type.elem_type, len(e.type.tensor_type.shape.dim)) for e in onnx.load(path).graph.output
    ]
    assert outputs == [("num_dets", 6, 2), ("det_boxes", 1, 3), ("det_scores", 1, 2), ("det_classes", 6, 2)]


def test_deepstream_precision_batch_and_stretch(tmp_path):
    path = tiny(tmp_path, backend="trt", batch=1)
    found = nvinfer(deploy(path, tmp_path / "kit", target="deepstream", half=True).folder)
    assert (found["network-mode"], found["batch-size"]) == ("2", "1")
    assert found["model-engine-file"] == "tiny.onnx_b1_gpu0_fp16.engine"
    model = onnx.load(path)
    image = json.loads({item.key: item.value for item in model.metadata_props}["fusenms.image"])
    tiny_onnx.metadata(model, fusenms__image=json.dumps(image | {"stretch": True}))
    onnx.save(model, path)
    assert nvinfer(deploy(path, tmp_path / "kit", target="deepstream").folder)["maintain-aspect-ratio"] == "0"


def test_deepstream_takes_engines(tmp_path):
    path = tiny(tmp_path, backend="trt")
    found = nvinfer(deploy(engine_of(path, tmp_path), tmp_path / "kit", target="deepstream").folder)
    assert "onnx-file" not in found and (tmp_path / "kit" / found["model-engine-file"]).read_bytes() == b"plan"
    assert found["batch-size"] == "8"
    with pytest.raises(UnsupportedByBackendError, match="DeepStream needs batches from 1"):
        deploy(engine_of(path, tmp_path, (2, 4, 8)), tmp_path / "other", target="deepstream")
    with pytest.raises(UnsupportedByBackendError, match="DeepStream runs those of TensorRT"):
        deploy(engine_of(path, tmp_path, builder="TensorRT-RTX"), tmp_path / "other", target="deepstream")
    with pytest.raises(ConfigError, match="whose precision is fixed"):
        deploy(engine_of(path, tmp_path), tmp_path / "other", target="deepstream", half=True)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "its backend is ort; expected 'trt' or 'portable'"),
        ({"backend": "plugin"}, "its backend is plugin"),
        ({"backend": "portable", "rounds": 3}, "labels int32.*, converged int32.*; .*: fuse the weights without rounds"),
        ({"backend": "trt", "indices": True}, "fuse the weights without indices"),
        ({"backend": "trt", "output_preset": "ultralytics"}, "has all rows in one output"),
        ({"backend": "trt", "batch": 2}, "its batch is fixed at 2"),
        ({"backend": "portable", "frames": (48, 80)}, "takes RGB frames of 48x80"),
        ({"backend": "portable", "runtime_thresholds": True}, "its thresholds are inputs, which DeepStream does not feed"),
    ],
    ids=str,
)  # fmt: skip
def test_deepstream_refuses_what_its_parser_does_not_read(tmp_path, settings, why):
    path = tiny(tmp_path, **settings)
    with pytest.raises(UnsupportedByBackendError, match=why):
        deploy(path, tmp_path / "kit", target="deepstream")
    assert not (tmp_path / "kit").exists()


def test_deepstream_refuses_outputs_of_other_types_and_order(tmp_path):
    path = tiny(tmp_path, backend="portable")
    model = onnx.load(path)
    outputs = list(model.graph.output)
    del model.graph.output[:]
    model.graph.output.extend([outputs[1], outputs[0], *outputs[2:]])
    onnx.save(model, path)
    with pytest.raises(UnsupportedByBackendError, match="in this order, and no others"):
        deploy(path, tmp_path / "kit", target="deepstream")
    engine = engine_of(tiny(tmp_path, backend="trt"), tmp_path)
    sidecar = engine.with_name(f"{engine.name}.json")
    info = json.loads(sidecar.read_text())
    info["outputs"]["labels"]["dtype"] = "int64"
    sidecar.write_text(json.dumps(info))
    with pytest.raises(UnsupportedByBackendError, match="labels int64"):
        deploy(engine, tmp_path / "kit", target="deepstream")


@pytest.mark.thorough
@pytest.mark.usefixtures("shared_exports")
def test_deepstream_refuses_masks_and_dynamic_sizes(tmp_path):
    masks = fusenms.fuse(write_segmenter(tmp_path / "s.pt"), size=64, backend="trt", unverified=True)
    with pytest.raises(UnsupportedByBackendError, match="is for the task segment"):
        deploy(masks.save(tmp_path / "s.onnx", unverified=True), tmp_path / "kit", target="deepstream")
    dynamic = fusenms.fuse(SHAPES / "shapes.pt", size=64, backend="trt", dynamic_size=True, unverified=True)
    with pytest.raises(UnsupportedByBackendError, match="its image size is dynamic"):
        deploy(dynamic.save(tmp_path / "d.onnx", unverified=True), tmp_path / "kit", target="deepstream")


@pytest.mark.parametrize(("name", "target"), [("", "triton"), ("a;b", "deepstream")])
def test_class_names_that_fill_no_line_are_refused(tmp_path, name, target):
    path = tiny(tmp_path, backend="portable")
    model = onnx.load(path)
    tiny_onnx.metadata(model, names=str({0: "a", 1: name, 2: "c"}))
    onnx.save(model, path)
    with pytest.raises(UnsupportedByBackendError, match="its class 1 is named"):
        deploy(path, tmp_path / "kit", target=target)
    assert not (tmp_path / "kit").exists()


# OpenVINO


def same(one, two, within: float) -> None:
    assert len(one) == len(two) and sum(map(len, one)) > 0
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=within)
        np.testing.assert_allclose(a.scores, b.scores, atol=within)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def ir(shapes, tmp_path_factory):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fusenms[openvino]'")
    written = deploy(shapes, tmp_path_factory.mktemp("ir") / "shapes.openvino", target="openvino")
    assert written.drift < 1e-4 and written.agreement.before == written.agreement.same > 0
    return written


def test_openvino_folder_gives_the_detections_of_the_file(shapes, ir):
    with Detector(shapes) as ort, Detector(ir.folder, threads=1) as found:
        assert found.runtime == "openvino" and found.class_names == ort.class_names
        expected = ort(IMAGES)
        same(expected, found(IMAGES), 1e-3)
        data = pickle.dumps(found)
        same(expected, pickle.loads(data)(IMAGES), 1e-3)
    with pytest.raises(InputError, match="runs in openvino, not in ncnn"):
        Detector(ir.folder, runtime="ncnn")


def test_openvino_files_of_different_exports_do_not_mix(ir, tmp_path):
    for name in (IR, IR_WEIGHTS):
        folder = Path(shutil.copytree(ir.folder, tmp_path / name))
        with (folder / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(SourceError, match=f"{name} is not the one that {IR_METADATA} was written with"):
            Detector(folder)
        (folder / IR_METADATA).write_text("{}")
        with pytest.raises(SourceError, match="its metadata is damaged"):
            Detector(folder)


@needs_openvino
@pytest.mark.slow
def test_openvino_half_stores_half(shapes, ir, tmp_path):
    written = deploy(shapes, tmp_path / "half", target="openvino", half=True)
    assert written.drift > 10 * ir.drift
    assert (written.folder / IR_WEIGHTS).stat().st_size < (ir.folder / IR_WEIGHTS).stat().st_size
    with Detector(shapes) as ort, Detector(written.folder) as found:
        same(ort(IMAGES), found(IMAGES), 0.5)


@needs_openvino
@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"frames": "dynamic", "frame_channels": "nv12"},
        {"frames": (480, 640)},
        {"backend": "portable"},
        {"output_preset": "ultralytics"},
    ],
    ids=str,
)
def test_openvino_takes_every_kind_of_file(shapes_raw, tmp_path, settings):
    path = trained(shapes_raw, tmp_path, **settings)
    written = deploy(path, tmp_path / "ir", target="openvino")
    assert written.agreement.before == written.agreement.same > 0
    with Detector(path) as ort, Detector(written.folder) as found:
        same(ort(IMAGES[0]), found(IMAGES[0]), 1e-2)


@needs_openvino
@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{"batch": 2}, {"dynamic_size": True}], ids=str)
def test_openvino_takes_fixed_batches_and_dynamic_sizes(tmp_path, settings):
    fused = fusenms.fuse(SHAPES / "shapes.pt", size=160, unverified=True, **settings)
    path = fused.save(tmp_path / "m.onnx", unverified=True)
    folder = deploy(path, tmp_path / "ir", target="openvino").folder
    with Detector(path) as ort, Detector(folder) as found:
        same(ort(IMAGES), found(IMAGES), 1e-2)


@needs_openvino
@pytest.mark.slow
def test_openvino_takes_thresholds_in_each_run(shapes_raw, tmp_path):
    path = trained(shapes_raw, tmp_path, runtime_thresholds=True)
    folder = deploy(path, tmp_path / "ir", target="openvino").folder
    with Detector(path) as ort, Detector(folder) as found:
        same(ort(IMAGES), found(IMAGES), 1e-2)
        given = {"score_threshold": 0.05, "iou_threshold": 0.1, "labels": [1]}
        same(ort(IMAGES, **given), found(IMAGES, **given), 1e-2)
        assert len(found(IMAGES[0], **given)[0]) != len(found(IMAGES[0])[0])


@needs_openvino
@pytest.mark.slow
def test_openvino_that_computes_otherwise_is_not_written(shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(openvino.MOST_DRIFT, False, 1e-12)
    with pytest.raises(
        UnsupportedByBackendError, match=r"OpenVINO computes something else: head within .* Nothing was written"
    ):
        deploy(shapes, tmp_path / "ir", target="openvino")
    monkeypatch.undo()
    monkeypatch.setattr(openvino, "MOST_LOST", -1)
    with pytest.raises(UnsupportedByBackendError, match="and the same detections"):
        deploy(shapes, tmp_path / "ir", target="openvino")
    assert not (tmp_path / "ir").exists()


def test_openvino_refuses_plugins_and_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UnsupportedByBackendError, match="has operators of backend trt, which OpenVINO lacks"):
        deploy(tiny(tmp_path, backend="trt"), tmp_path / "ir", target="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r"install it with: pip install 'fusenms\[openvino\]'"):
        deploy(tiny(tmp_path), tmp_path / "ir", target="openvino")


# Web

NODE = ROOT / ".node" / "node_modules"
WEB_PACKAGE = NODE / "onnxruntime-web" / "package.json"
HARNESS = """<!doctype html><iframe src="index.html" width="800" height="800"></iframe><script type="module">
const page = document.querySelector("iframe");
const state = () => page.contentDocument?.body?.dataset.state;
const until = async (done) => { while (!done.includes(state())) await new Promise((go) => setTimeout(go, 20)); };
const found = [];
try {
  await until(["ready", "failed"]);
  for (const name of IMAGES) {
    if (state() === "failed") throw new Error(page.contentDocument.getElementById("status").textContent);
    const input = page.contentDocument.getElementById("file");
    const files = new DataTransfer();
    files.items.add(new File([await (await fetch(name)).blob()], name));
    input.files = files.files;
    page.contentDocument.body.dataset.state = "waiting";
    input.dispatchEvent(new Event("change"));
    await until(["done", "failed"]);
    const canvas = page.contentDocument.getElementById("image");
    const rows = canvas.rows ?? [];
    const at = (x, y) => Array.from(canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3));
    found.push({
      status: page.contentDocument.getElementById("status").textContent, size: [canvas.width, canvas.height], rows,
      lines: page.contentDocument.querySelectorAll("#rows tr").length,
      edges: rows.map(({ box }) => at(Math.round((box[0] + box[2]) / 2), Math.min(Math.round(box[3]), canvas.height - 1))),
    });
  }
  await fetch("/result", { method: "POST", body: JSON.stringify(found) });
} catch (error) {
  await fetch("/result", { method: "POST", body: JSON.stringify({ error: String(error) }) });
}
</script>"""


def in_browser(kit: Path, images: list[Path]) -> list[dict]:
    """What the page of a kit shows for images."""
    if browser.CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package chromium)")
    if not WEB_PACKAGE.exists() or json.loads(WEB_PACKAGE.read_text())["version"] != web.ORT_WEB:
        pytest.skip(f"needs npm install --ignore-scripts --prefix .node onnxruntime-web@{web.ORT_WEB}")
    (kit / "node_modules").symlink_to(NODE)
    for image in images:
        shutil.copy(image, kit / image.name)
    (kit / "test.html").write_text(HARNESS.replace("IMAGES", json.dumps([image.name for image in images])))
    found = browser.result_of(kit, "test.html")
    assert isinstance(found, list), found
    return found


def check_rows(found: list[dict], expected, pixels: float, scores: float) -> None:
    assert len(found) == len(expected) > 0
    for row, (box, score, label) in zip(found, expected, strict=True):
        np.testing.assert_allclose(row["box"], box, atol=pixels)
        assert abs(row["score"] - score) <= scores
        assert (row["label"], row["name"]) == (label, expected.name(label))


def at_size(path: Path, target: Path, size: tuple[int, int]) -> Path:
    """An image at a size (width, height), as PNG, which every program decodes alike."""
    from PIL import Image

    Image.open(path).convert("RGB").resize(size).save(target)
    return target


@pytest.mark.slow
def test_page_finds_in_a_browser_what_onnxruntime_finds(shapes, tmp_path):
    """Without scaling, the rows are equal but for rounding; with it, colors may differ by one level of 255."""
    kit = deploy(shapes, tmp_path / "kit", target="web").folder
    exact = at_size(IMAGES[0], tmp_path / "exact.png", (64, 64))
    scaled = at_size(IMAGES[1], tmp_path / "scaled.png", (299, 401))
    images = [exact, scaled, IMAGES[0]]
    found = in_browser(kit, images)
    with Detector(shapes) as detect:
        expected = detect(images)
    for shown, rows, limits in zip(found, expected, ((1e-3, 1e-5), (0.5, 0.02), (2.0, 0.05)), strict=True):
        check_rows(shown["rows"], rows, *limits)
        assert shown["lines"] == len(rows) and shown["status"].startswith(f"{len(rows)} detections in ")
    assert [shown["size"] for shown in found] == [[64, 64], [299, 401], [640, 480]]
    shown = found[2]  # lines and names of later boxes cover few of the lower edges
    lines = [colorsys.hls_to_rgb(row["label"] * 137.5 % 360 / 360, 0.45, 0.9) for row in shown["rows"]]
    drawn = np.abs(np.array(lines) * 255 - shown["edges"]).max(1) < 4
    assert drawn.mean() > 0.5


@pytest.mark.thorough
@pytest.mark.usefixtures("shared_exports")
@pytest.mark.parametrize(
    "settings", [{"dynamic_size": True}, {"batch": 2}, {"runtime_thresholds": True}, {"backend": "portable"}], ids=str
)
def test_page_runs_every_kind_of_file(tmp_path, settings):
    path = fusenms.fuse(SHAPES / "shapes.pt", size=160, unverified=True, **settings).save(
        tmp_path / "m.onnx", unverified=True
    )
    kit = deploy(path, tmp_path / "kit", target="web").folder
    image = at_size(IMAGES[0], tmp_path / "image.png", (160, 96))
    with Detector(path) as detect:
        check_rows(in_browser(kit, [image])[0]["rows"], detect(image)[0], 1e-3, 1e-5)


def test_page_names_its_runtime_and_escapes_names(tmp_path):
    path = tiny(tmp_path)
    model = onnx.load(path)
    tiny_onnx.metadata(model, names=str({0: "</script><b>", 1: "b", 2: "c"}))
    onnx.save(model, path)
    kit = deploy(path, tmp_path / "kit", target="web").folder
    assert json.loads((kit / "package.json").read_text())["dependencies"] == {"onnxruntime-web": web.ORT_WEB}
    assert f"onnxruntime-web@{web.ORT_WEB}`" in (ROOT / "docs" / "development" / "tests.md").read_text()
    assert json.loads((kit / "model.json").read_text())["names"][0] == "</script><b>"
    assert (kit / "model.onnx").read_bytes() == path.read_bytes()
    page = (kit / "index.html").read_text()
    assert "</script><b>" not in page and "innerHTML" not in page
    named = {"http", "https"} & {word.partition(":")[0] for word in page.replace('"', " ").split()}
    assert not named, "the page loads something from elsewhere"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"backend": "trt"}, "which ONNX Runtime does not run, and the page"),
        ({"frames": (48, 80)}, "the page needs a model that takes images"),
        ({"output_preset": "ultralytics"}, "configure it with output_preset='fusenms'"),
    ],
    ids=str,
)
def test_page_refuses_what_it_cannot_run(tmp_path, settings, why):
    with pytest.raises(UnsupportedByBackendError, match=why):
        deploy(tiny(tmp_path, **settings), tmp_path / "kit", target="web")
    assert not (tmp_path / "kit").exists()


# Docker


def instructions(folder: Path) -> dict[str, list[str]]:
    """Instructions of a Dockerfile: the rest of each line."""
    found: dict[str, list[str]] = {}
    for line in (folder / "Dockerfile").read_text().splitlines():
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest)
    return found


def test_docker_file_serves_the_file_as_a_user_without_rights(tmp_path):
    path = tiny(tmp_path, "tiny.ort.onnx")
    folder = deploy(path, tmp_path / "kit", target="docker").folder
    found = instructions(folder)
    assert found["FROM"] == ["python:3.12-slim"] and found["USER"] == ["fusenms"] and "useradd" in found["RUN"][0]
    words = json.loads(found["ENTRYPOINT"][0])
    assert words[:3] == ["fusenms", "serve", "/models/tiny.ort.onnx"] and "0.0.0.0" in words
    assert found["EXPOSE"] == [words[words.index("--port") + 1]]
    copied = [line.split()[:-1] for line in found["COPY"]]
    context = set((folder / ".dockerignore").read_text().split())
    assert {f"!{name}" for names in copied for name in names} | {"*"} == context
    assert (folder / "tiny.ort.onnx").read_bytes() == path.read_bytes()
    wanted = Requirement((folder / "requirements.txt").read_text().strip())
    assert wanted.name == "fusenms" and wanted.specifier.contains(fusenms.__version__, prereleases=True)


def test_docker_commands_are_those_of_this_version(tmp_path):
    if "serve" not in COMMANDS:
        pytest.skip("needs the command serve")
    folder = deploy(tiny(tmp_path), tmp_path / "kit", target="docker").folder
    words = json.loads(instructions(folder)["ENTRYPOINT"][0])
    assert build_parser().parse_args(words[1:]).command == "serve"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert Requirement((folder / "requirements.txt").read_text().strip()).extras <= set(extras)


@pytest.mark.parametrize("status", [200, 503])
def test_docker_health_check_fails_until_the_server_is_ready(status):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        code = docker.READY.replace(f":{docker.PORT}/", f":{server.server_port}/")
        if status == 200:
            exec(code, {})
        else:
            with pytest.raises(OSError, match="503"):
                exec(code, {})
    assert asked == ["/v2/health/ready"]


def test_docker_refuses_what_the_server_cannot_run(tmp_path):
    with pytest.raises(UnsupportedByBackendError, match="which ONNX Runtime does not run, and the server"):
        deploy(tiny(tmp_path, backend="trt"), tmp_path / "kit", target="docker")


# All targets


@pytest.mark.parametrize("target", TARGETS)
def test_settings_that_a_target_lacks_are_refused(tmp_path, target):
    given = {"half": True, "images": np.zeros((1, 3, 64, 64), np.float32), "batch": 2}
    for name in set(given) - set(TARGETS[target].takes):
        with pytest.raises(ConfigError, match=f"found {name}, but target {target} has none; leave it out"):
            deploy(tmp_path / "no.onnx", tmp_path / "kit", target=target, **{name: given[name]})
    if "batch" in TARGETS[target].takes:
        with pytest.raises(ConfigError, match="batch is 0; expected a positive number"):
            deploy(tmp_path / "no.onnx", tmp_path / "kit", target=target, batch=0)


@pytest.mark.parametrize("target", ["triton", "deepstream", "web", "docker"])
def test_kits_are_written_whole_or_not_at_all(tmp_path, monkeypatch, target):
    """A second run replaces the files; one that fails at the last file changes nothing."""
    path = tiny(tmp_path, "tiny.onnx", backend="portable")
    kit = tmp_path / "kit"

    def sums() -> dict[str, str]:
        return {
            str(p.relative_to(kit)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kit.rglob("*") if p.is_file()
        }

    deploy(path, kit, target=target)
    before = sums()
    tiny(tmp_path, "tiny.onnx", backend="portable", score_threshold=0.4)
    replace, done = fusenms.safety.files.os.replace, []

    def fail_at_the_last(source, destination):
        if len(done) == len(before) - 1:
            done.append(destination)
            raise OSError(28, "No space left on device")
        done.append(destination)
        return replace(source, destination)

    monkeypatch.setattr(fusenms.safety.files.os, "replace", fail_at_the_last)
    with pytest.raises(SourceError, match="No space left"):
        deploy(path, kit, target=target)
    monkeypatch.undo()
    assert sums() == before
    deploy(path, kit, target=target)
    assert sums().keys() == before.keys() and sums() != before
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="the folder cannot be made"):
        deploy(path, tmp_path / "file" / "kit", target=target)
    monkeypatch.setattr(
        fusenms.safety.files, "write_together", lambda files: (_ for _ in ()).throw(SourceError("full"))
    )
    with pytest.raises(SourceError, match="full"):
        deploy(path, tmp_path / "new" / "kit", target=target)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["web", "docker", "deepstream"])
def test_kits_do_not_replace_their_own_source(tmp_path, target):
    path = tiny(tmp_path, "model.onnx", backend="portable")
    before = path.read_bytes()
    with pytest.raises(SourceError, match="is the input file, which would be overwritten"):
        deploy(path, tmp_path, target=target)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.txt"))


def test_command_says_what_was_checked_and_written(tmp_path, monkeypatch, capsys):
    path = tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", str(path), "--target", "triton", "--batch", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["wrote", "tiny.triton"]
    assert any("4 outputs of the declared types" in line for line in lines)
    assert main(["deploy", str(path), "--target", "web", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreement"] is None and found["drift"] is None and len(found["files"]) == 5
    assert main(["deploy", str(path), "--target", "deepstream"]) == 1


def test_external_weights_come_along(tmp_path):
    """A file with its weights in another file becomes one."""
    path = tiny(tmp_path)
    onnx.save(
        onnx.load(path), tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64
    )
    kit = deploy(tmp_path / "split.onnx", tmp_path / "kit", target="triton").folder
    alone = onnx.load(kit / "split" / "1" / "model.onnx", load_external_data=False)
    image = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    expected = OnnxRuntimeRunner(onnx.load(path)).infer(image)
    for name, value in OnnxRuntimeRunner(alone).infer(image).items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["yolov8-p-seg", "yolov8-p-pose", "yolov8-p-obb", "rtdetr-p", "yolo26-p", "yolov10-p"])
def test_real_networks(zoo, tmp_path, name):
    fused = fusenms.fuse(zoo / "shapes" / f"{name}.pt", unverified=True)
    path = fused.save(tmp_path / f"{name}.ort.onnx", unverified=True)
    triton = deploy(path, tmp_path / "triton", target="triton")
    check_triton(model_config(triton.folder, name), onnx.load(path))
    deploy(path, tmp_path / "docker", target="docker")
    written = deploy(path, tmp_path / "ir", target="openvino")
    assert written.agreement.before == written.agreement.same > 0
    images = sorted((zoo / "shapes" / "images").iterdir())[:2]
    with Detector(path) as ort, Detector(written.folder) as detect:
        for one, two in zip(ort(images), detect(images), strict=True):
            assert len(one) == len(two)
            np.testing.assert_allclose(one.oriented_boxes, two.oriented_boxes, atol=0.05)
            np.testing.assert_allclose(one.keypoints, two.keypoints, atol=0.05)
    kit = deploy(path, tmp_path / "web", target="web").folder
    exact = at_size(images[0], tmp_path / "exact.png", (load_fused(path).image.width, load_fused(path).image.height))
    (shown,) = in_browser(kit, [exact])
    with Detector(path) as detect:
        (expected,) = detect(exact)
    boxes = expected.oriented_boxes if expected.oriented else expected.boxes
    np.testing.assert_allclose([row["box"] for row in shown["rows"]], boxes, atol=0.02)
    if expected.keypoints.size:
        np.testing.assert_allclose([row["keypoints"] for row in shown["rows"]], expected.keypoints, atol=0.02)
