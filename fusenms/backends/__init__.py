"""Ways to suppress, one file each."""

from __future__ import annotations

from fusenms.backends.base import Backend
from fusenms.backends.ort import ORT
from fusenms.backends.trt import TRT
from fusenms.errors import ConfigError

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ORT, TRT)}

__all__ = ["BACKENDS", "Backend", "get_backend"]


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
