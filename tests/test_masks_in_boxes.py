"""The masks of objects lie in their boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from fusenms import RawModel, load, recognize
from fusenms.errors import LayoutContradictedError
from fusenms.heads import raw_head
from fusenms.heads.masks_in_boxes import FEWEST, masks_in_boxes
from fusenms.heads.meaning import check_meaning
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, to_tensor

BOX = (8, 8, 24, 24)


class Look:
    """Finds a box on each image, with a mask of 32 x 32 cells that is one rectangle."""

    def __init__(self, mask, box=BOX, score=0.9):
        x1, y1, x2, y2 = mask
        self.box, self.score, self.mask = np.array(box, float), score, np.zeros((32, 32), bool)
        self.mask[y1:y2, x1:x2] = True

    def masks(self, values):
        return self.box[None], np.array([self.score]), self.mask[None]


@pytest.mark.parametrize(
    ("mask", "inside", "beside", "contradicted"),
    [
        (BOX, 1.0, 0.0, False),
        ((8, 8, 24, 16), 0.5, 0.0, False),
        ((0, 0, 32, 32), 1.0, 1.0, True),
        ((0, 0, 8, 32), 0.0, 4 * 24 / 320, True),  # the band is four cells wide
        ((8, 8, 8, 8), 0.0, 0.0, True),
    ],
)
def test_parts_of_the_box_and_of_the_band(mask, inside, beside, contradicted):
    found = masks_in_boxes(Look(mask), [{}] * FEWEST)
    assert found.inside.tolist() == [inside] * FEWEST
    assert found.beside == pytest.approx(beside)
    assert bool(found.contradiction) == contradicted
    assert f"objects fill {inside:.0%} of their boxes, and {beside:.0%} around them" in str(found)


@pytest.mark.parametrize(
    ("look", "images"),
    [
        (Look(BOX), FEWEST - 1),
        (Look(BOX, score=0.4), FEWEST),
        (Look(BOX, box=(8, 8, 15, 24)), FEWEST),
        (Look(BOX, box=(-9, -9, 40, 40)), FEWEST),  # no band
        (Look(BOX, box=(40, 40, 60, 60)), FEWEST),  # outside
        (Look(BOX, box=(8, 8, np.inf, 24)), FEWEST),
        (Look(BOX, box=(np.nan, 8, 24, 24)), FEWEST),
        (Look(BOX, box=(-1e300, -1e300, 1e300, 1e300)), FEWEST),
    ],
)
@pytest.mark.filterwarnings("error")
def test_few_or_small_objects_are_not_judged(look, images):
    found = masks_in_boxes(look, [{}] * images)
    assert not found.contradiction and str(found) == "masks assumed: too few objects show them"


@pytest.mark.parametrize("weights", ["yolov8-p-seg", "yolo11-p-seg", "yolo26-p-seg"])
def test_other_prototypes_of_a_trained_detector_are_seen(zoo, weights):
    """The values of the boxes, motion and mirror images say nothing of masks."""
    raw = load(zoo / "shapes" / f"{weights}.pt", size=256)
    layout = recognize(raw)
    files = sorted((zoo / "shapes" / "images").glob("val*.jpg"))[:6]
    images = [to_tensor([letterbox(read_image(file), 256, 256)[0]]) for file in files]

    def shown(raw: RawModel) -> bool:
        lines = check_meaning(raw, raw_head(raw, layout), images)
        (line,) = (line for line in lines if line.startswith("masks "))
        return line.startswith("masks shown: those of")

    def moved_on() -> bool:
        try:
            return shown(with_prototypes(raw, layout.masks.prototypes, "Gather", axis=1))
        except LayoutContradictedError:
            return False

    assert shown(raw)
    assert not moved_on()
    with pytest.raises(LayoutContradictedError, match=r"the masks of \d+ objects fill"):
        shown(with_prototypes(raw, layout.masks.prototypes, "Transpose", perm=(0, 1, 3, 2)))


def with_prototypes(raw: RawModel, name: str, operator: str, **attributes) -> RawModel:
    """The same model with an operator behind its prototypes: `Gather` gives each the number of the one before it."""
    model = onnx.ModelProto.FromString(raw.model.SerializeToString())
    graph, right = model.graph, f"{name}_right"
    for node in graph.node:
        node.output[:] = [right if output == name else output for output in node.output]
    (count,) = (entry.type.tensor_type.shape.dim[1].dim_value for entry in graph.output if entry.name == name)
    graph.initializer.append(onnx.numpy_helper.from_array(np.roll(np.arange(count), 1), "order"))
    inputs = [right, "order"] if operator == "Gather" else [right]
    graph.node.append(onnx.helper.make_node(operator, inputs, [name], **attributes))
    return replace(raw, model=model)
