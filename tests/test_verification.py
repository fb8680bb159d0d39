"""Sabotage: break a fused model in every way that has been seen in the wild; verify must fail and name the cause."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from raw_heads import LAYOUTS, fused_model

from fusenms import FusedModel, FusenmsError, fuse, verify
from fusenms.errors import ConfigError, InputError, SourceError, VerificationError

pytestmark = pytest.mark.usefixtures("shared_exports")

# Thresholds that differ, and that boxes and scores can meet exactly.
SETTINGS = {"score_threshold": 0.25, "iou_threshold": 0.5, "max_detections": 100}


def rewire(model: onnx.ModelProto, output: str, nodes: Callable[[str], list[onnx.NodeProto]]) -> None:
    """Give an output's tensor another name, and let ``nodes(that name)`` make the output from it."""
    hidden = f"{output}_true"
    for node in model.graph.node:
        node.output[:] = [hidden if name == output else name for name in node.output]
        node.input[:] = [hidden if name == output else name for name in node.input]
    model.graph.node.extend(nodes(hidden))


def constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def shift_box(model):
    constant(model, "shift", np.array([0, 0, 1.5, 0], np.float32))
    constant(model, "none", np.float32(0))
    rewire(model, "boxes", lambda x: [
        helper.make_node("Add", [x, "shift"], ["moved"]), helper.make_node("Equal", [x, "none"], ["blank"]),
        helper.make_node("Where", ["blank", x, "moved"], ["boxes"]),
    ])  # fmt: skip


def swap_labels(model):
    constant(model, "table", np.array([2, 1, 0, 3, 4, -1], np.int32))
    rewire(model, "labels", lambda x: [helper.make_node("Gather", ["table", x], ["labels"])])


def class_off_by_one(model):
    constant(model, "table", np.array([1, 2, 3, 4, 5, -1], np.int32))
    rewire(model, "labels", lambda x: [helper.make_node("Gather", ["table", x], ["labels"])])


def freeze_batch(model):
    """Every image gets the rows of the first."""
    constant(model, "first", np.array([0], np.int64))
    for name in ("num_detections", "boxes", "scores", "labels"):
        rewire(model, name, lambda x, name=name: [
            helper.make_node("Gather", [x, "first"], [f"{name}_0"], axis=0), helper.make_node("Shape", [x], [f"{name}_s"]),
            helper.make_node("Expand", [f"{name}_0", f"{name}_s"], [name]),
        ])  # fmt: skip


def drop_sort(model):
    """The rows of an image in the order of the candidates' numbers, as an NMS emits them, not by score."""
    constant(model, "k", np.array([SETTINGS["max_detections"]], np.int64))
    constant(model, "axes", np.array([2], np.int64))
    constant(model, "wide", np.array([1, 1, 4], np.int64))
    constant(model, "far", np.float32(1e6))
    constant(model, "x1", np.array(0, np.int64))
    constant(model, "nobody", np.int32(-1))
    boxes, labels = "boxes_true", "labels_true"
    for name in ("boxes", "scores", "labels"):
        rewire(model, name, lambda x: [])
    model.graph.node.extend([
        helper.make_node("Gather", [boxes, "x1"], ["left"], axis=2), helper.make_node("Equal", [labels, "nobody"], ["blank"]),
        helper.make_node("Where", ["blank", "far", "left"], ["key"]),
        helper.make_node("TopK", ["key", "k"], ["_", "order"], axis=1, largest=0),
        helper.make_node("GatherElements", ["scores_true", "order"], ["scores"], axis=1),
        helper.make_node("GatherElements", [labels, "order"], ["labels"], axis=1),
        helper.make_node("Unsqueeze", ["order", "axes"], ["column"]), helper.make_node("Expand", ["column", "wide"], ["columns"]),
        helper.make_node("GatherElements", [boxes, "columns"], ["boxes"], axis=1),
    ])  # fmt: skip


