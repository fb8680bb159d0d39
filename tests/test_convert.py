"""`fusenms.convert` and `fusenms.configure` of files that fusenms fused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from conftest import SHAPES
from raw_heads import LAYOUTS, SIZE, fused_model

import fusenms
from fusenms import configure, convert, edit, fuse, load_fused, verify
from fusenms.cli import main
from fusenms.conversion import own
from fusenms.errors import ConfigError, SourceError, UnsupportedByBackendError, VerificationError
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.layout import Layout
from fusenms.onnx_reading.files import read_metadata

IMAGES = np.random.default_rng(0).random((2, 3, SIZE, SIZE), dtype=np.float32)


def written(folder, layout="distances", backend="ort", **config):
    model = fused_model(LAYOUTS[layout](3), backend, **config)
    return model.save(folder / f"{layout}.{backend}.onnx", unverified=True)


def rows(fused):
    runner = OnnxRuntimeRunner(get_backend(fused.backend).to_standard(fused.model, fused))
    outputs = runner.infer(IMAGES)
    runner.close()
    return [outputs[name] for name in fused.config.output_names]


def assert_same_rows(one, two):
    for a, b in zip(rows(one), rows(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.covering(default=2, quick=1)
@pytest.mark.parametrize("layout", ["distances", "end_to_end", "masks", "corners_rows", "background_first"])
@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_file_of_one_backend_becomes_one_of_another(tmp_path, backend, target, layout):
    path = written(tmp_path, layout, backend, score_threshold=0.01)
    made = convert(path, target)
    assert made.report and made.report.detections
    assert made.model.backend == target and made.model.config == load_fused(path).config
    assert verify(made.save(tmp_path / "made.onnx"))
    assert_same_rows(load_fused(path), load_fused(tmp_path / "made.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_fused_again(tmp_path, layout):
    path = written(tmp_path, layout, score_threshold=0.01)
    made = convert(path, "portable")
    assert made.report and made.model.layout.to_dict() == load_fused(path).layout.to_dict()
    assert_same_rows(load_fused(path), made.model)


def test_file_fused_again_equals_one_fused_with_these_settings(tmp_path):
    path = written(tmp_path, score_threshold=0.5, max_detections=20)
    settings = {"score_threshold": 0.1, "iou_threshold": 0.6, "max_detections": 50, "class_agnostic": True}
    made = configure(path, **settings, output_preset="tensorrt")
    assert made.changes == (
        "score_threshold 0.5 -> 0.1", "iou_threshold 0.45 -> 0.6", "max_detections 20 -> 50", "class_agnostic False -> True",
        "output_preset fusenms -> tensorrt",
    )  # fmt: skip
    assert made.report
    assert_same_rows(fused_model(LAYOUTS["distances"](3), **settings), made.model)
    made.save(path)
    assert [entry.name for entry in load_fused(path).model.graph.output][1:] == [
        "detection_boxes", "detection_scores", "detection_classes",
    ]  # fmt: skip


@pytest.mark.parametrize("setting", ["indices", "multi_label", "runtime_thresholds"])
def test_outputs_and_inputs_come_and_go(tmp_path, setting):
    path = written(tmp_path)
    configure(path, **{setting: True}).save(path)
    assert getattr(load_fused(path).config, setting) and verify(path)
    configure(path, **{setting: False}).save(path)
    assert load_fused(path).config == fused_model(LAYOUTS["distances"](3)).config


def test_one_tensor_leaves_no_trace(tmp_path):
    path = written(tmp_path)
    before = set(read_metadata(onnx.load(path)))
    configure(path, output_preset="ultralytics").save(path)
    assert {"end2end", "args", "batch"} <= set(read_metadata(onnx.load(path)))
    configure(path, output_preset="fusenms").save(path)
    assert set(read_metadata(onnx.load(path))) == before


def test_metadata_of_others_stay(tmp_path):
    path = written(tmp_path)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, read_metadata(model) | {"owner": "me"})
    onnx.save(model, path)
    assert read_metadata(onnx.load(convert(path, "portable").save(tmp_path / "p.onnx")))["owner"] == "me"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"batch": 3}, {"dynamic_size": True}, {"frames": (48, 80)}, {"frames": "dynamic"}, {"tiles": (2, 2)}]
)
def test_input_stays(tmp_path, options):
    path = fuse(SHAPES / "shapes.pt", size=64, unverified=True, **options).save(tmp_path / "f.onnx", unverified=True)
    before = load_fused(path)
    made = convert(path, "portable", score_threshold=0.3)
    assert made.report and made.model.image == before.image
    after = load_fused(made.save(tmp_path / "p.onnx"))
    assert [entry.name for entry in after.model.graph.input] == [entry.name for entry in before.model.graph.input]
    assert len([note for note in after.notes if note.startswith("takes ")]) == (
        "frames" in options or "tiles" in options
    )


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "target"), [("plugin", "ort"), ("ort", "plugin"), ("plugin", "plugin")])
def test_half_precision_stays(tmp_path, backend, target):
    path = fuse(SHAPES / "shapes.pt", size=64, precision="fp16", backend=backend, unverified=True).save(
        tmp_path / "f.onnx", unverified=True
    )
    made = convert(path, target)
    assert made.report and made.model.precision == "fp16"
    kinds = {item.data_type for item in made.model.model.graph.initializer if len(item.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dynamic_size": True}])
def test_raw_head_and_its_layout_fuse_to_the_same(tmp_path, options):
    path = fuse(SHAPES / "shapes.pt", size=64, unverified=True, **options).save(tmp_path / "f.onnx", unverified=True)
    raw = convert(path, "raw").save(tmp_path / "f.raw.onnx")
    layout = Layout.from_dict(json.loads((tmp_path / "f.raw.layout.json").read_text()))
    again = fuse(raw, layout=layout, pixels="rgb", stretch=False, **options)
    assert again.report and again.class_names == load_fused(path).class_names
    assert_same_rows(load_fused(path), again)


def test_images_are_refused_where_nothing_is_compared(tmp_path):
    with pytest.raises(ConfigError, match="found images with backend 'raw'"):
        convert(written(tmp_path), "raw", images=IMAGES)


def test_nothing_of_a_raw_head_is_written_if_one_file_cannot_be(tmp_path):
    made = convert(written(tmp_path), "raw")
    (tmp_path / "x.layout.json").mkdir()
    with pytest.raises(SourceError, match="is a directory"):
        made.save(tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ConfigError, "found nothing to change"),
        ({"precision": "fp16"}, ConfigError, "found precision, which a fused file cannot change; .* needs the weights"),
        ({"score_threshold": 7}, ConfigError, "score_threshold is 7; expected a number from 0 to 1"),
        ({"masks": "prototype"}, ConfigError, "a model of task 'detect' has none"),
    ],
)
def test_what_cannot_be_changed_is_refused(tmp_path, change, error, message):
    path = written(tmp_path)
    with pytest.raises(error, match=message):
        configure(path, **change)


def test_settings_that_the_other_backend_lacks_are_refused(tmp_path):
    path = written(tmp_path, runtime_thresholds=True)
    with pytest.raises(UnsupportedByBackendError, match=r"cannot be inputs.*the file has backend ort, and its other"):
        convert(path, "trt")
    assert convert(path, "trt", runtime_thresholds=False).report
    rounds = written(tmp_path, backend="portable", rounds=4)
    with pytest.raises(ConfigError, match=r"rounds is 4, but backend ort has none.*the file has backend portable"):
        convert(rounds, "ort")
    assert convert(rounds, "ort", rounds=None).report


def test_what_is_no_fused_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="backend is 'tensorrt'; expected one of ort, trt, portable, plugin, raw"):
        convert(tmp_path / "x.onnx", "tensorrt")
    with pytest.raises(ConfigError, match="found score_threshold with backend 'raw'"):
        convert(tmp_path / "x.onnx", "raw", score_threshold=0.5)
    with pytest.raises(SourceError, match="is an engine, which cannot be changed"):
        configure(tmp_path / "x.engine", score_threshold=0.5)
    with pytest.raises(SourceError, match="found a int"):
        convert(3)


def test_network_that_gives_another_head_is_refused(tmp_path, monkeypatch):
    """Verification compares what comes after the head, so that it does not see this."""
    path = written(tmp_path)
    darker = load_fused(
        edit(path, tmp_path / "darker.onnx", insert={"images": fusenms.graph.editing.Op("Mul", (0.5,))})
    )
    assert verify(darker)
    genuine = own.raw_of
    monkeypatch.setattr("fusenms.conversion.raw_of", lambda _: genuine(darker))
    with pytest.raises(SourceError, match=r"the network gives another (dist|logits) than the file does"):
        convert(path, "portable")


def test_file_stays_as_it_is_if_the_result_differs(tmp_path, monkeypatch, capsys):
    path = written(tmp_path)
    before = path.read_bytes()

    monkeypatch.setattr("fusenms.fusion.backends.ort.iou_threshold", lambda g, config: 0.9)
    with pytest.raises(VerificationError, match="was not converted: the result differs from the reference"):
        configure(path, score_threshold=0.1)
    assert main(["configure", str(path), "--score-threshold", "0.1"]) == 1
    assert "differs from the reference" in capsys.readouterr().err
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_commands_write_what_the_functions_make(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    assert main(["convert", path.name, "--backend", "trt", "--max-detections", "7", "--no-class-agnostic"]) == 0
    assert load_fused("distances.trt.onnx").config.max_detections == 7
    assert main(["configure", "distances.trt.onnx", "--names", "deepstream", "--json"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["changes"] == ["output_preset fusenms -> deepstream"]
    assert load_fused("distances.trt.onnx").config.output_names[0] == "num_dets"
    assert main(["convert", "distances.trt.onnx", "--backend", "raw"]) == 0
    assert "--layout distances.raw.layout.json" in capsys.readouterr().out
    assert main(["convert", path.name, "--backend", "ort"]) == 1
    assert "is the input file, which would be overwritten" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"tiles": {"rows": 2, "columns": 2, "overlap": 0.3}}, {"channels": "bgr"}])
def test_metadata_of_frames_that_the_graph_does_not_follow_are_refused(tmp_path, wrong):
    """The new file would be right by the metadata, and another one than the old."""
    path = fuse(SHAPES / "shapes.pt", size=64, unverified=True, tiles=(2, 2)).save(tmp_path / "f.onnx", unverified=True)
    model = onnx.load(path)
    (entry,) = (item for item in model.metadata_props if item.key == "fusenms.image")
    values = json.loads(entry.value)
    values["frames"] |= wrong
    entry.value = json.dumps(values)
    onnx.save(model, path)
    with pytest.raises(SourceError, match="its graph makes other images of them"):
        convert(path, "portable")
