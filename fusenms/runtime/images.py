"""Converts images of any kind to arrays, and arrays to the input of a model."""

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
"""Formats that Pillow may decode. Their headers state the size, and decoding runs no other program. An ICO can contain an image of another
size, and EPS starts a program."""


def opencv() -> Any:
    """Import OpenCV on first use.

    Raises:
        BackendUnavailableError: OpenCV is not installed.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "reading images needs OpenCV; install it with: pip install 'fusenms[images]'"
        ) from error
    return cv2


def is_single(value: Any) -> bool:
    """Whether a value is one image: a path, an array or a PIL image."""
    return isinstance(value, (str, bytes, os.PathLike, np.ndarray)) or hasattr(value, "convert")


def read_image(source: Any, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Convert a path, an array or a PIL image to an array ``[height, width, 3]`` uint8 RGB.

    A file is JPEG, PNG, BMP, WebP or TIFF, as its content shows. Its size is read from its header before it is decoded.

    An array is uint8, ``[height, width, 3]`` RGB or ``[height, width]`` gray.

    A PIL image is rotated according to its EXIF orientation. 16-bit modes (such as ``I;16``) keep their upper 8 bits. Mode ``I`` has no
    fixed range: values up to 255 count as 8 bits, others up to 65535 as 16 bits.

    Raises:
        InputError: the value is not an image, is damaged, exceeds the limits (`Limits.max_pixels`, `Limits.max_image_file_bytes`), or does
            not fit into memory.
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
            f"found a NumPy {type(source).__name__}; expected a plain array: convert it with np.asarray(...), which drops a mask"
        )
    array = np.asarray(source)
    gray = array.ndim == 2
    if not (gray or (array.ndim == 3 and array.shape[2] == 3)) or array.dtype != np.uint8 or 0 in array.shape:
        shown = printable(str(array.dtype)[:60])
        raise InputError(f"found an array {shown}{list(array.shape)}; expected uint8 [height, width, 3] (RGB)")
    check_pixels(array.shape[0], array.shape[1], "an array", limits)
    if _overlaps(array):
        raise InputError(
            f"found an array with strides {list(array.strides)}, whose rows share memory; expected one without: copy it with np.array(...)"
        )
    return np.ascontiguousarray(np.repeat(array[..., None], 3, 2) if gray else array)


def _overlaps(array: np.ndarray) -> bool:
    """Whether elements of an array share memory. Axes with stride 0, as from `np.broadcast_to`, do not count."""
    reach = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if stride and size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def _from_pil(image: Any, limits: Limits) -> np.ndarray:
    """Convert a PIL image in the same way as its file: rotated according to EXIF, and 16 bits reduced to 8."""
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
            f"found a PIL image of format {printable(image.format)}, which is not decoded yet; expected {', '.join(PIL_FORMATS)}, "
            "or a decoded image: make one with image.copy()"
        )
    if image.mode == "F":
        raise InputError(
            "found a PIL image of mode F (floating point, without a known range); expected integers: scale it, and convert it to L"
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
    ) as error:  # on a damaged file, Pillow raises errors of many types: SyntaxError, struct.error, KeyError, …
        raise InputError(f"found a PIL image that cannot be decoded ({printable(error)[:200]})") from error
    if array.ndim != 3 or sorted(array.shape[:2]) != sorted((height, width)):
        raise InputError(f"found a PIL image of {width} x {height} pixels that decodes to another size; it is damaged")
    return array


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Convert values of 16 or 32 bits to 8 bits."""
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
    """Paths of the images in a folder, sorted by name.

    Raises:
        InputError: the path is not a folder, cannot be read, or has no images.
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
    """The position of an image in the model's input, in whole pixels. Each axis has its own scale, because the size is rounded.

    Attributes:
        height, width: size of the image.
        left, top: position of the image's corner in the input.
        inner_height, inner_width: size of the scaled image in the input.
    """

    height: int
    width: int
    left: int
    top: int
    inner_height: int
    inner_width: int

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes ``[n, 4]`` xyxy from pixels of the input to pixels of the image, float32, clipped to the image."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height] * 2)
        moved = (boxes - np.array([self.left, self.top] * 2)) / gain
        return np.clip(moved, 0, [self.width, self.height] * 2).astype(np.float32)

    def points_to_image(self, points: np.ndarray) -> np.ndarray:
        """Convert points ``[..., 2 or more]``, x and y first, from pixels of the input to pixels of the image, float32, clipped to it."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = np.clip((points[..., :2] - np.array([self.left, self.top])) / gain, 0, [self.width, self.height])
        return np.concatenate((moved, points[..., 2:]), -1).astype(np.float32)

    def oriented_to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Convert oriented boxes ``[n, 5]`` from pixels of the input to pixels of the image, float32. They are not clipped.

        As in Ultralytics, the sides are scaled as if the box were upright. This is exact if both axes have the same scale.
        """
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = (boxes[:, :2] - np.array([self.left, self.top])) / gain
        return np.concatenate((moved, boxes[:, 2:4] / gain, boxes[:, 4:]), 1).astype(np.float32)


def letterbox(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to fit the input, and center it on gray.

    Return the input ``[height, width, 3]`` uint8, and the placement of the image in it. Sizes are rounded as in Ultralytics, because its
    models are trained and evaluated that way.
    """
    gain = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, round(image.shape[1] * gain)), max(1, round(image.shape[0] * gain)))
    left, top = (round((side - part) / 2 - 0.1) for side, part in zip((width, height), inner, strict=True))
    scaled = image if inner == (image.shape[1], image.shape[0]) else _resize(image, inner)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas, Placement(image.shape[0], image.shape[1], left, top, inner[1], inner[0])


def stretched(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to ``[height, width, 3]``, ignoring its aspect ratio. Return it with its placement."""
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
    """Stack images ``[height, width, 3]`` uint8 RGB of one size into ``[B, 3, height, width]`` float32, 0 to 1."""
    return np.ascontiguousarray(np.stack(canvases).transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def load_tensor(folder: Path, height: int, width: int, stretch: bool, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Read all images of a folder, letterboxed or stretched, into ``[n, 3, height, width]`` float32, 0 to 1.

    Raises:
        InputError: the folder has no images, or an image is unreadable.
    """
    fit = stretched if stretch else letterbox
    return to_tensor([fit(read_image(path, limits), height, width)[0] for path in list_images(folder)])
