"""What a server counts, for Prometheus. Labels are names of models and routes, and status codes: clients cannot add any."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own: a program may have several."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        by_model = ("model",)
        self.requests = Counter(
            "fusenms_requests", "Requests that were answered.", ("model", "route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "fusenms_request_seconds",
            "Time of a request, from its head to its answer.",
            ("model", "route"),
            buckets=SECONDS,
            registry=registry,
        )
        self.open = Gauge("fusenms_open_requests", "Requests that are being answered.", ("route",), registry=registry)
        self.images = Counter("fusenms_images", "Images that the model ran on.", by_model, registry=registry)
        self.batch = Histogram("fusenms_batch_images", "Images in a run.", by_model, buckets=IMAGES, registry=registry)
        self.run = Histogram("fusenms_run_seconds", "Time of a run.", by_model, buckets=SECONDS, registry=registry)
        self.queue = Gauge("fusenms_queue_images", "Images that wait or run.", by_model, registry=registry)
        self.reloads = Counter(
            "fusenms_reloads", "Replaced files that were opened, or refused.", ("model", "outcome"), registry=registry
        )
        self.refused = Gauge(
            "fusenms_replacement_refused",
            "1 while the file of a model was replaced by one that was refused, and the older one is served.",
            by_model,
            registry=registry,
        )

    def watch_connections(self, connections: Callable[[], int]) -> None:
        """Show the number of open connections."""
        Gauge("fusenms_open_connections", "Open connections.", registry=self.registry).set_function(connections)

    def watch_queue(self, model: str, images: Callable[[], int]) -> None:
        """Show the queue of a model, and its counters from 0 on."""
        self.queue.labels(model).set_function(images)
        self.images.labels(model)
        self.refused.labels(model)
        for outcome in ("opened", "refused"):
            self.reloads.labels(model, outcome)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
