"""Encoded images, byte by byte: headers that say what their data does not hold."""

from __future__ import annotations

import struct
import zlib
from functools import cache
from io import BytesIO

import numpy as np


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, color: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG; its rows are black where none are given."""
    if rows is None:
        line = bytes(1 + (width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8)
        packer = zlib.compressobj(9)
        rows = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@cache
def pillow(kind: str, width: int = 32, height: int = 24, **settings: object) -> bytes:
    """An image of noise, written by Pillow."""
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(values).save(file, kind, **settings)
    return file.getvalue()


def jpeg(width: int | None = None, height: int | None = None, scans: int = 1, **settings: object) -> bytes:
    """A JPEG, its frame edited to another size, its last scan repeated."""
    data = bytearray(pillow("JPEG", progressive=scans > 1, **settings))
    frame = data.find(b"\xff\xc2" if scans > 1 else b"\xff\xc0")
    old_height, old_width = struct.unpack_from(">HH", data, frame + 5)
    struct.pack_into(">HH", data, frame + 5, height or old_height, width or old_width)
    last = data.rfind(b"\xff\xda")
    return bytes(data[:-2] + data[last:-2] * (scans - 1) + data[-2:])


def bmp(width: int, height: int, header: int = 40) -> bytes:
    data = bytearray(pillow("BMP"))
    struct.pack_into("<I", data, 14, header)
    struct.pack_into("<II", data, 18, width & 0xFFFFFFFF, height & 0xFFFFFFFF)
    return bytes(data)


def webp(width: int, height: int, kind: bytes = b"VP8X") -> bytes:
    """A WebP that says a size, before data of 32 x 24 pixels."""
    inner = pillow("WEBP", lossless=kind == b"VP8L")[12:]
    if kind == b"VP8X":
        sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        inner = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides + inner
    else:
        data = bytearray(inner)
        if kind == b"VP8L":
            struct.pack_into("<I", data, 9, (width - 1) | (height - 1) << 14)
        else:
            struct.pack_into("<HH", data, 14, width, height)
        inner = bytes(data)
    return b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner


def tiff(
    width: int, height: int, *further: tuple[int, int, int], big: bool = False, data: bytes = b"\x80" * 4096
) -> bytes:
    """A TIFF of 8 bits gray; further entries are (tag, kind, value), and stand in for those of the same tag unless it is negative."""
    start = 16 if big else 8
    entries = {
        256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, start), 277: (3, 1), 278: (4, height),
        279: (4, len(data)),
    }  # fmt: skip
    entries |= {tag: (kind, value) for tag, kind, value in further if tag > 0}
    rows = sorted([(tag, *entry) for tag, entry in entries.items()] + [(-t, k, v) for t, k, v in further if t < 0])
    if big:
        head = b"II+\0" + struct.pack("<HHQ", 8, 0, start + len(data))
        table = b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in rows)
        return head + data + struct.pack("<Q", len(rows)) + table + bytes(8)
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in rows)
    return b"II*\0" + struct.pack("<I", start + len(data)) + data + struct.pack("<H", len(rows)) + table + bytes(4)
