"""Raw files of well-known detectors: their boxes and scores are read as they mean them, or the file is refused; none is guessed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from third_party import (
    CLASSES,
    SIZE,
    STRANGERS,
    Detr,
    FastestDet,
    Rows,
    RowsApart,
    Stranger,
    YoloNas,
    Yolov8,
    YoloxDecoded,
    YoloxRaw,
    write,
)  # fmt: skip
from third_party_exports import AnchorDecoded
from third_party_levels import AMBIGUOUS, LEVEL_STRANGERS, BlazeFace, Scrfd

from fusenms import fuse, inspect, load, recognize
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.artifacts.raw import RawModel
from fusenms.errors import AmbiguousHeadError, HeadNotRecognizedError, SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.heads.probe import Probe, probe_image
from fusenms.layout import Layout
from fusenms.reference import candidates


def assert_means(raw: RawModel, layout: Layout, module: Stranger) -> None:
    """The layout makes of the file's tensors the boxes and scores that the network means."""
    with torch.no_grad():
        boxes, scores = (t[0].numpy() for t in module.truth(torch.from_numpy(probe_image(SIZE, SIZE))))
    found = candidates(Probe(raw).head(layout), 0, layout, (SIZE, SIZE))
    np.testing.assert_allclose(found.boxes, boxes, atol=2e-3)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)


@pytest.mark.parametrize("module", [*STRANGERS, *LEVEL_STRANGERS])
def test_head_is_read_as_it_is_meant(tmp_path, module):
    raw = load(write(module(), tmp_path / "m.onnx"))
    layout = recognize(raw)
    assert layout.family == module.family
    assert_means(raw, layout, module())


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("module", [*STRANGERS, *LEVEL_STRANGERS])
def test_names_and_order_play_no_part(tmp_path, module, seed, named):
    names = {"names": str({i: f"thing{i}" for i in range(module.classes)}), "task": "detect"}
    metadata = names if named else None
    raw = load(write(module(), tmp_path / "m.onnx", seed=seed, metadata=metadata))
    layout = recognize(raw)
    assert layout.family == module.family
    assert_means(raw, layout, module())


@pytest.mark.covering(default=1, quick=0)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", [*STRANGERS, *LEVEL_STRANGERS])
def test_fused_file_equals_reference(tmp_path, module, backend):
    family = module.family if module.bare else None
    path = write(module(), tmp_path / "m.onnx")
    fused = fuse(path, backend=backend, family=family, score_threshold=0.01, max_detections=50)
    assert fused.report, fused.report
    assert [entry.name for entry in fused.model.graph.input] == ["images"]


@pytest.mark.parametrize("module", [module for module in LEVEL_STRANGERS if module.bare])
def test_bare_box_terms_that_no_image_shows_are_asked_for(tmp_path, module):
    path = write(module(), tmp_path / "m.onnx")
    with pytest.raises(
        AmbiguousHeadError, match=f"may be {module.family}, .* not shown on images.*say family='{module.family}'"
    ):
        fuse(path)
    found = inspect(path)
    assert found.layout is None and f"say family='{module.family}'" in found.reason
    raw = load(path)
    assert_means(raw, recognize(raw, family=module.family), module())


@pytest.mark.parametrize("module", AMBIGUOUS)
def test_implementations_of_fcos_are_asked_for(tmp_path, module):
    raw = load(write(module(), tmp_path / "m.onnx"))
    with pytest.raises(AmbiguousHeadError, match=r"fits fcos and .*fcos-mmdet; choose one with family=NAME"):
        recognize(raw)
    assert_means(raw, recognize(raw, family=module.family), module())
    fused = fuse(tmp_path / "m.onnx", family=module.family, score_threshold=0.01, max_detections=50)
    assert fused.report, fused.report


