"""An engine and its sidecar, a JSON file that describes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from fusenms.errors import ConfigError, SourceError
from fusenms.limits import DEFAULT_LIMITS
from fusenms.onnx_reading.files import read_metadata
from fusenms.safety.files import check_writable, read_regular, write_together

Sizes = tuple[int, int, int]
"""Minimum, optimum and maximum."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of an engine build, checked on construction.

    Attributes:
        batch: minimum, optimum and maximum batch size; None: 1, 8 and 32 if the batch of the model is dynamic.
        height, width: minimum, optimum and maximum input size, in pixels; None: the default size of the file if the model's is dynamic.
        compute_capabilities: GPUs to build for, by compute capability, such as ``8.6``; empty: chosen by the builder. TensorRT-RTX only.
        workspace: maximum memory for a layer while it runs, in MiB; None: chosen by the builder.
        timing_cache: file of measured times, read if it exists and written after the build. It makes the next build faster.
        version_compatible: make the engine run with later versions too.
        hardware_compatible: make the engine run on later GPUs too (Ampere and newer).
        plugin_library: library with the plugin `FusedNMS` (`make plugin`), opened before the build; None: the engine includes the plugin.

    Raises:
        ConfigError: a value is out of its range.

    Example:
        >>> from fusenms import EngineSettings
        >>> EngineSettings(batch=(1, 8, 32)).batch
        (1, 8, 32)
    """

    batch: Sizes | None = None
    height: Sizes | None = None
    width: Sizes | None = None
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    plugin_library: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "height", "width"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if len(sizes) != 3 or sorted(sizes) != list(sizes) or sizes[0] < 1:
                raise ConfigError(f"{name} is {list(sizes)}; expected minimum, optimum and maximum, ascending, from 1")
        if self.workspace is not None and (type(self.workspace) is not int or self.workspace < 1):
            raise ConfigError(f"workspace is {self.workspace!r}; expected a positive number of MiB")


@dataclass(frozen=True)
class Engine:
    """A built engine.

    Attributes:
        data: the serialized engine.
        info: the content of the sidecar.
        layers: report of the engine inspector (JSON); None if there was no GPU to open the engine on.
    """

    data: bytes
    info: dict[str, Any]
    layers: str | None = None

    def save(self, path: Path) -> list[Path]:
        """Write the engine, its sidecar ``PATH.json`` and, if there are ``layers``, ``PATH.layers.json``. Return the paths.

        Raises:
            SourceError: a path cannot be written. Nothing is written then.
        """
        check_places(path)
        sidecar, layers = beside(path)
        files = {sidecar: (json.dumps(self.info, indent=2) + "\n").encode()}
        if self.layers is not None:
            files[layers] = self.layers.encode()
        write_together(files | {path: self.data})  # the engine last, because it is opened only with its sidecar
        if self.layers is None:
            layers.unlink(missing_ok=True)  # left from another engine
        return [path, *files]


def load_engine(path: Path) -> Engine:
    """Read an engine that `Engine.save` wrote.

    An engine can hold code, so an engine that does not match its sidecar is refused.

    Raises:
        SourceError: the engine or its sidecar is missing or unreadable, or they do not match.
    """
    sidecar, _ = beside(path)
    data = read_regular(path, DEFAULT_LIMITS.max_file_bytes)
    try:
        info = json.loads(read_regular(sidecar, DEFAULT_LIMITS.max_metadata_bytes))
        expected = info["engine"]["sha256"]
        _check_sidecar(info)
    except (SourceError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{path}: has no valid sidecar {sidecar.name} ({error}); an engine can hold code, so it is not opened without one. "
            "Build it again with fusenms engine"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(
            f"{path}: is not the engine that {sidecar.name} describes (SHA-256 {found[:12]}…, expected {str(expected)[:12]}…); it was "
            "changed or replaced. Build it again"
        )
    return Engine(data, info)


def _check_sidecar(info: Any) -> None:
    """Refuse a sidecar that lacks entries for `fusenms verify`, or names a file in another folder.

    Raises:
        KeyError, TypeError, ValueError: the sidecar is refused.
    """
    name, version, file = info["builder"]["name"], info["builder"]["version"], info["source"]["file"]
    if not all(isinstance(text, str) for text in (name, version, file, info["source"]["sha256"])):
        raise TypeError("an entry of its builder or source is not a text")
    if Path(file).name != file or not file.isprintable():
        raise ValueError("its source is not the name of a file")
    if not info["inputs"] or not isinstance(info["metadata"], dict):
        raise ValueError("it names no inputs or no metadata")
    for shapes in info["inputs"].values():
        for key in ("min", "opt", "max"):
            if not isinstance(shapes[key], list) or not all(type(size) is int and size > 0 for size in shapes[key]):
                raise ValueError(f"the {key} shape of an input is {shapes[key]!r}")


def beside(path: Path) -> tuple[Path, Path]:
    """Paths of the sidecar and of the layers of an engine."""
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".layers.json")


def check_places(path: Path, source: Path | None = None) -> None:
    """Check that `Engine.save` can write all its files, and that none overwrites ``source``.

    Raises:
        SourceError: a path cannot be written.
    """
    for place in (path, *beside(path)):
        check_writable(place, source)


def describe(
    path: Path, model: onnx.ModelProto, data: bytes, builder: dict[str, Any], network: dict[str, Any]
) -> dict[str, Any]:
    """The content of a sidecar: the builder and its settings, the source file, inputs and outputs, and the metadata of the ONNX file."""
    from fusenms._version import __version__

    return {
        "fusenms": __version__,
        "builder": builder,
        "engine": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        **network,
        "metadata": read_metadata(model),
    }
