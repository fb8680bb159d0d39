"""A layout is checked against what the network gives: its scores, its boxes, how they move with the image, what it leaves over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import third_party
import torch
from conftest import SHAPES
from onnx import TensorProto, helper, numpy_helper
from raw_heads import LAYOUTS, raw_model
from third_party import CLASSES, SIZE, Detr, LevelsApart, YoloNas, Yolov8, write
from torch import Tensor, nn

from fusenms import Detector, fuse, inspect, load, recognize
from fusenms.cli import main
from fusenms.errors import (
    AmbiguousHeadError,
    ConfigError,
    HeadError,
    HeadNotRecognizedError,
    LayoutContradictedError,
    SourceError,
)
from fusenms.heads import raw_head
from fusenms.heads.coarse_scores import coarse_scores
from fusenms.heads.meaning import check_meaning
from fusenms.heads.motion import measure_motion, other_readings, slide
from fusenms.layout import Activation, AnchorBoxes, BoxFormat, Decoded, Distances, GridOffsets, Layout, Tap
from fusenms.runtime.example_images import example_images


def meaning(raw, layout):
    return check_meaning(raw, raw_head(raw, layout))


def motion(raw, layout):
    return measure_motion(slide(raw, raw_head(raw, layout)))


@pytest.fixture(scope="module")
def trained():
    """The embedded detector at a size with inner cells on each level."""
    return load(SHAPES / "shapes.pt", size=256)


# Images that move.


def test_trained_network_is_shown(trained):
    geometry, pixels = meaning(trained, trained.layout)
    assert geometry.startswith("geometry shown: boxes move with the image (stride 8, 16: within 0.")
    assert pixels == "pixels assumed for yolov8: RGB from 0 to 1"


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 96, (480, 64)])
def test_small_images_are_no_contradiction(size):
    raw = load(SHAPES / "shapes.pt", size=size)
    assert meaning(raw, raw.layout)[0] == "geometry assumed: its cells see the edges of its images"


def test_wrong_order_of_the_levels_is_contradicted_and_the_right_one_is_named(trained):
    wrong = replace(trained.layout, decode=replace(trained.layout.decode, strides=(32, 16, 8)))
    with pytest.raises(
        LayoutContradictedError, match="They do if read as strides 8, 16, 32; give a layout that says so"
    ):
        meaning(trained, wrong)


@pytest.mark.parametrize("module", [Yolov8, YoloNas], ids=lambda module: module.__name__)
def test_every_other_box_format_is_contradicted(tmp_path, module):
    raw = load(write(module(), tmp_path / "m.onnx"))
    right = recognize(raw)
    if not isinstance(right.decode, Decoded):
        right = decoded_output(raw, right)
    found = motion(raw, right)
    assert found.shown
    assert all(level.center < 0.01 for level in found.levels), found.levels
    for _, wrong in other_readings(right):
        with pytest.raises(LayoutContradictedError):
            meaning(raw, wrong)
        seen = motion(raw, wrong)
        assert seen.contradicted
        name = f"{right.decode.format.value} {'normalized' if right.decode.normalized else 'in pixels'}"
        assert seen.fitting == (name,)


def decoded_output(raw, layout):
    """The same head at the output of the file."""
    name = raw.model.graph.output[0].name
    taps = Tap(name, 1, 0, 4), Tap(name, 1, 4, 4 + layout.num_classes)
    return replace(
        layout, boxes=taps[0], classes=taps[1], joins=(), activation=Activation.NONE, decode=Decoded(BoxFormat.CXCYWH)
    )


def test_boxes_without_cells_are_said_to_be_assumed(tmp_path):
    raw = load(write(Detr(), tmp_path / "m.onnx"))
    geometry, pixels = meaning(raw, recognize(raw))
    assert geometry.startswith("geometry assumed: ")
    assert pixels.startswith("pixels assumed for detr: RGB from 0 to 1, less (0.485")


def test_head_that_does_not_see_the_image_is_said_to_be_assumed():
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axes"], ["mean3"]),
        helper.make_node("Mul", ["mean3", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "rows"], ["output"]),
    ]
    ticks = 8.0 * np.arange(8)
    x, y = np.meshgrid(ticks + 4, ticks + 4)
    rows = np.stack((x.ravel(), y.ravel(), x.ravel() * 0 + 6, x.ravel() * 0 + 6, x.ravel() / 100), 1)[None]
    weights = [
        numpy_helper.from_array(np.array([1, 2]), "axes"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        numpy_helper.from_array(rows.astype(np.float32), "rows"),
    ]
    graph = helper.make_graph(
        nodes,
        "raw",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 64, 5])],
        weights,
    )
    from fusenms.artifacts.raw import ImageInput, RawModel

    raw = RawModel(
        model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        image=ImageInput("images", SIZE, SIZE, 8),
        class_names=("thing",),
        task="detect",
        source="constant.onnx",
    )
    layout = Layout(
        "own", Tap("output", 2, 0, 4), Tap("output", 2, 4, 5), None, Activation.NONE, Decoded(BoxFormat.CXCYWH)
    )
    assert meaning(raw, layout)[0] == "geometry assumed: the head does not depend on the image"


# Values that contradict a layout.


class Cells(nn.Module):
    """One convolution: cx, cy, w, h between 0 and 1 and three logits for each of 100 cells, changed by ``change``."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.change = nn.Conv2d(3, 7, 16, 16), change
        nn.init.normal_(self.head.weight, std=0.05)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        rows = self.head(images).flatten(2).transpose(1, 2)
        boxes, logits = self.change(rows[..., :4].sigmoid(), rows[..., 4:] - 1)
        return {"boxes": boxes, "logits": logits}


