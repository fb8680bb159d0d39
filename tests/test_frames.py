"""Frames as the input of the graph: against OpenCV and `Detector`, at many sizes, and sabotaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
from conftest import SHAPES
from onnx import numpy_helper
from raw_heads import LAYOUTS, SIZE, fused_model, raw_model

import fusenms
from fusenms import Detector, FusedModel, contract, fuse, load_fused, verify
from fusenms.artifacts.frames import Frames
from fusenms.artifacts.raw import ImageInput
from fusenms.benchmark import default_shape
from fusenms.boxes import pairwise_iou
from fusenms.cli import main
from fusenms.engines import EngineSettings
from fusenms.engines.nvidia import Library, build
from fusenms.errors import ConfigError, InputError, SourceError, UnsupportedByBackendError
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, stretched, to_tensor
from fusenms.transforms.frames import of_input, parts, with_frames
from fusenms.verification.frames import letterboxed

pytestmark = [pytest.mark.usefixtures("shared_exports"), pytest.mark.slow]
ANY = Frames()
IMAGE = SHAPES / "shapes0.jpg"


@cache
def plain_model(kind: str, backend: str, config: tuple[tuple[str, object], ...]) -> FusedModel:
    return fused_model(LAYOUTS[kind](), backend, **dict(config))


def framed(
    kind: str = "distances", frames: Frames = ANY, backend: str = "ort", stretch: bool = False, **config: object
) -> FusedModel:
    """A tiny model with frames, of 64 x 64."""
    plain = plain_model(kind, backend, tuple(config.items()))
    return with_frames(replace(plain, image=replace(plain.image, stretch=stretch)), frames)


def noise(height: int, width: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def images_of(fused: FusedModel, frames: np.ndarray) -> np.ndarray:
    """The images that the graph makes of frames."""
    return OnnxRuntimeRunner(parts(fused).before).run({"frames": frames})["images"]


def problems(report: fusenms.Report) -> str:
    return "\n".join(problem for check in report.checks for problem in check.problems)


@pytest.fixture(scope="module")
def shapes(shapes_raw) -> FusedModel:
    return fuse(shapes_raw, frames="dynamic", unverified=True)


SIZES = [(480, 640), (333, 500), (719, 1279), (64, 64), (128, 128), (1, 1), (31, 77), (501, 3), (2, 900)]


@pytest.mark.parametrize(
    ("stretch", "channels"),
    [
        (False, "bgr"),
        *(pytest.param(*one, marks=pytest.mark.thorough) for one in [(False, "rgb"), (True, "rgb"), (True, "bgr")]),
    ],
)
def test_images_are_those_of_opencv(stretch, channels):
    """Within one level of 255: OpenCV rounds its factors to 11 bits."""
    fit = stretched if stretch else letterbox
    anywhere = framed(frames=Frames(channels=channels), stretch=stretch)
    for size in SIZES:
        frames = noise(*size, batch=2)
        rgb = frames if channels == "rgb" else frames[..., ::-1]
        expected = to_tensor([fit(np.ascontiguousarray(frame), SIZE, SIZE)[0] for frame in rgb])
        for fused in (anywhere, framed(frames=Frames(*size, channels), stretch=stretch)):
            apart = np.abs(images_of(fused, frames) - expected) * 255
            assert apart.max() < 1.01 and (apart > 0.5).mean() < 0.2, size


def test_truth_of_the_verification_is_that_of_opencv():
    for size in SIZES:
        frames = noise(*size)
        expected = letterbox(frames[0], SIZE, SIZE)[0].transpose(2, 0, 1).astype(float)
        apart = np.abs(letterboxed(frames, ImageInput("images", SIZE, SIZE, 32), "rgb")[0] - expected)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.2, size


def test_sizes_are_rounded_as_in_python():
    """Halves too: at these heights, every odd width gives one."""
    fused, black = framed(), np.zeros((1, 1, 1, 3), np.uint8)
    before = OnnxRuntimeRunner(parts(fused).before)
    some = np.random.default_rng(3).integers(1, 400, (60, 2)).tolist()
    for height, width in [(2 * SIZE, w) for w in range(1, 40)] + [(w, 4 * SIZE) for w in range(1, 30)] + some:
        place = letterbox(np.zeros((height, width, 3), np.uint8), SIZE, SIZE)[1]
        (image,) = before.run({"frames": np.broadcast_to(black, (1, height, width, 3))})["images"]
        rows, columns = (np.flatnonzero((image[0] == 0).any(axis)) for axis in (1, 0))
        found = (rows[0], len(rows), columns[0], len(columns))
        assert found == (place.top, place.inner_height, place.left, place.inner_width), (height, width)


USUAL = [
    ("distances", "ort", None),
    ("oriented", "portable", None),
    ("keypoints", "ort", (91, 45)),
    ("end_to_end", "portable", (91, 45)),
]
ALL = product(("distances", "oriented", "keypoints", "end_to_end"), ("ort", "portable"), (None, (91, 45)))


@pytest.mark.parametrize(
    ("kind", "backend", "size"),
    [one if one in USUAL else pytest.param(*one, marks=pytest.mark.thorough) for one in ALL],
)
def test_rows_are_those_of_the_images_in_the_frame(kind, backend, size):
    fused = framed(kind, Frames(*(size or (None, None))), backend, score_threshold=0.0, max_detections=20)
    report = verify(fused, batches=(2,))
    assert report and report.frames == (1 if size else 19)
    frames = noise(91, 45, batch=3)
    core, place = parts(fused).core, letterbox(frames[0], SIZE, SIZE)[1]
    expected = OnnxRuntimeRunner(core.model).infer(images_of(fused, frames))
    found = OnnxRuntimeRunner(fused.model).infer(frames)
    assert found["num_detections"].min() > 3
    for i, count in enumerate(found["num_detections"][:, 0]):
        boxes = expected["boxes"][i, :count]
        moved = place.oriented_to_image(boxes) if kind == "oriented" else place.to_image(boxes)
        np.testing.assert_allclose(found["boxes"][i, :count], moved, atol=1e-3, rtol=1e-5)
        assert not found["boxes"][i, count:].any()
        if kind == "keypoints":
            points = place.points_to_image(expected["keypoints"][i, :count])
            np.testing.assert_allclose(found["keypoints"][i, :count], points, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("opset", [11, *(pytest.param(opset, marks=pytest.mark.thorough) for opset in (12, 13, 18))])
def test_every_opset_is_verified(opset):
    plain = fused_model(LAYOUTS["distances"](), "ort", opset)
    assert verify(with_frames(plain, ANY), batches=(1,))
    assert verify(with_frames(plain, Frames(90, 130, "nv12")), batches=(1,))


def test_inputs_that_are_optional_stay(tmp_path):
    fused = fuse(
        raw_model(LAYOUTS["distances"]()), layout=LAYOUTS["distances"](), runtime_thresholds=True, frames=(70, 90)
    )
    path = fused.save(tmp_path / "m.onnx")
    assert [tensor.name for tensor in fusenms.inspect(path).inputs] == [
        "frames",
        "score_threshold",
        "iou_threshold",
        "class_mask",
    ]
    assert fused.report.settings and not fused.report.unshown
    with Detector(path) as detect:
        assert len(detect(noise(70, 90)[0], score_threshold=1.0)[0]) == 0


def test_fixed_batch():
    raw = replace(raw_model(LAYOUTS["distances"]()), batch=3)
    fused = fuse(raw, layout=LAYOUTS["distances"](), frames="dynamic", unverified=True)
    assert fused.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    with Detector(fused) as detect:
        assert len(detect([noise(40, 50)[0]] * 4)) == 4


# The embedded detector.


def test_detector_gives_what_it_gives_without_frames(shapes, shapes_raw, tmp_path):
    path = shapes.save(tmp_path / "shapes.onnx", unverified=True)
    image = read_image(IMAGE)
    some = [IMAGE, image, cv2.resize(image, (333, 251)), cv2.resize(image, (1001, 499)), image[:90]]
    rows = 0
    with Detector(path) as detect, Detector(fuse(shapes_raw, unverified=True)) as plain:
        for found, expected in zip(detect(some), plain(some), strict=True):
            iou = pairwise_iou(found.boxes.astype(float), expected.boxes.astype(float))
            assert np.array_equal(found.labels, expected.labels) and iou.diagonal().min(initial=1) >= 0.99
            rows += len(found)
    assert rows > 10


def test_detector_puts_channels_in_the_order_of_the_frames(shapes, shapes_raw):
    swapped = fuse(shapes_raw, frames="dynamic", frame_channels="bgr", unverified=True)
    bgr = cv2.imread(str(IMAGE))
    results = []
    for model in (swapped, shapes):
        for channels, array in (("bgr", bgr), ("rgb", np.ascontiguousarray(bgr[..., ::-1]))):
            with Detector(model, channels=channels) as detect:
                results += detect([array, IMAGE])
    assert len(results[0]) > 3
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].boxes, other.boxes)


def test_openvino_takes_nv12(shapes_raw):
    pytest.importorskip("openvino")
    fused = fuse(shapes_raw, frames="dynamic", frame_channels="nv12", unverified=True)
    with Detector(fused, runtime="openvino") as there, Detector(fused) as here:
        for one, two in zip(there([IMAGE]), here([IMAGE]), strict=True):
            np.testing.assert_allclose(one.boxes, two.boxes, atol=1)


def test_openvino_gives_the_same(shapes):
    pytest.importorskip("openvino")
    with Detector(shapes, runtime="openvino") as there, Detector(shapes) as here:
        for one, two in zip(there([IMAGE, noise(31, 77)[0]]), here([IMAGE, noise(31, 77)[0]]), strict=True):
            np.testing.assert_allclose(one.boxes, two.boxes, atol=1)


def test_detector_refuses_what_does_not_fit(shapes, shapes_raw):
    with Detector(fuse(shapes_raw, frames=(120, 160), unverified=True)) as detect:
        detect.warm_up()
        with pytest.raises(InputError, match=r"120x161 .* takes RGB frames of 120x160 only"):
            detect(noise(120, 161)[0])
        assert isinstance(next(detect.stream([noise(1, 1)[0]])), InputError)
    with pytest.raises(InputError, match="size is 64, but the model takes RGB frames of any size"):
        Detector(shapes, size=64)


def test_verification_compares_rows_of_objects(shapes):
    images = to_tensor([letterbox(read_image(IMAGE), 64, 64)[0]])
    report = verify(shapes, images=images, batches=(1,))
    rows = sum(check.detections for check in report.checks if check.frame)
    assert report and rows > 20 and report.worst_iou > 0.99
    assert f"frames of 19 sizes, {rows} rows, worst IoU" in report.summary


# Files.


def test_file_says_that_it_takes_frames(shapes, tmp_path):
    path = shapes.save(tmp_path / "m.onnx", unverified=True)
    again = load_fused(path)
    assert again.image == shapes.image and again.image.frames == Frames()
    assert str(fusenms.inspect(path).inputs[0]) == "frames uint8[batch, frame_height, frame_width, 3]"


def test_models_without_frames_do_not_mention_them():
    image = ImageInput("images", 64, 64, 32)
    assert "frames" not in image.to_dict() and ImageInput.from_dict(image.to_dict()) == image
    both = replace(image, frames=Frames(4, 5, "bgr"))
    assert ImageInput.from_dict(json.loads(json.dumps(both.to_dict()))) == both


@pytest.mark.parametrize(
    "frames",
    [
        {"height": 3},
        {"height": 0, "width": 2},
        {"channels": "gray"},
        {"tensor": ""},
        {"depth": 1},
        7,
        {"height": 2, "width": 10**6},
    ],
)
def test_damaged_metadata_is_refused(shapes, tmp_path, frames):
    model, path = onnx.load(shapes.save(tmp_path / "m.onnx", unverified=True)), tmp_path / "damaged.onnx"
    (entry,) = (item for item in model.metadata_props if item.key == contract.KEY_IMAGE)
    entry.value = json.dumps(json.loads(entry.value) | {"frames": frames})
    onnx.save(model, path)
    with pytest.raises(SourceError, match="its metadata is damaged"):
        load_fused(path)


def test_graph_that_contradicts_its_metadata_is_refused(shapes, tmp_path):
    def changed(change: Callable[[onnx.ModelProto], object]) -> Path:
        model = onnx.load(shapes.save(tmp_path / "m.onnx", unverified=True))
        change(model)
        onnx.save(model, tmp_path / "changed.onnx")
        return tmp_path / "changed.onnx"

    given = lambda model: model.graph.input[0].type.tensor_type  # noqa: E731
    with pytest.raises(SourceError, match="frames"):
        load_fused(changed(lambda model: setattr(given(model), "elem_type", onnx.TensorProto.FLOAT)))
    with pytest.raises(SourceError, match=r"frames \[0, 0, 0, 3\]"):
        load_fused(changed(lambda model: setattr(given(model).shape.dim[1], "dim_value", 30)))


@pytest.mark.thorough
def test_renamed_frames_are_still_frames(shapes, tmp_path):
    path = fusenms.edit(
        shapes.save(tmp_path / "m.onnx", unverified=True),
        tmp_path / "n.onnx",
        rename={"frames": "video", "images": "inner"},
    )
    fused = load_fused(path)
    assert (fused.image.frames.tensor, fused.image.tensor) == ("video", "inner") and verify(fused, batches=(1,))


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"frames": "any"}, ConfigError, r"frames is 'any'; expected \(height, width\) in pixels, or 'dynamic'"),
        ({"frames": (3, 0)}, ConfigError, "expected"),
        ({"frames": (3, 4.0)}, ConfigError, "expected"),
        ({"frames": (3, 10**6)}, ConfigError, "max_image_side"),
        ({"frames": (3, 4), "frame_channels": "gray"}, ConfigError, "expected one of 'rgb', 'bgr', 'nv12'"),
        ({"frame_channels": "bgr"}, ConfigError, "takes no frames"),
        ({"frames": "dynamic", "output_preset": "ultralytics"}, ConfigError, "readers letterbox images themselves"),
        ({"frames": (3, 4), "backend": "trt"}, UnsupportedByBackendError, "backend trt takes no frames"),
        ({"frames": (3, 4), "backend": "plugin"}, UnsupportedByBackendError, "backend plugin takes no frames"),
    ],
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fuse(raw_model(LAYOUTS["distances"]()), layout=LAYOUTS["distances"](), **settings)


def test_masks_are_refused():
    with pytest.raises(UnsupportedByBackendError, match="whose masks lie in its own input"):
        fuse(raw_model(LAYOUTS["masks"]()), layout=LAYOUTS["masks"](), frames=(3, 4))


def test_what_gives_images_refuses_frames(shapes, tmp_path):
    path = shapes.save(tmp_path / "m.onnx", unverified=True)
    library = Library(SimpleNamespace(), "TensorRT", {})
    for refusing in (
        lambda: default_shape(path),
        lambda: fusenms.compare(path, path),
        lambda: fusenms.deploy(path, tmp_path / "m.ncnn"),
        lambda: build(library, str(path), EngineSettings()),
    ):
        with pytest.raises(
            UnsupportedByBackendError, match=r"takes RGB frames of any size, but .*fuse the weights without frames"
        ):
            refusing()


# Sabotage.


def node_of(model: onnx.ModelProto, op: str, number: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][number]


def constant(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (item,) = (item for item in model.graph.initializer if item.name == name)
    value = numpy_helper.to_array(item)
    item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(value), value.dtype), name))


def mode(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for attribute in node_of(model, "Resize").attribute:
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = name.encode()

    return change


def other_side(model: onnx.ModelProto) -> None:
    pads = next(node for node in model.graph.node if node.output[0] == node_of(model, "Pad").input[1])
    pads.input[1], pads.input[3] = pads.input[3], pads.input[1]


def gray(model: onnx.ModelProto) -> None:
    constant(model, node_of(model, "Pad").input[2], lambda value: value - 1)


def boxes_node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    """The first node of an operator behind the boxes of the model's input."""
    reached = {of_input("boxes")}
    for node in model.graph.node:
        if reached.intersection(node.input):
            if node.op_type == op:
                return node
            reached.update(node.output)
    raise AssertionError(op)


