"""Images of any kind to arrays, and arrays into the square that a model takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.errors import BackendUnavailableError, InputError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.headers import check_pixels, read_header, without_notes
from fusenms.safety.files import is_folder, read_regular
from fusenms.safety.text import printable

GREY = 114
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PIL_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow may decode for us: their size stands in their header, and nothing else runs. An ICO holds an image of another size,
and EPS starts a program."""


def opencv() -> Any:
    """OpenCV, imported where it is needed.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "reading images needs OpenCV; install it with: pip install 'fusenms[images]'"
        ) from error
    return cv2


def is_single(value: Any) -> bool:
    """Whether a value stands for one image: a path, an array or a PIL image."""
    return isinstance(value, (str, bytes, os.PathLike, np.ndarray)) or hasattr(value, "convert")


def read_image(source: Any, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """A path, an array or a PIL image to an array ``[height, width, 3]`` uint8 RGB.

    A file is JPEG, PNG, BMP, WebP or TIFF; its content says which. Its size is read from its header before it is decoded. An array is
    uint8, ``[height, width, 3]`` RGB or ``[height, width]`` gray. PIL images are turned as their EXIF data says. Of 16 bits (modes ``I;16``
    and the like) the upper 8 are taken. Mode ``I`` has no range of its own: values up to 255 are taken for 8 bits, otherwise, up to
    65535, for 16 bits.

    Raises:
        InputError: it is not an image, is damaged, exceeds the limits (`Limits.max_pixels`, `Limits.max_image_file_bytes`), or does not fit
            into memory.
    """
    try:
        if isinstance(source, (str, bytes, os.PathLike)):
            return _read_file(Path(os.fsdecode(source)), limits)
        if isinstance(source, np.ndarray):
            return _from_array(source, limits)
        if hasattr(source, "convert"):  # a PIL image, without importing PIL
            return _from_pil(source, limits)
    except MemoryError as error:
        raise InputError("not enough memory for the image; expected a smaller one") from error
    raise InputError(f"found {printable(type(source).__name__)}; expected a path, an array or a PIL image")


def _from_array(source: np.ndarray, limits: Limits) -> np.ndarray:
    if isinstance(source, (np.matrix, np.ma.MaskedArray)):
        raise InputError(
            f"found a {type(source).__name__} of NumPy; expected a plain array: np.asarray(...) makes one, without a mask"
        )
    array = np.asarray(source)
    gray = array.ndim == 2
    if not (gray or (array.ndim == 3 and array.shape[2] == 3)) or array.dtype != np.uint8 or 0 in array.shape:
        shown = printable(str(array.dtype)[:60])
        raise InputError(f"found an array {shown}{list(array.shape)}; expected uint8 [height, width, 3] (RGB)")
    check_pixels(array.shape[0], array.shape[1], "an array", limits)
    if _overlaps(array):
        raise InputError(
            f"found an array whose strides {list(array.strides)} let rows share memory; expected one of its own: copy it with np.array(...)"
        )
    return np.ascontiguousarray(np.repeat(array[..., None], 3, 2) if gray else array)


def _overlaps(array: np.ndarray) -> bool:
    """Whether axes of an array share memory, but for those that repeat the same values (stride 0, as `np.broadcast_to` makes them)."""
    reach = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if stride and size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def _from_pil(image: Any, limits: Limits) -> np.ndarray:
    """A PIL image as the same file would be read by path: turned as its EXIF says, 16 bits made 8."""
    try:
        from PIL import Image, ImageFile, ImageOps
    except ImportError as error:
        raise InputError(
            f"found {printable(type(image).__name__)}; expected a path, an array or a PIL image (Pillow is not installed)"
        ) from error
    if not isinstance(image, Image.Image):
        raise InputError(f"found {printable(type(image).__name__)}; expected a path, an array or a PIL image")
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"found a PIL image of {width} x {height} pixels; expected at least 1 x 1")
    check_pixels(height, width, "a PIL image", limits)
    if isinstance(image, ImageFile.ImageFile) and image.format not in PIL_FORMATS:
        raise InputError(
            f"found a PIL image of format {printable(image.format)}, which is decoded when it is used; expected {', '.join(PIL_FORMATS)}, "
            "or a decoded image: image.copy() makes one"
        )
    if image.mode == "F":
        raise InputError(
            "found a PIL image of mode F (floating point, of no known range); expected one of integers: scale it, and convert it to L"
        )
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            gray = _eight_bits(np.asarray(upright), upright.mode)
            array = np.repeat(gray[..., None], 3, 2)
        else:
            array = np.asarray(upright.convert("RGB"))
    except (InputError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # of a damaged file, Pillow raises errors of many kinds: SyntaxError, struct.error, KeyError, …
        raise InputError(f"found a PIL image that cannot be decoded ({printable(error)[:200]})") from error
    if array.ndim != 3 or sorted(array.shape[:2]) != sorted((height, width)):
        raise InputError(f"found a PIL image of {width} x {height} pixels that is decoded to others; it is damaged")
    return array


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Values of 16 or 32 bits as 8 bits."""
    most, least = int(values.max()), int(values.min())
    if least < 0 or most > 0xFFFF:
        raise InputError(
            f"found a PIL image of mode {mode} with values from {least} to {most}; expected 0 to 255 or 0 to 65535"
        )
    return (values if mode == "I" and most <= 0xFF else values.astype(np.int64) >> 8).astype(np.uint8)