def centers_as_corners(model):
    """Give cx, cy, w, h where corners are promised."""
    for name, value in (("half", [[-0.5, 0], [0, -0.5], [0.5, 0], [0, 0.5]]), ("mid", [[0.5, 0], [0, 0.5]] * 2)):
        constant(model, name, np.array(value, np.float32))
    constant(model, "size", np.array([[-1, 0], [0, -1], [1, 0], [0, 1]], np.float32))
    rewire(model, "boxes", lambda x: [
        helper.make_node("MatMul", [x, "mid"], ["center"]), helper.make_node("MatMul", [x, "size"], ["extent"]),
        helper.make_node("Concat", ["center", "extent"], ["boxes"], axis=2),
    ])  # fmt: skip


def swap_thresholds(fused: FusedModel) -> FusedModel:
    swapped = fused_model(fused.layout, fused.backend, **SETTINGS | {"score_threshold": 0.5, "iou_threshold": 0.25})
    return FusedModel(**{**fused.__dict__, "model": swapped.model})


def keep_equal_scores(fused: FusedModel) -> FusedModel:
    """>= for > on scores: the threshold one float lower."""
    lower = float(np.nextafter(np.float32(0.25), np.float32(0)))
    loose = fused_model(fused.layout, fused.backend, **SETTINGS | {"score_threshold": lower})
    return FusedModel(**{**fused.__dict__, "model": loose.model})


def drop_equal_overlap(fused: FusedModel) -> FusedModel:
    """>= for > on IoU: the threshold lower by as many floats as lead below the margin that the node has."""
    lower = 0.5 * (1 - (2**-20 if fused.backend == "trt" else 2**-23))
    strict = fused_model(fused.layout, fused.backend, **SETTINGS | {"iou_threshold": lower})
    return FusedModel(**{**fused.__dict__, "model": strict.model})


IN_THE_GRAPH = {
    shift_box: "the boxes are shifted by (+0, +0, +1.5, +0) px",
    swap_labels: "labels are swapped (0 as 2, 2 as 0)",
    class_off_by_one: "the labels are off by +1",
    freeze_batch: "the batch is frozen",
    drop_sort: "the rows are right but not sorted by score",
    centers_as_corners: "the boxes are cx, cy, w, h taken as corners",
}
IN_THE_SETTINGS = {
    swap_thresholds: "score_threshold and iou_threshold are swapped",
    keep_equal_scores: "score_threshold: equal values are treated as above it (>= where > is expected)",
    drop_equal_overlap: "iou_threshold: equal values are treated as above it (>= where > is expected)",
}


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("backend", ["ort", "trt"])
@pytest.mark.parametrize("layout", ["distances", "decoded"])
@pytest.mark.parametrize("break_it", IN_THE_GRAPH, ids=lambda f: f.__name__)
def test_broken_graph_is_caught_and_named(break_it, layout, backend):
    fused = fused_model(LAYOUTS[layout](), backend, **SETTINGS)
    assert verify(fused)
    break_it(fused.model)
    report = verify(fused)
    assert not report
    assert IN_THE_GRAPH[break_it] in str(report), report


@pytest.mark.parametrize("layout", ["anchored_distances", "pixel_distances"])
def test_equal_overlap_of_plain_distances_is_caught_and_named(layout):
    fused = fused_model(LAYOUTS[layout](), "ort", **SETTINGS)
    assert verify(fused)
    report = verify(drop_equal_overlap(fused))
    assert not report
    assert IN_THE_SETTINGS[drop_equal_overlap] in str(report), report


@pytest.mark.covering(default=2, quick=0)
@pytest.mark.parametrize("backend", ["ort", "trt"])
@pytest.mark.parametrize("layout", ["distances", "decoded"])
@pytest.mark.parametrize("break_it", IN_THE_SETTINGS, ids=lambda f: f.__name__)
def test_wrong_setting_is_caught_and_named(break_it, layout, backend):
    report = verify(break_it(fused_model(LAYOUTS[layout](), backend, **SETTINGS)))
    assert not report
    assert any(IN_THE_SETTINGS[break_it] in problem for check in report.checks for problem in check.problems), report


