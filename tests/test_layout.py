import json
from dataclasses import replace

import pytest
from raw_heads import LAYOUTS

from fusenms.errors import SourceError
from fusenms.layout import Join, Layout


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
