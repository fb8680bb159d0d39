"""A server for fused files: `POST /detect/NAME`, the Open Inference Protocol (KServe v2), metrics for Prometheus.

1. Open the files, and look after them (`models`); collect requests into batches (`batching`).
2. Answer requests: `routes`, with `bodies` and `protocol` for what clients send.
3. Run the app on a socket (`server`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusenms.errors import BackendUnavailableError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.serving.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["ServeSettings", "asgi_app"]

DEFAULT_SETTINGS = ServeSettings()


def asgi_app(
    files: Sequence[str | os.PathLike[str]],
    settings: ServeSettings = DEFAULT_SETTINGS,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Starlette:
    """Open fused files, and make the ASGI app that `fusenms serve` runs: to mount in a service of your own, or to run in any ASGI server.

    The files are closed when the lifespan of the app ends, or by ``app.state.models.close()``. The limits on connections and on slow heads
    are those of the server that runs it; the others are those of the app.

    Args:
        files: what `fusenms.Detector` opens. The name of a model is that of its file up to the first dot.
        settings: how they are opened and served.
        limits: bounds on the files, on the images, and on the time of each run.

    Returns:
        an app of Starlette; ``app.state.models`` are the open models by name.

    Raises:
        ConfigError: there is no file, or two have one name.
        BackendUnavailableError: a package of the extra ``serve`` is missing, or what a file runs in.
        SourceError: a file cannot be opened.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> app = fusenms.asgi_app([path], fusenms.ServeSettings(max_queue=32))
        >>> sorted(app.state.models)
        ['yolov8n']
        >>> app.state.models.close()
    """
    require("starlette", "prometheus_client")
    from fusenms.serving.metrics import Metrics
    from fusenms.serving.models import Models
    from fusenms.serving.routes import Routes

    metrics = Metrics()
    models = Models(files, settings, limits, metrics)
    app = Routes(models, settings, metrics, lambda: not models.closed, models.close).app()
    app.state.models, app.state.metrics = models, metrics
    return app


def require(*packages: str) -> None:
    """Check that packages of the extra ``serve`` are installed.

    Raises:
        BackendUnavailableError: one is missing.
    """
    from importlib.util import find_spec

    if missing := [package for package in packages if find_spec(package) is None]:
        raise BackendUnavailableError(
            f"serving needs {' and '.join(missing)}; install with: pip install 'fusenms[serve]'"
        )