NORMALIZED = Layout(
    "own", Tap("boxes", 2, 0, 4), Tap("logits", 2, 0, 3), None, Activation.SIGMOID, Decoded(BoxFormat.CXCYWH, normalized=True)
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        (lambda b, s: (b / (b > 2), s), NORMALIZED, "100% of its boxes are NaN or infinite on a test image"),
        (lambda b, s: (b * 160, s), NORMALIZED, "sides of the image, so that they are in pixels, not normalized"),
        (
            lambda b, s: (b, s),
            replace(NORMALIZED, decode=Decoded(BoxFormat.CXCYWH)),
            "so that they are normalized, not in pixels",
        ),
        (lambda b, s: (b, (s - 6).sigmoid()), NORMALIZED, r"probabilities already \(Activation.NONE"),
        (
            lambda b, s: (b, s),
            replace(NORMALIZED, activation=Activation.NONE),
            r"expected probabilities from 0 to 1 for Activation.NONE",
        ),
        (
            lambda b, s: (b, s.softmax(-1)),
            replace(
                NORMALIZED,
                classes=Tap("logits", 2, 0, 2),
                activation=Activation.SOFTMAX,
                background=Tap("logits", 2, 2, 3),
            ),
            r"the result of a softmax already \(Activation.NONE",
        ),
    ],
)
def test_values_that_contradict_a_layout_are_named(change, layout, message):
    with pytest.raises((LayoutContradictedError, ConfigError), match=message):
        fuse(Cells(change), example=torch.zeros(1, 3, 160, 160), layout=layout)


def test_right_layout_written_by_hand_is_taken():
    fused = fuse(Cells(lambda b, s: (b, s)), example=torch.zeros(1, 3, 160, 160), layout=NORMALIZED)
    assert fused.report
    assert any(note.startswith("geometry assumed: its boxes do not lie in cells") for note in fused.notes)


