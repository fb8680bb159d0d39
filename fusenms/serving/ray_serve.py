"""The server on Ray Serve: each model is a deployment with replicas of its own, and the routes are those of one machine.

The app runs in a deployment too, and passes bodies on. A replica of a model is a `fusenms.serving.models.Model`: it collects batches, and
looks after its file, which every node needs under the same path. Connections are accepted by Ray's proxy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusenms.cluster.connection import connected
from fusenms.errors import BackendUnavailableError, ConfigError, FusenmsError, InputError, RunError, first_line
from fusenms.limits import Limits
from fusenms.safety.text import printable
from fusenms.serving.metrics import Metrics
from fusenms.serving.models import Models, OverloadedError, checked_names
from fusenms.serving.routes import Routes
from fusenms.serving.settings import ServeSettings

APP = "fusenms"
"""Environment of a local Ray: it sends nothing, and listens on 127.0.0.1 alone."""
ERRORS: dict[str, Callable[[str], Exception]] = {
    "overloaded": lambda _: OverloadedError(),
    "input": InputError,
    "run": RunError,
    "other": FusenmsError,
}


@dataclass(frozen=True)
class Replicas:
    """Smallest and largest number of replicas of a model.

    Raises:
        ConfigError: they are not 1 or more, in order.
    """

    least: int = 1
    most: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"replicas are {self.least}:{self.most}; expected MIN:MAX with 1 <= MIN <= MAX")


class _Replica:
    """A model in a process of its own. Results are ``(None, result)``, errors ``(kind, message)``, since Ray's own carry tracebacks."""

    def __init__(self, path: str, settings: ServeSettings, limits: Limits) -> None:
        self._models = Models([path], settings, limits, Metrics())
        (self._model,) = self._models.values()

    async def detect(self, body: bytes, settings: Mapping[str, Any]) -> tuple[str | None, Any]:
        return await _outcome(self._model.detect(body, settings))

    async def infer(self, body: bytes, header_length: str | None) -> tuple[str | None, Any]:
        return await _outcome(self._model.infer(body, header_length))

    async def metadata(self) -> tuple[str | None, Any]:
        return await _outcome(self._model.metadata())

    async def config(self) -> tuple[str | None, Any]:
        return await _outcome(self._model.config())


async def _outcome(work: Any) -> tuple[str | None, Any]:
    try:
        return None, await work
    except OverloadedError:
        return "overloaded", ""
    except RunError as error:
        return "run", str(error)
    except InputError as error:
        return "input", str(error)
    except FusenmsError as error:
        return "other", str(error)


class _Remote:
    """A model behind the handle of its deployment, for the routes."""

    problem, full = "", False

    def __init__(self, name: str) -> None:
        self.name, self._handle = name, _serve().get_deployment_handle(name, app_name=APP)

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray.serve.exceptions import BackPressureError

        try:
            kind, value = await getattr(self._handle, method).remote(*arguments)
        except BackPressureError as error:
            raise OverloadedError from error
        if kind is not None:
            raise ERRORS[kind](value)
        return value

    async def detect(self, body: bytes, settings: Mapping[str, Any]) -> bytes:
        return await self._call("detect", body, dict(settings))

    async def infer(self, body: bytes, header_length: str | None) -> tuple[bytes, int | None]:
        return await self._call("infer", body, header_length)

    async def metadata(self) -> dict[str, Any]:
        return await self._call("metadata")

    async def config(self) -> dict[str, Any]:
        return await self._call("config")


@contextmanager
def running(
    address: str,
    files: Sequence[str | os.PathLike[str]],
    host: str,
    port: int,
    settings: ServeSettings,
    limits: Limits,
    replicas: Replicas,
) -> Iterator[list[str]]:
    """Connect to a Ray cluster, or start Ray on this machine alone, and serve files on it until the end. Gives the names of the models.

    A replica takes ``settings.threads`` CPUs (1), and a GPU if the device is one.

    Args:
        address: ``local``, ``auto`` or ``HOST:PORT``.

    Raises:
        BackendUnavailableError: Ray is not installed, there is no cluster at the address, or the models do not start.
        ConfigError: files have one name.
        InputError: the address is none.
    """
    names = {name: path.absolute() for name, path in checked_names(files).items()}
    with connected(address) as ray:
        serve = _serve()
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(_application(names, settings, limits, replicas), name=APP, route_prefix="/", blocking=False)
        except (RuntimeError, ray.exceptions.RayError) as error:
            serve.delete(APP)
            raise BackendUnavailableError(
                f"the models do not start on Ray at {printable(address)} ({first_line(error)}); Ray's logs say why"
            ) from error
        try:
            yield list(names)
        finally:
            serve.delete(APP)  # once requests that were taken are answered


def _application(names: Mapping[str, Path], settings: ServeSettings, limits: Limits, replicas: Replicas) -> Any:
    """The deployments: one for each model, and the app."""
    serve = _serve()
    own = replace(settings, threads=settings.threads or 1)
    resources = {"num_cpus": own.threads, "num_gpus": 1 if settings.device.startswith(("cuda", "gpu")) else 0}
    models = [
        serve.deployment(
            _Replica,
            name=name,
            ray_actor_options=resources,
            max_ongoing_requests=settings.max_queue,
            max_queued_requests=settings.max_queue,
            graceful_shutdown_timeout_s=settings.shutdown_timeout,
            autoscaling_config={
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": settings.batch_size,
            },
        ).bind(str(path), own, limits)
        for name, path in names.items()
    ]

    def build() -> Any:
        metrics = Metrics()
        served = {name: _Remote(name) for name in names}
        return Routes(served, settings, metrics, lambda: True, lambda: None).app()

    app = serve.deployment(
        serve.ingress(build)(),
        name="routes",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )
    return app.bind(*models)


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise BackendUnavailableError(
            f"serving on a cluster needs Ray Serve ({first_line(error)}); install it with: pip install 'fusenms[ray]'"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve
