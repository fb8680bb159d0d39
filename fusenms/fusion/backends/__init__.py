"""The backends, one file each: ways to suppress in the graph."""

from __future__ import annotations

from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError, UnsupportedByBackendError
from fusenms.fusion.backends.base import Backend
from fusenms.fusion.backends.ort import ORT
from fusenms.fusion.backends.plugin import PLUGGED
from fusenms.fusion.backends.portable import PORTABLE
from fusenms.fusion.backends.trt import TRT

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ORT, TRT, PORTABLE, PLUGGED)}

__all__ = ["BACKENDS", "Backend", "get_backend"]


def get_backend(name: str, config: PostprocessConfig | None = None) -> Backend:
    """Return the backend of that name. With ``config``, check that it has these settings.

    Raises:
        ConfigError: there is no such backend, or it does not have these settings.
        UnsupportedByBackendError: its thresholds cannot be inputs, and the settings ask for that.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    if config is not None and config.rounds is not None and not BACKENDS[name].has_rounds:
        raise ConfigError(
            f"rounds is {config.rounds}, but backend {name} has none; leave it out, or take backend portable"
        )
    if config is not None and config.runtime_thresholds and not BACKENDS[name].has_runtime_thresholds:
        able = " or ".join(backend.name for backend in BACKENDS.values() if backend.has_runtime_thresholds)
        raise UnsupportedByBackendError(
            f"backend {name}: its thresholds are attributes of its plugin, and cannot be inputs; leave runtime_thresholds=True out, or "
            f"take backend {able}"
        )
    return BACKENDS[name]
