"""Text of metadata: layouts, settings, image inputs, class names, limits.

A find is an error of another class than ours, or a value that changes when it is written and read.
"""

from __future__ import annotations

import json

from fusenms import PostprocessConfig
from fusenms.artifacts.fused import parse_names
from fusenms.artifacts.raw import ImageInput
from fusenms.errors import FusenmsError
from fusenms.layout import Layout
from fusenms.limits import Limits

READERS = {
    b"L": lambda values: Layout.from_dict(values),
    b"C": lambda values: PostprocessConfig.from_dict(values),
    b"I": lambda values: ImageInput.from_dict(values),
    b"M": lambda values: Limits(**values),
}
"""By the first byte of the data; the rest is JSON."""


def fuzz_metadata(data: bytes) -> None:
    """Read metadata as `fusenms.artifacts.fused.load_fused` does; what is accepted is written and read again."""
    kind, text = data[:1], data[1:].decode("utf-8", "replace")
    if kind == b"N":
        try:
            names = parse_names(text)
        except ValueError:  # as it says; those who call it name the file
            return
        assert isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        return
    if kind not in READERS:
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return
    try:
        made = READERS[kind](values)
    except FusenmsError:
        return
    except (TypeError, ValueError):
        if kind in b"IM":  # plain dataclasses, whose callers catch what a wrong keyword or type raises
            return
        raise
    if kind in b"LC":
        again = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
        assert again == made, "changed by being written and read"
        if kind == b"L":
            assert made.outputs(PostprocessConfig()) and made.sources and made.renamed({}) == made
