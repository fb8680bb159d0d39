"""Hostile images: each ends in `InputError`, soon and in little memory; what only looks odd is taken."""

from __future__ import annotations

import os
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Attack
from encoded import bmp, chunk, jpeg, pillow, png, tiff, webp
from PIL import Image

from fusenms import Detector, fuse
from fusenms.errors import InputError
from fusenms.limits import Limits
from fusenms.runtime.images import PIL_FORMATS, read_image

SECONDS, MEGABYTES = 10, 300
"""An attack may take so long, and so much memory."""


def file(data: bytes, name: str = "a.jpg") -> Any:
    """What writes a file and returns its path."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.jpg")
    return folder / "a.jpg"


def link_to(target: str) -> Any:
    def make(folder: Path) -> Path:
        (folder / "a.jpg").symlink_to(target)
        return folder / "a.jpg"

    return make


def sparse(folder: Path) -> Path:
    with open(folder / "a.jpg", "wb") as hole:
        hole.truncate(200 * 2**30)
    return folder / "a.jpg"


def opened(data: bytes) -> Any:
    """What opens an image with Pillow, which decodes it when it is used."""
    return lambda _: Image.open(BytesIO(data))


def broken_png(_: Path) -> Image.Image:
    data = bytearray(pillow("PNG", 300, 300))
    second = data.find(b"IDAT", data.find(b"IDAT") + 4)
    data[second : second + 4] = bytes(4)
    return Image.open(BytesIO(bytes(data)))


def icon(_: Path) -> Image.Image:
    """An ICO that says 16 x 16, around a PNG of 9000 x 9000."""
    inner = png(9000, 9000, bits=1, color=0)
    entry = bytes([16, 16, 0, 0, 1, 0, 32, 0]) + len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little")
    return Image.open(BytesIO(bytes([0, 0, 1, 0, 1, 0]) + entry + inner))


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    return lambda _: np.lib.stride_tricks.as_strided(np.zeros(5000, np.uint8), shape, strides)


def array(*args: Any, **kwargs: Any) -> Any:
    return lambda _: np.zeros(*args, **kwargs)


class Weird(np.ndarray):
    """A subclass that answers for its base."""


REFUSED = [
    Attack("special file", "fifo", fifo),
    Attack("special file", "endless device", link_to("/dev/zero")),
    Attack("special file", "terminal", link_to("/dev/tty")),
    Attack("special file", "200 GB of nothing", sparse),
    Attack("special file", "directory", lambda folder: folder),
    Attack("special file", "link to itself", link_to("a.jpg")),
    Attack("path", "NUL", lambda _: "a\0b.jpg"),
    Attack("path", "too long", lambda _: "x" * 5000),
    Attack("path", "surrogate", lambda _: "\ud800.jpg"),
    Attack("path", "bytes that are no image", lambda _: [b"a\0b"]),
    Attack("path", "empty", lambda _: ""),
    Attack("pixels", "PNG of 1 bit", file(png(30_000, 30_000, bits=1, color=0))),
    Attack("pixels", "PNG, thin", file(png(2**31 - 1, 1, rows=b""))),
    Attack("pixels", "PNG, negative", file(png(2**32 - 1, 2**32 - 1, rows=b"", bits=1, color=0))),
    Attack("pixels", "JPEG", file(jpeg(65_000, 65_000))),
    Attack("pixels", "JPEG, progressive", file(jpeg(65_000, 65_000, scans=2))),
    Attack("pixels", "JPEG, header padded", file(b"\xff\xd8" + b"\xff" * 99 + jpeg(65_000, 65_000)[3:])),
    Attack("pixels", "BMP", file(bmp(50_000, 50_000))),
    Attack("pixels", "BMP, upside down", file(bmp(50_000, -50_000))),
    Attack("pixels", "BMP, least height", file(bmp(1, -(2**31)))),
    Attack("pixels", "BMP, old header", file(bmp(65_000 | 65_000 << 16, 0, header=12))),
    Attack("pixels", "WebP, canvas", file(webp(2**24, 255))),
    Attack("pixels", "WebP, lossy", file(webp(16_383, 16_383, b"VP8 "))),
    Attack("pixels", "WebP, lossless", file(webp(16_384, 16_384, b"VP8L"))),
    Attack("pixels", "TIFF", file(tiff(40_000, 40_000))),
    Attack("pixels", "BigTIFF", file(tiff(40_000, 40_000, big=True))),
    Attack("pixels", "TIFF, great tile", file(tiff(64, 64, (322, 4, 32_752), (323, 4, 32_752)))),
    Attack("pixels", "TIFF, many samples", file(tiff(9000, 9000, (277, 3, 60_000)))),
    Attack("pixels", "TIFF, two widths", file(tiff(64, 64, (-256, 4, 40_000)))),
    Attack("pixels", "TIFF, 64-bit width", file(tiff(64, 64, (256, 16, 0)))),
    Attack("pixels", "array", array((10_001, 10_000), np.uint8)),
    Attack("pixels", "array of one value", lambda _: np.broadcast_to(np.uint8(7), (40_000, 40_000, 3))),
    Attack("pixels", "PIL, lazy", lambda _: Image.open(BytesIO(png(13_000, 13_000, bits=1, color=0)))),
    Attack("pixels", "PIL, icon with another size", icon),
    Attack("time", "JPEG of many scans", file(jpeg(scans=5000))),
    Attack("time", "JPEG, tall, of many scans", file(jpeg(9000, 9000, scans=300))),
    Attack("time", "JPEG of many segments", file(jpeg()[:2] + b"\xff\xfe\0\2" * 3_000_000)),
    Attack("time", "JPEG of many restarts", file(jpeg()[:2] + b"\xff\xd0" * 6_000_000)),
    Attack("time", "PNG of many chunks", file(png(8, 8, chunk(b"IDAT", b"") * 1_000_000))),
    Attack("memory", "PNG chunk of 2 GB", file(png(8, 8, chunk(b"tRNS", b"")[:8].replace(b"\0\0\0\0", b"\x7f\xff\xff\xff")))),
    Attack("memory", "PNG last chunk of 2 GB", file(png(8, 8)[:-12] + b"\x7f\xff\xff\xffIDAT")),
    *[
        Attack("format", f"{kind} in a .jpg", file(pillow(kind)))
        for kind in ("GIF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX", "SGI")
    ],
    Attack("format", "HDR", file(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 99999 +X 99999\n")),
    Attack("format", "OpenEXR", file(b"\x76\x2f\x31\x01" + bytes(100))),
    Attack("format", "SVG", file(b"<svg xmlns='http://www.w3.org/2000/svg' width='99999' height='99999'/>")),
    Attack("format", "text", file(b"no image")),
    Attack("format", "nothing", file(b"")),
    *[
        Attack("cut short", f"{kind} after {length} bytes", file(pillow(kind)[:length]))
        for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
        for length in (3, 8, 16, 25, 33)
    ],
    Attack("empty", "PNG", file(png(0, 0, rows=b""))),
    Attack("empty", "BMP", file(bmp(0, 5))),
    Attack("empty", "TIFF", file(tiff(64, 0))),
    Attack("empty", "PIL", lambda _: Image.new("RGB", (0, 0))),
    Attack("empty", "PIL, no width", lambda _: Image.new("L", (0, 5))),
    Attack("empty", "array", array((0, 0, 3), np.uint8)),
    Attack("empty", "gray array", array((0, 0), np.uint8)),
    Attack("damaged", "PNG with two sizes", file(png(8, 8, chunk(b"IHDR", bytes(13))))),
    Attack("damaged", "JPEG with two frames", file((one := jpeg())[:-2] + one[2:])),
    Attack("damaged", "WebP frame of another size", file(webp(99, 99))),
    Attack("damaged", "TIFF directory in a circle", file(b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(40))),
    Attack("damaged", "TIFF directory beyond the end", file(b"II*\0" + b"\xf0" * 4)),
    Attack("damaged", "BigTIFF directory beyond any memory", file(b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(40))),
    Attack("damaged", "BigTIFF with 2^64 entries", file(b"II+\0\x08\0\0\0" + (16).to_bytes(8, "little") + b"\xff" * 8)),
    Attack("PIL", "broken PNG", broken_png),
    Attack("PIL", "cut JPEG", opened(pillow("JPEG", 300, 300)[:2000])),
    Attack("PIL", "cut TIFF", opened(tiff(64, 64)[:-20] + bytes(20))),
    Attack("PIL", "format that starts a program", lambda _: lazy("EPS")),
    Attack("PIL", "floating point", lambda _: Image.new("F", (8, 8))),
    Attack("PIL", "32 bits", lambda _: Image.fromarray(np.full((8, 8), 70_000, np.int32))),
    Attack("PIL", "32 bits, negative", lambda _: Image.fromarray(np.full((8, 8), -1, np.int32))),
    Attack("PIL", "closed file", lambda folder: closed(folder)),
    Attack("PIL", "pretends to be one", lambda _: type("Image", (), {"convert": None, "size": (8, 8), "mode": "RGB"})()),
    Attack("array", "matrix", lambda _: np.asmatrix(np.zeros((20, 20), np.uint8))),
    Attack("array", "masked", lambda _: np.ma.masked_array(np.zeros((20, 20), np.uint8), True)),
    Attack("array", "overlapping rows", strided((300, 300, 3), (3, 3, 1))),
    Attack("array", "overlapping channels", strided((30, 30, 3), (90, 1, 1))),
    Attack("array", "objects", array((8, 8, 3), object)),
    Attack("array", "structured, with a terminal's commands", array((8, 8, 3), [("\x1b[31m", np.uint8)])),
    Attack("array", "other byte order", array((8, 8, 3), ">u2")),
    Attack("array", "text", lambda _: np.array([["a"]])),
    Attack("array", "bool", array((8, 8), bool)),
    Attack("array", "int8", array((8, 8, 3), np.int8)),
    Attack("array", "no axes", array((), np.uint8)),
    Attack("array", "64 axes", array((1,) * 32, np.uint8)),
    Attack("array", "five channels", array((8, 8, 5), np.uint8)),
    Attack("array", "channels first", array((3, 8, 8), np.uint8)),
    Attack("list", "in a list", lambda _: [[np.zeros((8, 8, 3), np.uint8)]]),
    Attack("list", "of numbers", lambda _: [1, 2]),
    Attack("list", "of None", lambda _: [None]),
    Attack("list", "itself", lambda _: itself()),
    Attack("list", "name with a terminal's commands", lambda _: [type("\x1b[31m", (), {})()]),
]  # fmt: skip


def lazy(kind: str) -> Image.Image:
    image = Image.open(BytesIO(pillow("PNG")))
    image.format = kind
    return image


def closed(folder: Path) -> Image.Image:
    image = Image.open(file(pillow("PNG"))(folder))
    image.close()
    return image


def itself() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


TAKEN = [
    Attack("array", "read-only", lambda _: np.broadcast_to(np.uint8(7), (20, 30, 3))),
    Attack("array", "gray repeated by strides", lambda _: np.broadcast_to(noise()[..., :1], (24, 32, 3))),
    Attack("array", "backwards", lambda _: noise()[::-1, ::-1, ::-1]),
    Attack("array", "every second pixel", lambda _: noise()[::2, ::3]),
    Attack("array", "channels moved", lambda _: noise().transpose(1, 0, 2)),
    Attack("array", "in Fortran's order", lambda _: np.asfortranarray(noise())),
    Attack("array", "subclass", lambda _: noise().view(Weird)),
    Attack("array", "one pixel", array((1, 1, 3), np.uint8)),
    Attack("array", "very thin", array((1, 200_000, 3), np.uint8)),
    Attack("array", "very tall", array((200_000, 1), np.uint8)),
    *[
        Attack("PIL", f"mode {mode}", lambda _, mode=mode: Image.fromarray(noise()).convert(mode))
        for mode in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I")
    ],
    Attack("PIL", "mode LA", lambda _: Image.fromarray(noise()).convert("L").convert("LA")),
    Attack("PIL", "mode I;16B", lambda _: Image.fromarray(np.full((8, 8), 512, np.uint16)).convert("I;16B")),
    Attack("PIL", "palette with transparency", lambda _: transparent()),
    *[Attack("format", kind, file(pillow(kind), "a.txt")) for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF")],
    Attack("format", "progressive JPEG", file(pillow("JPEG", progressive=True))),
    Attack("format", "compressed TIFF", file(pillow("TIFF", compression="tiff_lzw"))),
    Attack("format", "WebP without loss", file(pillow("WEBP", lossless=True))),
    Attack("format", "PNG with texts", file(png(8, 8, chunk(b"tEXt", b"\x1b[31mk\0v"), chunk(b"iCCP", b"\x1b[31mk\0\0x")))),
    *[Attack("format", f"{kind} of Pillow", opened(pillow(kind))) for kind in ("GIF", "PPM", "JPEG2000", "AVIF")],
]  # fmt: skip


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)


def transparent() -> Image.Image:
    data = BytesIO()
    Image.fromarray(noise()).quantize(16).save(data, "PNG", transparency=3)
    return Image.open(data)


@pytest.fixture(scope="module")
def detect(shapes_raw, tmp_path_factory) -> Detector:
    fused = fuse(shapes_raw, unverified=True)
    return Detector(fused.save(tmp_path_factory.mktemp("m") / "f.onnx", unverified=True), threads=1)


def peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


ATTACKS = (*REFUSED, *TAKEN)


@pytest.mark.covering(quick=0)
@pytest.mark.parametrize("attack", REFUSED, ids=str)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::PendingDeprecationWarning")
def test_attack_ends_in_input_error(detect, tmp_path, attack):
    image = attack.make(tmp_path)
    memory, start = peak(), time.monotonic()
    with pytest.raises(InputError) as error:
        detect(image)
    assert str(error.value).isprintable()
    assert time.monotonic() - start < SECONDS
    assert (peak() - memory) / 1024 < MEGABYTES


@pytest.mark.parametrize("attack", TAKEN, ids=str)
def test_odd_image_is_taken(detect, tmp_path, attack):
    assert len(detect([attack.make(tmp_path)])) == 1


def test_file_gives_what_opencv_gives(tmp_path):
    """Nothing that this package does to a file's bytes before decoding changes a pixel."""
    import cv2

    for kind in ("JPEG", "PNG", "BMP", "WEBP", "TIFF"):
        path = file(pillow(kind))(tmp_path)
        np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[..., ::-1])