def other_axis(model: onnx.ModelProto) -> None:
    """The scales of x and y change places."""
    divisor = boxes_node(model, "Div").input[1]
    node = next((node for node in model.graph.node if divisor in node.output), None)
    if node is None:
        constant(model, divisor, lambda value: value[[1, 0, 3, 2]])
        return
    first = next((other for other in model.graph.node if node.input[0] in other.output), None)
    if first is None:
        constant(model, node.input[0], lambda value: value[::-1])
        return
    turned = next(other for other in model.graph.node if first.input[0] in other.output)
    assert turned.op_type == "Gather"
    constant(model, turned.input[1], lambda value: np.array([0, 1]))


def not_moved(model: onnx.ModelProto) -> None:
    node = boxes_node(model, "Where")
    node.input[1] = of_input("boxes")


def not_clipped(model: onnx.ModelProto) -> None:
    node = boxes_node(model, "Min")
    node.op_type = "Identity"
    del node.input[1:]


def red_last(model: onnx.ModelProto) -> None:
    order = next(item.name for item in model.graph.initializer if numpy_helper.to_array(item).tolist() == [2, 1, 0])
    constant(model, order, lambda value: np.array([0, 1, 2]))


def truncated(model: onnx.ModelProto) -> None:
    node_of(model, "Round", -1).op_type = "Floor"


