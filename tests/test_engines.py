"""Real TensorRT-RTX builds and parses, which need no GPU; refusals name the node and the cure."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import SHAPES
from raw_heads import LAYOUTS, SIZE, fused_model

from fusenms import PostprocessConfig, fuse
from fusenms.cli import main
from fusenms.engines import Engine, EngineSettings, get_builder
from fusenms.engines import rtx as rtx_module
from fusenms.engines.base import load_engine
from fusenms.engines.nvidia import Library, configure
from fusenms.engines.rtx import build_rtx
from fusenms.engines.running import compare_engine
from fusenms.engines.trt_check import check_trt_graph
from fusenms.errors import (
    BackendUnavailableError,
    ConfigError,
    EngineBuildError,
    SourceError,
    UnsupportedByBackendError,
)
from fusenms.fusion.backends.trt import PLUGIN
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, stretched, to_tensor
from fusenms.verification.agreement import Agreement

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX (pip install 'fusenms[rtx]')")
DTYPES = {"float32": "float", "int32": "int32", "bool": "bool"}
BATCH = EngineSettings(batch=(1, 2, 7))


def written(model, tmp_path):
    onnx.save(model, tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx")


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings", [{}, {"rounds": 4}, {"multi_label": True, "class_agnostic": True}, {"max_candidates": 20, "max_detections": 3}], ids=str
)  # fmt: skip
def test_portable_graph_builds(tmp_path, layout, settings):
    if not LAYOUTS[layout]().suppress and "rounds" in settings:
        pytest.skip("nothing to suppress, so no rounds")
    engine = build_rtx(written(fused_model(LAYOUTS[layout](), "portable", **settings).model, tmp_path), BATCH)
    assert engine.info["engine"]["bytes"] == len(engine.data) > 10_000
    config, sides = PostprocessConfig(**settings), (SIZE // 4, SIZE // 4)
    assert {name: (o["dtype"], o["shape"]) for name, o in engine.info["outputs"].items()} == {
        name: (DTYPES[str(spec.dtype)], list(spec.shape_for(-1, config.max_detections, *sides)))
        for name, spec in LAYOUTS[layout]().outputs(config)
    }


@pytest.mark.parametrize("layout", ["masks", "masks_end_to_end"])
def test_graph_with_masks_builds(tmp_path, layout):
    fused = fused_model(LAYOUTS[layout](), "portable", masks="prototype", indices=True, max_detections=70)
    outputs = build_rtx(written(fused.model, tmp_path), BATCH).info["outputs"]
    assert outputs["masks"] == {"dtype": "bool", "shape": [-1, 70, SIZE // 4, SIZE // 4]}
    assert outputs["indices"] == {"dtype": "int32", "shape": [-1, 70]}


@pytest.mark.parametrize("weights", ["derived/yolov8n.pt", "yolov5n.pt", "shapes/yolov10-p.pt", "shapes/yolo26-p.pt"])
def test_real_detector_builds(tmp_path, zoo, weights):
    path = fuse(zoo / weights, size=640, backend="portable", unverified=True).save(tmp_path / "m.onnx", unverified=True)
    engine = build_rtx(str(path), EngineSettings(compute_capabilities=("8.6", "12.0")))
    assert engine.info["inputs"]["images"] == {
        key: [b, 3, 640, 640] for key, b in (("min", 1), ("opt", 8), ("max", 32))
    }
    assert len(engine.data) > 3_000_000


def test_end_to_end_detector_builds(tmp_path, zoo):
    """It needs no suppression, and so no fusing."""
    assert build_rtx(str(zoo / "deimv2_atto_320.onnx"), BATCH).info["builder"]["name"] == "TensorRT-RTX"


@pytest.mark.thorough
def test_open_size_builds(tmp_path):
    path = fuse(SHAPES / "shapes.pt", size=128, backend="portable", dynamic_size=True).save(tmp_path / "m.onnx")
    engine = build_rtx(str(path), EngineSettings(batch=(1, 1, 1), height=(64, 128, 256), width=(64, 128, 256)))
    assert engine.info["inputs"]["images"]["max"] == [1, 3, 256, 256]


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize(
    ("backend", "operator"), [("ort", "has no kernel for NonMaxSuppression"), ("trt", f"has no plugin {PLUGIN}")]
)
def test_refusal_names_the_node_and_the_cure(tmp_path, backend, operator, class_agnostic):
    path = fuse(SHAPES / "shapes.pt", size=64, backend=backend, class_agnostic=class_agnostic).save(tmp_path / "m.onnx")
    with pytest.raises(UnsupportedByBackendError, match=rf"{operator} \(node 'fusenms/.*backend='portable'"):
        build_rtx(str(path), BATCH)


def test_refusal_blames_the_right_operator(tmp_path, zoo):
    path = zoo / "yolov8n_dynint8_640.onnx"
    fused = fuse(path, backend="trt", unverified=True).save(tmp_path / "m.onnx", unverified=True)
    with pytest.raises(UnsupportedByBackendError, match="take the float file"):
        check_trt_graph(str(fused))


def test_error_when_a_size_is_asked_for_that_is_fixed(tmp_path):
    path = fuse(SHAPES / "shapes.pt", size=128, backend="portable", unverified=True).save(
        tmp_path / "m.onnx", unverified=True
    )
    with pytest.raises(ConfigError, match=r"height is 320,320,320, but it is fixed at 128 in the file"):
        build_rtx(str(path), EngineSettings(height=(320, 320, 320)))


def test_usual_size_is_that_of_the_file(tmp_path):
    path = fuse(SHAPES / "shapes.pt", size=128, backend="portable", dynamic_size=True, unverified=True)
    engine = build_rtx(str(path.save(tmp_path / "m.onnx", unverified=True)), EngineSettings(batch=(1, 1, 1)))
    assert engine.info["inputs"]["images"]["opt"] == [1, 3, 128, 128]


def test_saving_leaves_no_half_and_no_old_layers(tmp_path):
    engine = Engine(b"plan", {"a": 1})
    (tmp_path / "m.rtx.layers.json").write_text("of another engine")
    engine.save(tmp_path / "m.rtx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.rtx", "m.rtx.json"]
    (tmp_path / "n.rtx.layers.json").mkdir()
    with pytest.raises(SourceError, match="is a directory"):
        Engine(b"plan", {}, "layers").save(tmp_path / "n.rtx")
    assert not (tmp_path / "n.rtx").exists()


def test_refusal_of_a_third_party_file_says_what_to_do(zoo):
    with pytest.raises(UnsupportedByBackendError, match=r"DynamicQuantizeLinear .* more nodes .* take the float file"):
        build_rtx(str(zoo / "yolov8n_dynint8_640.onnx"), BATCH)


def test_error_when_topk_is_too_large(tmp_path):
    model = fused_model(LAYOUTS["decoded"](80), "portable", multi_label=True, max_candidates=3841).model
    with pytest.raises(EngineBuildError, match=r"TopK.* lower max_candidates"):
        build_rtx(written(model, tmp_path), BATCH)


def test_errors_of_settings(tmp_path):
    path = written(fused_model(LAYOUTS["decoded"](), "portable").model, tmp_path)
    with pytest.raises(ConfigError, match=r"compute capability is 9\.9; .* builds for 7\.5, 8\.0"):
        build_rtx(path, EngineSettings(compute_capabilities=("9.9",)))
    with pytest.raises(ConfigError, match=r"batch is \[8, 1, 32\]; expected minimum, optimum and maximum"):
        EngineSettings(batch=(8, 1, 32))
    with pytest.raises(ConfigError, match="builder is 'x'; expected one of rtx"):
        get_builder("x")
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match="not a readable ONNX file"):
        build_rtx(str(tmp_path / "x.onnx"), BATCH)


def test_error_when_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'fusenms\[rtx\]'"):
        rtx_module.load_rtx()


def test_command_writes_engine_and_sidecar(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fuse(SHAPES / "shapes.pt", size=64, backend="portable").save("shapes.portable.onnx")
    assert main(["engine", "shapes.portable.onnx", "--batch", "1,4,8", "--compute-capability", "8.9"]) == 0
    assert "fused, backend portable" in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "shapes.rtx.json").read_text())
    data = (tmp_path / "shapes.rtx").read_bytes()
    assert sidecar["engine"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert sidecar["inputs"]["images"]["opt"] == [4, 3, 64, 64]
    assert sidecar["builder"]["compute_capabilities"] == ["8.9"]
    assert sidecar["metadata"]["names"] == "{0: 'circle', 1: 'square', 2: 'triangle'}"


def test_nothing_is_written_when_the_build_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fuse(SHAPES / "shapes.pt", size=64).save("m.onnx")
    assert main(["engine", "m.onnx"]) == 1
    assert "--backend portable" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize(
    "settings", [{}, {"class_agnostic": True}, {"multi_label": True}, {"score_threshold": 0.0}], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trt_graph_passes_the_parser_and_the_plugin_its_interface(tmp_path, layout, settings):
    checked = check_trt_graph(written(fused_model(LAYOUTS[layout](), "trt", **settings).model, tmp_path))
    assert bool(checked.plugin) == (LAYOUTS[layout]().suppress and LAYOUTS[layout]().angle is None)
    assert checked.nodes > 30


def test_trt_graph_with_masks_passes(tmp_path):
    fused = fused_model(LAYOUTS["masks"](), "trt", masks="prototype", indices=True)
    assert check_trt_graph(written(fused.model, tmp_path)).plugin


def test_real_trt_graphs_pass(tmp_path, zoo, capsys):
    for weights in ("derived/yolov8n.pt", "yolov5n.pt"):
        path = fuse(zoo / weights, backend="trt", unverified=True).save(tmp_path / "m.onnx", unverified=True)
        assert main(["engine", str(path), "--check"]) == 0
        assert "nodes except EfficientNMS_TRT, which conforms to its published interface" in capsys.readouterr().out


def broken(change):
    model = fused_model(LAYOUTS["distances"](), "trt").model
    change(model, next(node for node in model.graph.node if node.op_type == PLUGIN))
    return model


def set_attribute(name, value):
    def change(model, plugin):
        plugin.attribute.remove(next(a for a in plugin.attribute if a.name == name))
        if value is not None:
            plugin.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def add_attribute(model, plugin):
    plugin.attribute.append(onnx.helper.make_attribute("share_location", 1))


def swap_inputs(model, plugin):
    plugin.input[:] = plugin.input[::-1]


def one_input(model, plugin):
    plugin.input[1] = plugin.input[0]


def unknown_node(model, plugin):
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Sigmoidal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("box_coding", None), "box_coding is missing"),
        (set_attribute("iou_threshold", 1), "iou_threshold is 1"),
        (set_attribute("max_output_boxes", 0), "max_output_boxes is 0"),
        (set_attribute("plugin_version", "2"), "plugin_version is b'2'"),
        (add_attribute, "share_location is not an attribute of the plugin"),
        (one_input, "is used for both boxes and scores"),
        (set_attribute("background_class", 5), "background_class is 5, but there are 5 classes"),
        (swap_inputs, r"boxes are \[-1, 84, 5\], not \[batch, candidates, 4\]"),
        (unknown_node, r"does not support Sigmoidal \(node"),
    ],
)
def test_check_refuses_what_tensorrt_would(tmp_path, change, message):
    with pytest.raises(UnsupportedByBackendError, match=message):
        check_trt_graph(written(broken(change), tmp_path))


def test_progress_is_told(tmp_path):
    told = []
    build_rtx(
        written(fused_model(LAYOUTS["decoded"](), "portable").model, tmp_path), BATCH, lambda *args: told.append(args)
    )
    assert any(done == total for _, done, total in told)
    assert np.all([done <= total for _, done, total in told])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    path = fuse(SHAPES / "shapes.pt", size=64, backend="portable", unverified=True)
    path = path.save(folder / "shapes.portable.onnx", unverified=True)
    build_rtx(str(path), BATCH).save(folder / "shapes.rtx")
    return folder


@pytest.fixture
def engine(built, tmp_path):
    """An engine of the embedded detector, beside its ONNX file."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path / "shapes.rtx"


