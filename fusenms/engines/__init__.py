"""ONNX files to engines, one file per builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fusenms.engines.base import Engine, EngineSettings
from fusenms.engines.rtx import build_rtx
from fusenms.engines.tensorrt import build_tensorrt
from fusenms.errors import ConfigError
from fusenms.verification.checks import Progress

Build = Callable[[str, EngineSettings, "Progress | None"], Engine]

BUILDERS: Final[dict[str, Build]] = {"rtx": build_rtx, "trt": build_tensorrt}

__all__ = ["BUILDERS", "Engine", "EngineSettings", "get_builder"]


def get_builder(name: str) -> Build:
    """The builder of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BUILDERS:
        raise ConfigError(f"builder is {name!r}; expected one of {', '.join(BUILDERS)}")
    return BUILDERS[name]
