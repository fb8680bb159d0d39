"""Weights of every kind to a `RawModel`: one file per kind."""

from __future__ import annotations

import numbers
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.artifacts.raw import RawModel
from fusenms.errors import BackendUnavailableError, ConfigError, SourceError
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from fusenms.sources.export import Network

CHECKPOINT_SUFFIXES = (".pt", ".pth")
EXPECTED = "a checkpoint (.pt), an .onnx file, or a directory of a Hugging Face detector"


def load(
    weights: Any,
    *,
    size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    make_dynamic: bool = False,
    one_to_many: bool = False,
    pixels: str | Pixels | None = None,
    stretch: bool | None = None,
    example: Any = None,
    layout: Layout | None = None,
    names: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    isolate: bool = False,
) -> RawModel:
    """Read a detector's weights; export them to ONNX where they are none yet.

    Args:
        weights: path of an Ultralytics checkpoint or one of the original YOLOv5, YOLOv7, YOLOv9 (`.pt`), of a raw `.onnx`, or of a
            directory of a Hugging Face detector; or an `nn.Module`.
        size: input size in pixels, one side or (height, width).
        dynamic_size: leave height and width open.
        opset: ONNX operator set of an export.
        make_dynamic: take an `.onnx` with a frozen batch too; it is opened where that is shown to be safe.
        one_to_many: of a checkpoint with two heads (YOLOv10, YOLO26) take the one that needs suppression.
        pixels: what the network wants for pixels, a name of `fusenms.artifacts.preprocessing.PIXELS` or a `Pixels`;
            default: what the weights say, or what is usual in the family. The fused model takes RGB from 0 to 1 in any case.
        stretch: whether it wants pictures stretched to its size rather than letterboxed; default: as for ``pixels``.
        example: of an `nn.Module`: a batch of pictures ``[B, 3, height, width]`` of the size that it works at.
        layout: of an `nn.Module`: what it returns.
        names: of an `nn.Module`: its classes.
        limits: bounds on what a file may cost, and on each run of its graph.
        isolate: read a file in a child process, whose memory and time are limited too.

    Raises:
        SourceError: the weights are missing, damaged, unsafe, or no detector.
        AlreadyFusedError: the `.onnx` already ends in detections.
        ConfigError: a setting does not fit the weights.
        BackendUnavailableError: the weights need a package, such as PyTorch, that is not installed.
    """
    if isinstance(pixels, str) and pixels not in PIXELS:
        raise ConfigError(f"pixels is {pixels!r}; expected one of {', '.join(PIXELS)}, or a Pixels")
    wanted = PIXELS[pixels] if isinstance(pixels, str) else pixels
    sides = _sides(size)
    if sides is not None and max(sides) > limits.max_image_side:
        raise ConfigError(
            f"size is {sides[0]}x{sides[1]}; expected at most {limits.max_image_side} a side, or a higher max_image_side in limits"
        )
    if not isinstance(weights, (str, os.PathLike)):
        return _module(
            weights, example, layout, names, wanted, stretch, sides, dynamic_size, opset, make_dynamic or one_to_many
        )
    if example is not None or layout is not None or names:
        raise ConfigError("example, layout and names are for an nn.Module; a file says these itself: leave them out")
    path = Path(weights)
    if isolate:
        from fusenms.sources.isolated import load_isolated

        options = {"dynamic_size": dynamic_size, "opset": opset, "make_dynamic": make_dynamic, "one_to_many": one_to_many}  # fmt: skip
        raw = load_isolated(path, limits, size=sides, **options)
    else:
        raw = _file(path, sides, dynamic_size, opset, make_dynamic, one_to_many, limits)
    return replace(
        raw,
        pixels=raw.pixels if wanted is None else wanted,
        stretch=raw.stretch if stretch is None else stretch,
    )


def _file(
    path: Path, size: tuple[int, int] | None, dynamic_size: bool, opset: int | None, make_dynamic: bool, one_to_many: bool,
    limits: Limits,
) -> RawModel:  # fmt: skip
    if not os.path.exists(path):
        raise SourceError(f"{path}: no such file; expected {EXPECTED}")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"{path}: is empty (0 bytes); download or export it again")
    suffix = path.suffix.lower()
    if one_to_many and (path.is_dir() or suffix not in CHECKPOINT_SUFFIXES):
        raise ConfigError(
            "one_to_many is for checkpoints with two heads; these weights have what they have: leave it out"
        )
    if suffix == ".onnx" and not path.is_dir():
        from fusenms.sources.onnx_file import load_onnx

        if opset is not None:
            raise ConfigError("opset is for exporting a checkpoint; an .onnx file keeps its own: leave it out")
        return load_onnx(path, size=size, dynamic_size=dynamic_size, make_dynamic=make_dynamic, limits=limits)
    if path.is_file() and suffix not in CHECKPOINT_SUFFIXES:
        raise SourceError(f"{path}: unknown kind of file ({path.suffix or 'no suffix'}); expected {EXPECTED}")
    return _export(path, size, dynamic_size, opset, one_to_many, limits)


def _export(
    path: Path, size: tuple[int, int] | None, dynamic_size: bool, opset: int | None, one_to_many: bool, limits: Limits
) -> RawModel:  # fmt: skip
    try:
        from fusenms.sources.checkpoint import load_checkpoint
        from fusenms.sources.export import export, network_of
        from fusenms.sources.huggingface import load_directory
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{path}: needs PyTorch ({error}); install it with: pip install 'fusenms[export]'"
        ) from error
    network: Network = (
        load_directory(path, limits)
        if path.is_dir()
        else network_of(load_checkpoint(path, one_to_many, limits), path.name)
    )
    return export(network, size=size, dynamic_size=dynamic_size, opset=opset)


def _module(
    module: Any, example: Any, layout: Layout | None, names: Sequence[str], pixels: Pixels | None, stretch: bool | None,
    size: tuple[int, int] | None, dynamic_size: bool, opset: int | None, other: bool,
) -> RawModel:  # fmt: skip
    if not hasattr(module, "forward"):
        raise SourceError(f"weights is a {type(module).__name__}; expected the path of {EXPECTED}, or an nn.Module")
    if example is None or layout is None:
        raise ConfigError("an nn.Module needs example (a batch of pictures) and layout (what it returns)")
    if size is not None or other:
        raise ConfigError(
            "size, make_dynamic and one_to_many are for files; an nn.Module works at the size of its example"
        )
    from fusenms.sources.export import export
    from fusenms.sources.module import load_module

    return export(
        load_module(module, example, layout, names, pixels, stretch), size=None, dynamic_size=dynamic_size, opset=opset
    )


def _sides(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(s, numbers.Integral) and not isinstance(s, bool) and s > 0 for s in sides):
        raise ConfigError(f"size is {size!r}; expected one side or (height, width), in pixels")
    return int(sides[0]), int(sides[1])
