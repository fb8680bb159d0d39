"""Reads weights of every kind into a `RawModel`. Each kind has its own file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.artifacts.raw import RawModel
from fusenms.errors import BackendUnavailableError, ConfigError, SourceError
from fusenms.sources.isolated import load_isolated
from fusenms.sources.onnx_file import load_onnx
from fusenms.sources.options import LoadFields, LoadOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusenms.sources.network import Network

CHECKPOINT_SUFFIXES = (".pt", ".pth")
EXPECTED = "a checkpoint (.pt), an .onnx file, or a directory of a Hugging Face detector"

__all__ = ["CHECKPOINT_SUFFIXES", "EXPECTED", "LoadFields", "LoadOptions", "load", "options_from"]


def load(weights: Any, options: LoadOptions | None = None, **fields: Unpack[LoadFields]) -> RawModel:
    """Read the weights of a detector. Weights that are not ONNX are exported to ONNX.

    Args:
        weights: an `nn.Module`, or a path: a checkpoint (`.pt`) of Ultralytics or of the original YOLOv5, YOLOv7, YOLOv9; a raw `.onnx`;
            or the directory of a Hugging Face detector.
        options: how the weights are read.
        **fields: fields of `LoadOptions`, instead of ``options``.

    Raises:
        SourceError: the weights are missing, damaged, unsafe, or not those of a detector.
        AlreadyFusedError: the `.onnx` already returns detections.
        ConfigError: an option does not fit the weights.
        BackendUnavailableError: the weights need a package, such as PyTorch, that is not installed.

    Example:
        >>> import fusenms
        >>> raw = fusenms.load("yolov8n.pt", size=64)
        >>> raw.task, raw.image.height, raw.image.width
        ('detect', 64, 64)
    """
    options = options_from(options, fields)
    if not isinstance(weights, (str, os.PathLike)):
        return replace(_module(weights, options), batch=options.asked_batch)
    if options.example is not None or options.layout is not None or options.class_names:
        raise ConfigError(
            "example, layout and class_names are for an nn.Module; a file has these itself: leave them out "
            "(the layout of a raw .onnx is for fusenms.fuse)"
        )
    path = Path(weights)
    raw = load_isolated(path, options) if options.isolate else _file(path, options)
    return replace(
        raw,
        batch=options.asked_batch,
        pixels=raw.pixels if options.pixels is None else options.preprocessing,
        stretch=raw.stretch if options.stretch is None else options.stretch,
    )


def options_from(options: LoadOptions | None, fields: LoadFields) -> LoadOptions:
    """The options, from a value or from keywords.

    Raises:
        ConfigError: both are given, an option is unknown, or a value is out of its range.
    """
    if options is None:
        known = LoadFields.__annotations__
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(f"unknown option {', '.join(unknown)}; expected {', '.join(known)}")
        return LoadOptions(**fields)
    if fields:
        raise ConfigError(f"found options and {', '.join(fields)}; expected either a LoadOptions or its fields")
    return options


def _file(path: Path, options: LoadOptions) -> RawModel:
    if not os.path.exists(path):
        raise SourceError(f"{path}: no such file; expected {EXPECTED}")
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"{path}: is empty (0 bytes); download or export it again")
    suffix = path.suffix.lower()
    if options.one_to_many and (path.is_dir() or suffix not in CHECKPOINT_SUFFIXES):
        raise ConfigError(
            "one_to_many is for checkpoints (.pt) with two heads; these weights are of another kind: leave it out"
        )
    if options.ignore and (path.is_dir() or suffix != ".onnx"):
        raise ConfigError("ignore is for outputs of an .onnx file; these weights are of another kind: leave it out")
    if suffix == ".onnx" and not path.is_dir():
        if options.opset is not None:
            raise ConfigError("opset is for exporting a checkpoint; an .onnx file keeps its own: leave it out")
        return load_onnx(path, options)
    if path.is_file() and suffix not in CHECKPOINT_SUFFIXES:
        raise SourceError(f"{path}: unknown kind of file ({path.suffix or 'no suffix'}); expected {EXPECTED}")
    return _export(path, options)


def load_network(path: Path, options: LoadOptions) -> Network:
    """Load the network of a checkpoint or of a Hugging Face directory, before its export.

    Raises:
        SourceError: the weights cannot be read, or are not safe to load.
        BackendUnavailableError: PyTorch is not installed.
    """
    try:
        from fusenms.sources.checkpoint import load_checkpoint
        from fusenms.sources.export import network_of
        from fusenms.sources.huggingface import load_directory
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{path}: needs PyTorch ({error}); install it with: pip install 'fusenms[export]'"
        ) from error
    if path.is_dir():
        return load_directory(path, options.limits)
    return network_of(load_checkpoint(path, options.one_to_many, options.limits), path.name)


def _export(path: Path, options: LoadOptions) -> RawModel:
    network = load_network(path, options)
    from fusenms.sources.export import export

    return export(network, size=options.sides, dynamic_size=options.dynamic_size, opset=options.opset)


def _module(module: Any, options: LoadOptions) -> RawModel:
    if not hasattr(module, "forward"):
        raise SourceError(f"weights is a {type(module).__name__}; expected the path of {EXPECTED}, or an nn.Module")
    if options.example is None or options.layout is None:
        raise ConfigError("an nn.Module needs example (a batch of images) and layout (what it returns)")
    if options.size is not None or options.one_to_many or options.ignore:
        raise ConfigError("size, one_to_many and ignore are for files; an nn.Module works at the size of its example")
    from fusenms.sources.export import export
    from fusenms.sources.module import load_module

    network = load_module(module, options)
    return export(network, size=None, dynamic_size=options.dynamic_size, opset=options.opset)
