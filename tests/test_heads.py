"""Recognition by shapes, graph and values: right, or refused with reasons; never by names, never guessed."""

from __future__ import annotations

from functools import partial

import onnx
import pytest
import torch
from onnx import helper
from third_party_exports import SIZE, AnchorDecoded, Decoded, Further, FurtherRows, write

from fusenms import fuse, load, recognize
from fusenms import heads as heads_module
from fusenms.errors import (
    AlreadyFusedError,
    AmbiguousHeadError,
    ConfigError,
    HeadNotRecognizedError,
)
from fusenms.heads import HEADS, HeadSpec
from fusenms.layout import Activation, Distances

pytestmark = pytest.mark.slow

SHAPE_NAMES = {"names": "{0: 'circle', 1: 'square', 2: 'triangle'}", "task": "detect", "stride": "32"}
FURTHER_METADATA = {
    task: SHAPE_NAMES | {"task": task} | ({"kpt_shape": "[4, 3]"} if task == "pose" else {})
    for task in ("segment", "pose", "obb")
}


@pytest.mark.covering(default=2, quick=0)
@pytest.mark.parametrize("metadata", [None, SHAPE_NAMES])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_yolov8_is_recognized(tmp_path, transposed, shuffle, metadata):
    path = write(Decoded(transposed), tmp_path / "m.onnx", shuffle=shuffle, metadata=metadata)
    layout = recognize(load(path))
    assert (layout.family, layout.num_classes, layout.objectness) == ("yolov8", 3, None)


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 80])
def test_yolov5_is_recognized(tmp_path, classes, shuffle):
    raw = load(write(AnchorDecoded(classes), tmp_path / "m.onnx", shuffle=shuffle))
    if classes == 2:  # the second may be anything
        with pytest.raises(
            HeadNotRecognizedError, match="nothing shows that all 2 channels after the objectness are classes"
        ):
            recognize(raw)
    layout = recognize(raw, "yolov5")
    assert (layout.family, layout.num_classes) == ("yolov5", classes)
    assert layout.objectness.start == 4
    assert layout.decode.strides == (8, 16, 32)
    assert layout.decode.anchors[1] == ((16.0, 16.0), (24.0, 24.0), (32.0, 32.0))


class StretchedAnchors(AnchorDecoded):
    """Sizes that no anchor explains."""

    def forward(self, images):
        rows = super().forward(images)
        return torch.cat((rows[..., :2], rows[..., 2:4] ** 1.1, rows[..., 4:]), -1)