def test_untrained_network_whose_boxes_have_no_area_is_taken():
    module = nn.Sequential(nn.Conv2d(3, 7, 16, 16), nn.Flatten(2)).eval()
    layout = Layout("own", Tap("h", 1, 0, 4), Tap("h", 1, 4, 7), None, Activation.SIGMOID, Decoded(BoxFormat.CXCYWH))
    assert fuse(module, example=torch.zeros(1, 3, 160, 160), layout=layout).report


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ((1.0, 1.0, 1.0), None),
        ((8.0, 16.0, 32.0), "grow with the stride"),
        ((-1.0, -1.0, -1.0), "most of its distances are below 0"),
    ],
)
def test_distances_are_in_strides(tmp_path, factor, message):
    class Plain(LevelsApart):
        channels = 4 + CLASSES
        first_class = 4

        def forward(self, images):
            maps = self.maps(images)
            return tuple(p for f, m in zip(factor, maps, strict=True) for p in ((m[:, :4].abs() + 1) * f, m[:, 4:]))

    raw = load(write_new(Plain(), tmp_path / "m.onnx"))
    layout = replace(recognize(raw, family="levels"), decode=Distances((8, 16, 32), 1))
    if message is None:
        assert meaning(raw, layout)[0].startswith("geometry shown")
    else:
        with pytest.raises(LayoutContradictedError, match=message):
            meaning(raw, layout)


def write_new(module, path, **more):
    """Export a network of a class that lives in a test only."""
    third_party.exported.cache_clear()
    return write(module, path, **more)


# Everything is accounted for.


class Centerness(LevelsApart):
    """One more branch a level."""

    def forward(self, images):
        maps = self.maps(images)
        pools = [nn.functional.avg_pool2d(images, stride).mean(1, keepdim=True) for stride in self.strides]
        return tuple(p for m, pool in zip(maps, pools, strict=True) for p in (m[:, :64], m[:, 64:], pool))


class HiddenCenterness(LevelsApart):
    """One more branch, joined with the others and taken away from them again."""

    def forward(self, images):
        pools = [nn.functional.avg_pool2d(images, stride).mean(1, keepdim=True) for stride in self.strides]
        every = (torch.cat((m, pool), 1) for m, pool in zip(self.maps(images), pools, strict=True))
        return tuple(part for one in every for part in one.split((64, CLASSES, 1), 1))


class ScoreSums(LevelsApart):
    """A sum of the scores a level, as exports for NPUs have it."""

    def forward(self, images):
        parts = [(m[:, :64], m[:, 64:].sigmoid()) for m in self.maps(images)]
        return tuple(p for dist, scores in parts for p in (dist, scores, scores.sum(1, keepdim=True)))


@pytest.mark.parametrize("module", [Centerness, HiddenCenterness])
def test_output_that_is_left_over_is_refused_or_ignored(tmp_path, module):
    path = write_new(module(), tmp_path / "m.onnx")
    with pytest.raises(
        HeadNotRecognizedError, match=r"levels: output 'output2' would not be used.*\(ignore='output2'\)"
    ):
        recognize(load(path))
    layout = recognize(load(path, ignore=["output2", "output5", "output8"]))
    assert (layout.family, layout.num_classes) == ("levels", CLASSES)


