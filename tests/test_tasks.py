"""Masks, keypoints and oriented boxes: equal to what Ultralytics finds, and usable from the detector and the command line."""

from __future__ import annotations

import json

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from fusenms import Detector, fuse, load
from fusenms.boxes import cxcywh_to_xyxy, oriented_to_corners, pairwise_probiou
from fusenms.cli import main
from fusenms.errors import SourceError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import candidates
from fusenms.runtime.drawing import draw
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor
from fusenms.sources.checkpoint import load_checkpoint
from fusenms.sources.export import network_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_exports")]

FAMILIES = {
    **{f"{family}-p-{task}": [("images", {})] for family in ("yolov8", "yolo11") for task in ("seg", "pose", "obb")},
    **{
        f"yolo26-p-{task}": [("images", {"one_to_many": True}), ("images_end2end", {})]
        for task in ("seg", "pose", "obb")
    },
}
CASES = [(name, key, settings) for name, cases in FAMILIES.items() for key, settings in cases]


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name, _, settings in CASES])
def test_raw_outputs_equal_ultralytics(zoo, name, settings):
    golden = np.load(zoo / "shapes" / "golden" / f"{name}.npz")
    network = network_of(load_checkpoint(zoo / "shapes" / f"{name}.pt", **settings), name)
    output = golden["output" if network.layout.suppress else "one2one"]
    check_raw_outputs(network, golden["input"], output, golden.get("proto"))


def test_quantized_bins_of_a_box_distribution_are_taken_as_they_are(zoo):
    golden = np.load(zoo / "golden" / "yolov8n-seg-bus.npz")
    network = network_of(load_checkpoint(zoo / "derived" / "yolov8n-seg.pt"), "yolov8n-seg")
    assert network.layout.decode.bin_values[1] == pytest.approx(0.9448, abs=1e-4)
    image = golden["letterboxed_rgb_uint8"].transpose(2, 0, 1)[None]
    check_raw_outputs(network, image, golden["raw"], golden["prototypes"])


def check_raw_outputs(network, pixels, outputs, prototypes):
    from fusenms import reference

    layout, images = network.layout, pixels.astype(np.float32) / 255
    with torch.no_grad():
        taps = [tap.numpy() for tap in network.module(torch.from_numpy(images))]
    head = dict(zip(layout.sources, taps, strict=True))
    for i in range(len(images)):
        output, classes = outputs[i].T, layout.num_classes
        found = candidates(head, i, layout, images.shape[2:])
        numbers, further = np.arange(len(output)), output[:, 4 + classes :]
        np.testing.assert_allclose(found.scores, output[:, 4 : 4 + classes], atol=1e-5)
        boxes = output[:, :4]
        boxes = cxcywh_to_xyxy(boxes) if layout.angle is None else np.concatenate((boxes, further), 1)
        np.testing.assert_allclose(found.boxes, boxes, atol=5e-3)
        if layout.keypoints is not None:
            points = reference.keypoints(head, i, layout, images.shape[2:], numbers)
            np.testing.assert_allclose(points.reshape(further.shape), further, atol=1e-3)
        if layout.masks is not None:
            np.testing.assert_allclose(reference.mask_coefficients(head, i, layout, numbers), further, atol=1e-4)
            np.testing.assert_allclose(head[layout.masks.prototypes][i], prototypes[i], atol=1e-4)


def suppressed_by_a_suppressed_one(fused, image, box: np.ndarray, label: int, score: float) -> bool:
    """Whether a better candidate of the class overlaps an oriented box: Ultralytics drops it then, even where the better one is
    dropped itself (its fast NMS). Exact greedy suppression keeps it, unless the better one is kept."""
    canvas, _ = letterbox(image, fused.image.height, fused.image.width)
    head = OnnxRuntimeRunner(with_outputs(fused.model, fused.layout.tensors)).infer(to_tensor([canvas]))
    found = candidates(head, 0, fused.layout, (fused.image.height, fused.image.width))
    best = found.scores.max(1)
    better = (found.scores.argmax(1) == label) & (best > score + 1e-6)
    return bool((pairwise_probiou(box[None], found.boxes[better]) > 0.45).any())


