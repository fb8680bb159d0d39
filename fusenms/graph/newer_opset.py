"""Bring a graph of opset 9 or 10 to a newer one, and show that it gives the same."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import version_converter

from fusenms.errors import SourceError, first_line
from fusenms.graph.session import Session
from fusenms.graph.unlike_images import ROUNDING, largest_difference, unlike_images
from fusenms.limits import Limits

OLDEST, NEWER = 9, 13


def opset_of(model: onnx.ModelProto) -> int:
    """The opset of ONNX's own operators; 0 if the file does not say it."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def to_newer_opset(
    source: str, model: onnx.ModelProto, image: str, shape: tuple[int, ...], limits: Limits
) -> tuple[onnx.ModelProto, str]:
    """Convert to opset `NEWER`, and run both on the same images ``shape`` ``[batch, 3, height, width]``. Return the result and a note.

    Raises:
        SourceError: the graph cannot be converted, or the result differs.
    """
    opset = opset_of(model)
    advice = "Export again with opset 11 or newer"
    try:
        newer = version_converter.convert_version(model, NEWER)
    except Exception as error:  # the converter raises types of its own
        raise SourceError(
            f"{source}: opset {opset} could not be converted to {NEWER} ({first_line(error)}). {advice}"
        ) from error
    newer.metadata_props.extend(model.metadata_props)
    batch, _, height, width = shape
    kinds = unlike_images(height, width)
    old, new = (Session(graph, source=source, max_seconds=limits.max_run_seconds) for graph in (model, newer))
    worst = 0.0
    for values in kinds.values():
        inputs = {image: np.repeat(values[None], batch, 0)}
        worst = max(worst, largest_difference(new.run(inputs), old.run(inputs)).share)
    if not worst <= ROUNDING:
        raise SourceError(
            f"{source}: opset {opset} converted to {NEWER} differs by {worst:.2g} of full scale. {advice}"
        )
    return (
        newer,
        f"opset {opset} converted to {NEWER}, equal on {len(kinds)} unlike images (max |Δ| {worst:.0e} of full scale)",
    )
