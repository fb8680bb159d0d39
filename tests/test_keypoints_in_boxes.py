"""The keypoints of objects lie in their boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fusenms import load, recognize
from fusenms.errors import LayoutContradictedError
from fusenms.heads import raw_head
from fusenms.heads.keypoints_in_boxes import FEWEST, keypoints_in_boxes
from fusenms.heads.meaning import check_meaning
from fusenms.reference import Rows
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

BOX = np.array([100.0, 20, 180, 60])


class Look:
    """Finds the box on each image, with keypoints that are given."""

    def __init__(self, points, score=0.9):
        self.points, self.score = np.array(points, float), score

    def keypoints(self, values):
        return Rows(BOX[None], np.array([self.score]), np.zeros(1, int)), self.points[None]


@pytest.mark.parametrize(
    ("points", "part"),
    [
        ([[140, 40], [100, 20]], 1.0),
        ([[81, 11], [199, 69]], 1.0),  # a quarter of the box beside it
        ([[79, 40], [140, 71]], 0.0),
        ([[40, 140], [140, 40]], 0.5),
        ([[140, 40, 0.9], [40, 140, 0.1]], 1.0),  # one that is not visible
    ],
)
def test_part_in_the_box(points, part):
    found = keypoints_in_boxes(Look(points), [{}] * FEWEST)
    assert (found.objects, found.part, bool(found.contradiction)) == (FEWEST, part, part < 0.6)
    assert str(found) == f"keypoints shown: {part:.0%} of those of {FEWEST} objects lie in their boxes"


@pytest.mark.parametrize(
    ("look", "images"),
    [
        (Look([[0, 0]]), FEWEST - 1),
        (Look([[0, 0]], score=0.4), FEWEST),
        (Look([[0, 0, 0.4]]), FEWEST),
    ],
)
def test_few_objects_are_not_judged(look, images):
    found = keypoints_in_boxes(look, [{}] * images)
    assert not found.contradiction and str(found) == "keypoints assumed: too few objects show them"


@pytest.mark.parametrize("wrong", [{"factor": None}, {"point": 8.0}])
def test_other_units_of_a_trained_detector_are_refused(zoo, wrong):
    """The values of the boxes, motion and mirror images say nothing of keypoints."""
    raw = load(zoo / "shapes" / "yolov8-p-pose.pt", size=256)
    layout = recognize(raw)
    files = sorted((zoo / "shapes" / "images").glob("val*.jpg"))[:6]
    images = [to_tensor([letterbox(read_image(file), 256, 256)[0]]) for file in files]
    lines = check_meaning(raw, raw_head(raw, layout), images)
    assert any(line.startswith("keypoints shown: 9") or "keypoints shown: 100%" in line for line in lines), lines
    moved = replace(layout, keypoints=replace(layout.keypoints, **wrong))
    with pytest.raises(LayoutContradictedError, match=r"of the keypoints of \d+ objects lie in their boxes"):
        check_meaning(raw, raw_head(raw, moved), images)