@pytest.mark.parametrize("module", [Scrfd, BlazeFace])
def test_landmarks_of_faces_are_read_as_they_are_meant(tmp_path, module):
    path = write(module(), tmp_path / "m.onnx")
    wanted = {"family": module.family if module.bare else None, "pixels": "rgb"}
    fused = fuse(path, score_threshold=0.0, iou_threshold=1.0, max_detections=200, indices=True, **wanted)
    image = probe_image(SIZE, SIZE)
    with torch.no_grad():
        boxes, scores = (t[0].numpy() for t in module().truth(torch.from_numpy(image)))
        points = module().landmarks(torch.from_numpy(image))[0].numpy()
    found = OnnxRuntimeRunner(fused.model).infer(image)
    count, index = int(found["num_detections"][0, 0]), found["indices"][0]
    assert count > 100
    np.testing.assert_allclose(found["scores"][0, :count], scores[index[:count], 0], atol=1e-5)
    np.testing.assert_allclose(found["boxes"][0, :count], boxes[index[:count]], atol=2e-3)
    np.testing.assert_allclose(found["keypoints"][0, :count], points[index[:count]], atol=2e-3)


@pytest.mark.parametrize("module", [Rows, RowsApart])
def test_rows_are_taken_before_their_top_k(tmp_path, module):
    layout = recognize(load(write(module(), tmp_path / "m.onnx")))
    assert (layout.labels, layout.suppress, layout.num_classes) == (None, False, CLASSES)


class MovedRows(Rows):
    """Rows that are not quite what the top-k chose: moved by a pixel."""

    def forward(self, images):
        rows = super().forward(images)
        return torch.cat((rows[..., :4] + 1.0, rows[..., 4:]), -1)


def test_rows_stay_where_what_is_before_their_top_k_is_not_the_same(tmp_path):
    layout = recognize(load(write(MovedRows(), tmp_path / "m.onnx")))
    assert layout.labels is not None
    assert fuse(tmp_path / "m.onnx", score_threshold=0.01).report


@pytest.mark.parametrize(
    ("order", "factor", "meaning"),
    [("[1, 0]", "Mul", "height, width"), ("[0, 1]", "Mul", "width, height"), ("[0, 1]", "Div", "factor")],
)
def test_input_for_the_size_becomes_a_constant_in_its_order(tmp_path, order, factor, meaning):
    """Of an image that is higher than wide: x is scaled by its width, y by its height."""
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
      sized (float[b, 3, 96, 64] images, float[b, 2] size) => (float[b, 2, 4] boxes) {{
        order = Constant <value = int64[2] {{{order[1:-1]}}}> ()
        sides = Gather <axis = 1> (size, order)
        both = Concat <axis = 1> (sides, sides)
        one = Constant <value = int64[1] {{1}}> ()
        row = Unsqueeze (both, one)
        part = Constant <value = float[1, 2, 4] {{0.1, 0.2, 0.5, 0.6, 0.3, 0.1, 0.9, 0.8}}> ()
        boxes = {factor} (part, row)
      }}""")
    onnx.save(model, tmp_path / "m.onnx")
    raw = load(tmp_path / "m.onnx")
    assert f"input size is {meaning} of the images" in raw.notes[-1]
    images = np.zeros((3, 3, 96, 64), np.float32)
    boxes = OnnxRuntimeRunner(raw.model).infer(images)["boxes"]
    scale = np.array([64, 96] * 2) if factor == "Mul" else 1
    expected = np.array([[0.1, 0.2, 0.5, 0.6], [0.3, 0.1, 0.9, 0.8]]) * scale
    np.testing.assert_allclose(boxes, np.stack([expected] * 3), rtol=1e-5)


def test_two_inputs_beside_the_images_become_constants(tmp_path):
    """As PaddleDetection has them: the size, and the factor that boxes are divided by."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
      sized (float[b, 3, 96, 64] images, float[b, 2] im_shape, float[b, 2] scale_factor) => (float[b, 2, 4] boxes) {
        order = Constant <value = int64[2] {1, 0}> ()
        ratio = Div (im_shape, scale_factor)
        sides = Gather <axis = 1> (ratio, order)
        both = Concat <axis = 1> (sides, sides)
        one = Constant <value = int64[1] {1}> ()
        row = Unsqueeze (both, one)
        part = Constant <value = float[1, 2, 4] {0.1, 0.2, 0.5, 0.6, 0.3, 0.1, 0.9, 0.8}> ()
        boxes = Mul (part, row)
      }""")
    onnx.save(model, tmp_path / "m.onnx")
    raw = load(tmp_path / "m.onnx")
    assert [entry.name for entry in raw.model.graph.input] == ["images"]
    boxes = OnnxRuntimeRunner(raw.model).infer(np.zeros((2, 3, 96, 64), np.float32))["boxes"]
    expected = np.array([[0.1, 0.2, 0.5, 0.6], [0.3, 0.1, 0.9, 0.8]]) * [64, 96, 64, 96]
    np.testing.assert_allclose(boxes, np.stack([expected] * 2), rtol=1e-5)


class OneClassRows(Rows):
    channels = 5


@pytest.mark.slow
def test_rows_of_one_class_are_taken_before_their_top_k(tmp_path):
    fused = fuse(write(OneClassRows(), tmp_path / "m.onnx", dynamic=False), score_threshold=0.001)
    assert (fused.layout.labels, fused.layout.num_classes) == (None, 1)
    assert fused.report


class TwoClasses(Stranger):
    """YOLOv8 with two classes, transposed: six channels, as finished rows have."""

    family = "yolov8"
    channels = 6

    def forward(self, images):
        rows = torch.cat([m.flatten(2) for m in self.maps(images)], 2).transpose(1, 2)
        corners = self.corners(rows)
        size = corners[..., 2:] - corners[..., :2]
        return torch.cat((corners[..., :2] + size / 2, size, rows[..., 4:].sigmoid()), -1)


def test_two_classes_are_no_rows(tmp_path):
    layout = recognize(load(write(TwoClasses(), tmp_path / "m.onnx")), "yolov8")
    assert (layout.num_classes, layout.suppress) == (2, True)
    with pytest.raises(HeadNotRecognizedError, match="rows: the rows are not sorted by score"):
        recognize(load(tmp_path / "m.onnx"), "rows")


class SquareScores(YoloNas):
    """As many classes as candidates: either axis may be the classes."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return boxes, scores.repeat(1, 1, boxes.shape[1] // CLASSES)


