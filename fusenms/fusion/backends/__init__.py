"""The backends, one file each: ways to suppress in the graph."""

from __future__ import annotations

from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError
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
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    if config is not None and config.rounds is not None and not BACKENDS[name].has_rounds:
        raise ConfigError(
            f"rounds is {config.rounds}, but backend {name} has none; leave it out, or take backend portable"
        )
    return BACKENDS[name]