class LostAnchor(AnchorDecoded):
    """One level whose boxes have no width: an anchor of 0."""

    def forward(self, images):
        rows = super().forward(images)
        lost = torch.arange(rows.shape[1]) < 3 * (SIZE // 8) ** 2
        return torch.cat((rows[..., :2], rows[..., 2:3] * ~lost[None, :, None], rows[..., 3:]), -1)


@pytest.mark.covering(default=0, quick=0)
@pytest.mark.parametrize(
    ("module", "stage"),
    [
        *((Decoded, "late"), (partial(Decoded, True), "late"), (AnchorDecoded, "late")),
        *((StretchedAnchors, "full"), (LostAnchor, "full")),
    ],
)
@pytest.mark.parametrize("backend", ["ort", "trt"])
def test_foreign_file_equals_reference(tmp_path, module, stage, backend):
    fused = fuse(write(module(), tmp_path / "m.onnx"), backend=backend, score_threshold=0.01)
    assert fused.report
    assert fused.layout.decode_stage == stage
    assert fused.metadata["fusenms.decode"] == stage


def test_decode_is_cut_away_when_late(tmp_path):
    fused = fuse(write(Decoded(), tmp_path / "m.onnx", shuffle=True), unverified=True)
    assert (fused.layout.decode, fused.layout.activation) == (Distances((8, 16, 32), 16), Activation.SIGMOID)
    produced = {name for node in fused.model.graph.node for name in node.output}
    assert set(fused.layout.tensors) <= produced
    assert not {node.op_type for node in fused.model.graph.node} & {"Split", "ReduceProd"}


def test_decode_that_is_not_quite_the_known_one_stays(tmp_path):
    odd = Decoded()
    odd.strides = odd.strides * 1.01  # by value; the graph looks the same
    fused = fuse(write(odd, tmp_path / "m.onnx"))
    assert fused.layout.decode_stage == "full"
    assert fused.layout.activation is Activation.SIGMOID  # scores are late all the same
    assert fused.report


class Permuted(Decoded):
    """Two classes change places behind the sigmoid; the tensor before it is not the one to take."""

    def forward(self, images):
        joined = super().forward(images)
        return torch.cat((joined[:, :4], joined[:, 5:6], joined[:, 4:5], joined[:, 6:]), 1)


def test_classes_that_change_places_stay_where_the_file_has_them(tmp_path):
    fused = fuse(write(Permuted(), tmp_path / "m.onnx"), family="yolov8")
    assert (fused.layout.decode_stage, fused.layout.activation) == ("full", Activation.NONE)
    assert fused.layout.classes.tensor == fused.layout.boxes.tensor


@pytest.mark.thorough
def test_half_precision_inside_falls_back_to_the_decoded_output(tmp_path):
    model = onnx.load(write(Decoded(), tmp_path / "m.onnx"))
    graph, half = model.graph, onnx.TensorProto.FLOAT16
    scales = {name for node in model.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            weight.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype("float16"), weight.name)
            )
    for node in graph.node:
        for attribute in node.attribute if node.output[0] not in scales else ():
            if attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.FLOAT:
                attribute.t.CopyFrom(
                    onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype("float16"))
                )
        node.input[:] = ["half_images" if name == "images" else name for name in node.input]
        node.output[:] = ["half_out" if name == "out" else name for name in node.output]
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT:
            node.attribute[0].i = half
    graph.node.insert(0, helper.make_node("Cast", ["images"], ["half_images"], to=half))
    graph.node.append(helper.make_node("Cast", ["half_out"], ["out"], to=onnx.TensorProto.FLOAT))
    del graph.value_info[:]
    onnx.save(model, tmp_path / "half.onnx")
    fused = fuse(tmp_path / "half.onnx", family="yolov8")
    assert fused.report
    assert fused.layout.decode_stage == "full"


@pytest.mark.thorough
def test_foreign_file_finds_what_our_export_finds(tmp_path):
    import numpy as np

    from fusenms.graph.session import OnnxRuntimeRunner

    images = np.random.default_rng(0).random((3, 3, 64, 64), np.float32)
    foreign = fuse(write(Decoded(), tmp_path / "m.onnx"), score_threshold=0.001)
    from conftest import SHAPES

    ours = fuse(SHAPES / "shapes.pt", size=64, score_threshold=0.001)
    a, b = (OnnxRuntimeRunner(f.model).infer(images) for f in (foreign, ours))
    assert (a["num_detections"] == b["num_detections"]).all()
    assert a["num_detections"].sum() > 10
    np.testing.assert_allclose(a["boxes"], b["boxes"], atol=1e-2)


def test_objectness_is_not_taken_for_a_class(tmp_path):
    path = write(Decoded(objectness=True), tmp_path / "m.onnx")
    with pytest.raises(HeadNotRecognizedError, match="joined from 4, 1 and 3 channels, so channel 5 is objectness"):
        recognize(load(path))
    assert recognize(load(path), "yolov8").num_classes == 4  # the user has said so


def test_class_count_of_the_metadata_decides(tmp_path):
    metadata = {"names": "{0: 'a', 1: 'b'}"}
    with pytest.raises(HeadNotRecognizedError, match="found 3 channels after the box, but 2 class names"):
        recognize(load(write(Decoded(), tmp_path / "m.onnx", metadata=metadata)))


def test_other_task_is_refused(tmp_path):
    path = write(Decoded(), tmp_path / "m.onnx", metadata={"task": "segment"})
    with pytest.raises(HeadNotRecognizedError, match="its task is 'segment'"):
        recognize(load(path))


