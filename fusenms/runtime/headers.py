"""Reads format and size of an encoded image from its header, before the image is decoded.

Five formats are supported: JPEG, PNG, BMP, WebP and TIFF. The content of the file determines the format, not its name. OpenCV decodes the
images. Its own pixel limit is left alone, because it applies to the whole process and must be set before the import. This module reads
the same size as the decoders of OpenCV. Ambiguous headers are refused, so that both always agree on the size.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from fusenms.errors import InputError
from fusenms.limits import Limits

FORMATS = "JPEG, PNG, BMP, WebP or TIFF"
MAX_SCANS = 64
"""Maximum number of scans of a progressive JPEG. Encoders write about ten. Each scan costs time for every pixel, whatever its size."""
MAX_PARTS = 100_000
"""Maximum number of segments of a JPEG, or of chunks of a PNG."""
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
"""Markers of a JPEG: the start of a segment, or the end of the image."""
_TIFF_FORMATS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_SAMPLES, _TIFF_STRIP, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = (
    256, 257, 258, 277, 278, 322, 323,
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """The header of an image.

    Attributes:
        format: name of the format.
        height, width: size in pixels, before the EXIF orientation is applied.
        pixels: maximum number of pixels that a decoder holds at once, at up to 8 bytes each.
    """

    format: str
    height: int
    width: int
    pixels: int


class _Unreadable(Exception):
    """A header is damaged, or its size is missing or ambiguous."""


def read_header(data: bytes, name: str, limits: Limits) -> Header:
    """Read format and size of an encoded image. The EXIF orientation is ignored, so height and width may be swapped.

    Args:
        data: content of the file.
        name: name of the image, for messages.

    Raises:
        InputError: the format is not supported, the header is unreadable, or the image has no pixels or more than ``limits.max_pixels``.
    """
    kind = next((kind for kind in _READERS if _is(kind, data)), None)
    if kind is None:
        raise InputError(f"{name}: not a readable image ({len(data)} bytes); expected {FORMATS}")
    try:
        header = _READERS[kind](data)
    except (_Unreadable, struct.error, IndexError, OverflowError) as error:
        said = error if isinstance(error, _Unreadable) else "it ends in its header"
        raise InputError(
            f"{name}: not a readable image ({kind}, {len(data)} bytes: {said}); it is damaged or cut short"
        ) from error
    if header.height < 1 or header.width < 1:
        raise InputError(
            f"{name}: not a readable image ({kind} of {header.width} x {header.height} pixels); it is damaged"
        )
    check_pixels(header.height, header.width, name, limits)
    if header.pixels > limits.max_pixels:
        raise InputError(
            f"{name}: {kind} of {header.width} x {header.height} pixels, in parts that need as much memory as {header.pixels} pixels; "
            f"expected at most {limits.max_pixels} (max_pixels in Limits)"
        )
    return header


def check_pixels(height: int, width: int, name: str, limits: Limits) -> None:
    """Refuse an image with more pixels than the limit.

    Raises:
        InputError: the image has more pixels.
    """
    if height * width > limits.max_pixels:
        raise InputError(
            f"{name}: has {width} x {height} pixels; expected at most {limits.max_pixels}: make it smaller, or raise max_pixels in Limits"
        )


def _is(kind: str, data: bytes) -> bool:
    if kind == "WebP":
        return data[:4] == b"RIFF" and data[8:15] == b"WEBPVP8"
    starts = {
        "JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG\r\n\x1a\n",), "BMP": (b"BM",),
        "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    }  # fmt: skip
    return data.startswith(starts[kind])


def _jpeg(data: bytes) -> Header:
    """Read the size from the first frame marker. As in libjpeg, bytes between segments are skipped."""
    size: tuple[int, int] | None = None
    place = 2
    scans = parts = 0
    while (found := _MARKER.search(data, place)) is not None:
        place, code, parts = found.end(), found[1][0], parts + 1
        if parts > MAX_PARTS:
            raise _Unreadable(f"it has more than {MAX_PARTS} segments")
        if code == 0xD9:  # end of the image
            break
        length: int = struct.unpack_from(">H", data, place)[0]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                raise _Unreadable("it has two frames")
            height, width = struct.unpack_from(">HH", data, place + 3)
            size = height, width
        if code == 0xDA:
            if size is None:
                raise _Unreadable("it has no size before its data")
            scans += 1
            if scans > MAX_SCANS:
                raise _Unreadable(f"it has more than {MAX_SCANS} scans")
        if length < 2:
            raise _Unreadable("a segment has no length")
        place += length
    if size is None:
        raise _Unreadable("it has no size")
    return Header("JPEG", size[0], size[1], size[0] * size[1])


def _png(data: bytes) -> Header:
    if data[8:16] != b"\0\0\0\rIHDR":
        raise _Unreadable("it does not begin with an IHDR chunk")
    width, height = struct.unpack_from(">II", data, 16)
    for part, _ in enumerate(_chunks(data)):  # OpenCV allocates the stated length of a chunk before it reads the chunk
        if part > MAX_PARTS:
            raise _Unreadable(f"it has more than {MAX_PARTS} chunks")
    return Header("PNG", height, width, height * width)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and bytes of each chunk of a PNG, up to the end of the image."""
    place, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        end, kind = place + 12 + length, data[place + 4 : place + 8]
        if end > len(data):
            raise _Unreadable("a chunk is cut short")
        yield kind, data[place:end]
        place = end


