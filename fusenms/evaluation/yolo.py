"""Reads ground truth in YOLO's format: a folder of images and, beside it, one of text files with a row for each object.

A row is ``class cx cy width height``, with keypoints after it for a model with keypoints, or ``class x y x y x y …``, an outline. All
lengths are shares of the sides of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fusenms.errors import InputError
from fusenms.evaluation.truth import GroundTruth, TrueImage, TrueObject
from fusenms.limits import Limits
from fusenms.runtime.images import list_images
from fusenms.safety.files import is_folder, read_regular
from fusenms.safety.text import printable

IMAGES, LABELS = "images", "labels"
SLACK = 0.01
"""A coordinate may lie so far outside the image, in shares of its side, as in Ultralytics. Boxes are not cut."""


@dataclass(frozen=True)
class Row:
    """A row of a label file: where it stands, its class, and its other numbers."""

    where: str
    label: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class YoloFolder:
    """The images of a folder with their rows, which mean nothing until the keypoints of the model are known."""

    source: str
    rows: dict[Path, list[Row]]
    notes: tuple[str, ...]

    def truth(self, keypoints: tuple[int, int] | None) -> GroundTruth:
        """What the rows say, for a model with so many keypoints of so many numbers; None: without.

        Raises:
            InputError: a row is none of such a model.
        """
        images = tuple(
            TrueImage(
                key=int(path.stem) if path.stem.isdecimal() else path.stem,
                path=path,
                size=None,
                objects=tuple(_object(row, keypoints) for row in rows),
            )
            for path, rows in self.rows.items()
        )
        return GroundTruth(source=self.source, images=images, categories=None, normalized=True, notes=self.notes)


def read_yolo(folder: Path, limits: Limits) -> YoloFolder:
    """Read a folder that holds ``images`` and ``labels``, or a folder of images below one named ``images``, as ``data/images/val``.

    An image without a label file, or with an empty one, has no objects.

    Raises:
        InputError: the folders are not there, a label file is malformed, or there are no objects.
    """
    images, labels = _folders(folder)
    rows: dict[Path, list[Row]] = {}
    missing = twice = 0
    for path in list_images(images):
        file = labels / f"{path.stem}.txt"
        if not file.exists():
            missing += 1
        found = _read(file, limits) if file.exists() else []
        rows[path] = list({(row.label, row.values): row for row in found}.values())
        twice += len(found) - len(rows[path])
    if not any(rows.values()):
        raise InputError(
            f"{printable(labels)}: has no objects for the {len(rows)} images of {printable(images)}; expected a file IMAGE.txt for each"
        )
    notes = [f"{missing} of {len(rows)} images have no label file, and so no objects"] if missing else []
    notes += [f"{twice} rows that stand twice in their label file count once"] if twice else []
    return YoloFolder(str(folder), rows, tuple(notes))


def _folders(folder: Path) -> tuple[Path, Path]:
    if is_folder(folder / IMAGES):
        images, labels = folder / IMAGES, folder / LABELS
    elif is_folder(folder) and IMAGES in folder.absolute().parts:
        parts = folder.absolute().parts
        last = len(parts) - 1 - parts[::-1].index(IMAGES)
        images, labels = folder, Path(*parts[:last], LABELS, *parts[last + 1 :])
    else:
        raise InputError(
            f"{printable(folder)}: has no folder {IMAGES}; expected one that holds {IMAGES} and {LABELS}, or a folder of images below one "
            f"named {IMAGES}"
        )
    if not is_folder(labels):
        raise InputError(f"{printable(labels)}: is not a folder; expected the label files of {printable(images)} there")
    return images, labels


def _read(file: Path, limits: Limits) -> list[Row]:
    data = read_regular(file, limits.max_image_file_bytes, error=InputError)
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(file)}: is not text ({error.reason}); expected rows of numbers") from error
    return [_row(line, f"{printable(file)}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        first, *values = map(float, line.split())
    except ValueError:
        raise InputError(
            f"{where}: found {printable(line[:60])!r}; expected numbers: class cx cy width height"
        ) from None
    if not first.is_integer() or first < 0 or not all(map(math.isfinite, values)):
        raise InputError(
            f"{where}: found {printable(line[:60])!r}; expected a class number, and finite numbers after it"
        )
    return Row(where, int(first), tuple(values))


def _object(row: Row, keypoints: tuple[int, int] | None) -> TrueObject:
    count, dims = keypoints or (0, 0)
    points: tuple[float, ...] = ()
    if len(row.values) == 4 or (keypoints and len(row.values) == 4 + count * dims):
        cx, cy, width, height = row.values[:4]
        points = _keypoints(row, dims)
        inside: tuple[float, ...] = (*row.values[:4], *points[0::3], *points[1::3])
        box, area, outline = (cx - width / 2, cy - height / 2, width, height), width * height, None
    elif not keypoints and len(row.values) >= 6 and len(row.values) % 2 == 0:
        inside = row.values
        xs, ys = row.values[0::2], row.values[1::2]
        box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        area, outline = _area(xs, ys), [list(row.values)]
    else:
        more = f" and {count} keypoints of {dims} numbers" if keypoints else ", or an outline of at least three points"
        raise InputError(
            f"{row.where}: has {len(row.values)} numbers after the class; expected cx cy width height{more}"
        )
    if not all(-SLACK <= value <= 1 + SLACK for value in inside):
        raise InputError(f"{row.where}: has coordinates outside of 0 to 1; expected shares of the sides of the image")
    return TrueObject(category=row.label, box=box, area=area, segmentation=outline, keypoints=points)


def _keypoints(row: Row, dims: int) -> tuple[float, ...]:
    """Keypoints as x, y, visibility. Without a visibility, a point at the corner 0, 0 is not labeled, as in Ultralytics."""
    values = row.values[4:]
    if not values or dims == 3:
        return values
    pairs = zip(values[0::2], values[1::2], strict=True)
    return tuple(number for x, y in pairs for number in (x, y, 0.0 if x == y == 0 else 2.0))


def _area(xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    """Area of a polygon."""
    turned = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * v - u * y for x, y, u, v in turned)) / 2