def moved(output: str, by: object, dtype: type = np.float32):
    """Add to an output, where a row is valid."""

    def break_it(model):
        constant(model, "by", np.array(by, dtype))
        constant(model, "zero", np.array(-1 if output == "indices" else 0, dtype))
        rewire(model, output, lambda x: [
            helper.make_node("Add", [x, "by"], ["moved"]), helper.make_node("Equal", [x, "zero"], ["blank"]),
            helper.make_node("Where", ["blank", x, "moved"], [output]),
        ])  # fmt: skip

    return break_it


def made_by(output: str, *steps: tuple[str, list[str], np.ndarray | None]):
    """An output made of itself by one operator and a constant."""

    def break_it(model):
        def nodes(x):
            made, name = [], x
            for n, (op, order, value) in enumerate(steps):
                inputs = [name if word == "x" else constant(model, f"{word}{n}", value) for word in order]
                name = output if n == len(steps) - 1 else f"step{n}"
                made.append(helper.make_node(op, inputs, [name], **({"axis": 2} if op == "Gather" else {})))
            return made

        rewire(model, output, nodes)

    return break_it


FURTHER_MISTAKES = {
    "index": ("distances", {"indices": True}, moved("indices", 1, np.int32), "indices: "),
    "coefficients": ("masks", {}, made_by("mask_coefficients", ("Gather", ["x", "order"], np.arange(6)[::-1])), "mask_coefficients: "),
    "prototypes": ("masks", {}, made_by("prototypes", ("Mul", ["x", "half"], np.float32(1.001))), "the prototypes are not the head's"),
    "masks": ("masks", {"masks": "prototype"}, made_by("masks", ("Gather", ["x", "order"], np.arange(16)[::-1])), "masks: "),
    "keypoints": ("keypoints", {}, moved("keypoints", [0, 0.01, 0]), "keypoints: "),
    "visibility": ("keypoints", {}, moved("keypoints", [0, 0, 1e-3]), "keypoints: "),
    "nan": ("keypoints", {}, moved("keypoints", np.nan), "keypoints: "),
    "nan coefficients": ("masks", {}, moved("mask_coefficients", np.nan), "mask_coefficients: "),
    "blank": ("keypoints", {}, made_by("keypoints", ("Add", ["x", "one"], np.float32(1e-6))), "keypoints: rows past num_detections"),
    "turned": ("oriented", {}, made_by("boxes", ("Mul", ["x", "way"], np.array([1, 1, 1, 1, -1], np.float32))), "turn the other way"),
    "degrees": (
        "oriented", {}, made_by("boxes", ("Mul", ["x", "unit"], np.array([1, 1, 1, 1, 180 / np.pi], np.float32))), "are in degrees"
    ),
    "sides": ("oriented", {}, made_by("boxes", ("Gather", ["x", "order"], np.array([0, 1, 3, 2, 4]))), "width and height are swapped"),
    "angle": ("oriented", {}, moved("boxes", [0, 0, 0, 0, 0.01]), "the boxes are shifted by (+0, +0, +0, +0, +0.01) px, and rad"),
}  # fmt: skip


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("mistake", FURTHER_MISTAKES)
@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_mistake_in_a_further_output_is_caught_and_named(mistake, backend):
    layout, settings, break_it, named = FURTHER_MISTAKES[mistake]
    fused = fused_model(LAYOUTS[layout](), backend, **SETTINGS | settings)
    assert verify(fused)
    break_it(fused.model)
    report = verify(fused)
    assert not report
    assert named in str(report), report


def test_plugin_that_suppresses_at_equality_is_caught():
    """`EfficientNMS_TRT` drops IoU >= its threshold; without the next float up, verify must see it."""
    fused = fused_model(LAYOUTS["distances"](), "trt", **SETTINGS)
    attribute = next(a for a in node_of(fused.model, "EfficientNMS_TRT").attribute if a.name == "iou_threshold")
    attribute.f = 0.5
    assert "iou_threshold: equal values" in str(verify(fused))