def _bmp(data: bytes) -> Header:
    (length,) = struct.unpack_from("<I", data, 14)
    if length == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    elif length >= 36:
        width, height = struct.unpack_from("<ii", data, 18)
    else:
        raise _Unreadable(f"its header has {length} bytes")
    return Header("BMP", abs(height), width, abs(height) * width)


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        low = struct.unpack_from("<HBHB", data, 24)
        width, height = 1 + low[0] + (low[1] << 16), 1 + low[2] + (low[3] << 16)
    elif kind == b"VP8L":
        if data[20] != 0x2F:
            raise _Unreadable("its data has another signature")
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise _Unreadable("its data has another signature")
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise _Unreadable("its first chunk is not an image")
    return Header("WebP", height, width, height * width)


def _tiff(data: bytes) -> Header:
    """Read the size from the first directory, the page that OpenCV reads."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (place,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", data, place)
    place += 8 if big else 2
    if count > 4096:
        raise _Unreadable(f"its directory has {count} entries")
    tags: dict[int, list[int]] = {}
    wanted = (_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_SAMPLES, _TIFF_STRIP, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT)
    for i in range(count):
        start = place + i * (20 if big else 12)
        tag, kind = struct.unpack_from(f"{order}HH", data, start)
        if tag not in wanted:
            continue
        (number,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, start + 4)
        if tag in tags or kind not in _TIFF_FORMATS or not 1 <= number <= (1 if tag != _TIFF_BITS else 64):
            raise _Unreadable(f"tag {tag} is duplicated, or has an unusual type or count")
        form = f"{order}{number}{_TIFF_FORMATS[kind]}"
        inline = struct.calcsize(form) <= (8 if big else 4)
        where = start + (12 if big else 8)
        if not inline:
            (where,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, where)
        tags[tag] = list(struct.unpack_from(form, data, where))
    if _TIFF_WIDTH not in tags or _TIFF_HEIGHT not in tags:
        raise _Unreadable("it has no size")
    (width,), (height,) = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    depth = tags.get(_TIFF_SAMPLES, [1])[0] * max(tags.get(_TIFF_BITS, [1]))
    part = min(tags.get(_TIFF_STRIP, [height])[0], height) * width
    if _TIFF_TILE_WIDTH in tags or _TIFF_TILE_HEIGHT in tags:
        part = max(part, tags.get(_TIFF_TILE_WIDTH, [width])[0] * tags.get(_TIFF_TILE_HEIGHT, [height])[0])
    return Header("TIFF", height, width, max(height * width, part * depth // 64))


def without_notes(data: bytes) -> bytes:
    """Remove texts and color profiles, which OpenCV does not use, from a PNG. Other formats are returned unchanged.

    libpng would print the names of damaged chunks to standard error, unescaped. Call `read_header` first.
    """
    if not _is("PNG", data):
        return data
    used = (chunk for kind, chunk in _chunks(data) if kind[:1].isupper() or kind in _PNG_USED or not kind.isalpha())
    return data[:8] + b"".join(used)


_PNG_USED = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
"""Optional chunks that OpenCV reads, beside the mandatory ones: transparency, orientation, animation."""
_READERS = {"JPEG": _jpeg, "PNG": _png, "BMP": _bmp, "WebP": _webp, "TIFF": _tiff}