def test_every_family_gives_its_reason_when_none_fits(tmp_path):
    import torch

    class Classifier(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(HeadNotRecognizedError) as error:
        recognize(load(write(Classifier(), tmp_path / "m.onnx")))
    first, *reasons, last = str(error.value).splitlines()
    assert first == "m.onnx: no known detector head fits its outputs out [1, 3]:"
    assert sorted(reason.split(": expected ")[0].strip() for reason in reasons) == sorted(head.name for head in HEADS)
    assert last == "  none of them: describe it by a layout"


def test_families_with_such_outputs_come_first(tmp_path):
    import torch

    class NoScores(torch.nn.Module):
        """Two outputs as those of levels joined, whose scores are no probabilities of objects."""

        def forward(self, images):
            mean = images.mean((1, 2, 3), keepdim=True)[:, 0]
            return mean + torch.full((1, 84, 16), 3.0), mean * 0 + torch.full((1, 84, 1), 0.5)

    with pytest.raises(HeadNotRecognizedError) as error:
        recognize(load(write(NoScores(), tmp_path / "m.onnx")))
    reasons = str(error.value).splitlines()[1:-1]
    other = [": expected " in reason for reason in reasons]
    assert other == sorted(other)
    assert not all(other)


def test_error_says_how_to_choose_when_two_fit(tmp_path, monkeypatch):
    twin = HeadSpec("twin", heads_module.YOLOV8.match)
    monkeypatch.setattr(heads_module, "HEADS", (*HEADS, twin))
    raw = load(write(Decoded(), tmp_path / "m.onnx"))
    with pytest.raises(AmbiguousHeadError, match="fits yolov8 and twin; choose one with family="):
        recognize(raw)
    assert recognize(raw, "twin").num_classes == 3


def test_error_when_family_is_unknown_or_contradicts(shapes_raw):
    with pytest.raises(ConfigError, match="family is 'yolo99'"):
        recognize(shapes_raw, "yolo99")
    with pytest.raises(ConfigError, match="its layout is of family yolov8"):
        recognize(shapes_raw, "yolov5")


def test_file_with_nms_is_told_apart(tmp_path):
    path = write(Decoded(), tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("NonMaxSuppression", ["a", "b"], ["c"], name="nms"))
    onnx.save(model, path)
    with pytest.raises(AlreadyFusedError, match="NonMaxSuppression node 'nms'"):
        load(path)


def test_fused_file_is_told_apart(tmp_path, shapes_raw):
    path = fuse(shapes_raw).save(tmp_path / "f.onnx")
    with pytest.raises(AlreadyFusedError, match="is a fused model already"):
        load(path)


REAL = {
    "derived/yolov8n.onnx": ("yolov8", 80, "late"),
    "derived/yolov5n.onnx": ("yolov5", 80, "late"),
    "derived/yolo26n_e2e.onnx": ("rows", 80, "full"),
    "yolov8n_dynint8_640.onnx": ("yolov8", 80, "late"),
    "yolo11n_dynint8_320.onnx": ("yolov8", 80, "late"),
    "yolov8n-seg_dynint8_320.onnx": ("yolov8", 80, "late"),
    "yolo26n_dynint8_640_e2e.onnx": ("rows", 80, "full"),
    "yolox_nano_raw_416.onnx": ("yolox", 80, "late"),
    "deimv2_atto_320.onnx": ("rows", 80, "full"),
    "deimv2_femto_416.onnx": ("rows", 80, "full"),
    "nanodet_m_416.onnx": ("nanodet", 80, "late"),
    "fastestdet_352.onnx": ("fastestdet", 80, "late"),
}


@pytest.mark.parametrize("file", REAL)
def test_real_file_is_recognized(zoo, file):
    layout = recognize(load(zoo / file))
    assert (layout.family, layout.num_classes, layout.decode_stage) == REAL[file]


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_heads_of_other_tasks_are_taken_before_their_decode(tmp_path, task, turned, shuffle):
    path = write(Further(task, turned), tmp_path / "m.onnx", shuffle=shuffle, metadata=FURTHER_METADATA[task])
    fused = fuse(path, score_threshold=0.05, indices=True)
    layout = fused.layout
    assert fused.report, fused.report
    assert (layout.family, layout.task, layout.decode_stage, layout.num_classes) == ("yolov8", task, "late", 3)
    assert layout.boxes.tensor != layout.classes.tensor
    if task == "segment":
        assert layout.masks.coefficients.tensor != layout.boxes.tensor
    elif task == "pose":
        assert (layout.keypoints.factor, layout.keypoints.dims) == (2.0, 3)
    else:
        assert layout.angle.sigmoid


class Mirrored(Further):
    """The angle turns the boxes one way, and is given the other way round."""

    def joined(self, images):
        joined = super().joined(images)
        return torch.cat((joined[:, :-1], -joined[:, -1:]), 1)


@pytest.mark.thorough
def test_angle_that_is_not_the_boxes_own_stays_where_the_file_has_it(tmp_path):
    layout = recognize(load(write(Mirrored("obb"), tmp_path / "m.onnx", metadata=FURTHER_METADATA["obb"])))
    assert layout.decode_stage == "full"
    assert not layout.angle.sigmoid


def test_masks_need_no_metadata_where_names_show_the_classes(tmp_path):
    path = write(Further("segment"), tmp_path / "m.onnx", metadata={"names": SHAPE_NAMES["names"]})
    assert recognize(load(path)).task == "segment"


@pytest.mark.parametrize(
    "shape", [None, "[0, 3]", "[17]", "abc", "[1e999, 3]", "[4.9, 3.2]", "{4: 1, 3: 2}", "'43'", "[4, 4]"]
)
def test_error_when_a_pose_file_does_not_say_its_keypoints(tmp_path, shape):
    metadata = FURTHER_METADATA["pose"] | {"kpt_shape": shape}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(HeadNotRecognizedError, match="does not say how many keypoints it has; expected kpt_shape"):
        recognize(load(write(Further("pose"), tmp_path / "m.onnx", metadata=metadata)))


def test_error_when_keypoints_are_not_what_the_file_says(tmp_path):
    path = write(Further("pose"), tmp_path / "m.onnx", metadata=FURTHER_METADATA["pose"] | {"kpt_shape": "[2, 3]"})
    with pytest.raises(HeadNotRecognizedError, match="found 9 channels after the box, but 3 class names"):
        recognize(load(path))

    class Unlikely(Further):
        """The visibility is not the last of the three."""

        def joined(self, images):
            joined = super().joined(images)
            order = [*range(7), *(7 + 3 * point + i for point in range(4) for i in (2, 1, 0))]
            return joined[:, order]

    path = write(Unlikely("pose"), tmp_path / "m.onnx", metadata=FURTHER_METADATA["pose"])
    with pytest.raises(
        HeadNotRecognizedError, match=r"keypoints are \[4, 3\], but every third of their numbers goes from"
    ):
        recognize(load(path))


@pytest.mark.parametrize("task", ["pose", "obb"])
def test_error_when_a_file_does_not_say_its_task(tmp_path, task):
    metadata = {"names": SHAPE_NAMES["names"]}
    with pytest.raises(HeadNotRecognizedError, match=r"found \d+ channels after the box, but 3 class names"):
        recognize(load(write(Further(task), tmp_path / "m.onnx", metadata=metadata)))


def test_error_for_a_task_that_no_family_gives(tmp_path):
    path = write(Decoded(), tmp_path / "m.onnx", metadata=SHAPE_NAMES | {"task": "classify"})
    with pytest.raises(HeadNotRecognizedError, match="the file says that its task is 'classify'; expected 'detect'"):
        recognize(load(path))


@pytest.mark.covering(default=0)
@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_finished_rows_of_other_tasks(tmp_path, task):
    fused = fuse(write(FurtherRows(task), tmp_path / "m.onnx", metadata=FURTHER_METADATA[task]), score_threshold=0.05)
    assert fused.report, fused.report
    assert (fused.layout.family, fused.layout.task, fused.layout.suppress) == ("rows", task, False)


def test_yolov5_with_masks(tmp_path):
    fused = fuse(write(AnchorDecoded(2, masks=6), tmp_path / "m.onnx"), family="yolov5", score_threshold=0.2)
    assert fused.report, fused.report
    assert (fused.layout.family, fused.layout.task, fused.layout.num_classes) == ("yolov5", "segment", 2)


def test_real_quantized_file_equals_reference(zoo):
    assert fuse(zoo / "yolo11n_dynint8_320.onnx").report
