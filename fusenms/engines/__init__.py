"""Builds engines from ONNX files. Each builder has its own file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fusenms.contract import KEY_BACKEND
from fusenms.engines.base import Engine, EngineSettings
from fusenms.engines.rtx import build_rtx
from fusenms.engines.tensorrt import build_tensorrt
from fusenms.errors import ConfigError
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.verification.checks import OnProgress

Build = Callable[[str, EngineSettings, "OnProgress | None"], Engine]

TENSORRT: Final = ("trt", "plugin")
"""Backends whose files only TensorRT can build, not TensorRT-RTX."""
BUILDERS: Final[dict[str, Build]] = {"rtx": build_rtx, "trt": build_tensorrt}

__all__ = ["BUILDERS", "TENSORRT", "Engine", "EngineSettings", "build_engine", "builder_for", "get_builder"]


def build_engine(
    file: str | os.PathLike[str],
    *,
    builder: str | None = None,
    settings: EngineSettings | None = None,
    progress: OnProgress | None = None,
) -> Engine:
    """Build an engine from an `.onnx` file. `Engine.save` writes it with its sidecar.

    Args:
        builder: ``rtx`` for TensorRT-RTX (builds without a GPU), ``trt`` for TensorRT; None: the result of `builder_for`.
        settings: batch sizes and other settings; default: ``EngineSettings()``.
        progress: called at each step.

    Raises:
        BackendUnavailableError: the builder is not installed.
        UnsupportedByBackendError: the builder does not support the file.
        EngineBuildError: the build fails.

    Example:
        >>> import fusenms
        >>> file = fusenms.fuse("yolov8n.pt", size=64, backend="portable").save("yolov8n.portable.onnx")
        >>> engine = fusenms.build_engine(file, settings=fusenms.EngineSettings(batch=(1, 2, 4)))
        >>> engine.info["inputs"]["images"]["max"]
        [4, 3, 64, 64]
    """
    path = Path(file)
    return get_builder(builder or builder_for(path))(str(path), settings or EngineSettings(), progress)


def builder_for(path: Path) -> str:
    """The builder for a file: ``trt`` if it was fused for a plugin of TensorRT, else ``rtx``."""
    backend = read_metadata(read_onnx(path)).get(KEY_BACKEND)
    return "trt" if backend in TENSORRT else "rtx"


def get_builder(name: str) -> Build:
    """The builder with a name.

    Raises:
        ConfigError: there is no such builder.
    """
    if name not in BUILDERS:
        raise ConfigError(f"builder is {name!r}; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name]
