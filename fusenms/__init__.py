"""fusenms: a detector's weights to one ONNX model with decoding and non-maximum suppression inside, proven exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusenms._version import __version__ as __version__

if TYPE_CHECKING:
    from fusenms.artifacts.fused import FusedModel
    from fusenms.artifacts.raw import RawModel
    from fusenms.artifacts.report import Report
    from fusenms.config import PostprocessConfig
    from fusenms.errors import FusenmsError
    from fusenms.heads import recognize
    from fusenms.limits import Limits
    from fusenms.pipeline import fuse
    from fusenms.runtime import Detections, Detector
    from fusenms.sources import load
    from fusenms.verification.checks import verify

_HOMES = {
    "Detections": "fusenms.runtime",
    "Detector": "fusenms.runtime",
    "FusedModel": "fusenms.artifacts.fused",
    "FusenmsError": "fusenms.errors",
    "Limits": "fusenms.limits",
    "PostprocessConfig": "fusenms.config",
    "RawModel": "fusenms.artifacts.raw",
    "Report": "fusenms.artifacts.report",
    "fuse": "fusenms.pipeline",
    "load": "fusenms.sources",
    "recognize": "fusenms.heads",
    "verify": "fusenms.verification.checks",
}

__all__ = [
    "Detections",
    "Detector",
    "FusedModel",
    "FusenmsError",
    "Limits",
    "PostprocessConfig",
    "RawModel",
    "Report",
    "fuse",
    "load",
    "recognize",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that ``import fusenms`` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fusenms' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
