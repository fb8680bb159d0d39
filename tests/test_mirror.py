"""What is found in images of real objects, and found again in their mirror images, shows a layout and its pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SHAPES

from fusenms import fuse, inspect, load, recognize
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.cli import main
from fusenms.errors import AmbiguousHeadError, HeadError, LayoutContradictedError
from fusenms.heads import mirror, raw_head
from fusenms.heads.meaning import check_meaning
from fusenms.heads.mirror import Seen
from fusenms.heads.mirror_cells import mirror_boxes
from fusenms.layout import BoxFormat, Distances
from fusenms.runtime import example_images as shipped
from fusenms.runtime.example_images import example_images
from fusenms.transforms.dynamic_batch import open_batch

YOLO, QUERIES = "yolo11n_dynint8_320.onnx", "deimv2_atto_320.onnx"


def opened(path):
    raw = load(path)
    raw = open_batch(raw, recognize(raw))
    return raw, raw_head(raw, recognize(raw))


@pytest.fixture(scope="module")
def yolo(zoo):
    return opened(zoo / YOLO)


@pytest.fixture(scope="module")
def queries(zoo):
    return opened(zoo / QUERIES)


def look(raw, head, strict=False):
    lines = check_meaning(raw, head, [example_images(raw.image.height, raw.image.width)], strict)
    return next(line for line in lines if "shown on images" in line)


def test_detectors_of_everyday_objects_are_shown(yolo, queries):
    assert look(*yolo, strict=True) == "shown on images: 6 objects found again in mirror images"
    assert look(*queries).startswith("shown on images: 13 objects ")


def test_small_detector_is_shown_and_its_wrong_reading_is_asked_for(zoo):
    """BlazeFace at 128 pixels; read with x and y exchanged, it finds no face again."""
    file = zoo.parent / "cases" / "files" / "blazeface_front_base.onnx"
    if not file.is_file():
        pytest.skip(f"needs {file.name} of the cases")
    raw, head = opened(file)
    assert raw.image.height == 128
    assert look(raw, head, strict=True).startswith("shown on images: ")
    wrong = replace(head, layout=replace(head.layout, boxes=replace(head.layout.boxes, start=1, stop=5)))
    images = [example_images(128, 128)]
    with pytest.raises(AmbiguousHeadError, match="say family='blazeface'"):
        check_meaning(raw, wrong, images, guessed=True)


@pytest.mark.parametrize("name", ["rgb255", "imagenet"])
def test_other_pixels_that_find_clearly_more_are_named(yolo, name):
    raw, head = yolo
    with pytest.raises(
        LayoutContradictedError,
        match=r"objects again in mirror images, and with pixels rgb clearly more; give pixels='rgb'",
    ):
        look(raw, replace(head, pixels=PIXELS[name]))


def test_pixels_that_somebody_states_are_taken(yolo):
    raw, head = yolo
    line = look(replace(raw, pixels=PIXELS["imagenet"]), replace(head, pixels=PIXELS["imagenet"]))
    assert line.startswith("not shown on images: ")


def test_queries_whose_centers_are_read_as_corners(queries):
    """They have no cells, so nothing but images shows it."""
    raw, head = queries
    wrong = replace(head.layout, decode=replace(head.layout.decode, format=BoxFormat.CXCYWH))
    with pytest.raises(LayoutContradictedError, match="only if its boxes are xyxy in pixels"):
        look(raw, replace(head, layout=wrong))


@pytest.mark.parametrize("file", [YOLO, "nanodet_m_416.onnx"])
def test_half_a_cell(zoo, file):
    raw, head = opened(zoo / file)
    decode = head.layout.decode
    assert isinstance(decode, Distances)
    wrong = replace(head.layout, decode=replace(decode, point=0.5 - decode.point))
    with pytest.raises(
        LayoutContradictedError, match=r"lies (0\.[89]|1)\d* cells beside what it finds in mirror images"
    ):
        look(raw, replace(head, layout=wrong))


def test_a_detector_of_something_else_is_not_shown():
    raw = load(SHAPES / "shapes.pt", size=256)
    head = raw_head(raw, raw.layout)
    assert look(raw, head).startswith("not shown on images: ")
    with pytest.raises(HeadError, match=r"that is not shown on images \(.*\); give images of objects that it knows"):
        look(raw, head, strict=True)


def test_images_of_the_user_are_looked_at(tmp_path):
    """The example images hold no shapes, these do: six of the eight that are looked at."""
    images = np.concatenate([example_images(256, 256), *[_shapes()] * 2])
    fused = fuse(SHAPES / "shapes.pt", size=256, images=images, strict=True)
    assert any(note.startswith("shown on images: ") for note in fused.notes)


def _shapes():
    from fusenms.runtime.images import read_image
    from fusenms.runtime.placement import letterbox, to_tensor

    return to_tensor([letterbox(read_image(SHAPES / f"shapes{i}.jpg"), 256, 256)[0] for i in (0, 1)])


def test_strict_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(SHAPES / "shapes.pt"), "--size", "256", "--strict"]) == 1
    assert "that is not shown on images" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_opencv_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(shipped, "has_opencv", lambda: False)
    example_images.cache_clear()
    try:
        found = inspect(SHAPES / "shapes.pt")
        assert not any("on images" in line for line in found.meaning)
        with pytest.raises(HeadError, match="that is not shown on images; give images of objects that it knows"):
            fuse(SHAPES / "shapes.pt", size=64, strict=True)
    finally:
        example_images.cache_clear()


@pytest.mark.parametrize("size", [(2, 2), (33, 70), (320, 320), (640, 384)])
def test_example_images_have_any_size(size):
    image = example_images(*size)
    assert image.shape == (1, 3, *size)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_each_example_image_has_credits():
    text = (shipped.FOLDER / "CREDITS.md").read_text()
    assert all(f"`{name}`" in text for name in shipped.NAMES)
    assert {path.name for path in shipped.FOLDER.glob("*.jpg")} == set(shipped.NAMES)
    assert sum(path.stat().st_size for path in Path(shipped.FOLDER).iterdir()) < 200_000


GOOD = Seen(found=6.5, again=6, score=5.0, classes=4, offset=0.0, images=1)


@pytest.mark.parametrize(
    "other",
    [
        replace(GOOD, found=300, again=93, score=93.0),  # much, and little of it again
        replace(GOOD, found=50, again=45, score=40.0),  # more than an image holds
        replace(GOOD, score=7.4),  # not clearly more
        replace(GOOD, again=3, found=3, score=9.0),  # too few
        replace(GOOD, again=30, found=32, score=9.0),  # unsure
    ],
)
def test_what_is_no_better_reading(other):
    assert not other.beats(GOOD)
    assert GOOD.beats(replace(other, score=0.0, again=0))


def test_boxes_are_mirrored_back():
    boxes = np.array([[10.0, 5, 30, 25]])
    np.testing.assert_array_equal(mirror_boxes(boxes, 100), [[70, 5, 90, 25]])
    turned = np.array([[20.0, 5, 30, 10, 0.4]])
    np.testing.assert_allclose(mirror_boxes(mirror_boxes(turned, 100), 100), turned)


def test_noise_holds_no_objects(yolo, monkeypatch):
    """What is found in noise too is no object: here everything is."""
    monkeypatch.setattr(mirror, "MOST_IN_NOISE", -1.0)
    assert look(*yolo).startswith("not shown on images: ")
