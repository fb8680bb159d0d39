"""The demo detector: its samples are found as the generator drew them, and its scripts run."""

from __future__ import annotations

import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import ROOT, SHAPES

import fusenms
from fusenms import Detections, Detector, fuse
from fusenms.heads import recognize

sys.path.insert(0, str(SHAPES))
import demo_image
import evaluate
import images
import train

SAMPLES = {name: (image, boxes, labels) for name, image, boxes, labels in images.sample_images()}


@pytest.fixture(scope="module")
def detect(tmp_path_factory):
    path = fuse(SHAPES / "shapes.pt", unverified=True).save(
        tmp_path_factory.mktemp("shapes") / "f.onnx", unverified=True
    )
    with Detector(path) as detector:
        yield detector


def smooth(image: np.ndarray) -> np.ndarray:
    return cv2.blur(image, (5, 5)).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_every_object_of_a_sample_is_found_and_nothing_else(detect, name):
    _, boxes, labels = SAMPLES[name]
    assert len(labels) >= 10
    assert evaluate.mistakes((boxes, labels), detect(SHAPES / name)[0], least_iou=0.7) == []


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_the_image_that_the_generator_draws(name):
    stored = cv2.imread(str(SHAPES / name))[..., ::-1]
    assert np.abs(smooth(stored) - smooth(SAMPLES[name][0])).mean() < 1.5  # JPEG does not keep the grain


@pytest.mark.slow
def test_fresh_images_are_found(detect):
    rng = np.random.default_rng(2)
    drawn = [images.draw_image(rng) for _ in range(20)]
    truths = [(boxes, labels) for _, boxes, labels in drawn]
    values = evaluate.mean_average_precision(truths, detect([image for image, _, _ in drawn]))
    assert values[0] > 0.93, values


@pytest.mark.parametrize("height", [120, 480])
def test_shapes_stay_visible_within_the_image(height):
    rng = np.random.default_rng(0)
    for _ in range(5):
        image, boxes, labels = images.draw_image(rng, height, 160, radii=(6.0, 40.0), visible=0.65)
        assert image.shape == (height, 160, 3) and image.dtype == np.uint8 and len(boxes) == len(labels)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (160, height)).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 4).all()


def found(detections: Detections, rows: list[int], labels: np.ndarray, boxes: np.ndarray) -> Detections:
    """Detections that say so, made of some of a detector's."""
    some = {name: getattr(detections, name)[rows] for name in ("oriented_boxes", "keypoints", "indices")}
    scores = np.linspace(0.9, 0.5, len(rows)).astype(np.float32)
    return replace(detections, boxes=boxes, labels=labels.astype(np.int32), scores=scores, **some)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda boxes, labels: (boxes, labels), []),
        (lambda boxes, labels: (boxes + 30, labels), ["missed", "missed", "false", "false"]),
        (lambda boxes, labels: (boxes, 2 - labels), ["missed", "missed", "false", "false"]),
        (lambda boxes, labels: (boxes[:1], labels[:1]), ["missed"]),
        (lambda boxes, labels: (boxes[[0, 1, 0]], labels[[0, 1, 0]]), ["false"]),
    ],
)
def test_mistakes_are_named(detect, change, wrong):
    truth = np.array([[10, 10, 50, 50], [100, 20, 140, 80]], np.float32), np.array([0, 2])
    boxes, labels = change(*truth)
    rows = found(detect(SHAPES / "shapes0.jpg")[0], list(range(len(boxes))), labels, boxes)
    assert [line.split(":")[0] for line in evaluate.mistakes(truth, rows)] == wrong


@pytest.mark.parametrize(
    ("hits", "total", "value"),
    [([], 2, 0), ([1, 1], 2, 1), ([1], 2, 51 / 101), ([0, 1], 1, 0.5), ([1, 0, 1], 2, (51 + 50 * 2 / 3) / 101)],
)
def test_average_precision_is_that_of_coco(hits, total, value):
    assert evaluate.average_precision(np.array(hits, bool), total) == pytest.approx(value)


@pytest.mark.thorough
@pytest.mark.slow
def test_training_writes_a_checkpoint_that_is_recognized(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2", "--out", str(tmp_path / "two-steps.pt")])
    train.main()
    raw = fusenms.load(tmp_path / "two-steps.pt", size=64)
    assert recognize(raw).family == recognize(fusenms.load(SHAPES / "shapes.pt", size=64)).family == "yolov8"
    assert (tmp_path / "two-steps.pt").stat().st_size == pytest.approx((SHAPES / "shapes.pt").stat().st_size, rel=0.01)


@pytest.mark.thorough
@pytest.mark.slow
def test_the_image_of_the_readme_is_drawn_again():
    again = demo_image.demo_image()
    stored = cv2.imread(str(ROOT / "docs" / "demo.jpg"))[..., ::-1]
    assert again.shape == stored.shape
    assert np.abs(smooth(again) - smooth(stored)).mean() < 3  # other versions of OpenCV have another font
