"""Cells that see the same in the mirror image must see mirrored boxes there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fusenms import fuse, load, recognize
from fusenms.errors import LayoutContradictedError
from fusenms.heads import raw_head
from fusenms.heads.meaning import check_meaning
from fusenms.heads.mirror import objectness_last
from fusenms.heads.mirror_cells import FEWEST, compare_cells
from fusenms.heads.motion import grid_of
from fusenms.heads.probe import cell_centers
from fusenms.layout import (
    Activation,
    AnchorDeltas,
    AngleTerm,
    BoxFormat,
    Decoded,
    Distances,
    GridOffsets,
    Layout,
    PointOffsets,
    Tap,
    candidates_per_level,
    has_anchors_last,
)
from fusenms.runtime.example_images import example_images

SIDE, STRIDES, CLASSES = 64, (8, 16), 3
BOXES, SCORES = Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, CLASSES)
ANCHORS = (((20.0, 30.0), (30.0, 20.0)), ((50.0, 60.0), (60.0, 50.0)))


def layout_of(decode):
    return Layout("test", BOXES, SCORES, None, Activation.NONE, decode)


def flipped(decode, rows, side=SIDE):
    """Values ``[N, C]`` of each candidate at the mirrored place, written for itself."""
    out, start = np.empty_like(rows), 0
    for stride, count in zip(decode.strides, candidates_per_level(decode, SIDE, side), strict=True):
        height, width = -(-SIDE // stride), -(-side // stride)
        anchors = count // (height * width)
        for y in range(height):
            for x in range(width):
                for a in range(anchors):

                    def at(column, y=y, a=a):
                        if has_anchors_last(decode):
                            return start + (y * width + column) * anchors + a  # noqa: B023
                        return start + (a * height + y) * width + column  # noqa: B023

                    out[at(width - 1 - x)] = rows[at(x)]
        start += count
    return out


def sighted(decode, terms, mirrored, side=SIDE):
    """Heads of an image and of its mirror image: random scores, box terms, and what becomes of these by mirroring."""
    rng = np.random.default_rng(0)
    count = sum(candidates_per_level(decode, SIDE, side))
    scores, values = rng.random((count, CLASSES)), terms(rng, count)
    one = {"scores": scores[None], "boxes": values[None]}
    two = {"scores": flipped(decode, scores, side)[None], "boxes": flipped(decode, mirrored(values), side)[None]}
    return one, two


def far(rng, count):
    return 0.5 + 3 * rng.random((count, 4))


def near(rng, count):
    return rng.uniform(-0.4, 0.4, (count, 4))


def lr(terms):
    return terms[:, [2, 1, 0, 3]]


def x(terms):
    return terms * (-1, 1, 1, 1)


def compare(decode, terms, mirrored, side=SIDE):
    return compare_cells([sighted(decode, terms, mirrored, side)], layout_of(decode), grid_of(decode, SIDE, side), 0.25)


RIGHT = [
    (Distances(STRIDES, 1), far, lr),
    (Distances(STRIDES, 1, anchors=2, anchors_last=True), far, lr),
    (Distances(STRIDES, 1, anchors=2), far, lr),
    (GridOffsets(STRIDES), near, lambda t: (t - (0.5, 0, 0, 0)) * (-1, 1, 1, 1) + (0.5, 0, 0, 0)),
    (AnchorDeltas(STRIDES, ANCHORS), near, x),
    (PointOffsets(STRIDES, (2, 1)), lambda rng, n: near(rng, n) * 20 + (0, 0, 40, 40), x),
]


@pytest.mark.parametrize(("decode", "terms", "mirrored"), RIGHT)
def test_right_boxes_are_mirrored(decode, terms, mirrored):
    found = compare(decode, terms, mirrored)
    assert found.iou > 0.999 and found.part == 1 and found.symmetric and not found.unlike
    assert found.cells >= FEWEST and found.change > 0.1


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (1, 0, 3, 2), (2, 0, 3, 1), (0, 2, 1, 3)])
def test_distances_in_another_order_are_unlike(order):
    """They are mirrored as distances are, and then read in another order."""
    back = np.argsort(order)
    found = compare(Distances(STRIDES, 1), far, lambda t: lr(t[:, back])[:, list(order)])
    assert found.unlike


def test_decoded_corners_are_unlike():
    def corners(rng, count):
        low = rng.uniform(0, 30, (count, 2))
        return np.hstack((low, low + rng.uniform(5, 30, (count, 2))))

    mirrored = compare(
        Distances(STRIDES, 1, pixels=True), corners, lambda t: np.c_[SIDE - t[:, 2], t[:, 1], SIDE - t[:, 0], t[:, 3]]
    )
    assert mirrored.unlike


def test_nothing_follows_where_the_box_terms_stay_as_they_are():
    found = compare(Distances(STRIDES, 1), lambda rng, n: far(rng, n) * (0.2, 1, 2, 1), lambda t: t)
    assert found.iou < 0.6 and found.change == 0 and not found.unlike


def test_few_cells_are_not_judged():
    one, two = sighted(Distances(STRIDES, 1), far, lambda t: lr(t)[:, [1, 0, 3, 2]])
    for values in (one, two):
        values["scores"] = values["scores"] * (values["scores"] > np.sort(one["scores"].max(2)[0])[-FEWEST])
    found = compare_cells(
        [(one, two)], layout_of(Distances(STRIDES, 1)), grid_of(Distances(STRIDES, 1), SIDE, SIDE), 0.25
    )
    assert 0 < found.cells < FEWEST and found.iou < 0.6 and not found.unlike


def test_nothing_seen():
    one, two = sighted(Distances(STRIDES, 1), far, lr)
    found = compare_cells(
        [(one, two)], layout_of(Distances(STRIDES, 1)), grid_of(Distances(STRIDES, 1), SIDE, SIDE), 1.0
    )
    assert found.cells == 0 and not found.unlike and not found.symmetric


def test_levels_that_do_not_fill_the_width_are_left_out():
    """Their cells have no opposite: at 72 pixels, those of stride 16 are not judged."""
    decode = Distances(STRIDES, 1)
    found = compare(decode, far, lr, side=72)
    assert found.iou > 0.999 and found.part == 1
    assert found.cells <= (SIDE // 8) * (72 // 8)


def test_oriented_boxes():
    decode, layout = Distances(STRIDES, 1), layout_of(Distances(STRIDES, 1))
    layout = replace(layout, angle=AngleTerm(Tap("angle", 2, 0, 1)))
    one, two = sighted(decode, far, lr)
    angles = np.random.default_rng(1).uniform(0.2, 1.2, (one["boxes"].shape[1], 1))
    one["angle"], two["angle"] = angles[None], flipped(decode, -angles)[None]
    two["boxes"] = flipped(decode, lr(one["boxes"][0]))[None]
    assert compare_cells([(one, two)], layout, grid_of(decode, SIDE, SIDE), 0.25).iou > 0.99
    two["angle"] = flipped(decode, angles)[None]
    assert compare_cells([(one, two)], layout, grid_of(decode, SIDE, SIDE), 0.25).iou < 0.9


@pytest.mark.parametrize("cells", [GridOffsets(STRIDES), AnchorDeltas(STRIDES, ANCHORS, anchors_last=True)])
@pytest.mark.parametrize("corner", [False, True])
def test_decoded_boxes_are_compared_at_their_cells(cells, corner):
    """Right are centers and sizes; low corners and sizes, read as such, are not mirrored."""
    grid, places = grid_of(cells, SIDE, SIDE), np.concatenate([*map(centers_of(cells), STRIDES)])

    def boxes(rng, count):
        return np.hstack((places + rng.uniform(-3, 3, (count, 2)), rng.uniform(5, 30, (count, 2))))

    def mirrored(rows):
        return np.hstack((SIDE - rows[:, :1] - (rows[:, 2:3] if corner else 0), rows[:, 1:]))

    seen = sighted(cells, boxes, mirrored)
    found = compare_cells([seen], layout_of(Decoded(BoxFormat.CXCYWH)), grid, 0.25)
    assert (found.iou > 0.999, found.unlike) == (not corner, corner)


def test_nothing_follows_where_decoded_boxes_lie_alike_in_mirrored_cells():
    cells = GridOffsets(STRIDES)
    places = np.concatenate([*map(centers_of(cells), STRIDES)])

    def boxes(rng, count):
        return np.hstack((places + rng.uniform(0, 9, (count, 2)), rng.uniform(5, 30, (count, 2))))

    def same(rows):
        return np.hstack((SIDE - places[:, :1] + rows[:, :1] - places[:, :1], rows[:, 1:]))

    seen = sighted(cells, boxes, same)
    found = compare_cells([seen], layout_of(Decoded(BoxFormat.CXCYWH)), grid_of(cells, SIDE, SIDE), 0.25)
    assert found.iou < 0.9 and found.change < 1e-9 and not found.unlike


def centers_of(cells):
    anchors = len(ANCHORS[0]) if isinstance(cells, AnchorDeltas) else 1
    return lambda stride: np.repeat(cell_centers(SIDE, SIDE, stride), anchors, 0)


def check(raw, head):
    return check_meaning(raw, head, [example_images(raw.image.height, raw.image.width)])


@pytest.mark.parametrize("order", [(1, 0, 3, 2), (1, 3, 0, 2), (0, 2, 1, 3)])
def test_trained_distances_in_another_order_are_refused(zoo, order):
    """A trained detector, whose distances are given in another order: neither their motion nor the scores show it."""
    raw = load(zoo / "shapes" / "yolov8-p.pt")
    layout = recognize(raw)
    assert isinstance(layout.decode, Distances) and layout.boxes.start == 0
    turned = replace(layout, boxes=replace(layout.boxes, tensor="turned"))
    axis, bins, rest = layout.boxes.channel_axis, layout.decode.bins, layout.boxes.channels
    graph = raw.model.graph
    graph.initializer.append(numpy_helper.from_array(np.arange(rest).reshape(4, bins)[list(order)].ravel(), "order"))
    graph.node.append(helper.make_node("Gather", [layout.boxes.tensor, "order"], ["turned"], axis=axis))
    assert not any("mirrored boxes" in line for line in check(raw, raw_head(raw, layout)))
    with pytest.raises(
        LayoutContradictedError,
        match=r"cells see the same in mirror images, but not with mirrored boxes \(IoU 0\.[0-5]",
    ):
        check(raw, raw_head(raw, turned))


def test_low_corners_read_as_centers_are_refused(zoo, tmp_path):
    """COCO's format, which moves with the image as centers do."""
    model = onnx.load(zoo / "derived" / "yolov8n.onnx")
    graph = model.graph
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["whole" if name == output else name for name in node.output]
    shift = np.eye(84, dtype=np.float32)
    shift[:2, 2:4] = -0.5 * np.eye(2)  # half a size off the center
    graph.initializer.append(numpy_helper.from_array(shift, "shift"))
    graph.node.append(helper.make_node("MatMul", ["shift", "whole"], [output]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(LayoutContradictedError, match=r"not with mirrored boxes \(IoU 0\.0"):
        fuse(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("there", "classes", "other"),
    [
        (Tap("rows", 2, 4, 5), Tap("rows", 2, 5, 8), (Tap("rows", 2, 7, 8), Tap("rows", 2, 4, 7))),
        (Tap("rows", 2, 4, 5), Tap("rows", 2, 5, 6), None),
        (Tap("there", 2, 0, 1), Tap("scores", 2, 0, 3), None),
        (Tap("rows", 2, 7, 8), Tap("rows", 2, 4, 7), None),
        (None, Tap("rows", 2, 4, 7), None),
    ],
)
def test_another_place_of_the_objectness(there, classes, other):
    layout = Layout("test", BOXES, classes, there, Activation.NONE, GridOffsets(STRIDES))
    found = objectness_last(layout)
    assert (None if found is None else (found.objectness, found.classes)) == other


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (("boxes", "classes", "there"), "with the last channel as the objectness, behind the classes, it finds"),
        (
            ("boxes", "there", "multiplied"),
            "its class scores are never above its objectness, so that they are multiplied",
        ),
    ],
)
def test_another_place_or_use_of_the_objectness_is_refused(zoo, tmp_path, parts, why):
    """YOLOv5's rows, with the objectness behind the classes, or with class scores that were multiplied by it."""
    model = onnx.load(zoo / "derived" / "yolov5n.onnx")
    graph = model.graph
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["rows" if name == output else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(np.array([4, 1, 80]), "sizes"))
    graph.node.append(helper.make_node("Split", ["rows", "sizes"], ["boxes", "there", "classes"], axis=2))
    graph.node.append(helper.make_node("Mul", ["classes", "there"], ["multiplied"]))
    graph.node.append(helper.make_node("Concat", parts, [output], axis=2))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(LayoutContradictedError, match=why):
        fuse(tmp_path / "m.onnx")


def test_offsets_read_as_distances_are_refused(zoo):
    raw = load(zoo / "yolox_nano_raw_416.onnx")
    head = raw_head(raw, recognize(raw))
    assert isinstance(head.layout.decode, GridOffsets)
    assert any("shown on images" in line for line in check(raw, head))
    grid = head.layout.decode
    for decode in (Distances(grid.strides, 1), PointOffsets(grid.strides, (1, 1, 1))):
        with pytest.raises(LayoutContradictedError):
            check(raw, replace(head, layout=replace(head.layout, decode=decode)))