def test_engine_is_read_with_what_its_sidecar_says(engine):
    read = load_engine(engine)
    assert read.data == engine.read_bytes()
    assert read.info["builder"]["name"] == "TensorRT-RTX"
    assert read.info["builder"]["strongly_typed"] is True


def edit_sidecar(path: Path, edit) -> None:
    sidecar = path.with_name("shapes.rtx.json")
    info = json.loads(sidecar.read_text())
    edit(info)
    sidecar.write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is not the engine that shapes.rtx.json describes"),
        (lambda path: path.with_name("shapes.rtx.json").unlink(), "has no valid sidecar shapes.rtx.json"),
        (lambda path: path.with_name("shapes.rtx.json").write_text("{}"), "has no valid sidecar shapes.rtx.json"),
        (lambda path: path.with_name("shapes.rtx.json").write_text("no json"), "has no valid sidecar shapes.rtx.json"),
        (lambda path: path.unlink(), "cannot be read"),
        *[
            (lambda path, edit=edit: edit_sidecar(path, edit), "has no valid sidecar shapes.rtx.json")
            for edit in (
                lambda info: info.pop("builder"),
                lambda info: info["builder"].pop("version"),
                lambda info: info["source"].update(file="../shapes.onnx"),
                lambda info: info["source"].update(file=5),
                lambda info: info.update(inputs={}),
                lambda info: info.update(inputs={"images": {"min": [], "opt": "640", "max": None}}),
                lambda info: info.update(metadata=[]),
            )
        ],
    ],
)
def test_engine_that_is_not_the_one_of_its_sidecar_is_refused(engine, harm, message, capsys):
    harm(engine)
    with pytest.raises(SourceError, match=message):
        load_engine(engine)
    assert main(["verify", str(engine)]) == 1
    assert message in capsys.readouterr().err


