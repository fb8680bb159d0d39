"""Conformance: every backend x layout x settings x batch size equals the reference, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from raw_heads import LAYOUTS, SIZE, TASK_LAYOUTS, candidates_of, fused_model, shapes_of, tail_of

from fusenms.errors import ConfigError, UnsupportedByBackendError
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.graph.model import cut_before, with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.verification.checks import verify
from fusenms.verification.synthetic_heads import Stage, heads

SETTINGS = {
    "default": {},
    "agnostic": {"class_agnostic": True},
    "multi_label": {"multi_label": True},
    "halves": {"score_threshold": 0.5, "iou_threshold": 0.5},
    "everything": {"score_threshold": 0.0, "iou_threshold": 1.0},
    "nothing": {"score_threshold": 1.0, "iou_threshold": 0.0},
    "few_rows": {"max_detections": 3, "max_candidates": 20},
    "tiny_threshold": {"score_threshold": 0.001},
    "preset": {"names": "deepstream"},
}


MOST_TELLING = ("default", "multi_label", "everything", "few_rows")
"""For layouts that differ from others by their decode or their activation alone."""
SPECIAL = (
    *("sigmoid_queries", "background_first", "grid_offsets", "low_corners", "finished_rows", "corners_rows"),
    *(layout.__name__ for layout in TASK_LAYOUTS),
)


@pytest.mark.covering(default=1, quick=1)
@pytest.mark.parametrize(
    ("layout", "settings"),
    [(layout, settings) for layout in LAYOUTS for settings in (MOST_TELLING if layout in SPECIAL else SETTINGS)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, layout, settings):
    report = verify(fused_model(LAYOUTS[layout](), backend, **SETTINGS[settings]))
    assert report, report
    assert report.detections or settings == "nothing"


@pytest.mark.parametrize("case", ["empty", "unusable"])
@pytest.mark.parametrize("layout", ["distances", "decoded", "anchor_boxes", "end_to_end"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_topk_meets_what_cuda_takes_for_no_element(backend, layout, case):
    """ONNX Runtime's TopK on CUDA returns a place outside of the tensor for the lowest float32 and for -infinity."""
    fused = fused_model(LAYOUTS[layout](), backend)
    shapes = shapes_of(fused.layout)
    tail = get_backend(backend).to_standard(cut_before(fused.model, shapes), fused)
    sorted_by = [node.input[0] for node in tail.graph.node if node.op_type == "TopK"]
    assert sorted_by
    runner = OnnxRuntimeRunner(with_outputs(tail, sorted_by))
    stage = Stage(fused.layout, fused.config, fused.image, candidates_of(fused.layout))
    given = heads(stage, (case, case), shapes, seed=3) | {"images": np.zeros((2, 3, SIZE, SIZE), np.float32)}
    found = runner.run({name: given[name] for name in runner.inputs})
    for name in sorted_by:
        assert np.isfinite(found[name]).all()
        assert found[name].min() > np.finfo(np.float32).min


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.5, 0.7, 1.0])
def test_efficient_nms_has_a_threshold_beyond_what_its_division_errs(threshold):
    """CUDA's approximate division errs by two units in the last place at the most."""
    model = fused_model(LAYOUTS["decoded"](), "trt", iou_threshold=threshold).model
    node = next(node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
    given = next(attribute.f for attribute in node.attribute if attribute.name == "iou_threshold")
    units = (np.float32(given).view(np.int32) - np.float32(threshold).view(np.int32)) if threshold else 4
    assert 4 <= units <= 8
    assert given > threshold


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_numbers_equal_the_references(backend, layout):
    fused = fused_model(LAYOUTS[layout](), backend, indices=True, score_threshold=0.1)
    assert "indices" in {entry.name for entry in fused.model.graph.output}
    report = verify(fused)
    assert report, report


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("rows", [1, 32, 70, 300])
@pytest.mark.parametrize("layout", ["masks", "masks_end_to_end", "masks_decoded", "masks_anchor_boxes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_in_the_graph_equal_the_reference(backend, layout, rows):
    report = verify(fused_model(LAYOUTS[layout](), backend, masks="prototype", max_detections=rows))
    assert report, report


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixel_with_its_low_corner_on_the_edge_of_the_box(backend):
    """The low edge is inside, the high one is not: as in Ultralytics, exactly."""
    layout = LAYOUTS["masks_decoded"]()
    tensors = head(layout, 1)
    tensors["output0"][0, :5, 0] = [16, 24, 16, 32, 0.9]  # x from 8 to 24, y from 8 to 40; a pixel is 4 x 4
    tensors["output0"][0, 9:, 0], tensors["output1"][:] = 1, 1
    masks = tail_of(fused_model(layout, backend, masks="prototype", max_detections=40)).run(tensors)["masks"]
    expected = np.zeros((1, 40, SIZE // 4, SIZE // 4), bool)
    expected[0, 0, 2:10, 2:6] = True
    np.testing.assert_array_equal(masks, expected)


def test_masks_need_no_control_flow_with_rounds():
    fused = fused_model(LAYOUTS["masks"](), "portable", masks="prototype", rounds=6)
    assert not {"Loop", "If"} & {node.op_type for node in fused.model.graph.node}
    assert verify(fused)


@pytest.mark.parametrize("layout", ["distances", "keypoints", "oriented"])
def test_error_when_masks_are_asked_of_a_head_without(layout):
    with pytest.raises(ConfigError, match=r"masks is 'prototype', but a model of task '(detect|pose|obb)' has none"):
        fused_model(LAYOUTS[layout](), masks="prototype")


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("layout", ["masks", "keypoints", "oriented"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_further_outputs_equal_reference_at_every_opset(backend, layout, opset):
    settings = {"masks": "prototype"} if layout == "masks" else {}
    assert verify(fused_model(LAYOUTS[layout](), backend, opset=opset, indices=True, **settings))


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("classes", [1, 2, 80])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference_for_any_number_of_classes(backend, classes):
    assert verify(fused_model(LAYOUTS["distances"](classes), backend))


@pytest.mark.slow
@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference_at_every_opset(backend, opset):
    assert verify(fused_model(LAYOUTS["anchor_boxes"](), backend, opset=opset))


def head(layout, batch):
    return {name: np.full((batch, *shape), -20, np.float32) for name, shape in shapes_of(layout).items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_blank_when_nothing_is_found(backend):
    layout = LAYOUTS["distances"]()
    outputs = tail_of(fused_model(layout, backend)).run(head(layout, 2))
    assert outputs["num_detections"].tolist() == [[0], [0]]
    assert not outputs["boxes"].any()
    assert not outputs["scores"].any()
    assert (outputs["labels"] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_shapes_are_the_contract(backend):
    layout = LAYOUTS["decoded"]()
    outputs = tail_of(fused_model(layout, backend, max_detections=11)).run(head(layout, 3))
    assert {name: (str(value.dtype), value.shape) for name, value in outputs.items()} == {
        "num_detections": ("int32", (3, 1)),
        "boxes": ("float32", (3, 11, 4)),
        "scores": ("float32", (3, 11)),
        "labels": ("int32", (3, 11)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_k_keeps_the_best(backend):
    layout = LAYOUTS["distances"](1)
    tensors = head(layout, 1)
    logits = np.linspace(-1, 3, candidates_of(layout), dtype=np.float32)
    tensors["logits"][0, 0] = logits
    tensors["dist"][0].reshape(4, 16, -1)[:, 0] = 100.0  # boxes of size 0 overlap nothing
    outputs = tail_of(fused_model(layout, backend, max_detections=5)).run(tensors)
    np.testing.assert_allclose(outputs["scores"][0], 1 / (1 + np.exp(-logits[::-1][:5])), rtol=1e-6)


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_image_is_as_if_alone(backend, layout):
    fused = fused_model(LAYOUTS[layout](), backend, score_threshold=0.01)
    rng = np.random.default_rng(3)
    tail = tail_of(fused)
    spread = 0.3 if layout.startswith(("decoded", "corners")) else 3.0
    tensors = {
        name: rng.normal(0, spread, (16, *shape)).astype(np.float32) for name, shape in
        zip(fused.layout.tensors, shapes_of(fused.layout).values(), strict=True)
    }  # fmt: skip
    alone = [tail.run({name: value[i : i + 1] for name, value in tensors.items()}) for i in range(16)]
    for batch in (1, 2, 7, 16):
        together = tail.run({name: value[:batch] for name, value in tensors.items()})
        for i in range(batch):
            for name, value in together.items():
                place = f"{name} of image {i} in {batch}"
                if (
                    layout.startswith("oriented") and name == "boxes"
                ):  # ONNX Runtime's sine is another one at the end of a tensor
                    np.testing.assert_allclose(value[i], alone[i][name][0], rtol=5e-7, atol=1e-5, err_msg=place)
                else:
                    np.testing.assert_array_equal(value[i], alone[i][name][0], err_msg=place)
    assert sum(int(a["num_detections"][0, 0]) for a in alone) > 16


@pytest.mark.parametrize("backend", ["ort", "trt"])
def test_one_suppression_node_and_no_loop(backend):
    nodes = [node.op_type for node in fused_model(LAYOUTS["distances"](), backend).model.graph.node]
    assert nodes.count(get_backend(backend).suppresses_by) == 1
    assert not {"Loop", "Scan", "If"} & set(nodes)


@pytest.mark.slow
def test_error_when_trt_has_too_many_candidates():
    layout = LAYOUTS["distances"](80)
    with pytest.raises(UnsupportedByBackendError, match="lower max_candidates to 3840"):
        fused_model(layout, "trt", multi_label=True, max_candidates=5000)
    assert verify(fused_model(layout, "ort", multi_label=True, max_candidates=5000))


def test_plugin_body_is_not_in_the_file():
    fused = fused_model(LAYOUTS["distances"](), "trt")
    assert not fused.model.functions
    assert [entry.domain for entry in fused.model.opset_import] == ["", "TRT"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_end_to_end_head_gives_all_that_passes(backend):
    """Two equal boxes of one class, and one box with two classes: four rows, by score."""
    layout = LAYOUTS["end_to_end"]()
    tensors = head(layout, 1) | {"dist": np.full((1, 4, candidates_of(layout)), 2, np.float32)}
    for place, label, logit in ((0, 1, 2.0), (1, 1, 3.0), (40, 2, 1.0), (40, 4, 4.0)):
        tensors["logits"][0, label, place] = logit
    fused = fused_model(layout, backend)
    assert not {"NonMaxSuppression", "EfficientNMS_TRT", "Loop"} & {node.op_type for node in fused.model.graph.node}
    outputs = tail_of(fused).run(tensors)
    assert outputs["num_detections"].tolist() == [[4]]
    assert outputs["labels"][0, :4].tolist() == [4, 1, 1, 2]
    np.testing.assert_allclose(outputs["boxes"][0, 1:3], [[-4, -12, 28, 20], [-12, -12, 20, 20]])


def test_error_when_an_end_to_end_head_is_given_rounds():
    with pytest.raises(ConfigError, match="rounds is 4, but this head needs no suppression"):
        fused_model(LAYOUTS["end_to_end"](), "portable", rounds=4)


@pytest.mark.parametrize(
    ("layout", "settings", "idle"),
    [
        ("end_to_end", {}, None),
        ("end_to_end", {"class_agnostic": True}, "class_agnostic means"),
        ("finished_rows", {"iou_threshold": 0.6, "multi_label": True}, "iou_threshold and multi_label mean"),
        ("decoded", {"iou_threshold": 0.6, "multi_label": True}, None),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_to_a_head_are_named(layout, settings, idle):
    notes = [note for note in fused_model(LAYOUTS[layout](), **settings).notes if note.startswith("no suppression")]
    assert notes == ([] if idle is None else [f"no suppression: {idle} nothing to this head"])


def test_error_when_backend_has_no_rounds():
    with pytest.raises(ConfigError, match="rounds is 4, but backend ort has none"):
        fused_model(LAYOUTS["decoded"](), "ort", rounds=4)


def test_error_when_backend_is_unknown():
    with pytest.raises(ConfigError, match="backend is 'tensorflow'; expected one of ort, trt, portable"):
        get_backend("tensorflow")
