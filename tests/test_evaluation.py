"""`evaluate`: its metrics are those of separate code, ground truth that is wrong is refused, and what limits a result is said."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SHAPES, write_segmenter

import fusenms
from fusenms import Detector, PostprocessConfig, fuse
from fusenms.cli import main
from fusenms.errors import ConfigError, InputError, UnsupportedByBackendError
from fusenms.evaluation.classes import match_classes
from fusenms.evaluation.coco import read_coco
from fusenms.evaluation.models import SETTINGS
from fusenms.evaluation.raw import RawDetector
from fusenms.evaluation.scoring import encode_mask, score
from fusenms.evaluation.truth import GroundTruth, TrueImage, TrueObject
from fusenms.evaluation.yolo import read_yolo
from fusenms.limits import DEFAULT_LIMITS

sys.path.insert(0, str(SHAPES))
import evaluate as separate
from images import NAMES, draw_image

needs_library = pytest.mark.skipif(
    find_spec("faster_coco_eval") is None, reason="needs faster-coco-eval: pip install 'fusenms[eval]'"
)
SIZE = 192
IDS = (7, 2, 90)
"""Categories are not class numbers, and not in their order."""


class Drawn:
    """Images whose objects are known, in both formats, in one folder."""

    def __init__(self, folder: Path, count: int = 5) -> None:
        rng, self.folder = np.random.default_rng(4), folder
        self.truths, self.images = [], []
        for name in ("images", "labels"):
            (folder / name).mkdir()
        entries, annotations = [], []
        for i in range(count):
            image, boxes, labels = draw_image(rng, radii=(12.0, 96.0), visible=0.6)
            path = folder / "images" / f"{i}.png"
            cv2.imwrite(str(path), image[..., ::-1])
            self.images.append(path)
            self.truths.append((boxes, labels))
            height, width = image.shape[:2]
            entries.append({"id": 100 - i, "file_name": path.name, "height": height, "width": width})
            rows = []
            for (x1, y1, x2, y2), label in zip(boxes.astype(float).tolist(), labels.tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(
                    {"id": len(annotations), "image_id": 100 - i, "category_id": IDS[label], "bbox": box, "iscrowd": 0}
                )
                shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
                rows.append(" ".join(map(repr, (label, *shares))))
            (folder / "labels" / f"{i}.txt").write_text("\n".join(rows))
        categories = [{"id": number, "name": name} for number, name in zip(IDS, NAMES, strict=True)]
        self.data = {"images": entries, "annotations": annotations, "categories": categories}
        self.json = self.write(self.data)

    def write(self, data: object, name: str = "truth.json") -> Path:
        path = self.folder / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return Drawn(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def raw():
    return fusenms.load(SHAPES / "shapes.pt", size=SIZE)


@pytest.fixture(scope="module")
def fused(raw, tmp_path_factory):
    """A fused file with settings for mAP."""
    model = fuse(raw, unverified=True, **SETTINGS)
    return model.save(tmp_path_factory.mktemp("fused") / "f.onnx", unverified=True)


@pytest.fixture(scope="module")
def found(drawn, fused):
    if find_spec("faster_coco_eval") is None:
        pytest.skip("needs faster-coco-eval: pip install 'fusenms[eval]'")
    return fusenms.evaluate(fused, coco=drawn.json, images=drawn.folder / "images")


@pytest.mark.slow
def test_metrics_are_those_of_separate_code(found, drawn, fused):
    with Detector(fused) as detect:
        own = separate.mean_average_precision(drawn.truths, detect(drawn.images))
    assert 0.3 < own.mean() < 0.99  # neither nothing nor everything is found
    assert (found.map50_95, found.map50, found.boxes.map75) == pytest.approx((own.mean(), own[0], own[5]), abs=1e-9)


@pytest.mark.slow
def test_results_are_those_of_the_detector(found, drawn, fused):
    with Detector(fused) as detect:
        rows = [row for row in found.results if row["image_id"] == 98]
        expected = detect(drawn.images[2])[0]
    assert [row["category_id"] for row in rows] == [IDS[label] for label in expected.labels]
    boxes = np.array([row["bbox"] for row in rows])
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], expected.boxes[:, 2:], atol=2e-3)
    assert [np.float32(row["score"]) for row in rows] == expected.scores.tolist()


@pytest.mark.slow
def test_objects_and_classes_are_counted(found, drawn):
    labels = np.concatenate([labels for _, labels in drawn.truths])
    counts = {each.name: each.objects for each in found.boxes.classes}
    assert counts == {name: int((labels == i).sum()) for i, name in enumerate(NAMES)}
    assert (found.images, found.objects, found.matched) == (len(drawn.images), len(labels), "by name")
    assert np.mean([each.ap50_95 for each in found.boxes.classes]) == pytest.approx(found.map50_95)
    assert found.boxes.curves.mean(1).tolist() == pytest.approx([found.map50, found.boxes.map75, found.map50_95])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["", "images"])
def test_both_formats_give_the_same(where, found, drawn, fused):
    other = fusenms.evaluate(fused, yolo=drawn.folder / where)
    assert other.boxes.metrics == pytest.approx(found.boxes.metrics, abs=1e-9)
    assert other.matched == "by number"


@pytest.mark.slow
def test_deployed_folder_is_evaluated(found, drawn, fused, tmp_path):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fusenms[openvino]'")
    folder = fusenms.deploy(fused, tmp_path / "ir", target="openvino").folder
    other = fusenms.evaluate(folder, coco=drawn.json, images=drawn.folder / "images").boxes
    assert other.map50_95 == pytest.approx(found.boxes.map50_95, abs=1e-3)


@pytest.mark.slow
def test_sizes_are_those_of_the_areas(found, drawn, fused):
    """An object whose area says that it is small is one, whatever its box."""
    data = copy.deepcopy(drawn.data)
    for entry in data["annotations"]:
        entry["area"] = 100.0
    other = fusenms.evaluate(fused, coco=drawn.write(data, "small.json"), images=drawn.folder / "images").boxes
    assert (other.medium, other.large) == (None, None)
    assert other.small is not None
    assert found.boxes.large is not None


@pytest.mark.slow
@needs_library
def test_weights_are_fused_with_settings_for_map(drawn, found, raw):
    weights = fusenms.evaluate(raw, coco=drawn.json, images=drawn.folder / "images", against=True)
    assert weights.config == PostprocessConfig(
        score_threshold=0.001, iou_threshold=0.7, max_detections=300, multi_label=True
    )
    assert weights.boxes.metrics == found.boxes.metrics
    assert not weights.notes
    assert weights.raw_difference is not None
    assert weights.raw_difference <= 1e-6
    assert weights.equals_raw
    assert weights.raw_scores["boxes"].map50_95 > 0.3


@pytest.mark.slow
@needs_library
def test_difference_to_the_raw_model_is_found(drawn, raw):
    """The graph suppresses at 0.2, and its metadata say 0.7."""
    wrong = fuse(raw, unverified=True, **SETTINGS | {"iou_threshold": 0.2})
    wrong = replace(wrong, config=PostprocessConfig(**SETTINGS))
    got = fusenms.evaluate(wrong, coco=drawn.json, images=drawn.folder / "images", against=raw)
    assert not got.equals_raw
    assert got.raw_difference > 1e-3


@pytest.mark.slow
@needs_library
def test_file_with_a_higher_threshold_says_that_its_map_is_a_lower_bound(drawn, found, raw, tmp_path):
    path = fuse(raw, unverified=True).save(tmp_path / "f.onnx", unverified=True)
    got = fusenms.evaluate(path, coco=drawn.json, images=drawn.folder / "images")
    assert got.map50_95 < found.map50_95
    assert [note for note in got.notes if "lower bound" in note and "0.25" in note]
    assert [note for note in got.notes if "IoU > 0.45" in note]
    assert not found.notes


@pytest.mark.slow
@needs_library
def test_images_that_cannot_be_read_are_left_out_and_named(drawn, fused, capsys):
    data = copy.deepcopy(drawn.data)
    folder = drawn.folder / "images"
    (folder / "broken.png").write_bytes(drawn.images[0].read_bytes()[:900])
    data["images"] += [
        {"id": 1, "file_name": "broken.png", "height": 480, "width": 640},
        {"id": 2, "file_name": "missing.png", "height": 480, "width": 640},
        {"id": 3, "file_name": "0.png", "height": 640, "width": 480},
    ]
    for number in (1, 2, 3):
        data["annotations"].append({"image_id": number, "category_id": 2, "bbox": [0, 0, 50, 50]})
    path = drawn.write(data, "broken.json")
    got = fusenms.evaluate(fused, coco=path, images=folder)
    assert [Path(name).name for name, _ in got.failed] == ["broken.png", "missing.png", "0.png"]
    assert "says 480x640" in got.failed[2][1]
    assert got.images == len(drawn.images)
    assert got.objects == len(drawn.data["annotations"])
    assert main(["eval", str(fused), "--coco", str(path), "--images", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "missing.png" in printed
    assert "3 of 8 images" in printed


@pytest.mark.slow
@needs_library
def test_error_when_no_image_can_be_read(drawn, fused):
    with pytest.raises(InputError, match=r"none of its 5 images can be read.*0\.png"):
        fusenms.evaluate(fused, coco=drawn.json)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither coco and yolo"),
        ({"coco": "a", "yolo": "b"}, "both coco and yolo"),
        ({"yolo": "b", "images": "c"}, "leave images out"),
    ],
)
def test_error_without_one_ground_truth(arguments, message, fused):
    with pytest.raises(ConfigError, match=message):
        fusenms.evaluate(fused, **arguments)


@pytest.mark.slow
@needs_library
def test_error_when_settings_are_given_for_a_fused_file(drawn, fused):
    with pytest.raises(ConfigError, match="found iou_threshold, size, but the model is fused already"):
        fusenms.evaluate(fused, coco=drawn.json, iou_threshold=0.5, size=64)
    with pytest.raises(ConfigError, match="name its weights: against="):
        fusenms.evaluate(fused, coco=drawn.json, against=True)
    other = fusenms.load(SHAPES / "shapes.pt", size=64)
    with pytest.raises(ConfigError, match="takes 64x64 images"):
        fusenms.evaluate(fused, coco=drawn.json, against=other)


def changed(**changes):
    """Ground truth of one object, with changes at the places that are named: ``images_0_id=2``."""
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 480, "width": 640}],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "circle"}],
    }
    for place, value in changes.items():
        part, number, key = place.split("-")
        data[part][int(number)][key] = value
    return data


TWICE = changed()
for part in ("images", "categories"):
    TWICE[part] = TWICE[part] * 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is a JSON list"),
        ('[{"image_id": 1, "score": 1}]', "results of a detector"),
        ({"images": []}, "annotations is missing"),
        ({"images": {}, "annotations": [], "categories": []}, "images is {}"),
        ({"images": [1], "annotations": [], "categories": []}, "images is"),
        ({"images": [], "annotations": [], "categories": []}, "has no images"),
        (changed() | {"annotations": []}, "has 1 images and no objects"),
        (changed() | {"categories": []}, "has no categories"),
        (changed() | {"images": changed()["images"] * 2}, "more than one of its images has the id 1"),
        (changed() | {"categories": changed()["categories"] * 2}, "more than one of its categories has the id 1"),
        (changed(**{"images-0-id": "a"}), "found id 'a'"),
        (changed(**{"images-0-id": True}), "found id True"),
        (changed(**{"images-0-file_name": None}), "file_name of image 1 is missing"),
        (changed(**{"images-0-height": 0}), "height 0"),
        (changed(**{"annotations-0-image_id": 5}), "annotation 1: image_id is 5, but no image"),
        (changed(**{"annotations-0-category_id": 5}), "category_id is 5; expected the id of a category"),
        (changed(**{"annotations-0-bbox": [1, 2, 3]}), "bbox is"),
        (changed(**{"annotations-0-bbox": [1, 2, -3, 4]}), "bbox is"),
        (changed(**{"annotations-0-bbox": [1, 2, 3, float("nan")]}), "bbox is"),
        (changed(**{"annotations-0-bbox": [1, 2, 3, float("inf")]}), "bbox is"),
        (changed(**{"annotations-0-area": "large"}), "area is 'large'"),
        (changed(**{"annotations-0-iscrowd": 2}), "iscrowd is 2"),
        (changed(**{"annotations-0-segmentation": [[1, 2, 3]]}), "segmentation is"),
        (changed(**{"annotations-0-segmentation": {"size": [1]}}), "segmentation is"),
        (changed(**{"annotations-0-keypoints": [1, 2]}), "keypoints is"),
    ],
    ids=str,
)
def test_error_when_coco_is_malformed(data, message, tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(InputError, match=message) as error:
        read_coco(path, None, DEFAULT_LIMITS)
    assert str(error.value).startswith(str(path))


def test_coco_without_optional_entries_is_read(tmp_path):
    path = tmp_path / "truth.json"
    data = changed()
    del data["images"][0]["height"], data["images"][0]["width"]
    path.write_text(json.dumps(data))
    (image,) = read_coco(path, None, DEFAULT_LIMITS).images
    assert (image.size, image.path) == (None, tmp_path / "a.png")
    assert image.objects == (TrueObject(category=1, box=(1, 2, 3, 4), area=12),)


def yolo_folder(folder: Path, rows: str | bytes) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    shutil.copy(SHAPES / "shapes0.jpg", folder / "images" / "a.jpg")
    shutil.copy(SHAPES / "shapes0.jpg", folder / "images" / "000012.jpg")
    (folder / "labels" / "a.txt").write_bytes(rows.encode() if isinstance(rows, str) else rows)
    return folder


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no objects for the 2 images"),
        ("0 0.5 0.5 0.1", "line 1: has 3 numbers after the class"),
        ("\n0 0.5 0.5 0.1 0.1 0.1", "line 2: has 5 numbers after the class"),
        ("0.5 0.5 0.5 0.1 0.1", "expected a class number"),
        ("-1 0.5 0.5 0.1 0.1", "expected a class number"),
        ("0 0.5 nan 0.1 0.1", "finite numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected numbers"),
        ("0 320 240 20 20", "outside of 0 to 1"),
        (b"\xff\xfe0", "is not text"),
    ],
)
def test_error_when_labels_are_malformed(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_yolo(yolo_folder(tmp_path, rows), DEFAULT_LIMITS).truth(None)


def test_error_when_a_folder_is_missing(tmp_path):
    with pytest.raises(InputError, match="has no folder images"):
        read_yolo(tmp_path, DEFAULT_LIMITS)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="labels: is not a folder"):
        read_yolo(tmp_path, DEFAULT_LIMITS)


def test_rows_are_boxes_outlines_or_keypoints(tmp_path):
    folder = read_yolo(
        yolo_folder(tmp_path, "1 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.5 0.1 0.5 0.3\n"), DEFAULT_LIMITS
    )
    truth = folder.truth(None)
    assert [image.key for image in truth.images] == [12, "a"]
    box, outline = truth.images[1].objects
    assert box.box == pytest.approx((0.4, 0.3, 0.2, 0.4))
    assert (outline.box, outline.area) == (pytest.approx((0.1, 0.1, 0.4, 0.2)), pytest.approx(0.04))
    assert len(truth.notes) == 2  # an image without a file, a row that stands twice
    entry = outline.annotation(1, 1, (100.0, 50.0))
    assert entry["segmentation"] == [pytest.approx([10, 5, 50, 5, 50, 15])]
    assert entry["area"] == pytest.approx(200)


@pytest.mark.parametrize(
    ("dims", "row", "points"),
    [(3, "0.2 0.3 2 0.4 0.5 0", (0.2, 0.3, 2, 0.4, 0.5, 0)), (2, "0.2 0.3 0 0", (0.2, 0.3, 2, 0, 0, 0))],
)
def test_keypoints_have_a_visibility(dims, row, points, tmp_path):
    truth = read_yolo(yolo_folder(tmp_path, f"0 0.5 0.5 0.2 0.4 {row}"), DEFAULT_LIMITS).truth((2, dims))
    (entry,) = truth.images[1].objects
    assert entry.keypoints == points
    assert entry.annotation(1, 1, (10.0, 20.0))["keypoints"][:3] == [2, 6, 2]
    assert entry.annotation(1, 1, (10.0, 20.0))["num_keypoints"] == 1


def categories(*names: str, first: int = 1, classes: tuple[int, ...] = (1,)) -> GroundTruth:
    objects = tuple(TrueObject(category=number, box=(0, 0, 1, 1), area=1) for number in classes)
    named = {first + i: name for i, name in enumerate(names)} or None
    return GroundTruth(
        source="t.json", images=(TrueImage(key=1, path=Path("a"), size=None, objects=objects),), categories=named
    )


@pytest.mark.parametrize(
    ("truth", "labels", "matched"),
    [
        (categories("cat", "dog", "bird"), {0: 1, 1: 2, 2: 3}, "by name"),
        (categories("dog", "Cat", "bird"), {0: 2, 1: 1, 2: 3}, "by name"),
        (categories("bird"), {2: 1}, "by name"),
        (categories("kitten", "dog", "bird", first=5), {0: 5, 1: 6, 2: 7}, "by order (1 of 3 names differ)"),
        (categories("a", "a", "a"), {0: 1, 1: 2, 2: 3}, "by order (3 of 3 names differ)"),
        (categories(classes=(0, 2)), {0: 0, 1: 1, 2: 2}, "by number"),
    ],
)
def test_classes_are_matched(truth, labels, matched):
    got, _, how = match_classes(("cat", "dog", "bird"), truth)
    assert (got, how) == (labels, matched)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (categories("cat", "fish"), r"categories \(2\): cat, fish\nmodel \(3\): cat, dog, bird"),
        (categories("dog", "fish", "bird"), "are not the classes"),  # by order a dog would be a cat
        (categories(classes=(0, 3)), "objects of class 3, but the model has 3 classes"),
    ],
)
def test_error_when_classes_do_not_match(truth, message):
    with pytest.raises(InputError, match=message):
        match_classes(("cat", "dog", "bird"), truth)


@pytest.mark.slow
@needs_library
def test_error_when_a_label_has_a_class_that_the_model_lacks(fused, tmp_path):
    with pytest.raises(
        InputError, match="objects of class 3, but the model has 3 classes, 0 to 2: circle, square, triangle"
    ):
        fusenms.evaluate(fused, yolo=yolo_folder(tmp_path, "3 0.5 0.5 0.2 0.4"))


def one(number: int, crowd: bool = False, **extra: object) -> dict[str, object]:
    box = [10.0 * number, 10.0, 8.0, 40.0]
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 320.0, "iscrowd": int(crowd)} | extra


@needs_library
@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints"])
def test_perfect_results_score_one(kind):
    mask = np.zeros((60, 60), bool)
    mask[10:50, 10:18] = True
    annotation = one(
        1,
        segmentation=[[10, 10, 18, 10, 18, 50, 10, 50]],
        keypoints=[12.0, 20.0, 2.0, 16.0, 40.0, 2.0],
        num_keypoints=2,
    )
    result = {**annotation, "score": 0.5, "segmentation": encode_mask(mask)}
    got = score(kind, {1: (60, 60)}, {1: "a"}, [annotation], [result])
    assert got.metrics | {"small": 1, "medium": 1} == pytest.approx(
        {"map50_95": 1, "map50": 1, "map75": 1, "small": 1, "medium": 1, "large": None, "recall": 1}
    )
    moved = {
        **result,
        "bbox": [14, 10, 8, 40],
        "keypoints": [30.0, 20, 1, 36, 40, 1],
        "segmentation": encode_mask(np.roll(mask, 4, 1)),
    }
    assert score(kind, {1: (60, 60)}, {1: "a"}, [annotation], [moved]).map50_95 < 0.3


@needs_library
def test_detections_in_a_crowd_do_not_count():
    truth, crowd = one(1), one(3, crowd=True)
    right, inside = {**truth, "score": 0.2}, {**crowd, "score": 0.9}
    assert score("boxes", {1: (60, 60)}, {1: "a"}, [truth, crowd], [right, inside]).map50_95 == 1
    assert score("boxes", {1: (60, 60)}, {1: "a"}, [truth], [right, inside]).map50_95 == pytest.approx(0.5)


@needs_library
def test_size_of_a_mask_is_its_own_and_not_that_of_its_box():
    """A wrong mask that is small does not count among objects of medium size, however large its box is."""
    mask = np.zeros((90, 90), bool)
    mask[10:60, 10:60] = True
    small = np.zeros((90, 90), bool)
    small[80:85, 10:15] = small[20:25, 80:85] = True
    truth = one(1, bbox=[10, 10, 50, 50], area=2500, segmentation=encode_mask(mask))
    right, wrong = (
        {**truth, "score": 0.2},
        {**truth, "score": 0.9, "segmentation": encode_mask(small), "bbox": [10, 20, 75, 65]},
    )
    got = score("masks", {1: (90, 90)}, {1: "a"}, [truth], [right, wrong])
    assert (got.medium, got.map50_95) == (1, pytest.approx(0.5))


@needs_library
def test_no_detections_score_zero():
    got = score("boxes", {1: (60, 60)}, {1: "a", 2: "b"}, [one(1)], [])
    assert (got.map50_95, got.recall) == (0, 0)
    assert [each.ap50 for each in got.classes] == [0, None]


@pytest.mark.slow
@needs_library
def test_command_prints_plots_and_saves(drawn, fused, found, tmp_path, capsys):
    plot, saved = tmp_path / "pr.svg", tmp_path / "results.json"
    words = ["eval", str(fused), "--coco", str(drawn.json), "--images", str(drawn.folder / "images")]
    assert main([*words, "--plot", str(plot), "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert f"{found.map50_95:.4f}" in printed
    assert all(name in printed for name in NAMES)
    assert "IoU 0.5:" in plot.read_text() or plot.stat().st_size > 1000
    results = json.loads(saved.read_text())
    assert results == found.results
    numbers = {entry["id"]: (entry["height"], entry["width"]) for entry in drawn.data["images"]}
    annotations = [
        entry | {"id": entry["id"] + 1, "area": entry["bbox"][2] * entry["bbox"][3]}
        for entry in drawn.data["annotations"]
    ]
    names = {entry["id"]: entry["name"] for entry in drawn.data["categories"]}
    assert score("boxes", numbers, names, annotations, results).metrics == found.boxes.metrics
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["scores"]["boxes"]["map50_95"] == found.map50_95
    assert values["config"]["score_threshold"] == 0.001


@pytest.mark.slow
@needs_library
def test_command_fails_when_the_raw_model_differs(drawn, raw, fused, monkeypatch, capsys):
    reads = RawDetector.__call__
    monkeypatch.setattr(RawDetector, "__call__", lambda self, image: reads(self, image[:, ::-1].copy()))
    monkeypatch.setattr("fusenms.evaluation.models.load", lambda *_, **__: raw)
    words = ["eval", str(fused), "--coco", str(drawn.json), "--images", str(drawn.folder / "images")]
    assert main([*words, "--against-raw", "shapes.pt"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_flags_that_are_not_given_leave_the_settings():
    from fusenms.cli import build_parser
    from fusenms.cli.eval import given_fields

    words = ["eval", "f.pt", "--yolo", "d"]
    assert given_fields(build_parser().parse_args(words)) == {}
    words += ["--no-multi-label", "--score-threshold", "0", "--size", "64", "--no-stretch"]
    expected = {"multi_label": False, "score_threshold": 0.0, "size": 64, "stretch": False}
    assert given_fields(build_parser().parse_args(words)) == expected


@needs_library
@pytest.mark.slow
def test_masks_of_the_raw_model_are_those_of_the_fused_one(drawn, tmp_path):
    """The masks of this model are random, so its own masks are taken for the truth."""
    path = write_segmenter(tmp_path / "s.pt")
    with_boxes = fusenms.evaluate(path, coco=drawn.json, images=drawn.folder / "images", size=64, score_threshold=0.1)
    assert any("masks are not evaluated" in note for note in with_boxes.notes)
    data = copy.deepcopy(drawn.data)
    rows = [row for row in with_boxes.results if "1" in row["segmentation"]["counts"]][:40]
    data["annotations"] = [{**row, "segmentation": row["segmentation"]} for row in rows]
    truth = drawn.write(data, "masks.json")
    got = fusenms.evaluate(path, coco=truth, images=drawn.folder / "images", size=64, score_threshold=0.1, against=True)
    assert set(got.scores) == {"boxes", "masks"}
    assert got.scores["masks"].map50_95 > 0.3
    assert got.raw_difference <= 1e-4


def shapes_truth(folder: Path, target: Path) -> Path:
    """The validation images of the small checkpoints beside the repository, with outlines and keypoints."""
    data = json.loads((folder / "images.json").read_text())
    entries, annotations = [], []
    for i, (name, image) in enumerate(data["images"].items()):
        entries.append({"id": i, "file_name": name, "height": image["height"], "width": image["width"]})
        for each in image["objects"]:
            x1, y1, x2, y2 = each["box"]
            outline = [value for point in each["polygon"] for value in point]
            points = [value for point in each["keypoints"] for value in (*point, 2)]
            annotations.append(
                {"image_id": i, "category_id": each["label"], "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [outline],
                 "keypoints": points}
            )  # fmt: skip
    named = [{"id": i, "name": name} for i, name in enumerate(data["names"])]
    target.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": named}))
    return target


@needs_library
@pytest.mark.parametrize(("name", "kind"), [("yolov8-p-seg", "masks"), ("yolov8-p-pose", "keypoints")])
def test_tasks_of_trained_checkpoints(name, kind, zoo, tmp_path):
    folder = zoo / "shapes"
    truth = shapes_truth(folder, tmp_path / "truth.json")
    got = fusenms.evaluate(folder / f"{name}.pt", coco=truth, images=folder / "images", against=True)
    assert set(got.scores) == {"boxes", kind}
    assert got.raw_difference <= 1e-4
    assert got.map50 > 0.5
    assert got.scores[kind].map50 > 0.5


@needs_library
def test_error_for_oriented_boxes(zoo, tmp_path):
    folder = zoo / "shapes"
    with pytest.raises(UnsupportedByBackendError, match="oriented boxes, for which COCO defines no metric"):
        fusenms.evaluate(
            folder / "yolov8-p-obb.pt", coco=shapes_truth(folder, tmp_path / "truth.json"), images=folder / "images"
        )