def test_verify_says_that_an_engine_was_not_run(engine, capsys):
    """There is no GPU here, or no cuda-python: then that is what it says, and it is no success."""
    if find_spec("cuda") is not None and find_spec("cuda.bindings") is not None:
        from cuda.bindings import runtime

        if int(runtime.cudaGetDeviceCount()[0]) == 0:
            pytest.skip("there is a GPU; make test-gpu runs the engine")
    assert main(["verify", str(engine)]) == 1
    said = capsys.readouterr()
    assert "matches its sidecar" in said.out
    assert "the engine was not run" in said.err


def test_engine_needs_the_file_that_it_was_built_of(engine):
    (engine.parent / "shapes.portable.onnx").unlink()
    with pytest.raises(SourceError, match=r"was built from shapes\.portable\.onnx, but .* is missing or was changed"):
        compare_engine(engine)


def test_main_command_builds_an_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(SHAPES / "shapes.pt"), "--size", "64", "--unverified"]
    assert main([*command, "--backend", "portable", "--engine", "rtx", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["engine"]["builder"]["name"] == "TensorRT-RTX"
    assert load_engine(tmp_path / "shapes.rtx").info["source"]["file"] == "shapes.portable.onnx"
    if find_spec("tensorrt") is None:
        assert main([*command, "--backend", "trt"]) == 0
        assert (
            "TensorRT is not installed; on a machine with TensorRT, run: python -m fusenms engine"
            in capsys.readouterr().out
        )
        assert main(["engine", "shapes.trt.onnx"]) == 1  # a trt file's builder is TensorRT
        assert "TensorRT is not installed" in capsys.readouterr().err


def test_timing_cache_is_written_and_read(tmp_path):
    path = written(fused_model(LAYOUTS["decoded"](), "portable").model, tmp_path)
    settings = EngineSettings(batch=(1, 1, 1), timing_cache=tmp_path / "times", workspace=64)
    for _ in range(2):
        assert build_rtx(path, settings).data
        assert (tmp_path / "times").stat().st_size > 0


class Older:
    """TensorRT 8.5 as far as its names go: what it has, and what it has not yet. What they do is not played."""

    __version__ = "8.5.3.1"

    class NetworkDefinitionCreationFlag:
        EXPLICIT_BATCH = 0

    class BuilderFlag:
        FP16, INT8 = "fp16", "int8"

    class ProfilingVerbosity:
        DETAILED = "detailed"


class Config:
    def __init__(self):
        self.flags = []

    def set_flag(self, flag):
        self.flags.append(flag)


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["fp16"])])
def test_older_versions_are_let_choose_half_precision_where_the_graph_has_it(precision, flags):
    library, config = Library(Older, "TensorRT", {}), Config()
    model = fuse(SHAPES / "shapes.pt", size=64, precision=precision, unverified=True).model
    configure(library, config, EngineSettings(), model, None)
    assert config.flags == flags
    assert (library.strongly_typed, library.network_flags()) == (False, 1)


