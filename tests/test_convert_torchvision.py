"""`fusenms.convert` of detectors that select candidates before they suppress, inside an `If`, as torchvision's are exported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torchvision_tails import CLASSES, INNER, IOU, MOST, ROWS, SCORE, SIZE, export

from fusenms import convert, fuse, inspect, load_fused, verify
from fusenms.conversion import third_party
from fusenms.conversion.branches import with_suppressions_inlined
from fusenms.conversion.one_image import with_batch
from fusenms.errors import AlreadyFusedError, SuppressionError
from fusenms.graph.session import Session

IMAGES = np.kron(np.random.default_rng(3).random((4, 3, 8, 8)), np.ones((8, 8))).astype(np.float32)


def branches(model):
    """The branch without rows and the one that suppresses, of the only `If`."""
    node = next(node for node in model.graph.node if node.op_type == "If")
    return sorted((one.g for one in node.attribute), key=lambda graph: len(graph.node))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batched"), [("level", False), ("class", False), ("level", True), ("image", False)])
def test_selected_candidates_are_cut_and_fused_again(tmp_path, kind, batched):
    path = export(tmp_path / "old.onnx", kind=kind, batched=batched)
    made = convert(path, "portable", images=IMAGES, keep_semantics=True)
    read, rows = made.semantics, made.rows
    assert (read.score_threshold, read.iou_threshold) == (pytest.approx(SCORE), pytest.approx(IOU))
    assert read.max_detections == ROWS and read.multi_label == (kind != "image") and not read.class_agnostic
    limited = any(f"at most {MOST} candidates of each {kind} enter" in line for line in read.others)
    assert limited == (kind != "image")
    assert rows.explained and rows.before >= 8 and rows.after == rows.left == rows.before
    assert rows.worst_box < 1e-4 and made.report
    assert made.layout.num_classes == CLASSES + (kind == "class")
    assert f"resizes images of {SIZE}x{SIZE} to {INNER}x{INNER} inside, and its boxes back" in made.meaning
    assert any("normalizes images inside: 0.48, 0.45, 0.4 subtracted" in line for line in made.meaning)
    after = load_fused(made.save(tmp_path / "new.onnx"))
    assert after.image.batch == 1 and verify(after, batches=(1,))


def test_rows_of_the_new_file_are_those_of_the_old_one(tmp_path):
    path = export(tmp_path / "old.onnx", kind="class")
    made = convert(path, images=IMAGES, keep_semantics=True).model.model
    old, new = (Session(model, source="file") for model in (onnx.load(path), made))
    for image in IMAGES:
        boxes, scores, labels = old.run({old.inputs[0]: image})
        count, *rows = new.run({new.inputs[0]: image[None]})
        got = [value[0, : int(count[0, 0] if count.ndim > 1 else count[0])] for value in rows]
        assert len(boxes) == len(got[0]) and set(labels) <= {1, 2, 3}
        np.testing.assert_allclose(got[0], boxes, atol=1e-4)
        np.testing.assert_allclose(got[1], scores, atol=1e-6)
        np.testing.assert_array_equal(got[2], labels)


def test_raw_head_of_it_has_all_candidates(tmp_path):
    made = convert(export(tmp_path / "old.onnx"), "raw", images=IMAGES)
    head = onnx.load(made.save(tmp_path / "raw.onnx"))
    shapes = [[dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in head.graph.output]
    cells = (INNER // 8) ** 2 + (INNER // 16) ** 2
    assert shapes == [[1, 3 * cells, 4], [1, 3 * cells, CLASSES]]
    assert not {node.op_type for node in head.graph.node} & {"If", "TopK", "NonZero", "NonMaxSuppression"}


def test_limit_of_a_level_that_changes_rows_is_refused(tmp_path):
    path = export(tmp_path / "old.onnx", most=4)
    with pytest.raises(SuppressionError, match=r"give other rows than the file.*at most 4 candidates of each level"):
        convert(path, images=IMAGES)


def test_if_whose_other_branch_gives_rows_stays(tmp_path):
    path = export(tmp_path / "old.onnx")
    model = onnx.load(path)
    empty, _ = branches(model)
    empty.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64)))
    onnx.save(model, path)
    assert with_suppressions_inlined(model) is model
    with pytest.raises(
        SuppressionError, match=r"inside of the subgraphs of its If node.*whose other branch gives no rows"
    ):
        convert(path, images=IMAGES)


def test_inlined_branch_gives_what_the_if_gives(tmp_path):
    model = onnx.load(export(tmp_path / "old.onnx"))
    flat = with_suppressions_inlined(model)
    onnx.checker.check_model(flat)
    assert "If" not in {node.op_type for node in flat.graph.node}
    sessions = [Session(one, source="file") for one in (model, flat)]
    for image in IMAGES:
        for old, new in zip(*(session.run({session.inputs[0]: image}) for session in sessions), strict=True):
            np.testing.assert_array_equal(old, new)


def test_two_stages_inside_of_branches_are_refused_with_the_way_out(tmp_path):
    path = export(tmp_path / "old.onnx")
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("RoiAlign", ["a", "b", "c"], ["d"], name="pool"))
    onnx.save(model, path)
    with pytest.raises(SuppressionError, match=r"RoiAlign node 'pool'.*two stages.*Run it as it is"):
        convert(path)


def test_settings_that_are_read_wrong_are_seen(tmp_path, monkeypatch):
    genuine, path = third_party.without_selections, export(tmp_path / "old.onnx")

    def read_as(**settings):
        def wrong(*given):
            dense = genuine(*given)
            return replace(dense, semantics=replace(dense.semantics, **settings))

        monkeypatch.setattr(third_party, "without_selections", wrong)

    read_as(iou_threshold=0.9)
    rows = convert(path, "raw", images=IMAGES).rows
    assert rows.same < rows.before and not rows.explained
    read_as(max_detections=ROWS // 2)
    with pytest.raises(SuppressionError, match="give other rows than the file"):
        convert(path, "raw", images=IMAGES)


def test_centers_and_sizes_are_not_taken_for_corners(tmp_path):
    path = export(tmp_path / "old.onnx")
    model = onnx.load(path)
    _, suppressing = branches(model)
    node = next(node for node in suppressing.node if node.op_type == "NonMaxSuppression")
    node.attribute.append(helper.make_attribute("center_point_box", 1))
    onnx.save(model, path)
    with pytest.raises(SuppressionError, match="cannot be cut out"):
        convert(path, images=IMAGES)


def test_main_command_and_inspect_point_to_convert(tmp_path):
    path = export(tmp_path / "old.onnx")
    with pytest.raises(AlreadyFusedError, match="Cut it out with: python -m fusenms convert"):
        fuse(path)
    assert "python -m fusenms convert" in inspect(path).reason


def test_one_image_becomes_a_batch_of_one():
    shapes = {3: [3, "height", "width"], 4: [1, 3, "height", "width"]}
    for rank, shape in shapes.items():
        entry = helper.make_tensor_value_info("image", 1, shape)
        node = helper.make_node("Relu", ["image"], ["out"])
        graph = helper.make_graph([node], "g", [entry], [helper.make_tensor_value_info("out", 1, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        made = with_batch(model)
        assert (made is model) == (rank == 4)
        dims = [dim.dim_value or dim.dim_param for dim in made.graph.input[0].type.tensor_type.shape.dim]
        assert dims == shapes[4]
