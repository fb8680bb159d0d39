"""Reads images: converts files, their contents, arrays and PIL images to arrays ``[height, width, 3]`` uint8."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.errors import BackendUnavailableError, InputError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.headers import check_pixels, read_header, without_notes
from fusenms.safety.files import is_folder, read_regular
from fusenms.safety.text import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CONTENTS = (bytes, bytearray, memoryview)
"""Types of the contents of a file."""
PIL_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats that Pillow may decode. Their headers state the size, and decoding runs no other program. An ICO can contain an image of another
size, and EPS starts a program."""


@cache
def has_opencv() -> bool:
    """Whether OpenCV is installed."""
    return find_spec("cv2") is not None


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
    """Whether a value is one image: a path, the contents of a file, an array of up to three dimensions or a PIL image."""
    if isinstance(value, (str, os.PathLike, *CONTENTS)) or hasattr(value, "convert"):
        return True
    return hasattr(value, "__dlpack__") and getattr(value, "ndim", 0) < 4


def read_image(source: Any, limits: Limits = DEFAULT_LIMITS, channels: str = "rgb") -> np.ndarray:
    """Convert an image of any kind to an array ``[height, width, 3]`` uint8 RGB. Arguments and errors are those of `open_image`."""
    image, reversed_ = open_image(source, limits, channels)
    return red_first(image) if reversed_ else image


def red_first(image: np.ndarray) -> np.ndarray:
    """Convert an image ``[height, width, 3]`` from BGR to RGB."""
    cv2 = opencv()
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def nv12_frame(array: np.ndarray) -> np.ndarray:
    """Check an array that is to be an NV12 frame: ``[height * 3 / 2, width]`` uint8.

    Raises:
        InputError: it is none.
    """
    rows, width = array.shape if array.ndim == 2 else (0, 0)
    if array.dtype != np.uint8 or not rows or rows % 3 or width % 2 or not width:
        raise InputError(
            f"found an array {array.dtype}{list(array.shape)}; expected an NV12 frame, uint8 [height * 3 / 2, width] with even sides"
        )
    return np.ascontiguousarray(array)


def to_nv12(image: np.ndarray, reversed_: bool) -> np.ndarray:
    """Convert an image ``[height, width, 3]``, BGR if ``reversed_``, to an NV12 frame ``[height * 3 / 2, width]``.

    Raises:
        InputError: its sides are not even.
    """
    cv2, (height, width) = opencv(), image.shape[:2]
    if height % 2 or width % 2:
        raise InputError(
            f"found an image of {height}x{width}; the file takes NV12 frames, whose sides are even: scale the image"
        )
    planes = cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420 if reversed_ else cv2.COLOR_RGB2YUV_I420)
    pairs = planes[height:].reshape(2, -1).T.reshape(-1, width)
    return np.concatenate((planes[:height], pairs))


def open_image(source: Any, limits: Limits = DEFAULT_LIMITS, channels: str = "rgb") -> tuple[np.ndarray, bool]:
    """Convert an image of any kind to an array ``[height, width, 3]`` uint8, and say whether its channels are BGR.

    A file, or its contents as bytes, is JPEG, PNG, BMP, WebP or TIFF, as its content shows. Its size is read from its header before it is
    decoded.

    An array is uint8, ``[height, width, 3]``, ``[height, width, 4]`` (the last channel, opacity, is dropped), ``[height, width]`` or
    ``[height, width, 1]`` gray. The order of its channels is ``channels``: ``rgb`` or ``bgr``. A tensor on the CPU that has ``__dlpack__``
    is taken as an array.

    A PIL image is rotated according to its EXIF orientation. 16-bit modes (such as ``I;16``) keep their upper 8 bits. Mode ``I`` has no
    fixed range: values up to 255 count as 8 bits, others up to 65535 as 16 bits.

    Raises:
        InputError: the value is not an image, is damaged, exceeds the limits (`Limits.max_pixels`, `Limits.max_image_file_bytes`), or does
            not fit into memory.
    """
    try:
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            return _decoded(
                read_regular(path, limits.max_image_file_bytes, error=InputError), printable(path), limits
            ), True
        if isinstance(source, CONTENTS):
            return _from_contents(source, limits), True
        if hasattr(source, "convert"):  # a PIL image, without importing PIL
            return _from_pil(source, limits), False
        if isinstance(source, np.ndarray):
            return _from_array(source, limits), channels == "bgr"
        if hasattr(source, "__dlpack__"):
            return _from_array(_from_dlpack(source), limits), channels == "bgr"
    except MemoryError as error:
        raise InputError("not enough memory for the image; expected a smaller one") from error
    raise InputError(
        f"found {printable(type(source).__name__)}; expected a path, the contents of a file, an array or a PIL image"
    )


def _from_contents(data: bytes | bytearray | memoryview, limits: Limits) -> np.ndarray:
    size, most = memoryview(data).nbytes, limits.max_image_file_bytes
    if size > most:  # before it is copied
        raise InputError(f"found {size} bytes; expected at most {most} for an image (max_image_file_bytes)")
    return _decoded(bytes(data), "bytes", limits)


def _from_dlpack(source: Any) -> np.ndarray:
    try:
        return np.from_dlpack(source)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise InputError(
            f"found a {printable(type(source).__name__)} that NumPy cannot share ({printable(error)[:100]}); expected it on the CPU: "
            "move it there with .cpu()"
        ) from error


def _from_array(source: np.ndarray, limits: Limits) -> np.ndarray:
    if isinstance(source, (np.matrix, np.ma.MaskedArray)):
        raise InputError(
            f"found a NumPy {type(source).__name__}; expected a plain array: convert it with np.asarray(...), which drops a mask"
        )
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype != np.uint8 or 0 in array.shape:
        shown = printable(str(array.dtype)[:60])
        raise InputError(
            f"found an array {shown}{list(source.shape)}; expected uint8 [height, width, 3] (RGB){_way_out(np.asarray(source))}"
        )
    check_pixels(array.shape[0], array.shape[1], "an array", limits)
    if _overlaps(array):
        raise InputError(
            f"found an array with strides {list(array.strides)}, whose rows share memory; expected one without: copy it with np.array(...)"
        )
    return np.ascontiguousarray(np.repeat(array, 3, 2) if array.shape[2] == 1 else array[..., :3])


def _way_out(array: np.ndarray) -> str:
    """How an array of another form becomes an image, for the end of a message."""
    if 0 in array.shape:
        return ""
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return "; its channels come first: give array.transpose(1, 2, 0)"
    if array.dtype == np.uint8 and array.ndim > 3:
        return "; give images one by one, or a batch [B, height, width, 3]"
    if array.ndim in (2, 3) and np.issubdtype(array.dtype, np.floating):
        return "; of values from 0 to 1 make (array * 255).round().astype(np.uint8)"
    return ""


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


def _decoded(data: bytes, name: str, limits: Limits) -> np.ndarray:
    """The image that an image file holds, BGR."""
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
    return image


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
