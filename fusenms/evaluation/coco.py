"""Reads ground truth in COCO's format: a JSON file with images, annotations and categories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusenms.errors import InputError, first_line
from fusenms.evaluation.truth import GroundTruth, TrueImage, TrueObject
from fusenms.limits import Limits
from fusenms.safety.files import read_regular
from fusenms.safety.text import printable

LISTS = ("images", "annotations", "categories")


def read_coco(path: Path, folder: Path | None, limits: Limits) -> GroundTruth:
    """Read a JSON file.

    Args:
        folder: where its images lie; None: beside it.

    Raises:
        InputError: the file cannot be read, is no ground truth in COCO's format, or has no objects.
    """
    data = _load(path, limits)
    categories = {_number(entry, "id", path): str(entry.get("name", "")) for entry in data["categories"]}
    _refuse_twice(path, "categories", [entry["id"] for entry in data["categories"]])
    _refuse_twice(path, "images", [_number(entry, "id", path) for entry in data["images"]])
    objects: dict[int, list[TrueObject]] = {entry["id"]: [] for entry in data["images"]}
    for place, entry in enumerate(data["annotations"]):
        image = _number(entry, "image_id", path)
        if image not in objects:
            raise InputError(f"{_where(path, place)}: image_id is {image}, but no image has that id")
        objects[image].append(_object(entry, categories, _where(path, place)))
    root = path.parent if folder is None else folder
    images = tuple(_image(entry, root, tuple(objects[entry["id"]]), path) for entry in data["images"])
    if not any(image.objects for image in images):
        raise InputError(
            f"{printable(path)}: has {len(images)} images and no objects; expected annotations of objects to find"
        )
    return GroundTruth(source=str(path), images=images, categories=categories)


def _load(path: Path, limits: Limits) -> dict[str, list[dict[str, Any]]]:
    try:
        data = json.loads(read_regular(path, limits.max_file_bytes, error=InputError))
    except (ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, InputError)
            else InputError(
                f"{printable(path)}: is not JSON ({first_line(error)}); expected ground truth in COCO's format"
            )
        ) from error
    expected = "expected ground truth in COCO's format: an object with images, annotations and categories"
    if isinstance(data, list) and data and isinstance(data[0], dict) and "score" in data[0]:
        raise InputError(f"{printable(path)}: has results of a detector, not ground truth; {expected}")
    if not isinstance(data, dict):
        raise InputError(f"{printable(path)}: is a JSON {type(data).__name__}; {expected}")
    for name in LISTS:
        entries = data.get(name)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{printable(path)}: {name} is {_shown(entries)}; {expected}, each a list of objects")
    for name in ("images", "categories"):
        if not data[name]:
            raise InputError(f"{printable(path)}: has no {name}; {expected}")
    return data


def _image(entry: Mapping[str, Any], root: Path, objects: tuple[TrueObject, ...], path: Path) -> TrueImage:
    name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
    if not isinstance(name, str) or not name:
        raise InputError(f"{printable(path)}: file_name of image {entry['id']} is {_shown(name)}; expected a path")
    if height is None and width is None:
        return TrueImage(key=entry["id"], path=root / name, size=None, objects=objects)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise InputError(
            f"{printable(path)}: image {entry['id']} has height {_shown(height)} and width {_shown(width)}; expected pixels"
        )
    return TrueImage(key=entry["id"], path=root / name, size=(height, width), objects=objects)


def _object(entry: Mapping[str, Any], categories: Mapping[int, str], where: str) -> TrueObject:
    category, box, crowd = entry.get("category_id"), _numbers(entry.get("bbox")), entry.get("iscrowd", 0)
    if type(category) is not int or category not in categories:
        known = ", ".join(map(str, list(categories)[:10])) + (", …" if len(categories) > 10 else "")
        raise InputError(f"{where}: category_id is {_shown(category)}; expected the id of a category ({known})")
    if box is None or len(box) != 4 or min(box[2:]) < 0:
        raise InputError(f"{where}: bbox is {_shown(entry.get('bbox'))}; expected [left, top, width, height] in pixels")
    if crowd not in (0, 1):
        raise InputError(f"{where}: iscrowd is {_shown(crowd)}; expected 0 or 1")
    area = _numbers([entry.get("area", box[2] * box[3])])
    if area is None or area[0] < 0:
        raise InputError(f"{where}: area is {_shown(entry.get('area'))}; expected a number of pixels")
    return TrueObject(
        category=category,
        box=(box[0], box[1], box[2], box[3]),
        area=area[0],
        crowd=bool(crowd),
        segmentation=_segmentation(entry.get("segmentation"), where),
        keypoints=_keypoints(entry.get("keypoints"), where),
    )


def _segmentation(value: Any, where: str) -> Any:
    """Polygons or a run-length encoding, checked; None if there is none."""
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        runs = isinstance(counts, str) or (isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts))
        if whole and runs:
            return value
    elif isinstance(value, list):
        rings = [_numbers(ring) for ring in value]
        if all(ring is not None and len(ring) >= 6 and len(ring) % 2 == 0 for ring in rings):
            return rings
    raise InputError(
        f"{where}: segmentation is {_shown(value)}; expected polygons [[x, y, x, y, x, y, …], …] or a run-length encoding (size, counts)"
    )


def _keypoints(value: Any, where: str) -> tuple[float, ...]:
    if value is None or value == []:
        return ()
    points = _numbers(value)
    if points is None or len(points) % 3:
        raise InputError(f"{where}: keypoints is {_shown(value)}; expected [x, y, visibility, x, y, visibility, …]")
    return tuple(points)


def _numbers(values: Any) -> list[float] | None:
    """The values as numbers; None if they are not a list of finite numbers."""
    if not isinstance(values, list):
        return None
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in values)
    return [float(value) for value in values] if good and not any(map(math.isnan, values)) else None


def _number(entry: Mapping[str, Any], name: str, path: Path) -> int:
    value = entry.get(name)
    if type(value) is not int:
        raise InputError(f"{printable(path)}: found {name} {_shown(value)}; expected a whole number in each entry")
    return value


def _refuse_twice(path: Path, what: str, ids: list[int]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise InputError(f"{printable(path)}: more than one of its {what} has the id {twice}; expected each id once")


def _where(path: Path, place: int) -> str:
    return f"{printable(path)}: annotation {place + 1}"


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return "missing" if value is None else text if len(text) <= 60 else f"{text[:60]}…"
