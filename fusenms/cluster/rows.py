"""The rows that a job writes: one for each image, frame or row of the data set, with its detections, or with the error that it met."""

from __future__ import annotations

from functools import cache
from typing import Any

from fusenms.runtime import Detections


@cache
def schema() -> Any:
    """The columns, which are the same for every model: what it does not give is null."""
    import pyarrow as pa

    point = pa.list_(pa.float32())
    detection = pa.struct(
        {
            "label": pa.int32(),
            "name": pa.string(),
            "score": pa.float32(),
            "box": point,
            "oriented_box": point,
            "corners": pa.list_(point),
            "keypoints": pa.list_(point),
            "polygons": pa.list_(pa.list_(point)),
            "index": pa.int32(),
        }
    )
    return pa.schema(
        {
            "image": pa.string(),
            "row": pa.int64(),
            "frame": pa.int64(),
            "seconds": pa.float64(),
            "height": pa.int32(),
            "width": pa.int32(),
            "detections": pa.list_(detection),
            "converged": pa.bool_(),
            "error": pa.string(),
        }
    )


@cache
def worker_schema() -> Any:
    """What actors send: the columns, where the row was made, and whether it only says that a video has ended."""
    import pyarrow as pa

    more = {"_ended": pa.bool_(), "_actor": pa.string(), "_node": pa.string()}
    return pa.schema([*schema(), *(pa.field(name, kind) for name, kind in more.items())])


def values_of(found: Detections) -> dict[str, Any]:
    """The columns of an image with its detections. Numbers are those of `Detections`, not rounded."""
    place = found.masks.place
    return {
        "height": place.height,
        "width": place.width,
        "detections": _detections(found),
        "converged": found.converged,
    }


def _detections(found: Detections) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"label": label, "name": found.name(label), "score": score, "box": box.tolist()} for box, score, label in found
    ]
    columns: dict[str, Any] = {}
    if found.oriented:
        columns |= {"oriented_box": found.oriented_boxes.tolist(), "corners": found.corners.tolist()}
    if found.keypoints.shape[1]:
        columns["keypoints"] = found.keypoints.tolist()
    if len(found.masks):
        columns["polygons"] = [[outline.tolist() for outline in outlines] for outlines in found.masks.polygons()]
    if (found.indices >= 0).any():
        columns["index"] = found.indices.tolist()
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows
