"""What is drawn: boxes, keypoints, masks, and labels that neither cover each other nor leave the image."""

from __future__ import annotations

import numpy as np
import pytest

from fusenms.boxes import cxcywh_to_xyxy, oriented_to_corners, upright_around
from fusenms.runtime.detections import Detections
from fusenms.runtime.drawing import draw, draw_shapes, labels_of, save_image, text_height
from fusenms.runtime.masks import Masks
from fusenms.runtime.placement import Placement

NAMES = ("tie", "person", "triangle", "a class name that is longer than most of them", "Größe 大")


def random_detections(
    height: int,
    width: int,
    count: int,
    *,
    oriented: bool = False,
    keypoints: int = 0,
    masks: bool = False,
    seed: int = 0,
) -> Detections:
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(0.02), np.log(0.3), (count, 2))) * min(height, width)
    angles = rng.uniform(-np.pi / 2, np.pi / 2, (count, 1)) * oriented
    rows = np.concatenate((rng.uniform(0, 1, (count, 2)) * (width, height), sides, angles), 1).astype(np.float32)
    if not oriented:
        low, high = np.split(cxcywh_to_xyxy(rows[:, :4]).clip(0, [width, height] * 2), 2, axis=1)
        rows[:, :4] = np.concatenate(((low + high) / 2, high - low), 1)
    boxes = upright_around(oriented_to_corners(rows)).clip(0, [width, height] * 2).astype(np.float32)
    points = rng.uniform(0, 1, (count, keypoints, 3)).astype(np.float32)
    points[..., :2] = boxes[:, None, :2] + points[..., :2] * (boxes[:, None, 2:] - boxes[:, None, :2])
    logits = np.ones((count if masks else 0, 8, 8), np.float32)
    return Detections(
        boxes=boxes,
        scores=np.sort(rng.uniform(0.25, 1, count))[::-1].astype(np.float32),
        labels=rng.integers(0, len(NAMES), count).astype(np.int32),
        class_names=NAMES,
        oriented_boxes=rows,
        keypoints=points,
        masks=Masks(logits, boxes, Placement(height, width, 0, 0, 8, 8), (8, 8)),
        indices=np.full(count, -1, np.int32),
        oriented=oriented,
    )


CASES = [
    *[(height, width, 12, {}) for height, width in [(1, 1), (32, 32), (64, 48), (20, 900), (480, 640), (2160, 3840)]],
    (480, 640, 0, {}),
    (480, 640, 1, {}),
    (480, 640, 300, {}),
    (32, 32, 300, {}),
    (480, 640, 30, {"oriented": True}),
    (480, 640, 20, {"keypoints": 17}),
    (240, 320, 20, {"masks": True}),
]


@pytest.mark.parametrize(("height", "width", "count", "kind"), CASES)
def test_labels_neither_overlap_nor_leave_the_image(height, width, count, kind):
    owner = np.full((height, width), -1)
    for i, label in enumerate(labels_of(height, width, random_detections(height, width, count, **kind))):
        left, top, right, bottom = label.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height, label
        assert (owner[top:bottom, left:right] == -1).all(), label
        owner[top:bottom, left:right] = i


@pytest.mark.parametrize(("height", "width", "count", "kind"), CASES)
def test_a_label_is_drawn_in_its_box_only(height, width, count, kind):
    image, detections = np.full((height, width, 3), 90, np.uint8), random_detections(height, width, count, **kind)
    drawn, shapes = draw(image, detections), image.copy()
    draw_shapes(shapes, detections)
    for label in labels_of(height, width, detections):
        left, top, right, bottom = label.box
        shapes[top:bottom, left:right] = drawn[top:bottom, left:right]
    np.testing.assert_array_equal(drawn, shapes)
    assert (image == 90).all()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (2160, 3840)])
def test_every_label_finds_a_place_when_there_is_room(height, width):
    for seed in range(5):
        labels = labels_of(height, width, random_detections(height, width, 25, seed=seed))
        assert [label.row for label in labels] == list(range(25))
        assert all(label.text.count(" ") for label in labels), "a label without its name"


def test_labels_touch_their_boxes():
    detections = random_detections(480, 640, 40)
    for label in labels_of(480, 640, detections):
        left, top, right, bottom = label.box
        x1, y1, x2, y2 = detections.boxes[label.row]
        assert left <= x2 + 1 and right >= x1 - 1 and top <= y2 + 1 and bottom >= y1 - 1, label


def test_a_label_lies_above_its_box_when_nothing_else_is_there():
    (label,) = labels_of(480, 640, detections := random_detections(480, 640, 1))
    assert label.box[3] == round(float(detections.boxes[0, 1]))


def test_labels_of_the_lowest_scores_are_left_out_when_there_is_no_room():
    rows = [label.row for label in labels_of(96, 96, random_detections(96, 96, 200))]
    assert 5 < len(rows) < 200
    assert rows[0] == 0 and np.mean(rows) < 100


def test_text_grows_with_the_image():
    heights = [text_height(side, side) for side in (32, 256, 1024, 4096)]
    assert heights == sorted(heights) and heights[0] == 10 and 40 < heights[-1] < 100
    shown = [labels_of(side, side, random_detections(side, side, 1))[0].box for side in (256, 4096)]
    assert shown[1][3] - shown[1][1] > 3 * (shown[0][3] - shown[0][1])


def test_text_becomes_smaller_when_there_are_many_labels():
    few, many = (labels_of(480, 640, random_detections(480, 640, count))[0] for count in (3, 300))
    assert many.box[3] - many.box[1] < few.box[3] - few.box[1]


def test_keypoints_stay_visible_when_labels_can_avoid_them():
    detections = random_detections(480, 640, 10, keypoints=5)
    for label in labels_of(480, 640, detections):
        x, y = detections.keypoints[label.row, :, :2].T
        left, top, right, bottom = label.box
        assert not ((x > left) & (x < right) & (y > top) & (y < bottom)).any(), label


def test_hundreds_of_labels_are_placed_in_time():
    from time import process_time

    start = process_time()
    labels_of(2160, 3840, random_detections(2160, 3840, 300))
    assert process_time() - start < 5  # 0.2 s on a core of its own


def test_written_images_are_read_back(tmp_path):
    import cv2

    image = draw(np.full((60, 80, 3), 200, np.uint8), random_detections(60, 80, 3))
    path = save_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], image)
