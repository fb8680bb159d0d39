"""Weights of every kind to a `RawModel`: one file per kind."""

from __future__ import annotations

import numbers
import os
from pathlib import Path

from fusenms.artifacts import RawModel
from fusenms.errors import BackendUnavailableError, ConfigError, SourceError

CHECKPOINT_SUFFIXES = (".pt", ".pth")


def load(
    weights: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    make_dynamic: bool = False,
    one_to_many: bool = False,
) -> RawModel:
    """Read a detector's weights; export them to ONNX where they are a checkpoint.

    Args:
        weights: an Ultralytics or YOLOv5 checkpoint (`.pt`), or a raw `.onnx`.
        size: input size in pixels, one side or (height, width).
        dynamic_size: leave height and width open.
        opset: ONNX operator set of an export.
        make_dynamic: open the frozen batch of an `.onnx`, where that is shown to be safe.
        one_to_many: of a checkpoint with two heads (YOLOv10, YOLO26) take the one that needs suppression.

    Raises:
        SourceError: the weights are missing, damaged, unsafe, or no detector.
        AlreadyFusedError: the `.onnx` already ends in detections.
        ConfigError: a setting does not fit the weights.
        BackendUnavailableError: a checkpoint needs PyTorch, which is not installed.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise SourceError(
            f"weights is a {type(weights).__name__}; expected the path of a checkpoint (.pt) or an .onnx file"
        )
    path = Path(weights)
    sides = _sides(size)
    if path.is_dir():
        raise SourceError(f"{path}: is a directory; expected a checkpoint (.pt) or an .onnx file")
    if not path.exists():
        raise SourceError(f"{path}: no such file; expected a checkpoint (.pt) or an .onnx file")
    if path.stat().st_size == 0:
        raise SourceError(f"{path}: is empty (0 bytes); download or export it again")
    if path.suffix.lower() == ".onnx":
        from fusenms.sources.onnx_file import load_onnx

        if one_to_many:
            raise ConfigError(
                "one_to_many is for checkpoints with two heads; an .onnx file has what it has: leave it out"
            )
        if opset is not None:
            raise ConfigError("opset is for exporting a checkpoint; an .onnx file keeps its own: leave it out")
        return load_onnx(path, size=sides, dynamic_size=dynamic_size, make_dynamic=make_dynamic)
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        try:
            from fusenms.sources.checkpoint import load_checkpoint
            from fusenms.sources.export import export
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(
                f"{path}: a checkpoint needs PyTorch ({error}); install it with: pip install 'fusenms[export]'"
            ) from error
        return export(load_checkpoint(path, one_to_many), path.name, size=sides, dynamic_size=dynamic_size, opset=opset)
    raise SourceError(
        f"{path}: unknown kind of file ({path.suffix or 'no suffix'}); expected a checkpoint (.pt) or an .onnx file"
    )


def _sides(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(s, numbers.Integral) and not isinstance(s, bool) and s > 0 for s in sides):
        raise ConfigError(f"size is {size!r}; expected one side or (height, width), in pixels")
    return int(sides[0]), int(sides[1])