def test_output_that_is_computed_from_what_is_used_is_no_matter(tmp_path):
    layout = recognize(load(write_new(ScoreSums(), tmp_path / "m.onnx")))
    assert (layout.family, layout.num_classes) == ("levels", CLASSES)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["nothing"], "ignore names nothing; expected some of its outputs: output0"),
        (["output0", "output1"], "every output"),
        ("output0", "expected a list"),
    ],
)
def test_error_when_ignore_is_wrong(tmp_path, ignore, message):
    path = write(YoloNas(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=message):
        load(path, ignore=ignore)


def test_error_when_ignore_is_for_a_checkpoint():
    with pytest.raises(ConfigError, match=r"ignore is for outputs of an \.onnx"):
        load(SHAPES / "shapes.pt", ignore=["output0"])


# Heads that look alike.


class Corners(Yolov8):
    """Corners instead of centers."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return torch.cat((boxes, scores), -1).transpose(1, 2)


class NormalizedQuality(YoloNas):
    """Normalized corners, a quality and classes."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return torch.cat((boxes / SIZE, scores.mean(-1, keepdim=True), scores), -1)


class Yolov6(YoloNas):
    """An objectness of 1."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        centers = torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)
        return torch.cat((centers, torch.ones_like(scores[..., :1]), scores), -1)


@pytest.mark.parametrize(
    ("module", "family", "decode"),
    [
        (Corners, "yolov8", Distances((8, 16, 32), 16)),  # before their decode
        (NormalizedQuality, "yolox", Decoded(BoxFormat.XYXY, normalized=True)),
        (Yolov6, "yolov6", Decoded(BoxFormat.CXCYWH)),
    ],
)
def test_boxes_are_read_by_their_values(tmp_path, module, family, decode):
    raw = load(write_new(module(), tmp_path / "m.onnx"))
    layout = recognize(raw)
    assert (layout.family, layout.decode, layout.num_classes) == (family, decode, CLASSES)
    assert meaning(raw, layout)[0].startswith("geometry shown")


def test_pixels_of_yolov6_and_of_rf_detr_are_their_own(tmp_path):
    raw = load(write_new(Yolov6(), tmp_path / "m.onnx"))
    assert meaning(raw, recognize(raw))[1] == "pixels assumed for yolov6: RGB from 0 to 1"
    path = write(third_party.RtDetr(), tmp_path / "r.onnx")
    assert recognize(load(path)).family == "rtdetr"
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = [{"output0": "dets", "output1": "labels"}.get(name, name) for name in node.output]
        node.input[:] = [{"output0": "dets", "output1": "labels"}.get(name, name) for name in node.input]
    for entry, name in zip(model.graph.output, ("dets", "labels"), strict=True):
        entry.name = name
    onnx.save(model, path)
    raw = load(path)
    assert meaning(raw, recognize(raw))[1].startswith("pixels assumed for rfdetr: RGB from 0 to 1, less (0.485")


class FinishedCenters(third_party.RtDetr):
    """Rows of centers, score and class, best first, as newer exports of Ultralytics have them."""

    def forward(self, images):
        logits, boxes = super().forward(images)
        scores, number = logits.sigmoid().flatten(1).topk(20)
        query = (number // CLASSES).unsqueeze(-1).expand(-1, -1, 4)
        return torch.cat((boxes.gather(1, query), scores[..., None], (number % CLASSES)[..., None].float()), -1)


class FinishedCorners(FinishedCenters):
    """Rows of low corner and size, which may be taken for centers."""

    def forward(self, images):
        rows = super().forward(images)
        return torch.cat((rows[..., :4] / 2, rows[..., 4:]), -1)


def test_finished_rows_of_centers_are_taken_before_their_top_k(tmp_path):
    layout = recognize(load(write_new(FinishedCenters(), tmp_path / "m.onnx")))
    assert (layout.family, layout.decode, layout.labels) == ("rtdetr", Decoded(BoxFormat.CXCYWH, normalized=True), None)
    assert (layout.activation, layout.num_classes) == (Activation.SIGMOID, CLASSES)


def test_finished_rows_that_may_be_low_corners_are_refused(tmp_path):
    raw = load(write_new(FinishedCorners(), tmp_path / "m.onnx"))
    with pytest.raises(HeadNotRecognizedError, match="rtdetr: nothing shows that the boxes are centers and sizes"):
        recognize(raw)


def test_export_of_ultralytics_gives_what_its_checkpoint_gives(zoo, tmp_path):
    path = zoo.parent / "cases" / "files" / "rtdetr-p_ultralytics_8.4.190.onnx"
    if not path.exists():
        pytest.skip("needs ../shared/cases/files")
    saved = [
        fuse(weights, unverified=True).save(tmp_path / f"{i}.onnx", unverified=True)
        for i, weights in enumerate((path, zoo / "shapes" / "rtdetr-p.pt"))
    ]
    images = sorted((zoo / "shapes" / "images").iterdir())[:10]
    total = 0
    for image in images:
        of_export, of_checkpoint = (Detector(file)(image)[0] for file in saved)
        assert np.array_equal(of_export.labels, of_checkpoint.labels), image
        assert np.abs(of_export.boxes - of_checkpoint.boxes).max(initial=0) < 0.01
        total += len(of_export)
    assert total > 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--scale 255 --mean 127 127 127 --std 128 128 128",
            "RGB from 0 to 255, less (127, 127, 127), over (128, 128, 128)",
        ),
        ("--pixels bgr255-imagenet --channels rgb", "RGB from 0 to 255, less (103.53, 116.28, 123.675)"),
        ("--pixels bgr255", "BGR from 0 to 255"),
    ],
)
def test_any_pixels_can_be_named(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    write(YoloNas(), tmp_path / "m.onnx")
    assert main(["m.onnx", "-o", "f.onnx", *flags.split()]) == 0
    assert f"pixels as stated: {said}" in capsys.readouterr().out


def test_error_when_pixels_are_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(YoloNas(), tmp_path / "m.onnx")
    assert main(["m.onnx", "--std", "1", "0", "1"]) == 1
    assert "std is (1.0, 0.0, 1.0); expected three numbers each, std not 0" in capsys.readouterr().err


class Bins17(LevelsApart):
    """Seventeen bins: PP-YOLOE's from the center of the cell, GFL's from its low corner."""

    bins = 17
    first_class = 68
    channels = 68 + CLASSES

    def forward(self, images):
        return tuple(part for m in self.maps(images) for part in (m[:, :68], m[:, 68:]))


def test_seventeen_bins_are_asked_for(tmp_path):
    raw = load(write_new(Bins17(), tmp_path / "m.onnx"))
    with pytest.raises(AmbiguousHeadError, match="fits levels and gfl"):
        recognize(raw)
    assert recognize(raw, "levels").decode == Distances((8, 16, 32), 17)
    assert recognize(raw, "gfl").decode == Distances((8, 16, 32), 17, point=0.0)


class OneConvolution(LevelsApart):
    """One convolution a level, whose channels may be those of three anchors."""

    channels = 255

    def forward(self, images):
        down = 5.0 * (torch.arange(255) >= 64)[:, None, None]
        return tuple(m - down for m in self.maps(images))


class Faces(LevelsApart):
    """Distances, one class, and five keypoints, as YOLOv8-face before its decode."""

    channels = 64 + 1 + 15

    def forward(self, images):
        return tuple(self.maps(images))


@pytest.mark.slow
def test_levels_with_keypoints_need_metadata(tmp_path):
    said = {"task": "pose", "names": "{0: 'face'}", "kpt_shape": "[5, 3]"}
    fused = fuse(write_new(Faces(), tmp_path / "m.onnx", metadata=said), score_threshold=0.01)
    assert fused.report, fused.report
    assert (fused.layout.family, fused.layout.task, fused.layout.num_classes) == ("levels", "pose", 1)
    assert (fused.layout.keypoints.count, fused.layout.keypoints.factor) == (5, 2.0)
    with pytest.raises(
        HeadNotRecognizedError, match="levels: found 80 channels per level; expected 64 of distances, then 1 of classes"
    ):
        recognize(load(write_new(Faces(), tmp_path / "m.onnx", metadata={"names": "{0: 'face'}"})))


class NineAnchors(LevelsApart):
    """Four terms and the classes of nine anchors, as RetinaNet's."""

    first_class = 36
    channels = 36 + 9 * CLASSES

    def forward(self, images):
        return tuple(p for m in self.maps(images) for p in (m[:, :36], m[:, 36:] - 5))


class ClassesFirst(LevelsApart):
    """Classes, then distances."""

    channels = 104

    def forward(self, images):
        return tuple(torch.cat((m[:, 4:] - 5, (m[:, :4] + 1).relu()), 1) for m in self.maps(images))


class ClassesFirstMoved(ClassesFirst):
    """The same, but nothing shows where the classes end."""

    def forward(self, images):
        return tuple(m + 0.0 for m in super().forward(images))


def test_classes_before_distances_are_shown_by_what_they_are_joined_from(tmp_path):
    layout = recognize(load(write_new(ClassesFirst(), tmp_path / "m.onnx")))
    assert (layout.boxes.start, layout.classes.stop, layout.decode) == (100, 100, Distances((8, 16, 32), 1))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            OneConvolution,
            "levels: nothing shows that 255 channels per level are distances and classes, in which order",
        ),
        (NineAnchors, "found 36 channels of boxes and 27 of classes, which may be those of several anchors"),
        (ClassesFirstMoved, r"levels: nothing shows that 104 .* joined from unknown channels"),
    ],
)
def test_channels_without_evidence_are_refused(tmp_path, module, message):
    with pytest.raises(HeadNotRecognizedError, match=message):
        recognize(load(write_new(module(), tmp_path / "m.onnx")))


