"""Pictures of any kind to arrays, and arrays into the square that a model takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.errors import BackendUnavailableError, InputError

GREY = 114
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def opencv() -> Any:
    """OpenCV, imported where it is needed.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "reading pictures needs OpenCV; install it with: pip install 'fusenms[images]'"
        ) from error
    return cv2


def read_picture(source: Any) -> np.ndarray:
    """A path, an array or a PIL image to an array ``[height, width, 3]`` uint8 RGB.

    An array is uint8, ``[height, width, 3]`` RGB or ``[height, width]`` gray.

    Raises:
        InputError: it is not a picture.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if hasattr(source, "convert"):  # a PIL image, without importing PIL
        return _from_pil(source)
    if not isinstance(source, np.ndarray):
        raise InputError(f"found {type(source).__name__}; expected a path, an array or a PIL image")
    array = np.repeat(source[..., None], 3, 2) if source.ndim == 2 else source
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise InputError(f"found an array {source.dtype}{list(source.shape)}; expected uint8 [height, width, 3] (RGB)")
    return array


def _from_pil(image: Any) -> np.ndarray:
    """A PIL image as the same file would be read by path: turned as its EXIF says, 16 bits made 8."""
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I;16", "I")):
            gray = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, 2)
        return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError) as error:
        raise InputError(f"found a PIL image that cannot be decoded ({error})") from error


def _read_file(path: Path) -> np.ndarray:
    if path.is_dir():
        raise InputError(f"{path}: is a directory; expected a picture")
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    cv2 = opencv()
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:
        picture = None
    if picture is None:
        raise InputError(f"{path}: not a readable picture ({data.size} bytes); expected {', '.join(SUFFIXES)}")
    return np.ascontiguousarray(picture[..., ::-1])


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by name.

    Raises:
        InputError: it is no folder, or has none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; expected a folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: has no pictures; expected {', '.join(SUFFIXES)}")
    return found


@dataclass(frozen=True)
class Placement:
    """Where a picture of ``height`` x ``width`` lies in the model's input: its corner and its size there, in whole pixels.

    Each axis has its own scale, since the size is rounded.
    """

    height: int
    width: int
    left: int
    top: int
    inner_height: int
    inner_width: int

    def to_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``[n, 4]`` xyxy in pixels of the input to pixels of the picture, clipped to it; float32."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height] * 2)
        moved = (boxes - np.array([self.left, self.top] * 2)) / gain
        return np.clip(moved, 0, [self.width, self.height] * 2).astype(np.float32)

    def points_to_picture(self, points: np.ndarray) -> np.ndarray:
        """Points ``[..., 2 or more]``, x and y first, in pixels of the input to pixels of the picture, clipped to it; float32."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = np.clip((points[..., :2] - np.array([self.left, self.top])) / gain, 0, [self.width, self.height])
        return np.concatenate((moved, points[..., 2:]), -1).astype(np.float32)

    def oriented_to_picture(self, boxes: np.ndarray) -> np.ndarray:
        """Oriented boxes ``[n, 5]`` in pixels of the input to pixels of the picture; float32. They may reach out of it.

        As in Ultralytics, sides are scaled as if upright: exact where both axes have the same scale.
        """
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = (boxes[:, :2] - np.array([self.left, self.top])) / gain
        return np.concatenate((moved, boxes[:, 2:4] / gain, boxes[:, 4:]), 1).astype(np.float32)


def letterbox(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale a picture ``[h, w, 3]`` uint8 to fit, and center it on grey.

    Returns ``[height, width, 3]`` uint8, and where the picture lies in it. The rounding is that of Ultralytics, whose
    models are trained and measured with it.
    """
    cv2 = opencv()
    gain = min(height / picture.shape[0], width / picture.shape[1])
    inner = (max(1, round(picture.shape[1] * gain)), max(1, round(picture.shape[0] * gain)))
    left, top = (round((side - part) / 2 - 0.1) for side, part in zip((width, height), inner, strict=True))
    scaled = (
        picture
        if inner == (picture.shape[1], picture.shape[0])
        else cv2.resize(picture, inner, interpolation=cv2.INTER_LINEAR)
    )
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas, Placement(picture.shape[0], picture.shape[1], left, top, inner[1], inner[0])


def stretched(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale a picture ``[h, w, 3]`` uint8 to ``[height, width, 3]``, whatever its sides, and say so."""
    cv2 = opencv()
    whole = Placement(picture.shape[0], picture.shape[1], 0, 0, height, width)
    if picture.shape[:2] == (height, width):
        return picture, whole
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR), whole


def to_tensor(canvases: list[np.ndarray]) -> np.ndarray:
    """Pictures ``[height, width, 3]`` uint8 RGB of one size to ``[B, 3, height, width]`` float32, 0 to 1."""
    return np.ascontiguousarray(np.stack(canvases).transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def load_tensor(folder: Path, height: int, width: int, stretch: bool) -> np.ndarray:
    """All pictures of a folder, letterboxed or stretched: ``[n, 3, height, width]`` float32, 0 to 1.

    Raises:
        InputError: the folder has no pictures, or one of them is unreadable.
    """
    fit = stretched if stretch else letterbox
    return to_tensor([fit(read_picture(path), height, width)[0] for path in list_pictures(folder)])