def differences(fused, found, rows, image) -> list[str]:
    """Every difference of detections from the golden ones, as text."""
    problems, left = [], list(range(len(rows)))
    for i, (box, score, label) in enumerate(found):
        near = [k for k in left if rows[k]["label"] == label and np.abs(box - rows[k]["box"]).max() <= 0.5]
        near = [k for k in near if abs(rows[k]["score"] - score) <= 2e-3]
        if not near:
            oriented = found.oriented_boxes[i].astype(np.float64)
            oriented[1] += (fused.image.height - image.shape[0]) // 2  # to the input: padded, never scaled
            if fused.layout.angle is None or not suppressed_by_a_suppressed_one(fused, image, oriented, label, score):
                problems.append(f"not in the golden: label {label} score {score:.4f} box {box}")
            continue
        left.remove(near[0])
        row = rows[near[0]]
        if "keypoints" in row:
            apart = np.abs(np.array(row["keypoints"]) - found.keypoints[i])
            if apart[:, :2].max() > 0.5 or apart[:, 2].max() > 1e-3:
                problems.append(f"keypoints {apart.max():.3g} apart")
        if "xywhr" in row:
            apart = np.abs(np.array(row["xywhr"]) - found.oriented_boxes[i])
            corners = np.abs(np.array(row["corners"]).reshape(4, 2) - found.corners[i]).max()
            if apart[4] > 1e-3 or apart[:4].max() > 0.05 or corners > 0.05:
                problems.append(f"oriented box {apart} apart, corners {corners:.3g}")
        if "mask_pixels" in row:
            mask, outlines = found.masks[i], found.masks[i : i + 1].polygons()[0]
            if abs(int(mask.sum()) - row["mask_pixels"]) > 0.005 * row["mask_pixels"]:
                problems.append(f"mask of {mask.sum()} pixels, expected {row['mask_pixels']}")
            pieces = (
                cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
            )  # of several, the golden one joins the outlines
            if mask.sum() == row["mask_pixels"] and pieces == 1 and len(outlines[0]) != row["polygon_points"]:
                problems.append(f"outline of {len(outlines[0])} points, expected {row['polygon_points']}")
    return problems + [f"missing {rows[k]}" for k in left]


@pytest.mark.parametrize("size", [256, 640])
@pytest.mark.parametrize(("name", "key", "settings"), CASES)
def test_detections_equal_ultralytics(zoo, tmp_path, name, key, settings, size):
    golden = json.loads((zoo / "shapes" / "golden" / f"{name}.json").read_text())[key]
    backend = "portable" if size == 256 else "ort"
    fused = fuse(zoo / "shapes" / f"{name}.pt", size=size, backend=backend, unverified=True, **settings)
    problems, total = [], 0
    with Detector(fused.save(tmp_path / "f.onnx", unverified=True)) as detector:
        for file, values in golden.items():
            if values["imgsz"] == size:
                image, rows = read_image(zoo / "shapes" / "images" / file), values["detections"]
                total += len(rows)
                found = detector(image)[0]
                problems += [f"{file}: {p}" for p in differences(fused, found, rows, image)]
    assert not problems, "\n".join(problems)
    assert total > 50


def test_segmentation_finds_what_ultralytics_finds_on_photos(zoo, tmp_path):
    golden = json.loads((zoo / "golden" / "yolov8n-seg.json").read_text())["images"]
    raw, problems, total = load(zoo / "derived" / "yolov8n-seg.pt"), [], 0
    fused = fuse(raw, unverified=True)
    with Detector(fused.save(tmp_path / "f.onnx", unverified=True)) as detector:
        for name, values in golden.items():
            rows = values if isinstance(values, list) else values["detections"]
            image = read_image(zoo / name)
            total += len(rows)
            problems += [f"{name}: {p}" for p in differences(fused, detector(image)[0], rows, image)]
    assert not problems, "\n".join(problems)
    assert total > 200