def test_inspect_says_what_is_shown(tmp_path):
    found = inspect(write(YoloNas(), tmp_path / "m.onnx"))
    assert found.layout is not None
    assert [line.split(":")[0] for line in found.meaning] == [
        *("geometry shown", "pixels assumed for corners", "not shown on images"),
    ]


# The files of other people: no false alarm, and every wrong reading seen.


def readings(layout):
    """Wrong readings of a head, by name."""
    decode = layout.decode
    yield from other_readings(layout)
    if isinstance(decode, Distances | AnchorBoxes | GridOffsets):
        yield "strides doubled", replace(layout, decode=replace(decode, strides=tuple(2 * s for s in decode.strides)))
    if layout.activation is Activation.SIGMOID:
        yield "logits said probabilities", replace(layout, activation=Activation.NONE)
    elif layout.activation is Activation.NONE and layout.labels is None:
        yield "probabilities said logits", replace(layout, activation=Activation.SIGMOID)


FILES = (
    "derived/yolov8n.onnx",
    "derived/yolov5n.onnx",
    "derived/yolo26n_e2e.onnx",
    "yolox_nano_raw_416.onnx",
    "nanodet_m_416.onnx",
    "shapes/yolo12-p.pt",
    "shapes/yolov3-tinyu-p.pt",
    "shapes/yolo26-p-obb.pt",
    "shapes/yolov8-p-pose.pt",
    "shapes/yolov9-p.pt",
)


