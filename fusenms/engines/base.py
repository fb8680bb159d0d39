"""What an engine is: its bytes, and the sidecar that says what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from fusenms.artifacts import check_writable, read_metadata, write_atomically
from fusenms.errors import ConfigError

Sizes = tuple[int, int, int]
"""Least, usual and most."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of an engine build, checked on construction.

    Attributes:
        batch: least, usual and most pictures of a run.
        height, width: the same for the picture's sides, where the model leaves them open.
        compute_capabilities: GPUs to build for, as ``8.6``; empty: the builder's own choice.

    Raises:
        ConfigError: a value is out of its range.
    """

    batch: Sizes = (1, 8, 32)
    height: Sizes = (640, 640, 640)
    width: Sizes = (640, 640, 640)
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or sorted(sizes) != list(sizes) or sizes[0] < 1:
                raise ConfigError(f"{name} is {list(sizes)}; expected least, usual and most, rising, from 1 on")


@dataclass(frozen=True)
class Engine:
    """A built engine. ``info`` is what its sidecar says; ``layers`` the engine inspector's words (JSON), where a GPU could be asked."""

    data: bytes
    info: dict[str, Any]
    layers: str | None = None

    def save(self, path: Path) -> list[Path]:
        """Write the engine, ``PATH.json`` beside it, and ``PATH.layers.json`` where there is one; return the paths.

        Raises:
            SourceError: a path cannot be written.
        """
        sidecar, layers = (path.with_name(path.name + suffix) for suffix in (".json", ".layers.json"))
        check_writable(sidecar)
        written = [write_atomically(path, self.data)]
        written.append(write_atomically(sidecar, (json.dumps(self.info, indent=2) + "\n").encode()))
        if self.layers is not None:
            written.append(write_atomically(layers, self.layers.encode()))
        return written


def describe(
    model: onnx.ModelProto, source: str, data: bytes, settings: EngineSettings, builder: dict[str, Any], network: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """What the sidecar says of an engine: how it was built, from what, and all that the ONNX file says of itself."""
    from fusenms import __version__

    return {
        "fusenms": __version__,
        "builder": builder,
        "engine": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "source": {"file": source, "sha256": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()},
        "settings": asdict(settings),
        **network,
        "metadata": read_metadata(model),
    }
