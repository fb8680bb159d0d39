"""fusenms: turn detector weights into one ONNX model with decoding and non-maximum suppression inside, verified as exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusenms._version import __version__ as __version__

if TYPE_CHECKING:
    from fusenms.artifacts.frames import Tiles
    from fusenms.artifacts.fused import FusedModel, load_fused
    from fusenms.artifacts.raw import RawModel
    from fusenms.artifacts.report import Report
    from fusenms.cluster import DatasetRun, detect_dataset
    from fusenms.comparison import Comparison, compare
    from fusenms.config import PostprocessConfig
    from fusenms.conversion import Conversion, configure, convert
    from fusenms.deployment import deploy
    from fusenms.diagnosis import doctor
    from fusenms.editing import edit, expose, extract, restamp
    from fusenms.engines import Engine, EngineSettings, build_engine
    from fusenms.errors import FusenmsError
    from fusenms.evaluation import Evaluation, evaluate
    from fusenms.graph.custom_ops import custom_ops
    from fusenms.heads import recognize
    from fusenms.inspection import Inspection, inspect
    from fusenms.limits import Limits
    from fusenms.pipeline import fuse
    from fusenms.runtime import Detections, Detector
    from fusenms.serving import ServeSettings, asgi_app
    from fusenms.sources import LoadOptions, load
    from fusenms.sources.operators import register_operator
    from fusenms.verification.checks import verify

_HOMES = {
    "Comparison": "fusenms.comparison",
    "Conversion": "fusenms.conversion",
    "DatasetRun": "fusenms.cluster",
    "Detections": "fusenms.runtime",
    "Detector": "fusenms.runtime",
    "Engine": "fusenms.engines",
    "EngineSettings": "fusenms.engines",
    "Evaluation": "fusenms.evaluation",
    "FusedModel": "fusenms.artifacts.fused",
    "FusenmsError": "fusenms.errors",
    "Inspection": "fusenms.inspection",
    "Limits": "fusenms.limits",
    "LoadOptions": "fusenms.sources",
    "PostprocessConfig": "fusenms.config",
    "RawModel": "fusenms.artifacts.raw",
    "Report": "fusenms.artifacts.report",
    "ServeSettings": "fusenms.serving",
    "Tiles": "fusenms.artifacts.frames",
    "asgi_app": "fusenms.serving",
    "build_engine": "fusenms.engines",
    "compare": "fusenms.comparison",
    "configure": "fusenms.conversion",
    "convert": "fusenms.conversion",
    "deploy": "fusenms.deployment",
    "custom_ops": "fusenms.graph.custom_ops",
    "detect_dataset": "fusenms.cluster",
    "doctor": "fusenms.diagnosis",
    "edit": "fusenms.editing",
    "evaluate": "fusenms.evaluation",
    "expose": "fusenms.editing",
    "extract": "fusenms.editing",
    "fuse": "fusenms.pipeline",
    "inspect": "fusenms.inspection",
    "load": "fusenms.sources",
    "load_fused": "fusenms.artifacts.fused",
    "recognize": "fusenms.heads",
    "register_operator": "fusenms.sources.operators",
    "restamp": "fusenms.editing",
    "verify": "fusenms.verification.checks",
}

__all__ = [
    "Comparison",
    "Conversion",
    "DatasetRun",
    "Detections",
    "Detector",
    "Engine",
    "EngineSettings",
    "Evaluation",
    "FusedModel",
    "FusenmsError",
    "Inspection",
    "Limits",
    "LoadOptions",
    "PostprocessConfig",
    "RawModel",
    "Report",
    "ServeSettings",
    "Tiles",
    "asgi_app",
    "build_engine",
    "compare",
    "configure",
    "convert",
    "custom_ops",
    "deploy",
    "detect_dataset",
    "doctor",
    "edit",
    "evaluate",
    "expose",
    "extract",
    "fuse",
    "inspect",
    "load",
    "load_fused",
    "recognize",
    "register_operator",
    "restamp",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import fusenms`` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fusenms' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
