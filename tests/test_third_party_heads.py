"""Families of other packages: given to `recognize` and `fuse`, or found by their entry points."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from conftest import SHAPES

from fusenms import fuse, load, recognize
from fusenms.cli import main
from fusenms.errors import ConfigError, HeadNotRecognizedError
from fusenms.heads import HeadSpec, Mismatch, installed_heads, known_heads
from fusenms.layout import Layout

PACKAGE = """
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.heads import HeadSpec, Mismatch
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap


def match(probe, certain):
    if len(probe.samples) != 1 or probe.samples[0].value.shape[2] != 7:
        return Mismatch("expected [batch, candidates, 7]: box, three scores")
    tensor = probe.samples[0].tensor
    boxes = Decoded(BoxFormat.XYXY)
    return Layout("acme", Tap(tensor, 2, 0, 4), Tap(tensor, 2, 4, 7), None, Activation.NONE, boxes)


ACME = HeadSpec("acme", match, pixels=PIXELS["bgr255"])
"""


@pytest.fixture
def head():
    """The family of the package, as a value."""
    names: dict = {}
    exec(PACKAGE, names)
    return names["ACME"]


@pytest.fixture
def raw():
    """A model with a head that no family of ours has: our detector's network, its output turned and cut to other channels."""
    from onnx import TensorProto, helper

    from fusenms.artifacts.raw import ImageInput, RawModel

    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axes"], ["mean3"]),
        helper.make_node("Mul", ["mean3", "part"], ["little"]),
        helper.make_node("Add", ["little", "rows"], ["output"]),
    ]
    rows = [0.0] * 7 * 5
    for i in range(5):
        rows[7 * i : 7 * i + 7] = [10 * i, 10 * i, 10 * i + 8, 10 * i + 9, 0.1 * (i + 1), 0.0, 0.01]
    weights = [
        helper.make_tensor("part", TensorProto.FLOAT, [], [1e-4]),
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("rows", TensorProto.FLOAT, [1, 5, 7], rows),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5, 7])
    graph = helper.make_graph(nodes, "raw", [images], [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    image = ImageInput("images", 64, 64, 32)
    return RawModel(model=model, image=image, class_names=("a", "b", "c"), task="detect", source="acme.onnx")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package, installed: its module and its metadata lie on the path."""
    (tmp_path / "acme_heads.py").write_text(PACKAGE)
    info = tmp_path / "acme_heads-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-heads\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fusenms.heads]\nacme = acme_heads:ACME\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    installed_heads.cache_clear()
    yield tmp_path
    installed_heads.cache_clear()
    sys.modules.pop("acme_heads", None)


def test_no_family_of_ours_fits(raw):
    with pytest.raises(HeadNotRecognizedError):
        recognize(raw)


def test_head_that_is_given_is_tried(raw, head):
    assert recognize(raw, heads=[head]).family == "acme"


def test_head_that_is_given_is_fused_with_its_pixels(raw, head):
    fused = fuse(raw, heads=[head], score_threshold=0.2)
    assert fused.report
    assert "converted inside to BGR from 0 to 255" in fused.notes[-1]


def test_entry_point_is_found_and_fused(raw, installed):
    assert [spec.name for spec in known_heads()][-1] == "acme"
    assert fuse(raw, score_threshold=0.2).layout.family == "acme"


def test_entry_point_is_a_family_on_the_command_line(raw, installed, capsys, monkeypatch):
    import onnx

    monkeypatch.chdir(installed)
    onnx.save(raw.model, "acme.onnx")
    assert main(["acme.onnx", "--family", "acme", "--score-threshold", "0.2", "-o", "f.onnx"]) == 0
    assert "acme.onnx · acme detect · 3 classes" in capsys.readouterr().out


def test_entry_point_is_listed(installed, capsys):
    assert main(["families", "acme"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "acme",
        "    reads    .onnx · detect · head acme",
        "    source   entry point acme = acme_heads:ACME",
    ]
    assert main(["families", "acme", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["installed"]] == ["acme"]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([HeadSpec("yolov8", lambda *_: Mismatch("never"))], "the family name 'yolov8' is already taken"),
        (["yolov8"], "heads: is a str; expected a fusenms.heads.HeadSpec"),
    ],
)
def test_error_when_heads_are_wrong(raw, heads, message):
    with pytest.raises(ConfigError, match=message):
        recognize(raw, heads=heads)


def test_error_names_the_entry_point_that_cannot_be_imported(raw, installed):
    (installed / "acme_heads.py").write_text("import nothing_of_that_name")
    with pytest.raises(ConfigError, match="entry point acme = acme_heads:ACME: cannot be imported"):
        recognize(raw)


def test_layout_of_a_family_that_is_gone_is_still_fused(raw, head):
    layout = recognize(raw, heads=[head])
    assert isinstance(layout, Layout)
    assert fuse(replace(raw, layout=layout), score_threshold=0.2).report


@pytest.mark.slow
def test_our_own_models_are_recognized_beside_it(installed):
    assert recognize(load(SHAPES / "shapes.pt", size=64)).family == "yolov8"
