import json

import pytest
from raw_heads import LAYOUTS

from fusenms.errors import SourceError
from fusenms.layout import Layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_round_trip(name):
    layout = LAYOUTS[name]()
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize("key", ["boxes", "decode", "activation"])
def test_error_when_stored_layout_is_damaged(key):
    values = LAYOUTS["distances"]().to_dict()
    values[key] = {"kind": "nonsense"}
    with pytest.raises(SourceError, match="layout stored in the file is unreadable"):
        Layout.from_dict(values)
