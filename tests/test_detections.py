"""`Detections` in the hands of others: rows of it, several together, tables, COCO's results, supervision."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
from test_drawing import random_detections

from fusenms import Detections
from fusenms.errors import InputError
from fusenms.runtime.masks import Masks


def found(**changes: object) -> Detections:
    return random_detections(120, 160, 12, keypoints=3, masks=True, **changes)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (3, [3]),
        (-1, [11]),
        (slice(2, 5), [2, 3, 4]),
        ([0, 7], [0, 7]),
        (np.arange(12) % 4 == 1, [1, 5, 9]),
        ([], []),
        (np.zeros(12, bool), []),
    ],
)
def test_rows_are_chosen_as_of_an_array(rows, expected):
    every = found()
    some = every[rows]
    assert len(some) == len(expected) == len(some.masks)
    for name in ("boxes", "scores", "labels", "oriented_boxes", "keypoints", "indices"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[expected])
    for mask, number in zip(some.masks, expected, strict=True):
        np.testing.assert_array_equal(mask, every.masks[number])


@pytest.mark.parametrize("rows", [12, np.ones(5, bool)])
def test_error_when_there_is_no_such_row(rows):
    with pytest.raises(IndexError):
        found()[rows]


def test_parts_together_are_the_whole():
    every = found()
    again = Detections.concatenate([every[:5], every[5:5], every[5:]])
    np.testing.assert_array_equal(again.boxes, every.boxes)
    np.testing.assert_array_equal(np.asarray(again.masks), np.asarray(every.masks))
    assert again.to_dicts() == every.to_dicts()


def test_masks_of_other_inputs_are_joined_at_the_size_of_the_image():
    every = found()
    other = Detections(
        boxes=every.boxes, scores=every.scores, labels=every.labels, class_names=every.class_names, keypoints=every.keypoints,
        masks=Masks.of_arrays(np.asarray(every.masks)),
    )  # fmt: skip
    both = Detections.concatenate([every, other])
    np.testing.assert_array_equal(np.asarray(both.masks), np.concatenate([np.asarray(every.masks)] * 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (random_detections(120, 160, 2), "other keypoints"),
        (random_detections(120, 160, 2, keypoints=3, oriented=True), "another kind of boxes"),
        (random_detections(120, 160, 2, keypoints=3), "masks and others without"),
    ],
)
def test_error_when_parts_do_not_fit(other, message):
    with pytest.raises(InputError, match=message):
        Detections.concatenate([found(), other])
    with pytest.raises(InputError, match="at least one"):
        Detections.concatenate([])


def test_fields_have_defaults():
    boxes = np.array([[10, 20, 30, 60]], np.float32)
    one = Detections(boxes=boxes, scores=np.ones(1, np.float32), labels=np.zeros(1, np.int32))
    assert one.oriented_boxes.tolist() == [[20, 40, 20, 40, 0]]
    assert (one.keypoints.shape, len(one.masks), one.indices.tolist()) == ((1, 0, 2), 0, [-1])
    assert one.name(0) == "class0"


def test_crops_are_the_pixels_inside():
    image = np.arange(120 * 160 * 3, dtype=np.uint32).reshape(120, 160, 3)
    boxes = np.array([[10.2, 20, 29.5, 60], [155, 118, 160, 120], [50, 50, 50, 50], [-9, -9, 3, 2]], np.float32)
    some = Detections(boxes=boxes, scores=np.ones(4, np.float32), labels=np.zeros(4, np.int32))
    crops = some.crop(image)
    np.testing.assert_array_equal(crops[0], image[20:60, 10:30])
    assert [crop.shape[:2] for crop in crops] == [(40, 20), (2, 5), (1, 1), (2, 3)]


def test_coco_results_have_corner_and_size():
    every = found()
    rows = every.to_coco(7, categories=[90, 80, 70, 60, 50])
    for row, box, score, label in zip(rows, every.boxes, every.scores, every.labels, strict=True):
        assert row["image_id"] == 7 and row["category_id"] == [90, 80, 70, 60, 50][label]
        np.testing.assert_allclose(row["bbox"], [*box[:2], *(box[2:] - box[:2])], atol=1e-3)
        assert row["score"] == pytest.approx(score, abs=1e-6)
        assert len(row["keypoints"]) == 9 and all(len(polygon) % 2 == 0 for polygon in row["segmentation"])
    assert every.to_coco(1)[0]["category_id"] == every.labels[0]


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_pandas"), ("pyarrow", "to_arrow")])
def test_tables_have_a_row_for_each_detection(package, method):
    pytest.importorskip(package)
    every = random_detections(120, 160, 6, oriented=True)
    table = getattr(every, method)()
    columns = table.to_dict("list") if package == "pandas" else table.to_pydict()
    assert list(columns) == ["x1", "y1", "x2", "y2", "cx", "cy", "w", "h", "angle", "score", "label", "name"]
    np.testing.assert_array_equal(columns["y2"], every.boxes[:, 3])
    np.testing.assert_array_equal(columns["angle"], every.oriented_boxes[:, 4])
    assert columns["name"] == [every.name(label) for label in every.labels]


@pytest.mark.parametrize("method", ["to_pandas", "to_arrow", "to_supervision"])
def test_error_names_the_package_that_is_missing(method, monkeypatch):
    package = {"to_pandas": "pandas", "to_arrow": "pyarrow", "to_supervision": "supervision"}[method]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        getattr(found(), method)()


def test_supervision_takes_and_gives_the_same(monkeypatch):
    """supervision itself where it is installed; else a class with its fields."""
    if importlib.util.find_spec("supervision") is None:
        monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=types.SimpleNamespace))
    every = found()
    theirs = every.to_supervision()
    assert theirs.data["class_name"].tolist() == [every.name(label) for label in every.labels]
    again = Detections.from_supervision(theirs, every.class_names)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(every, name))
    np.testing.assert_array_equal(np.asarray(again.masks), np.asarray(every.masks))
    turned = random_detections(120, 160, 4, oriented=True)
    np.testing.assert_allclose(turned.to_supervision().data["xyxyxyxy"], turned.corners, atol=1e-4)


def test_drawn_as_by_draw():
    from fusenms.runtime.drawing import draw

    image = np.full((120, 160, 3), 90, np.uint8)
    np.testing.assert_array_equal(found().draw(image), draw(image, found()))