def test_names_in_a_png_do_not_reach_the_terminal(tmp_path, capfd):
    profile = b"\x1b[31mEVIL\0\0" + zlib.compress((2**30).to_bytes(4, "big") + bytes(2**16))
    read_image(file(png(8, 8, chunk(b"iCCP", profile)))(tmp_path))
    printed = capfd.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_limits_are_those_that_were_given(tmp_path):
    path = file(pillow("PNG"))(tmp_path)
    assert read_image(path, Limits(max_pixels=32 * 24)).shape == (24, 32, 3)
    with pytest.raises(
        InputError, match=r"has 32 x 24 pixels; expected at most 767: make it smaller, or raise max_pixels"
    ):
        read_image(path, Limits(max_pixels=32 * 24 - 1))
    with pytest.raises(InputError, match="expected at most 100"):
        read_image(path, Limits(max_image_file_bytes=100))


@pytest.mark.parametrize(("value", "shown"), [(200, 200), (255, 255), (256, 1), (65_535, 255)])
def test_mode_i_is_8_or_16_bits_by_its_values(value, shown):
    assert read_image(Image.fromarray(np.full((4, 4), value, np.int32))).max() == shown


def test_formats_of_pillow_do_not_change_size_when_decoded():
    assert not {"ICO", "ICNS", "WMF", "EPS"} & set(PIL_FORMATS)