def test_square_scores_are_refused(tmp_path):
    with pytest.raises(HeadNotRecognizedError, match=r"either axis of .* may be that of the classes"):
        recognize(load(write(SquareScores(), tmp_path / "m.onnx")))


class FourClasses(YoloNas):
    """Boxes and scores both have four channels."""

    def forward(self, images):
        boxes, scores = self.truth(images)
        return torch.cat((scores, scores[..., :1]), -1), boxes


def test_four_classes_are_told_from_boxes(tmp_path):
    layout = recognize(load(write(FourClasses(), tmp_path / "m.onnx")))
    assert (layout.boxes.tensor, layout.classes.tensor, layout.num_classes) == ("output1", "output0", 4)


@pytest.mark.parametrize("module", [YoloxRaw, YoloxDecoded])
@pytest.mark.parametrize("more", [-1, 1])
def test_class_names_that_contradict_are_refused(tmp_path, module, more):
    names = {"names": str({i: f"thing{i}" for i in range(CLASSES + more)}), "task": "detect"}
    raw = load(write(module(), tmp_path / "m.onnx", metadata=names))
    with pytest.raises(HeadNotRecognizedError, match="class names in the metadata"):
        recognize(raw)


class SilentRows(Rows):
    """Finished rows of a network that finds nothing on the test image."""

    def forward(self, images):
        return super().forward(images) * 0


def test_rows_that_show_nothing_are_refused_unless_named(tmp_path):
    path = write(SilentRows(), tmp_path / "m.onnx")
    with pytest.raises(HeadNotRecognizedError, match=r"every score is 0 .* say family=.rows"):
        recognize(load(path))
    assert recognize(load(path), "rows").labels is not None


class OddInput(YoloNas):
    inputs = ("images", "other")

    def forward(self, images, other):
        boxes, scores = self.truth(images)
        return boxes + other.sum(1)[:, None, None], scores

    def example(self, batch):
        return (*super().example(batch), torch.ones(batch, 2))


def test_input_that_is_not_understood_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"its input other .* scales x and y of the boxes by"):
        load(write(OddInput(), tmp_path / "m.onnx"))