SABOTAGE = {
    "half_a_pixel": (mode("asymmetric"), "differ from the reference by"),
    "corners": (mode("align_corners"), "differ from the reference by"),
    "padding_on_the_other_side": (other_side, "differ from the reference by"),
    "other_gray": (gray, "in the mean"),
    "red_last": (red_last, "differ from the reference by"),
    "truncated": (truncated, "in the mean"),
    "scale_of_the_other_axis": (other_axis, "boxes of the frame differ"),
    "not_moved": (not_moved, "boxes of the frame differ"),
    "not_clipped": (not_clipped, "boxes of the frame differ"),
}


FIRST = ("half_a_pixel", "red_last", "scale_of_the_other_axis", "not_moved")


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough) for name in SABOTAGE]
)
def test_wrong_graph_of_any_size_is_seen(name):
    change, message = SABOTAGE[name]
    fused = framed(frames=Frames(channels="bgr"))
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    change(model)
    assert model != fused.model
    if name == "not_moved":
        with pytest.raises(SourceError, match="frames play no part in boxes"):
            verify(replace(fused, model=model), batches=(1,))
        return
    assert message in problems(verify(replace(fused, model=model), batches=(1,)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in SABOTAGE if name not in ("half_a_pixel", "red_last")])
def test_wrong_graph_of_one_size_is_seen(name):
    """The frame is so small that its sides, 33 and 57, have unlike scales: 37 / 33 and 64 / 57."""
    change, message = SABOTAGE[name]
    fused = framed(frames=Frames(33, 57))
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    change(model)
    assert message in problems(verify(replace(fused, model=model), batches=(1,)))


