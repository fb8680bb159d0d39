"""`fusenms serve FUSED...`: serves fused files over HTTP."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fusenms.cli.flags import add_fields, fields_of
from fusenms.cli.printing import Steps
from fusenms.cluster.connection import LOCAL
from fusenms.errors import ConfigError
from fusenms.safety.text import printable_lines
from fusenms.serving import ServeSettings, asgi_app, require

if TYPE_CHECKING:
    from fusenms.serving.models import Models

NAME = "serve"
HELP = "serve fused files over HTTP: images in and detections out, the Open Inference Protocol (KServe v2), metrics for Prometheus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        metavar="FUSED",
        nargs="+",
        help="what Detector opens: fused .onnx files, engines, folders of deploy. A model has the name of its file up to the first dot",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0: a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="serve on Ray Serve: local starts Ray on this machine; auto or HOST:PORT is a cluster that this machine is a node of",
    )
    parser.add_argument(
        "--replicas",
        type=replicas_argument,
        metavar="MIN:MAX",
        help="on Ray, number of replicas of each model; Ray adds and removes them with the load (default: 1:1)",
    )
    add_fields(parser, ServeSettings)


def replicas_argument(text: str) -> tuple[int, int]:
    """Parse ``2`` or ``1:4``."""
    numbers = text.split(":")
    if len(numbers) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected MIN:MAX (1:4), or one number for both")
    return int(numbers[0]), int(numbers[-1])


def run(args: argparse.Namespace) -> int:
    if args.isolate:
        raise ConfigError("found --isolate, which has a time limit, but serve runs until it is stopped; leave it out")
    settings = ServeSettings(**fields_of(args, ServeSettings))
    require("starlette", "prometheus_client", "uvicorn")
    from fusenms.serving import server

    steps = Steps(args.json)
    if args.ray is not None:
        return _run_on_ray(args, settings, steps)
    if args.replicas is not None:
        raise ConfigError("found --replicas without --ray; add --ray local or an address, or leave it out")
    bound = server.listen(args.host, args.port)
    with bound, _log_on_standard_error():
        app = asgi_app(args.files, settings, limits=args.limits)
        server.run(app, bound, settings, lambda: _say(steps, server.url_of(bound), app.state.models))
        steps.line("stopped", "all requests that were taken are answered")
    return 0


def _run_on_ray(args: argparse.Namespace, settings: ServeSettings, steps: Steps) -> int:
    from fusenms.serving import ray_serve, server

    replicas = ray_serve.Replicas(*(args.replicas or (1, 1)))
    host, port = args.host, args.port
    if args.ray == LOCAL:
        with server.listen(host, port) as bound:  # the port is free, or is chosen
            port = bound.getsockname()[1]
    with ray_serve.running(args.ray, args.files, host, port, settings, args.limits, replicas) as names:
        stop = server.Stop()  # after Ray has put handlers of its own
        url = server.address(host, port)
        for name in names:
            steps.line("model", f"{name} · {replicas.least} to {replicas.most} replicas on Ray at {args.ray}")
        _say_where(steps, url, names[0])
        steps.finish(url=url, models={name: {} for name in names})
        stop.wait()
    steps.line("stopped", "all requests that were taken are answered")
    return 0


def _say_where(steps: Steps, url: str, name: str) -> None:
    steps.line("serve", f"{url} · POST {url}/detect/{name} · {url}/metrics")


def _say(steps: Steps, url: str, models: Models) -> None:
    """Print what is served, and where."""
    values = {}
    for name, model in models.items():
        detector = model.detector
        steps.line(
            "model", f"{name} · {detector.runtime} · {detector.inputs[0]} · up to {detector.batch_size} images in a run"
        )
        values[name] = {"runtime": detector.runtime, "batch_size": detector.batch_size}
    _say_where(steps, url, next(iter(models)))
    steps.finish(url=url, models=values)
    sys.stdout.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


@contextmanager
def _log_on_standard_error() -> Iterator[None]:
    """What the server has to tell while it runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("fusenms", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