@pytest.mark.parametrize("name", FILES)
def test_real_file_is_shown_and_its_wrong_readings_are_not(zoo, name):
    raw = load(zoo / name, make_dynamic=name.endswith(".onnx"))
    right = recognize(raw)
    assert meaning(raw, right)[0].startswith("geometry shown")
    for said, wrong in readings(right):
        with pytest.raises(LayoutContradictedError):
            pytest.fail(f"{said}: {meaning(raw, wrong)}")


# Layouts in files.


@pytest.mark.slow
def test_layout_of_a_file_is_printed_changed_and_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(YoloNas(), tmp_path / "m.onnx")
    assert main(["inspect", "m.onnx", "--layout"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "l.json").write_text(text)
    assert main(["m.onnx", "--layout", "l.json", "-o", "own.onnx"]) == 0
    assert main(["m.onnx", "-o", "recognized.onnx"]) == 0
    assert (tmp_path / "own.onnx").read_bytes() == (tmp_path / "recognized.onnx").read_bytes()
    capsys.readouterr()
    (tmp_path / "l.json").write_text(text.replace('"xyxy"', '"cxcywh"'))
    assert main(["m.onnx", "--layout", "l.json", "-o", "wrong.onnx"]) == 1
    assert "They do if read as xyxy in pixels" in capsys.readouterr().err
    assert not (tmp_path / "wrong.onnx").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "l.json: is not a layout ([Errno 2]"),
        ("", "l.json: is not a layout (Expecting value"),
        ("[]", "l.json: is not a layout (is a list, not an object); expected what `inspect FILE --layout` prints"),
        ("{}", "l.json: is not a layout (the layout stored in the file is unreadable"),
        ("[" * 5000, "l.json: is not a layout (JSON is nested more than"),
    ],
)
def test_error_when_the_file_is_not_a_layout(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    write(YoloNas(), tmp_path / "m.onnx")
    if text is not None:
        (tmp_path / "l.json").write_text(text)
    assert main(["m.onnx", "--layout", "l.json"]) == 1
    assert message in capsys.readouterr().err


def test_error_when_a_layout_names_what_the_model_does_not_have(tmp_path):
    path = write(YoloNas(), tmp_path / "m.onnx")
    layout = recognize(load(path))
    with pytest.raises(
        SourceError, match="the layout names nothing, which is not in the model; its outputs are output0, output1"
    ):
        fuse(path, layout=layout.renamed({"output0": "nothing"}))


def test_error_when_family_and_layout_are_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["m.onnx", "--layout", "l.json", "--family", "yolov8"]) == 1
    assert "found --family and --layout" in capsys.readouterr().err


