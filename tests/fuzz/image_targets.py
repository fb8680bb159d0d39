"""A target for fuzzing the reading of images; run alone it mutates images at random: python tests/fuzz/image_targets.py SECONDS [SEED]."""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attacks"))

import numpy as np
from encoded import bmp, jpeg, pillow, png, tiff, webp

from fusenms.errors import FusenmsError
from fusenms.limits import Limits
from fusenms.runtime.headers import read_header
from fusenms.runtime.images import read_image
from fusenms.runtime.placement import letterbox, stretched

LIMITS = Limits(max_pixels=200_000, max_image_file_bytes=2**20)
SLOW = 2.0
"""Seconds; an input that takes longer is a find."""
FOLDER = tempfile.TemporaryDirectory(prefix="fusenms-fuzz-")
MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
    "I;16L",
)
DTYPES = ("u1", "i1", "u2", ">u2", "f4", "f8", "?", "O", "U3", "M8[s]", "V5", "c8")


def seeds() -> list[bytes]:
    """Small valid images of every format and kind of compression."""
    from PIL import Image

    images = [pillow(kind) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")]
    images += [pillow("JPEG", progressive=True), pillow("JPEG", subsampling=0), pillow("WEBP", lossless=True)]
    images += [pillow("TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")]
    images += [
        tiff(64, 64),
        tiff(64, 64, big=True),
        tiff(64, 64, (322, 3, 16), (323, 3, 16)),
        png(9, 9, bits=16, color=6),
    ]
    images += [png(9, 9, bits=4, color=0), bmp(32, -24), webp(32, 24), jpeg(scans=3)]
    for kind in ("PNG", "WEBP", "TIFF"):
        file = BytesIO()
        frames = [Image.new("RGBA", (20, 10), color) for color in ("red", "green")]
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        images.append(file.getvalue())
    return images


def build(data: bytes) -> bytes:
    """An image from fuzzed bytes: a format, a size and fields of its header that they choose, then their own content."""
    width, height, extra, value = struct.unpack_from("<IIHI", data.ljust(15, b"\0"), 1)
    short, rest = (width % 65_536 or 1, height % 65_536 or 1), data[15:]
    kind = data[0] % 8
    if kind == 0:
        return png(width, height, bits=1 << extra % 5, color=(0, 2, 3, 4, 6)[value % 5], rows=rest)
    if kind == 1:
        return jpeg(*short, scans=1 + extra % 80)
    if kind == 2:
        return bmp(width, height, header=(12, 40, 64, 108, 124, extra)[value % 6]) + rest
    if kind == 3:
        return webp(1 + width % 2**24, 1 + height % 2**24) + rest
    if kind in (4, 5):
        side = (1 + width % 16_383, 1 + height % 16_383)
        return webp(*side, b"VP8L" if kind == 4 else b"VP8 ") + rest
    tags = [(254 + extra % 90, 1 + value % 18, value), (258 + value % 22, 3, extra), (-(254 + value % 90), 4, width)]
    return tiff(width % 9999, height % 9999, *tags[: value % 4], big=kind == 7, data=rest or bytes(64))


def fuzz_image(data: bytes) -> None:
    """Read an image of fuzzed bytes: as a file, as an array or as a PIL image, as the first byte says.

    Raises:
        AssertionError: an array exceeds the limits, or is none of an image.
        Exception: anything else than success or a `FusenmsError`, which is what a fuzzer looks for.
    """
    if not data:
        return
    way, data = data[0] % 8, data[1:]
    sources = {5: _array, 6: _pil_mode, 7: _pil_file}
    try:
        source = sources[way](data) if way in sources else _file(build(data) if way == 4 and data else data)
        image = read_image(source, LIMITS)
    except FusenmsError as error:
        message = str(error)
    else:
        message = ""
        _check(image, source)
    assert message.isprintable()


def _check(image: np.ndarray, source: Any) -> None:
    assert image.dtype == np.uint8
    assert image.ndim == 3 and image.shape[2] == 3
    assert 0 < image.shape[0] * image.shape[1] <= LIMITS.max_pixels
    for fit in (letterbox, stretched):
        assert fit(image, 64, 96)[0].shape == (64, 96, 3)
    if isinstance(source, Path):
        header = read_header(source.read_bytes(), "", LIMITS)
        assert sorted((header.height, header.width)) == sorted(image.shape[:2])


def _file(data: bytes) -> Path:
    path = Path(FOLDER.name) / f"{os.getpid()}.jpg"
    path.write_bytes(data)
    return path


def _array(data: bytes) -> np.ndarray:
    numbers = data.ljust(16, b"\0")
    dtype = np.dtype(DTYPES[numbers[0] % len(DTYPES)] if numbers[0] < 128 else "u1")
    shape = [side % 40 for side in numbers[2 : 2 + numbers[1] % 5]]
    if numbers[6] < 160 and len(shape) > 2:
        shape[2:] = [3]
    array = np.zeros(shape, dtype)
    if numbers[7] < 128 or dtype.hasobject:
        return array
    base = np.frombuffer(bytes(range(256)) * 64, np.uint8)
    strides = [(number % 64) for number in numbers[8 : 8 + len(shape)]]
    return (
        np.lib.stride_tricks.as_strided(base, shape, strides)[:: -1 if numbers[13] % 2 and shape else 1]
        if shape
        else array
    )


def _pil_mode(data: bytes) -> Any:
    from PIL import Image

    numbers = data.ljust(8, b"\0")
    try:
        image = Image.new(MODES[numbers[0] % len(MODES)], (numbers[1] % 50, numbers[2] % 50), numbers[3])
        image.frombytes((data * 9999)[: len(image.tobytes())])
    except (ValueError, TypeError):
        return Image.new("L", (1, 1))
    if numbers[4] % 2:
        image.getexif()[0x0112] = numbers[5] % 12
    return image


def _pil_file(data: bytes) -> Any:
    from PIL import Image

    try:
        return Image.open(BytesIO(build(data[1:]) if data[:1] < b"\x40" and data[1:] else data[1:]))
    except Exception:  # Pillow does not open it, so nobody can hand it to us
        return Image.new("L", (1, 1))


def mutate(rng: random.Random, pool: list[bytes]) -> bytes:
    """A fuzzed input: a valid image with some bytes changed, cut, doubled or crossed with another one; or random bytes."""
    way = rng.randrange(8)
    if way in (4, 5, 6) or (way == 7 and rng.random() < 0.4):
        sides = (
            rng.choice((rng.randrange(100), rng.randrange(2**32))),
            rng.choice((rng.randrange(100), rng.randrange(2**32))),
        )
        head = bytes([rng.randrange(64)] * (way == 7)) + bytes([rng.randrange(256)]) + struct.pack("<II", *sides)
        return bytes([way]) + head + rng.randbytes(rng.choice((6, 20, 200)))
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 80))
        what = rng.randrange(6)
        if what == 0:
            data[place] = rng.randrange(256)
        elif what == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif what == 2:
            del data[place : place + rng.randrange(1, 40)]
        elif what == 3:
            data[place : place + 4] = rng.choice(
                (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\x80\0\0\0")
            )
        elif what == 4:
            data[place:place] = data[place : place + rng.randrange(1, 60)] * rng.choice((1, 1, 9))
        else:
            other = rng.choice(pool)
            data[place:] = other[rng.randrange(len(other)) :]
        if not data:
            data = bytearray(b"x")
    return bytes([way]) + (bytes([255]) if way == 7 else b"") + bytes(data)


def main(seconds: float, seed: int) -> int:
    """Fuzz for some seconds of processor time; the input of each find is written beside this file."""
    rng, pool, counts, finds = random.Random(seed), seeds(), Counter(), 0
    slowest, last = 0.0, time.process_time()
    while time.process_time() - last < seconds:
        data = mutate(rng, pool)
        start = time.process_time()
        current = Path(FOLDER.name) / "current"
        current.write_bytes(data)  # survives a crash of a decoder
        try:
            fuzz_image(data)
        except Exception as error:
            finds += 1
            last = time.process_time()
            found = Path(tempfile.gettempdir()) / f"fusenms-find-{seed}-{finds}"
            found.write_bytes(data)
            print(f"{found}: {type(error).__name__}: {error!r:.200}", flush=True)
        if (spent := time.process_time() - start) > SLOW:
            start = time.process_time()  # once more: the first time, the machine may have been busy
            fuzz_image(data)
            spent = min(spent, time.process_time() - start)
        if spent > SLOW:
            finds, last = finds + 1, time.process_time()
            found = Path(tempfile.gettempdir()) / f"fusenms-find-{seed}-{finds}"
            found.write_bytes(data)
            print(f"{found}: took {spent:.1f} s", flush=True)
        slowest = max(slowest, spent)
        counts[data[0] % 8] += 1
    print(
        f"{sum(counts.values())} inputs ({dict(sorted(counts.items()))}), {finds} finds, slowest {slowest:.2f} s",
        flush=True,
    )
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
