"""The routes of a server: images in and detections out, the Open Inference Protocol (v2), and metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fusenms._version import __version__
from fusenms.errors import FusenmsError, InputError, RunError
from fusenms.serving.bodies import RETRY_AFTER, Bodies, GoneError, Lingering, unless_gone
from fusenms.serving.metrics import Metrics
from fusenms.serving.models import OverloadedError
from fusenms.serving.protocol import HEADER, VERSION
from fusenms.serving.settings import ServeSettings

_LOG = logging.getLogger(__name__)
IMAGES, TENSORS = ("image/", "application/octet-stream"), ("application/json", "application/octet-stream")
GONE = 499
"""Status in the metrics of requests whose clients did not wait."""
_SETTINGS = ("score_threshold", "iou_threshold", "labels", "max_detections")


class Served(Protocol):
    """A model as the routes need it."""

    name: str
    problem: str

    @property
    def full(self) -> bool: ...

    async def detect(self, body: bytes, settings: Mapping[str, Any]) -> bytes: ...

    async def infer(self, body: bytes, header_length: str | None) -> tuple[bytes, int | None]: ...

    async def metadata(self) -> dict[str, Any]: ...

    async def config(self) -> dict[str, Any]: ...


class Routes:
    """The app of some models."""

    def __init__(
        self,
        models: Mapping[str, Served],
        settings: ServeSettings,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        close: Callable[[], None],
    ) -> None:
        self._models, self._metrics, self._is_ready = models, metrics, is_ready
        self._settings, self._bodies, self._close = settings, Bodies(settings), close

    def app(self) -> Starlette:
        """The ASGI app. Its lifespan closes the models."""
        each = (
            ("GET", "", "metadata", self._metadata),
            ("GET", "/ready", "ready", self._ready),
            ("GET", "/config", "config", self._config),
            ("POST", "/infer", "infer", self._infer),
        )
        routes = [
            self._route("POST", "/detect/{name}", "detect", self._detect),
            self._route("GET", "/v2", "server", self._server),
            self._route("GET", "/v2/health/live", "live", self._live),
            self._route("GET", "/v2/health/ready", "server_ready", self._server_ready),
            self._route("POST", "/v2/repository/index", "index", self._index),
            *(self._route(method, f"/v2/models/{{name}}{path}", route, do) for method, path, route, do in each),
            *(
                self._route(method, f"/v2/models/{{name}}/versions/{{version}}{path}", route, do)
                for method, path, route, do in each
            ),
            Route("/metrics", self._counted, methods=["GET"]),
        ]

        @asynccontextmanager
        async def lifespan(_: Starlette) -> Any:
            yield
            self._close()

        async def on_http_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            self._metrics.requests.labels("", "none", str(error.status_code)).inc()
            what = f"{request.method} {request.url.path}"[:200]
            return _error(error.status_code, f"found {what}; expected a route of this server: {_PATHS}", error.headers)

        return Starlette(
            routes=routes,
            lifespan=lifespan,
            middleware=[Middleware(Lingering)],
            exception_handlers={404: on_http_error, 405: on_http_error},
        )

    def _route(self, method: str, path: str, route: str, do: Callable[[Request], Awaitable[Response]]) -> Route:
        """A route whose errors are answers, and whose answers are counted."""

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            with self._metrics.open.labels(route).track_inprogress():
                response, status = await self._answered(request, do)
            name = request.path_params.get("name", "")
            name = name if name in self._models else ""
            self._metrics.requests.labels(name, route, str(status)).inc()
            if status == 200:
                self._metrics.seconds.labels(name, route).observe(time.perf_counter() - start)
            return response

        return Route(path, answer, methods=[method])

    async def _answered(self, request: Request, do: Callable[[Request], Awaitable[Response]]) -> tuple[Response, int]:
        try:
            response = await do(request)
        except HTTPException as error:
            response = _error(error.status_code, error.detail, error.headers)
        except OverloadedError:
            response = _error(503, "the model has as many requests as it may have; try again", RETRY_AFTER)
        except GoneError:
            return Response(status_code=400), GONE
        except InputError as error:
            response = _error(400, str(error))
        except RunError as error:
            response = _error(500, str(error))
        except FusenmsError as error:
            response = _error(400, str(error))
        except MemoryError:
            response = _error(503, "not enough memory for this request at this moment; try again", RETRY_AFTER)
        except Exception:
            _LOG.exception("a request failed")
            response = _error(500, "the server failed; its log says why")
        return response, response.status_code

    def _model(self, request: Request) -> Served:
        """The model that the path names.

        Raises:
            HTTPException: 404 there is none.
        """
        name, version = request.path_params["name"], request.path_params.get("version", VERSION)
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise HTTPException(404, f"found the model {name[:100]!r}; expected one of {known}")
        if version != VERSION:
            raise HTTPException(404, f"found version {version[:20]!r} of {name}; expected {VERSION}")
        return model

    def _accepting(self, request: Request, kinds: tuple[str, ...]) -> Served:
        """The model that the path names, if it takes a body of this type now.

        Raises:
            HTTPException: 404, or 415 the type is another one.
            OverloadedError: its queue is full.
        """
        model = self._model(request)
        kind = request.headers.get("content-type", kinds[-1]).partition(";")[0].strip().lower()
        if not kind.startswith(kinds):
            expected = "image/jpeg, image/png, ... or" if kinds is IMAGES else "application/json or"
            raise HTTPException(
                415,
                f"found Content-Type {kind[:100]!r}; expected {expected} application/octet-stream, and the body alone",
            )
        if model.full:
            raise OverloadedError
        return model

    async def _detect(self, request: Request) -> Response:
        model, settings = self._accepting(request, IMAGES), call_settings(request)
        async with self._bodies.read(request) as body:
            answer = await unless_gone(request, model.detect(body, settings))
        return Response(answer, media_type="application/json")

    async def _infer(self, request: Request) -> Response:
        model = self._accepting(request, TENSORS)
        header, most = request.headers.get(HEADER), self._settings.max_json
        async with self._bodies.read(request) as body:
            size = int(header) if header and header.isdecimal() and len(header) < 20 else len(body)
            if min(size, len(body)) > most:
                raise HTTPException(413, f"found {size} bytes of JSON; expected at most {most}: send tensors in binary")
            answer, length = await unless_gone(request, model.infer(body, header))
        if length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={HEADER: str(length)})

    async def _server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_configuration", "model_repository"]
        return JSONResponse({"name": "fusenms", "version": __version__, "extensions": extensions})

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _server_ready(self, request: Request) -> Response:
        ready = self._is_ready()
        problems = {name: model.problem for name, model in self._models.items() if model.problem}
        return JSONResponse(
            {"ready": ready} | ({"replacements_refused": problems} if problems else {}), 200 if ready else 503
        )

    async def _metadata(self, request: Request) -> Response:
        return JSONResponse(await self._model(request).metadata())

    async def _config(self, request: Request) -> Response:
        return JSONResponse(await self._model(request).config())

    async def _ready(self, request: Request) -> Response:
        model, ready = self._model(request), self._is_ready()
        more = {"replacement_refused": model.problem} if model.problem else {}
        return JSONResponse({"name": model.name, "ready": ready} | more, 200 if ready else 503)

    async def _index(self, request: Request) -> Response:
        async with self._bodies.read(request):
            state = "READY" if self._is_ready() else "UNAVAILABLE"
        return JSONResponse([
            {"name": name, "version": VERSION, "state": state, "reason": model.problem}
            for name, model in self._models.items()
        ])  # fmt: skip

    async def _counted(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)


_PATHS = "POST /detect/NAME, GET /v2, GET /v2/health/live and /ready, GET /v2/models/NAME, POST /v2/models/NAME/infer, GET /metrics"


def call_settings(request: Request) -> dict[str, Any]:
    """The settings of a call in the query, as `fusenms.Detector` takes them.

    Raises:
        InputError: one is unknown, there twice, or no number.
    """
    found: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name not in _SETTINGS:
            raise InputError(f"found {name[:100]!r} in the query; expected {', '.join(_SETTINGS)}")
        if name == "labels":
            found.setdefault(name, []).append(
                int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
            )
            continue
        if name in found:
            raise InputError(f"found {name} twice in the query; expected it once")
        try:
            found[name] = int(text) if name == "max_detections" else float(text)
        except ValueError:
            raise InputError(f"found {name}={text[:100]!r} in the query; expected a number") from None
    return found


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)