def test_masks_equal_ultralytics_way_to_make_them(zoo, tmp_path):
    """Mask by mask, against its own raw outputs: enlarged by torch, then above 0, then cut to the box; at the input's size."""
    golden = np.load(zoo / "shapes" / "golden" / "yolov8-p-seg.npz")
    fused = fuse(zoo / "shapes" / "yolov8-p-seg.pt", size=256, indices=True)
    with Detector(fused.save(tmp_path / "f.onnx")) as detector:
        found = detector(list(golden["input"].transpose(0, 2, 3, 1)))
    compared = 0
    for i, detections in enumerate(found):
        rows = torch.from_numpy(golden["output"][i].T[detections.indices])
        logits = torch.tensordot(rows[:, 7:], torch.from_numpy(golden["proto"][i]), 1)
        large = functional.interpolate(logits[None], (256, 256), mode="bilinear")[0].numpy() > 0
        y, x = np.mgrid[:256, :256]
        for mask, box, expected in zip(detections.masks, detections.boxes, large, strict=True):
            expected = expected & (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
            assert (mask & expected).sum() / (mask | expected).sum() >= 0.99
            compared += 1
    assert compared > 10


@pytest.mark.parametrize(("shape", "size"), [((300, 500), 256), ((97, 61), 256), ((480, 640), 320)])
def test_masks_lie_where_the_boxes_do_whatever_the_images_size(zoo, tmp_path, shape, size):
    """The image is scaled to another size: its masks, scaled back, are still those of the objects."""
    image = read_image(zoo / "shapes" / "images" / "val0000.jpg")
    other = cv2.resize(image, shape[::-1])
    with Detector(fuse(zoo / "shapes" / "yolov8-p-seg.pt", size=size).save(tmp_path / "f.onnx")) as detector:
        found = detector(other)[0]
    assert len(found) > 1
    assert np.asarray(found.masks).shape == (len(found), *shape)
    for mask, (x1, y1, x2, y2) in zip(found.masks, found.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert mask.sum() > 0.3 * (x2 - x1) * (y2 - y1)  # they are circles, squares and triangles
        assert columns.min() >= x1 - 1e-3
        assert columns.max() < x2
        assert rows.min() >= y1 - 1e-3
        assert rows.max() < y2


@pytest.mark.parametrize("backend", ["ort", "portable"])
def test_masks_of_the_graph_are_those_of_the_prototypes(zoo, tmp_path, backend):
    image = read_image(zoo / "shapes" / "images" / "val0001.jpg")
    raw = load(zoo / "shapes" / "yolov8-p-seg.pt", size=256)
    found = []
    for masks in ("coefficients", "prototype"):
        with Detector(fuse(raw, backend=backend, masks=masks).save(tmp_path / f"{masks}.onnx")) as detector:
            found.append(detector(image)[0])
    assert len(found[0]) == len(found[1]) > 3
    for fine, coarse in zip(found[0].masks, found[1].masks, strict=True):
        edge = 4 * np.sqrt(fine.sum())  # pixels of 4 x 4 were decided before
        assert (fine ^ coarse).sum() < 2 * edge


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["yolov8-p-seg", "yolo11-p-pose", "yolov8-p-obb", "yolo26-p-obb"])
def test_metadata_says_what_suppresses(zoo, name, backend):
    fused = fuse(zoo / "shapes" / f"{name}.pt", size=256, backend=backend, unverified=True)
    by = {"ort": "NonMaxSuppression", "trt": "EfficientNMS_TRT", "portable": "tensor operators", "plugin": "FusedNMS"}[
        backend
    ]
    if "26" in name:
        by = "no suppression"
    elif "obb" in name and backend != "plugin":
        by = "tensor operators"
    assert fused.metadata["fusenms.suppression"] == by


@pytest.mark.parametrize("name", ["yolov8-p-seg", "yolov8-p-pose", "yolov8-p-obb"])
def test_open_size_equals_reference(zoo, name):
    settings = {"masks": "prototype"} if "seg" in name else {}
    fused = fuse(zoo / "shapes" / f"{name}.pt", size=160, dynamic_size=True, backend="portable", **settings)
    assert fused.report, fused.report


def test_detect_prints_and_draws_all_of_it(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = zoo / "shapes" / "images" / "val0000.jpg"
    for name, key in (("yolov8-p-seg", "polygons"), ("yolov8-p-pose", "keypoints"), ("yolov8-p-obb", "corners")):
        weights = zoo / "shapes" / f"{name}.pt"
        assert main([str(weights), "--size", "256", "--indices", "-o", "f.onnx"]) == 0
        assert main(["detect", "f.onnx", str(image), "-o", name]) == 0
        assert (tmp_path / name / image.name).is_file()
        capsys.readouterr()
        assert main(["detect", "f.onnx", str(image), "--no-draw", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["images"][0]["detections"]
        assert rows
        assert all(row[key] and row["index"] >= 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("yolov8-p-seg", "masks: 32 coefficients"),
        ("yolov8-p-pose", "keypoints: 4 of 3 numbers"),
        ("yolov8-p-obb", "turned by an angle"),
    ],
)
def test_inspect_says_what_else_the_head_gives(zoo, tmp_path, capsys, name, said):
    fused = fuse(zoo / "shapes" / f"{name}.pt", size=64, unverified=True)
    assert main(["inspect", str(fused.save(tmp_path / "f.onnx", unverified=True))]) == 0
    assert said in capsys.readouterr().out


def test_turned_boxes_are_drawn_as_they_lie(zoo, tmp_path):
    image = read_image(zoo / "shapes" / "images" / "val0000.jpg")
    with Detector(fuse(zoo / "shapes" / "yolov8-p-obb.pt", size=256).save(tmp_path / "f.onnx")) as detector:
        found = detector(image)[0]
    drawn = draw(np.zeros_like(image), found)
    for i in np.argsort(-np.abs(np.sin(2 * found.oriented_boxes[:, 4])))[:3]:
        for x, y in found.corners[i]:
            near = drawn[max(0, round(y) - 2) : round(y) + 3, max(0, round(x) - 2) : round(x) + 3]
            assert near.size == 0 or near.any()


def test_detections_of_other_models_have_no_masks_and_no_angle(tmp_path):
    from conftest import SHAPES

    with Detector(fuse(SHAPES / "shapes.pt", size=128).save(tmp_path / "f.onnx")) as detector:
        found = detector(SHAPES / "shapes0.jpg")[0]
    assert len(found) > 1
    assert len(found.masks) == 0
    assert np.asarray(found.masks).shape[0] == 0
    assert found.keypoints.shape == (len(found), 0, 2)
    assert not found.oriented_boxes[:, 4].any()
    np.testing.assert_allclose(found.corners[:, 2], found.boxes[:, :2], atol=1e-3)
    assert set(found.to_dicts()[0]) == {"label", "name", "score", "box"}


def test_corners_turn_from_x_to_y():
    box = np.array([[10.0, 20.0, 6.0, 2.0, np.pi / 2]])
    np.testing.assert_allclose(oriented_to_corners(box)[0], [[9, 23], [11, 23], [11, 17], [9, 17]], atol=1e-12)


@pytest.mark.parametrize("task", ["pose", "obb"])
def test_keypoints_and_turned_boxes_scale_with_the_image(zoo, tmp_path, task):
    """Each pixel four times: the network sees the same, and everything is twice as large."""
    image = read_image(zoo / "shapes" / "images" / "val0000.jpg")
    with Detector(fuse(zoo / "shapes" / f"yolov8-p-{task}.pt", size=256).save(tmp_path / "f.onnx")) as detector:
        small, large = detector([image, image.repeat(2, 0).repeat(2, 1)])
    assert len(small) > 3
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, atol=1e-3)
    np.testing.assert_allclose(large.keypoints[..., :2], 2 * small.keypoints[..., :2], atol=1e-3)
    np.testing.assert_allclose(large.oriented_boxes[:, :4], 2 * small.oriented_boxes[:, :4], atol=1e-3)
    np.testing.assert_array_equal(large.oriented_boxes[:, 4], small.oriented_boxes[:, 4])


def test_masks_are_chosen_as_arrays_are(zoo, tmp_path):
    with Detector(fuse(zoo / "shapes" / "yolov8-p-seg.pt", size=256).save(tmp_path / "f.onnx")) as detector:
        found = detector(zoo / "shapes" / "images" / "val0000.jpg")[0]
    every, good = np.asarray(found.masks), found.scores > np.median(found.scores)
    assert 0 < good.sum() < len(found)
    for some in (good, [0, 2], slice(1, 3), np.array([-1])):
        np.testing.assert_array_equal(np.asarray(found.masks[some]), every[some])
    np.testing.assert_array_equal(found.masks[-1], every[-1])
    with pytest.raises(ValueError, match="leave copy=False out"):
        np.array(found.masks, copy=False)
    assert all(len(outline) > 2 for outlines in found.masks.polygons() for outline in outlines)


def replaced(key: str, old: str, new: str):
    return lambda metadata: metadata.update({key: metadata[key].replace(old, new)})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            replaced("fusenms.layout", '"keypoints": {', '"keypoints": null, "was": {'),
            "task is 'pose', but its head is for 'detect'",
        ),
        (replaced("task", "pose", "segment"), "task is 'segment', but its head is for 'pose'"),
        (replaced("fusenms.layout", '"dims": 3', '"dims": 3.0'), "damaged"),
        (replaced("fusenms.layout", '"factor": 2.0', '"factor": "2"'), "damaged"),
    ],
)
def test_error_when_a_file_says_something_else_than_it_is(zoo, tmp_path, break_it, message):
    path = fuse(zoo / "shapes" / "yolov8-p-pose.pt", size=64, indices=True, unverified=True).save(
        tmp_path / "f.onnx", unverified=True
    )
    model = onnx.load(path)
    metadata = {item.key: item.value for item in model.metadata_props}
    break_it(metadata)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    with pytest.raises(SourceError, match=message):
        Detector(path)