def test_plugins_are_those_of_the_registry():
    assert "ROIAlign_TRT" in rtx_module.load_rtx().plugins()
    assert PLUGIN not in rtx_module.load_rtx().plugins()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"version_compatible": True}, "TensorRT 8.5.3.1 has no version-compatible engines"),
        ({"hardware_compatible": True}, "TensorRT 8.5.3.1 has no hardware-compatible engines"),
        ({"compute_capabilities": ("8.6",)}, "builds for the GPU that it runs on"),
    ],
)
def test_error_when_an_older_version_has_no_such_setting(setting, message):
    model = fused_model(LAYOUTS["decoded"](), "portable").model
    with pytest.raises(ConfigError, match=message):
        configure(Library(Older, "TensorRT", {}), Config(), EngineSettings(**setting), model, None)


def test_engine_that_nobody_asked_for_may_fail(tmp_path, monkeypatch, capsys):
    """TensorRT is there as far as its name goes, and does not load: the file is written, and a line says what is missing."""
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fusenms.cli.fuse.find_spec", lambda name: name)
    command = [str(SHAPES / "shapes.pt"), "--size", "64", "--unverified", "--backend", "trt"]
    assert main(command) == 0
    assert "not built: TensorRT is not installed" in capsys.readouterr().out
    assert main([*command, "--engine", "trt"]) == 1
    assert (tmp_path / "shapes.trt.onnx").is_file()


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("stretch", [False, True])
def test_engine_gets_its_images_as_the_detector_fits_them(tmp_path, monkeypatch, stretch):
    fused = fuse(SHAPES / "shapes.pt", size=64, backend="portable", stretch=stretch, unverified=True)
    build_rtx(str(fused.save(tmp_path / "m.onnx", unverified=True)), BATCH).save(tmp_path / "m.rtx")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes((SHAPES / "shapes0.jpg").read_bytes())
    given = []
    monkeypatch.setattr(
        "fusenms.cli.verify.compare_engine",
        lambda path, images: given.append(images) or [(1, Agreement(1, 3, 3, 3, 0.0, 0.0))],
    )
    assert main(["verify", str(tmp_path / "m.rtx"), "--images", str(tmp_path / "images")]) == 0
    fit = stretched if stretch else letterbox
    np.testing.assert_array_equal(given[0], to_tensor([fit(read_image(SHAPES / "shapes0.jpg"), 64, 64)[0]]))
    assert not np.array_equal(*(f(read_image(SHAPES / "shapes0.jpg"), 64, 64)[0] for f in (letterbox, stretched)))


@pytest.mark.parametrize(
    ("agreement", "status"),
    [
        (Agreement(1, 3, 3, 3, 0.5, 0.001), 0),
        (Agreement(1, 3, 2, 2, 0.5, 0.001), 1),
        (Agreement(1, 3, 4, 3, 0.5, 0.001), 1),
        (Agreement(1, 3, 3, 3, 9.0, 0.001), 1),
        (Agreement(1, 3, 3, 3, 0.5, 0.1), 1),
        (Agreement(1, 0, 0, 0, 0.0, 0.0), 1),  # nothing was compared
    ],
)
def test_engine_that_finds_something_else_does_not_pass(engine, monkeypatch, agreement, status):
    monkeypatch.setattr("fusenms.cli.verify.compare_engine", lambda path, images: [(1, agreement)])
    assert main(["verify", str(engine)]) == status
