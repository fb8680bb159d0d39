"""`ServeSettings`: how a server opens its files, collects batches and bounds what clients may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fusenms.errors import ConfigError
from fusenms.runtime.opening import RUNTIMES

MIB = 2**20
_MAY_BE_0 = ("batch_delay", "watch")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server. Those of files are the same for all of them.

    Attributes:
        runtime: the runtime of the files, as for Detector; auto is the one that a file is made for.
        device: the device of the runtime: cpu, cuda, cuda:1, ...
        threads: number of threads of one run.
        batch_size: maximum number of images that run together.
        batch_delay: time that the first image of a batch waits for others, in milliseconds. Images that arrive during a run form the next
            batch without it.
        max_queue: maximum number of images of one model that wait or run; more are answered with status 503 at once.
        max_body: maximum size of a request's body, in bytes.
        max_json: maximum size of the JSON of a tensor request, in bytes; tensors may follow in binary.
        max_bodies: maximum size of all bodies that are in memory at a time, in bytes.
        max_connections: maximum number of open connections; more are answered with status 503 at once.
        read_timeout: time that a client has for the head of a request, for its body, and for taking the answer, each, in seconds.
        keep_alive: time that a connection without requests stays open, in seconds.
        shutdown_timeout: time for the requests that were taken, once the server is told to stop, in seconds.
        watch: how often to look for files that were replaced, in seconds; 0: never.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from fusenms import ServeSettings
        >>> ServeSettings(batch_size=16, batch_delay=2).max_queue
        64
    """

    runtime: str = field(default="auto", metadata={"choices": RUNTIMES})
    device: str = "cpu"
    threads: int | None = None
    batch_size: int = 8
    batch_delay: float = 0.0
    max_queue: int = 64
    max_body: int = 32 * MIB
    max_json: int = 16 * MIB
    max_bodies: int = 512 * MIB
    max_connections: int = 1000
    read_timeout: float = 20.0
    keep_alive: float = 75.0
    shutdown_timeout: float = 30.0
    watch: float = 1.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value: Any = getattr(self, entry.name)
            if isinstance(entry.default, str) or value is entry.default:
                continue
            kinds: tuple[type, ...] = (int, float) if isinstance(entry.default, float) else (int,)
            if type(value) not in kinds or not 0 <= value < math.inf or (not value and entry.name not in _MAY_BE_0):
                least = "0 or more" if entry.name in _MAY_BE_0 else "more than 0"
                raise ConfigError(
                    f"{entry.name} is {value!r}; expected a {'number' if float in kinds else 'whole number'}, {least}"
                )
        if self.max_queue < self.batch_size:
            raise ConfigError(
                f"max_queue is {self.max_queue}, less than batch_size ({self.batch_size}); expected at least as many"
            )
        if self.max_bodies < self.max_body:
            raise ConfigError(
                f"max_bodies is {self.max_bodies}, less than max_body ({self.max_body}); expected at least as many bytes"
            )
