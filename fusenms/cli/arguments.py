"""Values of flags: parsed from text, and put together to the values that the functions take."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from fusenms.artifacts.frames import Tiles
from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.cli.flags import add_fields, fields_of
from fusenms.errors import ConfigError, SourceError, first_line
from fusenms.heads import Anchors
from fusenms.heads.anchors import SETS
from fusenms.layout import Layout
from fusenms.onnx_reading.metadata import read_json
from fusenms.quantization import AUTO
from fusenms.sources.options import DYNAMIC


def keep_float_argument(text: str) -> int | str:
    """Parse a number of convolutions, or ``auto``."""
    if text != AUTO and not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {AUTO} or a number of convolutions")
    return text if text == AUTO else int(text)


def batch_argument(text: str) -> int | str:
    """Parse a batch: a number of images, or ``dynamic``."""
    if text != DYNAMIC and not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected {DYNAMIC} or a number of images")
    return text if text == DYNAMIC else int(text)


def frames_argument(text: str) -> tuple[int, int] | str:
    """Parse a size of frames: ``1080x1920`` (height x width), or ``dynamic``."""
    sides = text.lower().split("x")
    if text != DYNAMIC and (len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides)):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected HEIGHTxWIDTH (1080x1920) or {DYNAMIC}")
    return text if text == DYNAMIC else (int(sides[0]), int(sides[1]))


def tiles_argument(text: str) -> tuple[int, int]:
    """Parse rows and columns: ``2x3``."""
    counts = text.lower().split("x")
    if len(counts) != 2 or not all(count.isdigit() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected ROWSxCOLUMNS (2x3)")
    return int(counts[0]), int(counts[1])


def anchors_argument(text: str) -> Anchors:
    """Parse anchors: numbers, or the name of a set."""
    try:
        return text if text in SETS else [float(number) for number in text.replace("/", ",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}; expected numbers W,H,W,H,… or one of {', '.join(SETS)}"
        ) from None


def rounds_argument(text: str) -> int | None:
    """Parse a number of rounds. ``auto`` gives None."""
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected auto or a number of rounds")
    return None if text == "auto" else int(text)


def tiles_of(args: argparse.Namespace) -> Tiles | None:
    """The tiles that the flags describe.

    Raises:
        ConfigError: there are flags of tiles without tiles, or values are out of range.
    """
    if args.tiles is None:
        if args.overlap is not None or args.and_whole:
            raise ConfigError("found --overlap or --and-whole without --tiles; add --tiles RxC, or leave them out")
        return None
    rows, columns = args.tiles
    try:
        return Tiles(rows, columns, Tiles.overlap if args.overlap is None else args.overlap, args.and_whole)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def add_pixels(group: argparse._ArgumentGroup) -> None:
    """Add a flag for each value of `Pixels`, besides that for a preset."""
    own: dict[str, Any] = {"default": None}
    three = own | {"type": float, "nargs": 3, "metavar": "N"}
    add_fields(
        group, Pixels, channels=own | {"choices": ["rgb", "bgr"]}, scale=own | {"metavar": "N"}, mean=three, std=three
    )


def add_anchors(group: argparse._ArgumentGroup) -> None:
    """Add the flag for anchor boxes."""
    group.add_argument(
        "--anchors",
        type=anchors_argument,
        metavar="W,H,…|SET",
        help="anchor boxes of an .onnx whose head is not decoded: widths and heights in pixels, the finest level first, or one of "
        + ", ".join(SETS),
    )


def pixels_of(args: argparse.Namespace) -> str | Pixels | None:
    """The pixels that the flags name: a preset, or one of which some values are replaced."""
    own = {name: value for name, value in fields_of(args, Pixels).items() if value is not None}
    if not own:
        return args.pixels
    own |= {name: tuple(own[name]) for name in ("mean", "std") if name in own}
    return replace(PIXELS[args.pixels or "rgb"], **own)


def read_layout(args: argparse.Namespace) -> Layout | None:
    """Read the layout that ``--layout`` names.

    Raises:
        ConfigError: the file cannot be read or is not a layout.
    """
    path, advice = args.layout, "expected what `inspect FILE --layout` prints"
    if path is None:
        return None
    if args.family is not None:
        raise ConfigError("found --family and --layout; a layout names its family itself: leave one of them out")
    try:
        with path.open("rb") as file:
            text = file.read(args.limits.max_metadata_bytes + 1)
        if len(text) > args.limits.max_metadata_bytes:
            raise ValueError(f"more than {args.limits.max_metadata_bytes} bytes (max_metadata_bytes)")
        values = read_json(text.decode("utf-8"), args.limits)
        if not isinstance(values, dict):
            raise ValueError(f"is a {type(values).__name__}, not an object")
        return Layout.from_dict(values)
    except (OSError, ValueError, SourceError) as error:
        raise ConfigError(f"{path}: is not a layout ({first_line(error)}); {advice}") from error