class Frozen(Yolov8):
    """A channel shuffle as ShuffleNet's authors write it, and resizes to sizes: a batch of one is in their constants."""

    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 3, 1)

    def maps(self, images):
        x = self.before(images)
        batch, channels, height, width = x.shape
        pairs = (
            x.view(batch * channels // 2, 2, height * width)
            .permute(1, 0, 2)
            .reshape(2, -1, channels // 2, height, width)
        )
        x = torch.cat((pairs[0], pairs[1]), 1)
        small = torch.nn.functional.interpolate(x, size=(SIZE // 2, SIZE // 2), mode="bilinear")
        return super().maps(self.after(torch.nn.functional.interpolate(small, size=(SIZE, SIZE), mode="nearest")))


@pytest.mark.slow
def test_frozen_shuffles_and_resizes_are_opened(tmp_path):
    path = write(Frozen(), tmp_path / "m.onnx", dynamic=False)
    model = onnx.load(path)
    reshapes = [node for node in model.graph.node if node.op_type == "Constant"]
    assert [2, 2, 4096] in [numpy_helper.to_array(node.attribute[0].t).tolist() for node in reshapes]
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    for node, side in zip(resizes, (SIZE // 2, SIZE), strict=True):  # as older exporters write them: a batch and all
        sizes = np.array([1, 4, side, side], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(sizes, f"sizes{side}"))
        node.input[:] = [node.input[0], "", "", f"sizes{side}"]
    onnx.save(model, path)
    fused = fuse(path, score_threshold=0.01)
    assert fused.report
    assert any("4 unlike images equal to running them alone" in note for note in fused.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_made_inside(tmp_path, name):
    """The fused model's head, of an image in RGB from 0 to 1, is the raw model's, of what it wants."""
    path, pixels = write(Yolov8(), tmp_path / "m.onnx"), PIXELS[name]
    images = np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32)
    fused = fuse(path, pixels=name, unverified=True)
    got = OnnxRuntimeRunner(with_outputs(fused.model, fused.layout.tensors)).infer(images)
    wanted = np.stack([images[:, c] for c in ((0, 1, 2) if pixels.channels == "rgb" else (2, 1, 0))], 1) * pixels.scale
    wanted = (wanted - np.reshape(pixels.mean, (3, 1, 1))) / np.reshape(pixels.std, (3, 1, 1))
    raw = OnnxRuntimeRunner(with_outputs(load(path).model, fused.layout.tensors)).infer(wanted.astype(np.float32))
    for tensor in fused.layout.tensors:
        np.testing.assert_allclose(got[tensor], raw[tensor], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "stretch"), [(Yolov8, False), (RowsApart, True), (Detr, True), (FastestDet, True)])
def test_images_are_fitted_as_the_family_has_them(tmp_path, module, stretch):
    path = write(module(), tmp_path / "m.onnx")
    assert fuse(path, unverified=True).image.stretch == stretch
    assert fuse(path, unverified=True, stretch=not stretch).image.stretch != stretch


class Yolox79(YoloxRaw):
    """84 channels for each cell: box, objectness, 79 classes."""

    channels = 84


class Yolov8With80(Yolov8):
    """84 channels for each cell: box, 80 classes."""

    channels = 64 + 80

    def forward(self, images):
        return super().forward(images).transpose(1, 2)


class Yolov5With79(AnchorDecoded):
    """84 channels for each anchor: box, objectness, 79 classes."""

    inputs = ("images",)

    def __init__(self):
        super().__init__(79)

    def example(self, batch):
        return (torch.rand(batch, 3, SIZE, SIZE),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "family", "classes"),
    [(Yolox79, "yolox", 79), (Yolov8With80, "yolov8", 80), (Yolov5With79, "yolov5", 79)],
)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_heads_of_84_channels_are_told_apart(tmp_path, module, family, classes, seed):
    names = {"names": str({i: f"class{i}" for i in range(classes)})} if family == "yolov5" else None
    layout = recognize(load(write(module(), tmp_path / "m.onnx", seed=seed, metadata=names)))
    assert (layout.family, layout.num_classes) == (family, classes)
    assert (layout.objectness is None) == (family == "yolov8")