def test_output_that_is_not_mapped_but_of_another_tensor_is_refused():
    fused = framed()
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == of_input("boxes"):
                    names[i] = "elsewhere"
    with pytest.raises(SourceError, match="its graph is not as fusenms makes it"):
        verify(replace(fused, model=model))


# The command line.


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "frame.png"
    cv2.imwrite(str(image), cv2.resize(cv2.imread(str(IMAGE)), (161, 120)))
    weights = str(SHAPES / "shapes.pt")
    flags = ["--size", "64", "--frames", "120x161", "--frame-channels", "bgr", "-o", "m.onnx"]
    assert main([weights, *flags]) == 0
    out = capsys.readouterr().out
    assert "takes BGR frames of 120x161, letterboxed inside to 64x64" in out and "frames of 1 size" in out
    assert main(["verify", "m.onnx"]) == 0 and "frames of 1 size" in capsys.readouterr().out
    assert main(["inspect", "m.onnx"]) == 0
    assert (
        "BGR frames of 120x161, letterboxed inside to 64x64; results are in pixels of the frame"
        in capsys.readouterr().out
    )
    assert main(["detect", "m.onnx", str(image)]) == 0
    assert main(["bench", "m.onnx"]) == 1
    assert main([weights, "--frames", "dynamic", "--backend", "trt", "-o", "n.onnx"]) == 1
    assert "backend trt takes no frames" in capsys.readouterr().err
    assert main([weights, "--frames", "dynamic", "--engine", "rtx", "-o", "n.onnx"]) == 1
    assert "found --frames and --engine rtx" in capsys.readouterr().err
    assert not (tmp_path / "n.onnx").exists()
    with pytest.raises(SystemExit):
        main([weights, "--frames", "120"])


