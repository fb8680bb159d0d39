import json
from dataclasses import replace

import pytest
from raw_heads import LAYOUTS

from fusenms.errors import ConfigError, SourceError
from fusenms.layout import (
    Activation,
    AngleTerm,
    BoxFormat,
    Decoded,
    Distances,
    Join,
    KeypointTerms,
    Layout,
    MaskTerms,
    Tap,
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_round_trip(name):
    layout = LAYOUTS[name]()
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_joined_parts_stand_for_their_tensor():
    layout = LAYOUTS["anchor_boxes"]()
    join = Join(layout.classes.tensor, ("a", "b"), layout.classes.channel_axis, 7)
    joined = replace(layout, joins=(join,))
    assert (joined.tensors, joined.sources) == (layout.tensors, ("a", "b"))
    assert Layout.from_dict(json.loads(json.dumps(joined.to_dict()))) == joined


@pytest.mark.parametrize("key", ["boxes", "decode", "activation"])
def test_error_when_stored_layout_is_damaged(key):
    values = LAYOUTS["distances"]().to_dict()
    values[key] = {"kind": "nonsense"}
    with pytest.raises(SourceError, match="layout stored in the file is unreadable"):
        Layout.from_dict(values)


BOXES, CLASSES = Tap("boxes", 2, 0, 4), Tap("scores", 2, 0, 3)
SOUND = {
    "family": "own", "boxes": BOXES, "classes": CLASSES, "objectness": None, "activation": Activation.SIGMOID,
    "decode": Decoded(BoxFormat.XYXY),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": Tap("boxes", 2, 0, 3)}, "boxes has 3 channels; expected a Tap of 4"),
        ({"boxes": None}, "boxes is None; expected a Tap of 4"),
        ({"decode": Distances((8,), 16)}, "boxes has 4 channels; expected a Tap of 64"),
        ({"classes": "scores"}, "classes is 'scores'; expected a Tap"),
        ({"objectness": "logits"}, "objectness is 'logits'; expected a Tap of 1"),
        ({"activation": "sigmoid"}, "activation is 'sigmoid'; expected one of fusenms.layout: Activation.NONE"),
        ({"decode": None}, "decode is None; expected one of fusenms.layout: Decoded"),
        ({"labels": Tap("scores", 2, 3, 4)}, "labels require finished rows"),
        ({"background": Tap("scores", 2, 3, 4)}, "background requires Activation.SOFTMAX"),
    ],
)
def test_error_when_a_layout_makes_no_sense(wrong, message):
    assert Layout(**SOUND).num_classes == 3
    with pytest.raises(ConfigError, match=message):
        Layout(**(SOUND | wrong))


@pytest.mark.parametrize("span", [(2, -3, 3), (2, 3, 3), (5, 0, 4)])
def test_error_when_a_tap_is_none(span):
    with pytest.raises(ConfigError, match="expected axis 1 or 2, and channels with 0 <= start"):
        Tap("scores", *span)


def test_error_when_the_format_of_boxes_is_text():
    with pytest.raises(ConfigError, match=r"format is 'cxcywh'; expected one of .*BoxFormat\.XYXY"):
        Decoded("cxcywh")


TAP = Tap("x", 1, 0, 12)
DISTANCES = ("any", Tap("b", 1, 0, 64), Tap("c", 1, 0, 3), None, Activation.SIGMOID, Distances((8, 16), 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskTerms("m", "p"), "coefficients is 'm'; expected a Tap"),
        (lambda: MaskTerms(TAP, None), "prototypes is None; expected the name of a tensor"),
        (lambda: KeypointTerms(None, 3), "values is None; expected a Tap"),
        (lambda: KeypointTerms(TAP, "3"), "keypoints of '3' numbers in 12 channels"),
        (lambda: KeypointTerms(TAP, 3.0), "keypoints of 3.0 numbers"),
        (lambda: KeypointTerms(Tap("x", 1, 0, 11), 3), "keypoints of 3 numbers in 11 channels"),
        (lambda: KeypointTerms(TAP, 3, float("nan")), "factor of keypoints is nan; expected a finite number"),
        (lambda: KeypointTerms(TAP, 3, 2.0, None), "point of keypoints is None"),
        (lambda: KeypointTerms(TAP, 3, "2"), "factor of keypoints is '2'"),
        (lambda: AngleTerm(None), "value is None; expected a Tap of 1"),
        (lambda: AngleTerm(TAP), "value has 12 channels; expected a Tap of 1"),
        (lambda: AngleTerm(Tap("x", 1, 0, 1), "no"), "sigmoid is 'no'; expected True or False"),
        (lambda: Layout(*DISTANCES, masks="p"), "masks is 'p'; expected a MaskTerms"),
        (lambda: Layout(*DISTANCES, keypoints=(1, 2)), r"keypoints is \(1, 2\); expected a KeypointTerms"),
        (lambda: Layout(*DISTANCES, angle=Tap("x", 1, 0, 1)), "expected a AngleTerm"),
        (lambda: Layout(*DISTANCES, masks=MaskTerms(TAP, "p"), angle=AngleTerm(Tap("a", 1, 0, 1))), "masks are cut at upright boxes"),
        (
            lambda: Layout(*DISTANCES[:5], Decoded(BoxFormat.XYXY), angle=AngleTerm(Tap("a", 1, 0, 1))),
            "boxes has 64 channels",
        ),
        (
            lambda: Layout("any", Tap("b", 1, 0, 4), *DISTANCES[2:5], Decoded(BoxFormat.XYXY), angle=AngleTerm(Tap("a", 1, 0, 1))),
            "an angle requires Distances in strides, or Decoded boxes as BoxFormat.CXCYWH",
        ),
        (
            lambda: Layout("any", Tap("b", 1, 0, 4), *DISTANCES[2:5], Decoded(BoxFormat.XYXY), keypoints=KeypointTerms(TAP, 3, 2.0)),
            "keypoints with a factor require the cells of Distances",
        ),
        (lambda: Distances((8, 16), 16, values=(0.0, 1.0)), "values are 2 numbers; expected one for each of 16 bins"),
    ],
)  # fmt: skip
def test_error_when_further_terms_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_keypoints_are_read_under_their_first_name():
    """Files of 0.1.0 call ``dims`` ``numbers``."""
    layout = LAYOUTS["keypoints"]()
    values = layout.to_dict()
    values["keypoints"]["numbers"] = values["keypoints"].pop("dims")
    assert Layout.from_dict(values) == layout
