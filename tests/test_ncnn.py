"""Models deployed for ncnn give the detections of the fused file, or are refused with what was found."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle

import numpy as np
import pytest
from conftest import SHAPES

import fusenms
from fusenms.cli import main
from fusenms.deployment import deploy, ncnn
from fusenms.errors import BackendUnavailableError, ConfigError, InputError, SourceError, UnsupportedByBackendError
from fusenms.runtime import Detector
from fusenms.runtime.ncnn import NETWORK, TAIL, WEIGHTS

needs_ncnn = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("ncnn", "pnnx"))), reason="needs ncnn and pnnx: pip install 'fusenms[ncnn]'"
)
IMAGES = [SHAPES / "shapes0.jpg", SHAPES / "shapes1.jpg"]


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return fusenms.fuse(SHAPES / "shapes.pt", size=160).save(tmp_path_factory.mktemp("fused") / "shapes.ort.onnx")


@pytest.fixture(scope="module")
def deployed(fused, tmp_path_factory):
    return deploy(fused, tmp_path_factory.mktemp("ncnn") / "shapes.ncnn")


def same(one, two, within=1e-3):
    assert len(one) == len(two) and sum(map(len, one)) > 0
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.boxes, b.boxes, atol=within)
        np.testing.assert_allclose(a.scores, b.scores, atol=within)
        np.testing.assert_array_equal(a.labels, b.labels)


@needs_ncnn
def test_detections_are_those_of_the_fused_file(fused, deployed):
    assert (
        deployed.drift < 1e-4 and deployed.agreement.before == deployed.agreement.after == deployed.agreement.same > 0
    )
    with Detector(fused) as ort, Detector(deployed.folder, threads=1) as found:
        same(ort(IMAGES), found(IMAGES))
        assert found.class_names == ort.class_names


@needs_ncnn
def test_copies_and_pickles_open_the_same_files(deployed, tmp_path):
    detect = Detector(deployed.folder, threads=1)
    expected = detect(IMAGES)
    same(expected, copy.copy(detect)(IMAGES), 0)
    data = pickle.dumps(detect)
    same(expected, pickle.loads(data)(IMAGES), 0)
    tail = deployed.folder / TAIL
    whole = tail.read_bytes()
    tail.write_bytes(whole + b"\x00")
    try:
        with pytest.raises(SourceError, match="has changed since"):
            pickle.loads(data)
    finally:
        tail.write_bytes(whole)
    detect.close()
    with pytest.raises(InputError, match="the detector is closed"):
        detect(IMAGES)


@needs_ncnn
def test_files_of_different_exports_do_not_mix(deployed, tmp_path):
    for name in (NETWORK, WEIGHTS):
        folder = tmp_path / name
        folder.mkdir()
        for other in (NETWORK, WEIGHTS, TAIL):
            data = (deployed.folder / other).read_bytes()
            (folder / other).write_bytes(data + b"\n" if other == name else data)
        with pytest.raises(
            SourceError, match=f"{name} is not the one that {TAIL} was written with; deploy the model again"
        ):
            Detector(folder)
        (folder / name).unlink()
        with pytest.raises(SourceError, match=name):
            Detector(folder)


@needs_ncnn
@pytest.mark.slow
def test_command_writes_and_detects(fused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", str(fused), "--target", "ncnn", "--half", "--images", str(SHAPES), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "shapes.ncnn" and found["agreement"]["images"] == 3 and 0 < found["drift"] < 0.05
    assert main(["detect", "shapes.ncnn", str(IMAGES[0]), "--no-draw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["detections"]
    with pytest.raises(SourceError, match="is the last part of a model for ncnn; give its folder to Detector"):
        fusenms.load_fused(tmp_path / "shapes.ncnn" / TAIL)


@needs_ncnn
def test_network_that_ncnn_computes_otherwise_is_not_written(fused, tmp_path, monkeypatch):
    monkeypatch.setitem(ncnn.MOST_DRIFT, False, 1e-9)
    with pytest.raises(
        UnsupportedByBackendError, match=r"ncnn computes something else: .* Nothing was written \(\d+ images? · "
    ):
        deploy(fused, tmp_path / "x.ncnn")
    assert not (tmp_path / "x.ncnn").exists()


@needs_ncnn
def test_operators_that_ncnn_lacks_are_named(fused, tmp_path, monkeypatch):
    def convert(*args, **kwargs):
        done = run(*args, **kwargs)
        network = kwargs["cwd"] / NETWORK
        network.write_text(network.read_text().replace("Sigmoid ", "aten::erf ").replace("Swish ", "F.grid_sample "))
        return done

    run = ncnn.subprocess.run
    monkeypatch.setattr(ncnn.subprocess, "run", convert)
    with pytest.raises(UnsupportedByBackendError, match=r"ncnn has no operator for F\.grid_sample"):
        deploy(fused, tmp_path / "x.ncnn")


def test_what_ncnn_cannot_do_is_said(tmp_path):
    """Before anything is converted."""
    for settings, why in (
        ({"dynamic_size": True}, "its image size is dynamic"),
        ({"batch": 2}, "its batch is fixed at 2"),
        ({"precision": "fp16"}, "its precision is fp16"),
    ):
        path = fusenms.fuse(SHAPES / "shapes.pt", size=64, **settings).save(tmp_path / "m.onnx")
        with pytest.raises(UnsupportedByBackendError, match=why):
            deploy(path, tmp_path / "x.ncnn")


def test_wrong_arguments(fused, tmp_path):
    with pytest.raises(ConfigError, match="target is 'tflite'; expected one of ncnn"):
        deploy(fused, tmp_path, target="tflite")
    with pytest.raises(ConfigError, match=r"images have shape \[1, 3, 8, 8\]; expected \[n, 3, 160, 160\]"):
        deploy(fused, tmp_path, images=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(InputError, match="found providers, but ncnn has none"):
        Detector(tmp_path, providers=["CUDAExecutionProvider"])
    with pytest.raises(SourceError, match=TAIL):
        Detector(tmp_path)
    (tmp_path / TAIL).write_bytes(fused.read_bytes())
    with pytest.raises(SourceError, match=f"{TAIL} was not made for ncnn"):
        Detector(tmp_path)


def test_missing_packages_are_named(fused, tmp_path, monkeypatch):
    monkeypatch.setattr(ncnn.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendUnavailableError, match="pnnx is not installed; install it with: pip install 'fusenms\\[ncnn\\]'"
    ):
        deploy(fused, tmp_path / "x.ncnn")


@needs_ncnn
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["yolov8-p-seg", "yolov8-p-pose", "yolov8-p-obb", "yolo12-p", "yolo26-p", "yolov10-p"])
def test_every_task_runs(zoo, tmp_path, name):
    path = fusenms.fuse(zoo / "shapes" / f"{name}.pt").save(tmp_path / "m.onnx")
    written = deploy(path, tmp_path / "m.ncnn")
    found = written.agreement
    assert found.before == found.after == found.same > 0
    images = (
        sorted((zoo / "shapes" / "images").glob("*.jpg"))[:2] or sorted((zoo / "shapes" / "images").glob("*.png"))[:2]
    )
    with Detector(path) as ort, Detector(written.folder) as detect:
        for one, two in zip(ort(images), detect(images), strict=True):
            assert len(one) == len(two)
            np.testing.assert_allclose(one.oriented_boxes, two.oriented_boxes, atol=0.01)
            np.testing.assert_allclose(one.keypoints, two.keypoints, atol=0.01)
            assert len(one.masks) == len(two.masks)


@needs_ncnn
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "why"), [("rtdetr-p", "ncnn has no operator for pnnx.Expression")])
def test_networks_that_ncnn_cannot_run(zoo, tmp_path, name, why):
    path = fusenms.fuse(zoo / "shapes" / f"{name}.pt").save(tmp_path / "m.onnx")
    with pytest.raises(UnsupportedByBackendError, match=why):
        deploy(path, tmp_path / "m.ncnn")