# A real detector.


def least_ious(found: fusenms.Detections, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each row, the IoU with the best box of its class; rows near the threshold, which a level of color moves, are left out."""
    iou = pairwise_iou(found.boxes.astype(float), boxes.astype(float))
    best = np.where(found.labels[:, None] == labels[None], iou, 0).max(1, initial=0)
    return best[(best >= 0.99) | (found.scores > 0.27)]


def test_fifty_odd_sizes_equal_the_model_without_frames(zoo):
    """Photos and COCO. On images letterboxed in float64, every row is the same. OpenCV's factors of 11 bits change every eighth color by
    a level, which makes another candidate of the same object win now and then."""
    rng, fused = np.random.default_rng(50), fuse(zoo / "derived" / "yolov8n.pt", frames="dynamic", unverified=True)
    paths = sorted([*(zoo / "photos").glob("*.jpg"), *(zoo / "coco").rglob("*.jpg")])[:10]
    photos, core = [read_image(path) for path in paths], parts(fused).core
    session, exact, opencv = OnnxRuntimeRunner(core.model), [], []
    with Detector(fused) as detect, Detector(core) as plain:
        for i in range(50):
            height, width = (int(side) | 1 for side in rng.integers(150, 1300, 2))
            frame = cv2.resize(photos[i % len(photos)], (width, height))
            found, expected = detect(frame)[0], plain(frame)[0]
            opencv.append(least_ious(found, expected.boxes, expected.labels))
            outputs = session.infer((letterboxed(frame[None], core.image, "rgb") / 255).astype(np.float32))
            count, boxes, _, labels = (outputs[name][0] for name in core.config.output_names)
            place = letterbox(frame, core.image.height, core.image.width)[1]
            exact.append(least_ious(found, place.to_image(boxes)[: count[0]], labels[: count[0]]))
    exact, opencv = np.concatenate(exact), np.concatenate(opencv)
    assert len(exact) > 150 and exact.min() >= 0.99
    assert (opencv >= 0.99).mean() > 0.95 and opencv.min() > 0.9


# NV12.


def nv12(rgb: np.ndarray) -> np.ndarray:
    """A frame ``[height, width, 3]`` by OpenCV, with its colors in pairs."""
    planes, height = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420), len(rgb)
    return np.concatenate((planes[:height], planes[height:].reshape(2, -1).T.reshape(-1, rgb.shape[1])))


@pytest.mark.parametrize("size", [None, (90, 130)])
def test_colors_of_nv12_are_those_of_opencv(size):
    given = np.random.default_rng(1).integers(0, 256, (2, 135, 130), dtype=np.uint8)
    fused = framed(frames=Frames(*(size or (None, None)), "nv12"))
    rgb = [cv2.cvtColor(frame, cv2.COLOR_YUV2RGB_NV12) for frame in given]
    expected = to_tensor([letterbox(image, SIZE, SIZE)[0] for image in rgb])
    apart = np.abs(images_of(fused, given) - expected) * 255
    assert apart.max() < 1.6 and (apart > 0.5).mean() < 0.25


@pytest.mark.covering(default=1)
@pytest.mark.parametrize("tiles", [None, fusenms.Tiles(2, 2, whole=True)])
@pytest.mark.parametrize("frames", ["dynamic", (90, 130)])
def test_nv12_is_verified(frames, tiles):
    layout = LAYOUTS["distances"]()
    fused = fuse(raw_model(layout), layout=layout, frames=frames, frame_channels="nv12", tiles=tiles)
    assert fused.report and fused.report.frames == (1 if frames != "dynamic" else 10 if tiles else 19)


def test_wrong_colors_of_nv12_are_seen():
    fused = framed(frames=Frames(channels="nv12"))
    blue = next(t for t in fused.model.graph.initializer if numpy_helper.to_array(t).tolist() == pytest.approx(2.018))
    model = onnx.ModelProto()
    model.CopyFrom(fused.model)
    one = next(t for t in model.graph.initializer if t.name == blue.name)
    one.CopyFrom(numpy_helper.from_array(np.array(1.8, np.float32), one.name))
    assert "of 255" in problems(verify(replace(fused, model=model), batches=(1,)))


def test_detector_takes_nv12(shapes, shapes_raw, tmp_path):
    path = fuse(shapes_raw, frames="dynamic", frame_channels="nv12", unverified=True).save(
        tmp_path / "m.onnx", unverified=True
    )
    image = read_image(IMAGE)
    with Detector(path, channels="nv12") as yuv, Detector(path) as rgb, Detector(shapes) as plain:
        yuv.warm_up()
        (one,), (two,), (expected,) = yuv(nv12(image)), rgb(image), plain(image)
        np.testing.assert_array_equal(one.boxes, two.boxes)
        assert len(one) > 5 and abs(len(one) - len(expected)) <= 1
        with pytest.raises(InputError, match="expected an NV12 frame"):
            yuv(image)
        with pytest.raises(InputError, match="whose sides are even"):
            rgb(image[1:])
    with pytest.raises(InputError, match="the file takes no NV12 frames"):
        Detector(shapes, channels="nv12")


def test_odd_sides_of_nv12_are_refused():
    with pytest.raises(ConfigError, match="expected even sides of NV12 frames"):
        fuse(raw_model(LAYOUTS["distances"]()), layout=LAYOUTS["distances"](), frames=(91, 130), frame_channels="nv12")