def test_error_when_inspect_has_no_layout_to_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_new(Bins17(), tmp_path / "m.onnx")
    assert main(["inspect", "m.onnx", "--layout"]) == 1
    assert "fits levels and gfl" in capsys.readouterr().err


def rounded(path, scale: float, over=("output0",)):
    """YOLOv8 with its decode, and outputs rounded as a quantizer does that has one scale for boxes and scores."""
    model = onnx.load(write(Yolov8(), path))
    (output,) = model.graph.output
    inner = f"{output.name}_before"
    for node in model.graph.node:
        node.output[:] = [inner if name == output.name else name for name in node.output]
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array(scale, np.float32), "s"), numpy_helper.from_array(np.array(0, np.uint8), "z")]
    )
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", [inner, "s", "z"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], [output.name], name="dq"),
        ]
    )
    onnx.save(model, path)
    return path


def test_error_when_boxes_and_scores_share_a_scale(tmp_path):
    path = rounded(tmp_path / "m.onnx", 2.5)
    layout = LAYOUTS["decoded"](CLASSES)
    message = r"scores are quantized in steps of 2\.5, which they share with boxes.*nothing can be detected any more"
    with pytest.raises(HeadError, match=message):
        fuse(path, layout=layout)
    with pytest.raises(HeadError, match=message):
        fuse(path, layout=layout, unverified=True)


def test_fine_steps_are_taken(tmp_path):
    assert coarse_scores(onnx.load(rounded(tmp_path / "m.onnx", 1 / 255)), LAYOUTS["decoded"](CLASSES)) is None


@pytest.mark.slow
def test_inspect_says_that_nothing_can_be_detected(tmp_path, capsys):
    path = rounded(tmp_path / "m.onnx", 2.5)
    assert main(["inspect", str(path)]) == 0
    assert "nothing can be detected any more" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("name", "assumed"),
    [
        ("masks", {"masks"}),
        ("keypoints", {"keypoints"}),
        ("masks_and_keypoints", {"masks", "keypoints"}),
        ("oriented", {"angle"}),
        ("distances", set()),
    ],
)
def test_what_no_object_shows_is_said_to_be_assumed(name, assumed, count):
    raw = raw_model(LAYOUTS[name](5))
    lines = check_meaning(raw, raw_head(raw, raw.layout), [example_images(raw.image.height, raw.image.width)] * count)
    said = {line.split(" assumed: ")[0] for line in lines if " assumed: " in line}
    assert said - {"geometry"} == assumed
