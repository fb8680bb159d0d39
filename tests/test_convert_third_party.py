"""`fusenms.convert` of files that others fused, rebuilt from their published recipes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper
from third_party import YoloNas, Yolov8
from third_party_suppressions import (
    IOU,
    ROWS,
    SCORE,
    Tail,
    batched,
    efficient,
    flat,
    mmdeploy,
    offset,
    padded,
    tail_of,
    unrolled,
)

from fusenms import convert, fuse, inspect, load_fused, verify
from fusenms.cli import main
from fusenms.errors import AlreadyFusedError, ConfigError, SuppressionError
from fusenms.layout import Layout

IMAGES = np.kron(np.random.default_rng(3).integers(0, 2, (4, 3, 4, 4)), np.ones((16, 16))).astype(np.float32)
NAMES = {"names": str({0: "a", 1: "b", 2: "c"})}


def nas(path, make, **options):
    t = tail_of(YoloNas(), path)
    return saved(make(t, *t.heads, **options), path)


def centers(path, make, **options):
    """Boxes as centers and sizes, cut out of `[B, 4 + C, N]`."""
    t = tail_of(Yolov8(), path)
    rows = t.op("Transpose", t.heads[0], perm=[0, 2, 1])
    boxes, scores = (t.op("Slice", rows, t.const([a]), t.const([b]), t.const([2])) for a, b in ((0, 4), (4, 7)))
    return saved(make(t, boxes, scores, **options), path)


def loop(path, batch=2):
    t = tail_of(YoloNas(), path, dynamic=False)
    shape = t.graph.input[0].type.tensor_type.shape.dim[0]
    shape.dim_value = 1
    return saved(unrolled(t, t.op("Concat", *t.heads, axis=2), 1, 3), path)


def saved(model, path):
    helper.set_model_props(model, NAMES)
    onnx.save(model, path)
    return path


RECIPES = {
    "EfficientNMS_TRT": lambda path: nas(path, efficient),
    "EfficientNMS_TRT without a domain": lambda path: nas(path, efficient, domain=""),
    "EfficientNMS_TRT of centers": lambda path: centers(path, efficient, box_coding=1),
    "EfficientNMS_TRT class-agnostic": lambda path: nas(path, efficient, class_agnostic=1),
    "EfficientNMS_TRT with numbers as lists": lambda path: nas(path, efficient, background_class=[-1]),
    "EfficientNMSX_TRT": lambda path: nas(path, efficient, operator="EfficientNMSX_TRT", more=("det_indices",)),
    "EfficientIdxNMS_TRT": lambda path: nas(path, efficient, operator="EfficientIdxNMS_TRT", more=("det_indices",)),
    "BatchedNMSDynamic_TRT": lambda path: nas(path, batched),
    "TRTBatchedNMS": lambda path: nas(path, mmdeploy),
    "rows by class": lambda path: nas(path, flat),
    "rows by class, score first": lambda path: nas(path, flat, order="score-middle"),
    "class offset": lambda path: nas(path, offset),
    "class-agnostic": lambda path: nas(path, offset, agnostic=True),
    "one node an image": loop,
    "padded rows by class": lambda path: nas(path, padded),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_cut_and_fused_again(tmp_path, recipe):
    path = RECIPES[recipe](tmp_path / "old.onnx")
    made = convert(path, "portable", images=IMAGES, keep_semantics=True)
    read, rows = made.semantics, made.rows
    assert (read.score_threshold, read.iou_threshold) == (pytest.approx(SCORE), pytest.approx(IOU))
    assert read.class_agnostic == ("agnostic" in recipe)
    assert read.multi_label == ("TRT" in recipe or "by class" in recipe)
    assert read.max_detections == (None if recipe.startswith("rows") else ROWS)
    assert rows.explained and rows.before >= 8
    assert made.report and rows.after == rows.before == rows.left
    after = load_fused(made.save(tmp_path / "new.onnx"))
    assert after.image.batch is None and after.class_names == ("a", "b", "c")
    assert verify(after, batches=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort", "trt", "plugin"])
def test_other_backends_take_it_too(tmp_path, backend):
    path = nas(tmp_path / "old.onnx", efficient)
    made = convert(path, backend, images=IMAGES, score_threshold=0.1)
    assert made.report and made.model.backend == backend
    assert "score_threshold 0.05 -> 0.1" in made.changes and "multi_label True -> False" in made.changes
    assert not made.lost


def test_what_cannot_be_kept_is_said(tmp_path):
    made = convert(nas(tmp_path / "old.onnx", efficient), images=IMAGES, keep_semantics=True)
    assert made.lost == ("a score or IoU that equals its threshold exactly: fusenms compares strictly",)
    assert made.model.config.multi_label and made.model.config.max_detections == ROWS


def test_output_names_that_mean_the_same_are_kept(tmp_path):
    made = convert(nas(tmp_path / "old.onnx", efficient), images=IMAGES, keep_semantics=True)
    outputs = [entry.name for entry in made.model.model.graph.output]
    assert outputs == ["num_dets", "det_boxes", "det_scores", "det_classes"] == list(made.semantics.outputs)
    assert convert(nas(tmp_path / "old.onnx", efficient), images=IMAGES).model.config.output_preset == "fusenms"
    asked = {"keep_semantics": True, "output_preset": "tensorrt"}
    assert convert(tmp_path / "old.onnx", images=IMAGES, **asked).model.config.output_preset == "tensorrt"


def test_output_names_that_no_preset_has_are_lost(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient)
    model = onnx.load(path)
    model.graph.node[-1].output[1] = model.graph.output[1].name = "where"
    onnx.save(model, path)
    made = convert(path, images=IMAGES, keep_semantics=True)
    assert "the output names num_dets, where, det_scores, det_classes: no output preset has them" in made.lost
    assert made.model.config.output_preset == "fusenms"


def test_output_names_of_other_meaning_are_not_kept(tmp_path):
    made = convert(nas(tmp_path / "old.onnx", batched), images=IMAGES, keep_semantics=True)
    assert made.semantics.outputs == () and made.model.config.output_preset == "fusenms"


def test_raw_head_of_it_is_fused_as_any_other(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient)
    raw = convert(path, "raw", images=IMAGES).save(tmp_path / "raw.onnx")
    layout = Layout.from_dict(json.loads((tmp_path / "raw.layout.json").read_text()))
    assert fuse(raw, layout=layout).report and inspect(raw).layout == layout


def test_attribute_that_is_left_out_has_the_default_of_the_plugin(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient)
    model = onnx.load(path)
    attributes = model.graph.node[-1].attribute
    attributes.remove(next(one for one in attributes if one.name == "max_output_boxes"))
    onnx.save(model, path)
    assert convert(path, images=IMAGES).semantics.max_detections == 100


def test_scores_moved_behind_the_head_are_part_of_it(tmp_path):
    t = tail_of(YoloNas(), tmp_path / "old.onnx")
    boxes, scores = t.heads
    path = saved(efficient(t, boxes, t.op("Gather", scores, t.const([1, 0, 2]), axis=2)), tmp_path / "old.onnx")
    assert convert(path, images=IMAGES).rows.explained


def test_settings_that_are_read_wrong_are_refused(tmp_path, monkeypatch):
    from fusenms.conversion import third_party

    path, genuine = nas(tmp_path / "old.onnx", flat), third_party.standard_semantics
    monkeypatch.setattr(third_party, "standard_semantics", lambda *a: replace(genuine(*a), score_threshold=0.5))
    with pytest.raises(SuppressionError, match="give other rows than the file"):
        convert(path, images=IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["plugin", "offset"])
def test_real_head_with_objectness_as_yolov7_writes_it(zoo, tmp_path, tail):
    """YOLOv5 has the output of YOLOv7: centers and sizes, objectness, classes."""
    t = Tail(onnx.load(zoo / "derived/yolov5n.onnx"))
    boxes, objectness, classes = (
        t.op("Slice", t.heads[0], t.const([a]), t.const([b]), t.const([2])) for a, b in ((0, 4), (4, 5), (5, 85))
    )
    scores = t.op("Mul", classes, objectness)
    if tail == "plugin":
        model = efficient(t, boxes, scores, box_coding=1, score_threshold=0.25)
    else:
        corners = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
        model = offset(t, t.op("MatMul", boxes, t.const(corners, np.float32)), scores)
    onnx.save(model, tmp_path / "old.onnx")
    made = convert(tmp_path / "old.onnx", "portable", images=zoo / "photos", keep_semantics=True)
    assert made.layout.family == "yolov5" and made.layout.decode_stage == "late"
    assert made.rows.explained and made.rows.before >= 6 and made.report


@pytest.mark.slow
def test_real_masks_beside_corners_as_ultralytics_writes_them(zoo, tmp_path):
    t = Tail(onnx.load(zoo / "yolov8n-seg_dynint8_320.onnx"))
    rows = t.op("Transpose", t.heads[0], perm=[0, 2, 1])
    boxes, rest = (t.op("Slice", rows, t.const([a]), t.const([b]), t.const([2])) for a, b in ((0, 4), (4, 116)))
    corners = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]])
    head = t.op("Concat", t.op("MatMul", boxes, t.const(corners, np.float32)), rest, axis=2)
    prototypes = (1, [1, 32, 80, 80])
    model = unrolled(t, head, 1, 80)
    model.graph.output.append(helper.make_tensor_value_info(t.heads[1], *prototypes))
    onnx.save(model, tmp_path / "old.onnx")
    made = convert(tmp_path / "old.onnx", images=zoo / "photos", keep_semantics=True)
    assert made.layout.task == "segment" and made.layout.masks.prototypes == t.heads[1]
    assert made.rows.explained and made.rows.before >= 6 and made.report


def test_layout_with_swapped_classes_is_refused(tmp_path, monkeypatch):
    from fusenms.conversion import third_party

    genuine = third_party.candidates

    def swapped(*args):
        found = genuine(*args)
        values = {name: getattr(found, name) for name in ("keys", "probabilities", "labels_by")}
        return replace(found, **{name: value[:, [1, 0, 2]] for name, value in values.items() if value is not None})

    monkeypatch.setattr(third_party, "candidates", swapped)
    with pytest.raises(SuppressionError, match=r"give other rows than the file"):
        convert(nas(tmp_path / "old.onnx", efficient), images=IMAGES)


def test_images_without_objects_show_nothing_and_say_so(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient, score_threshold=0.999)
    made = convert(path, images=IMAGES)
    assert made.rows.before == 0 and "nothing is shown" in made.rows.verdict


def test_file_that_decodes_images_is_refused_with_the_way_out(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient)
    model = onnx.load(path)
    name = model.graph.input[0].name
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("file", onnx.TensorProto.UINT8, ["bytes"]))
    model.graph.node.insert(
        0, helper.make_node("DecodeImage", ["file"], [name], name="decode", domain="com.microsoft.extensions")
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft.extensions", 1))
    onnx.save(model, path)
    with pytest.raises(SuppressionError, match=rf"DecodeImage.*from the tensor '{name}' to its head"):
        convert(path)


def test_two_stages_are_refused(tmp_path):
    t = tail_of(YoloNas(), tmp_path / "old.onnx")
    model = flat(t, *t.heads)
    model.graph.node.append(helper.make_node("RoiAlign", ["a", "b", "c"], ["d"], name="pool"))
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(SuppressionError, match="a RoiAlign node 'pool', so that it is a detector of two stages"):
        convert(tmp_path / "old.onnx")


def test_suppression_of_what_another_keeps_is_refused(tmp_path):
    t = tail_of(YoloNas(), tmp_path / "old.onnx")
    boxes, scores = t.heads
    by_class = t.op("Transpose", scores, perm=[0, 2, 1])
    numbers = t.op("Gather", t.op("NonMaxSuppression", boxes, by_class, t.const(50)), t.const(2), axis=1)
    boxes, by_class = t.op("Gather", boxes, numbers, axis=1), t.op("Gather", by_class, numbers, axis=2)
    t.op("NonMaxSuppression", boxes, by_class, t.const(50), outputs=["picked"])
    onnx.save(t.outputs(picked=(7, ["n", 3])), tmp_path / "old.onnx")
    with pytest.raises(SuppressionError, match="keeps is suppressed again"):
        convert(tmp_path / "old.onnx")


def test_suppression_in_a_subgraph_is_refused(tmp_path):
    t = tail_of(YoloNas(), tmp_path / "old.onnx")
    inner = helper.make_node("NonMaxSuppression", t.heads, ["picked"])
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("picked", 7, None)])
    t.op("If", t.const(True, bool), then_branch=branch, else_branch=branch)
    onnx.save(t.model, tmp_path / "old.onnx")
    with pytest.raises(SuppressionError, match="inside of the subgraphs of its If node"):
        convert(tmp_path / "old.onnx")


@pytest.mark.parametrize("operator", ["NMSRotated", "TRTBatchedRotatedNMS", "EfficientRotatedNMS_TRT"])
def test_suppression_of_oriented_boxes_is_refused_with_the_way_out(tmp_path, operator):
    path = tmp_path / "old.onnx"
    t = tail_of(YoloNas(), path)
    t.op(operator, *t.heads, outputs=["found"], domain="mmdeploy")
    t.model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    onnx.save(t.outputs(found=(1, None)), path)
    with pytest.raises(
        SuppressionError, match=rf"oriented boxes by {operator} .*IoU of polygons.*without its suppression"
    ):
        convert(path)
    with pytest.raises(AlreadyFusedError, match=operator):
        fuse(path)


def test_unknown_suppression_is_refused(tmp_path):
    t = tail_of(YoloNas(), tmp_path / "old.onnx")
    t.op("BatchedNMS3D", *t.heads, outputs=["found"], domain="other")
    t.model.opset_import.append(helper.make_opsetid("other", 1))
    onnx.save(t.outputs(found=(1, None)), tmp_path / "old.onnx")
    with pytest.raises(SuppressionError, match="suppresses by BatchedNMS3D"):
        convert(tmp_path / "old.onnx")


def test_file_without_suppression_is_refused(tmp_path):
    tail_of(YoloNas(), tmp_path / "old.onnx")
    with pytest.raises(SuppressionError, match="has no suppression; expected one to cut out"):
        convert(tmp_path / "old.onnx")


def test_family_of_our_own_file_is_refused(tmp_path, monkeypatch):
    path = convert(nas(tmp_path / "old.onnx", efficient), images=IMAGES).save(tmp_path / "new.onnx")
    with pytest.raises(ConfigError, match="found family, but"):
        convert(path, "portable", family="corners")


def test_main_command_and_inspect_point_to_convert(tmp_path):
    path = nas(tmp_path / "old.onnx", efficient)
    with pytest.raises(AlreadyFusedError, match="Cut it out with: python -m fusenms convert"):
        fuse(path)
    assert "python -m fusenms convert" in inspect(path).reason


def test_command_says_what_it_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nas(tmp_path / "old.onnx", efficient)
    assert main(["convert", "old.onnx", "--backend", "portable", "--keep-semantics", "--max-detections", "9"]) == 0
    said = capsys.readouterr().out
    assert "EfficientNMS_TRT · score >= 0.05 · IoU >= 0.5 suppressed within a class · at most 20 rows" in said
    assert "max_detections 20 -> 9" in said and "lost " in said
    assert load_fused("old.portable.onnx").config.max_detections == 9
