"""What is left of an object that is cut ends at the cut, if boxes have the sizes of objects."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fusenms import fuse, inspect
from fusenms.errors import LayoutContradictedError
from fusenms.heads.cuts import FEWEST, MOST, Cuts, cut_objects
from fusenms.reference import Rows

SIDE = 100


class White:
    """A detector of white rectangles, one of each row of squares of 50 pixels, whose sizes are read with a factor."""

    def __init__(self, factor: float, whole: bool = False) -> None:
        self.factor, self.whole, self.runs = factor, whole, 0

    def values(self, images):
        self.runs += len(images)
        return images

    def rows(self, image):
        boxes = []
        for x in (0, 50):
            ys, xs = np.nonzero(image[0, 0, :, x : x + 50] == 1)
            if len(xs):
                low, high = np.array([xs.min() + x, ys.min()]), np.array([xs.max() + x + 1, ys.max() + 1])
                if self.whole:  # the object is 40 pixels wide and high
                    low, high = np.array([x + 5, 5]), np.array([x + 45, 45])
                middle, half = (low + high) / 2, (high - low) / 2 * self.factor
                boxes.append([*(middle - half), *(middle + half)])
        n = len(boxes)
        return Rows(np.array(boxes).reshape(n, 4), np.full(n, 0.9), np.zeros(n, int)), np.arange(n)


def image_of(*lefts):
    image = np.zeros((1, 3, SIDE, SIDE), np.float32)
    for x in lefts:
        image[:, :, 5:45, x + 5 : x + 45] = 1
    return image


def cut(look, *images):
    return cut_objects(look, images, images)


@pytest.mark.parametrize(("factor", "error"), [(1.0, 0.0), (0.5, -0.5), (0.75, -1 / 6), (1.5, 1 / 6)])
def test_error_is_that_of_the_factor(factor, error):
    look = White(factor)
    found = cut(look, image_of(0, 50), image_of(0))
    assert look.runs == MOST == len(found.errors)
    np.testing.assert_allclose(found.errors, error, atol=0.02)
    assert bool(found.contradiction) == (factor == 0.5)
    assert str(found).startswith("sizes shown")


def test_both_ends_and_both_axes_are_cut():
    seen = []

    class Look(White):
        def values(self, images):
            seen.extend(images)
            return super().values(images)

    cut(Look(1.0), image_of(0, 50))
    gray = [np.argwhere(image[0, 0] == np.float32(114 / 255)) for image in seen]
    ends = {(tuple(places.min(0)), tuple(places.max(0))) for places in gray}
    assert ends == {((0, 25), (99, 99)), ((25, 0), (99, 99)), ((0, 0), (99, 74)), ((0, 0), (24, 99))}


def test_boxes_of_whole_objects_contradict_nothing():
    found = cut(White(1.0, whole=True), image_of(0, 50), image_of(0))
    assert found.error == 1.0 and not found.contradiction
    assert (
        str(found)
        == "sizes assumed: boxes of cut objects reach 100% beyond the cut, as those of whole objects or too large ones"
    )


def test_few_objects_are_not_judged():
    look = White(0.5)
    found = cut(look, image_of(0))
    assert (look.runs, found.judged, found.contradiction, str(found)) == (0, False, None, "")
    assert not Cuts(np.full(FEWEST - 1, -0.5)).contradiction


def test_most_cuts_must_agree():
    assert Cuts(np.array([-0.5, -0.5, -0.4, 0.1])).contradiction
    assert not Cuts(np.array([-0.5, -0.5, -0.1, 0.1])).contradiction


def halved(zoo, path, factor):
    """YOLOv8n with sizes times a factor."""
    model = onnx.load(zoo / "derived" / "yolov8n.onnx")
    graph = model.graph
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["whole" if name == output else name for name in node.output]
    sizes = np.ones((84, 1), np.float32)
    sizes[2:4] = factor
    graph.initializer.append(numpy_helper.from_array(sizes, "factor"))
    graph.node.append(helper.make_node("Mul", ["whole", "factor"], [output]))
    onnx.save(model, path)
    return path


def test_half_sizes_of_a_trained_detector_are_refused(zoo, tmp_path):
    """Neither the values, nor motion, nor mirror images show them."""
    with pytest.raises(
        LayoutContradictedError, match=r"what is left of \d cut objects ends (4|5)\d% of its size before"
    ):
        fuse(halved(zoo, tmp_path / "m.onnx", 0.5))
    lines = inspect(zoo / "derived" / "yolov8n.onnx").meaning
    assert any("sizes shown: boxes of 6 cut objects" in line for line in lines)
