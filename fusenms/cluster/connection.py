"""Connects to a Ray cluster, or starts Ray on this machine alone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusenms.errors import BackendUnavailableError, InputError, first_line
from fusenms.safety.text import printable

LOCAL = "local"
STORE_BYTES = 256 * 2**20
"""Of the object store of a local Ray, beside the model: rows are small."""
_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens on 127.0.0.1 alone
}
"""Environment of a local Ray, which it reads when it is imported and started."""


def import_ray() -> Any:
    """Import Ray with Ray Data on first use.

    Raises:
        BackendUnavailableError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailableError(
            f"work on a cluster needs Ray ({first_line(error)}); install it with: pip install 'fusenms[ray]'"
        ) from error
    return ray


def import_pyarrow() -> Any:
    """Import pyarrow on first use.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise BackendUnavailableError(
            f"a job on a cluster needs pyarrow ({first_line(error)}); install it with: pip install 'fusenms[ray]'"
        ) from error
    return pyarrow


@contextmanager
def connected(address: str, model_bytes: int | None = None) -> Iterator[Any]:
    """Ray, connected to a cluster; the connection is closed afterwards. One that this process has already is taken, and stays open.

    A local Ray listens on 127.0.0.1 alone and sends no usage statistics. Newer versions ask for a token by themselves.

    Args:
        address: ``local``, ``auto`` or ``HOST:PORT``.
        model_bytes: size of the model, for the object store of a local Ray; None: of the size that Ray chooses.

    Raises:
        BackendUnavailableError: Ray is not installed, or there is no cluster at the address.
        InputError: the address is one of Ray Client.
    """
    if not isinstance(address, str) or not address or address.startswith("ray://"):
        raise InputError(
            f"the address is {printable(repr(address))}; expected local, auto or HOST:PORT of a cluster that this machine is a node of"
        )
    if "ray" in sys.modules and import_ray().is_initialized():
        yield import_ray()
        return
    with _environment(_LOCAL if address == LOCAL else {}):
        ray = import_ray()
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == LOCAL:
            settings["include_dashboard"] = False
            if model_bytes is not None:
                settings["object_store_memory"] = STORE_BYTES + 2 * model_bytes
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise BackendUnavailableError(
                f"found no Ray cluster at {printable(address)} ({first_line(error)}); expected local, auto or HOST:PORT"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while. What the user has set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