def _read_file(path: Path, limits: Limits) -> np.ndarray:
    data, name = read_regular(path, limits.max_image_file_bytes, error=InputError), printable(path)
    header = read_header(data, name, limits)
    cv2 = opencv()
    try:
        image = cv2.imdecode(np.frombuffer(without_notes(data), np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        image = None
    if image is None:
        raise InputError(
            f"{name}: not a readable image ({header.format}, {len(data)} bytes); it is damaged or cut short"
        )
    if sorted(image.shape[:2]) != sorted((header.height, header.width)):
        raise InputError(
            f"{name}: not a readable image (its header says {header.width} x {header.height} pixels, but it has {image.shape[1]} x "
            f"{image.shape[0]}); it is damaged"
        )
    return np.ascontiguousarray(image[..., ::-1])


def list_images(folder: Path) -> list[Path]:
    """The images in a folder, by name.

    Raises:
        InputError: it is no folder, cannot be read, or has none.
    """
    if not is_folder(folder):
        raise InputError(f"{printable(folder)}: is not a folder; expected a folder of images")
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot be read ({error.strerror or error})") from error
    if not found:
        raise InputError(f"{printable(folder)}: has no images; expected {', '.join(SUFFIXES)}")
    return found


@dataclass(frozen=True)
class Placement:
    """Where an image of ``height`` x ``width`` lies in the model's input: its corner and its size there, in whole pixels.

    Each axis has its own scale, since the size is rounded.
    """

    height: int
    width: int
    left: int
    top: int
    inner_height: int
    inner_width: int

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``[n, 4]`` xyxy in pixels of the input to pixels of the image, clipped to it; float32."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height] * 2)
        moved = (boxes - np.array([self.left, self.top] * 2)) / gain
        return np.clip(moved, 0, [self.width, self.height] * 2).astype(np.float32)

    def points_to_image(self, points: np.ndarray) -> np.ndarray:
        """Points ``[..., 2 or more]``, x and y first, in pixels of the input to pixels of the image, clipped to it; float32."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = np.clip((points[..., :2] - np.array([self.left, self.top])) / gain, 0, [self.width, self.height])
        return np.concatenate((moved, points[..., 2:]), -1).astype(np.float32)

    def oriented_to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Oriented boxes ``[n, 5]`` in pixels of the input to pixels of the image; float32. They may reach out of it.

        As in Ultralytics, sides are scaled as if upright: exact where both axes have the same scale.
        """
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = (boxes[:, :2] - np.array([self.left, self.top])) / gain
        return np.concatenate((moved, boxes[:, 2:4] / gain, boxes[:, 4:]), 1).astype(np.float32)


def letterbox(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to fit, and center it on grey.

    Returns ``[height, width, 3]`` uint8, and where the image lies in it. The rounding is that of Ultralytics, whose
    models are trained and measured with it.
    """
    gain = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, round(image.shape[1] * gain)), max(1, round(image.shape[0] * gain)))
    left, top = (round((side - part) / 2 - 0.1) for side, part in zip((width, height), inner, strict=True))
    scaled = image if inner == (image.shape[1], image.shape[0]) else _resize(image, inner)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas, Placement(image.shape[0], image.shape[1], left, top, inner[1], inner[0])


def stretched(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to ``[height, width, 3]``, whatever its sides, and say so."""
    whole = Placement(image.shape[0], image.shape[1], 0, 0, height, width)
    if image.shape[:2] == (height, width):
        return image, whole
    return _resize(image, (width, height)), whole


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    cv2 = opencv()
    try:
        return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    except cv2.error as error:
        raise InputError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels cannot be scaled to {size[0]} x {size[1]} ({error.err})"
        ) from error


def to_tensor(canvases: list[np.ndarray]) -> np.ndarray:
    """Images ``[height, width, 3]`` uint8 RGB of one size to ``[B, 3, height, width]`` float32, 0 to 1."""
    return np.ascontiguousarray(np.stack(canvases).transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def load_tensor(folder: Path, height: int, width: int, stretch: bool, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """All images of a folder, letterboxed or stretched: ``[n, 3, height, width]`` float32, 0 to 1.

    Raises:
        InputError: the folder has no images, or one of them is unreadable.
    """
    fit = stretched if stretch else letterbox
    return to_tensor([fit(read_image(path, limits), height, width)[0] for path in list_images(folder)])