def test_frozen_batch_that_does_not_run_is_named():
    fused = fused_model(LAYOUTS["distances"](), **SETTINGS)
    rewire(fused.model, "scores", lambda x: [helper.make_node("Reshape", [x, "one"], ["scores"])])
    constant(fused.model, "one", np.array([1, SETTINGS["max_detections"]], np.int64))
    assert "does not run at batch 2 (the batch is frozen)" in str(verify(fused))


@pytest.mark.slow
def test_rows_past_the_count_must_be_blank():
    fused = fused_model(LAYOUTS["distances"](), **SETTINGS)
    constant(fused.model, "tenth", np.float32(0.1))
    rewire(fused.model, "scores", lambda x: [helper.make_node("Max", [x, "tenth"], ["scores"])])
    assert "are not blank" in str(verify(fused))


def test_wrong_dtype_is_named():
    fused = fused_model(LAYOUTS["distances"](), **SETTINGS)
    rewire(fused.model, "labels", lambda x: [helper.make_node("Cast", [x], ["labels"], to=onnx.TensorProto.INT64)])
    next(e for e in fused.model.graph.output if e.name == "labels").type.tensor_type.elem_type = onnx.TensorProto.INT64
    assert "output labels: found int64[1, 100], expected int32[1, 100]" in str(verify(fused))


def test_nothing_is_written_when_it_differs(tmp_path):
    fused = fused_model(LAYOUTS["distances"](), **SETTINGS)
    shift_box(fused.model)
    with pytest.raises(VerificationError, match="was not written"):
        fused.proven(verify(fused)).save(tmp_path / "f.onnx")
    assert not list(tmp_path.iterdir())


def test_unverified_is_refused_or_stamped(tmp_path):
    fused = fused_model(LAYOUTS["distances"]())
    with pytest.raises(ConfigError, match="was not verified"):
        fused.save(tmp_path / "f.onnx")
    fused.save(tmp_path / "f.onnx", unverified=True)
    stored = {item.key: item.value for item in onnx.load(tmp_path / "f.onnx").metadata_props}
    assert stored["fusenms.verification"] == "unverified"


@pytest.mark.slow
def test_written_file_verifies_again(tmp_path, shapes_raw):
    path = fuse(shapes_raw, backend="trt", output_preset="deepstream").save(tmp_path / "f.onnx")
    report = verify(path)
    assert report
    assert report.detections > 100
    assert verify(path, batches=[3]).batches == (3,)


def test_report_is_false_when_nothing_was_checked():
    from fusenms import Report

    assert not Report((), (1,))


@pytest.mark.slow
def test_images_are_checked_all(shapes_raw):
    images = np.random.default_rng(0).random((9, 3, 64, 64), np.float32)
    report = verify(fuse(shapes_raw), images=images)
    assert {check.case for check in report.checks} >= {f"image {i}" for i in range(9)}


@pytest.mark.parametrize(
    "images", [np.zeros((1, 3, 32, 64), np.float32), np.zeros((1, 3, 64, 64)), np.zeros((0, 3, 64, 64), np.float32)]
)
def test_error_when_images_do_not_fit(shapes_raw, images):
    with pytest.raises(InputError, match=r"expected float32 \[n, 3, 64, 64\]"):
        verify(fuse(shapes_raw, unverified=True), images=images)


def test_error_when_batches_are_wrong(shapes_raw):
    with pytest.raises(InputError, match="batches are"):
        verify(fuse(shapes_raw, unverified=True), batches=[0])


def test_error_when_head_was_renamed_away(shapes_raw):
    fused = fuse(shapes_raw, unverified=True)
    for node in fused.model.graph.node:
        node.output[:] = ["other" if name == "head_boxes" else name for name in node.output]
        node.input[:] = ["other" if name == "head_boxes" else name for name in node.input]
    with pytest.raises(SourceError, match="lacks the head's tensors head_boxes"):
        verify(fused)


def test_error_when_file_is_no_fused_model(tmp_path, shapes_raw):
    onnx.save(shapes_raw.model, tmp_path / "raw.onnx")
    with pytest.raises(FusenmsError, match="not a fused model"):
        verify(tmp_path / "raw.onnx")
