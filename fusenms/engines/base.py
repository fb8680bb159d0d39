"""What an engine is: its bytes, and the sidecar that says what they are."""

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
"""Least, usual and most."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of an engine build, checked on construction.

    Attributes:
        batch: least, usual and most images of a run; None: 1, 8 and 32 where the model leaves that open.
        height, width: the same for the image's sides; None: the file's usual ones where the model leaves them open.
        compute_capabilities: GPUs to build for, as ``8.6``; empty: the builder's own choice. TensorRT-RTX only.
        workspace: most memory that a layer may take while it runs, in MiB; None: the builder's own choice.
        timing_cache: a file of measured times, read where it is there and written after the build: the next build is faster.
        version_compatible: the engine runs with later versions too.
        hardware_compatible: the engine runs on later GPUs too (Ampere and newer).
        plugin_library: a library with the plugin `FusedNMS` (`make plugin`), opened first; None: TensorRT carries it in the engine.

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
                raise ConfigError(f"{name} is {list(sizes)}; expected least, usual and most, rising, from 1 on")
        if self.workspace is not None and (type(self.workspace) is not int or self.workspace < 1):
            raise ConfigError(f"workspace is {self.workspace!r}; expected a positive number of MiB")


@dataclass(frozen=True)
class Engine:
    """A built engine. ``info`` is what its sidecar says; ``layers`` the engine inspector's words (JSON), where a GPU could be asked."""

    data: bytes
    info: dict[str, Any]
    layers: str | None = None

    def save(self, path: Path) -> list[Path]:
        """Write the engine, ``PATH.json`` beside it, and ``PATH.layers.json`` where there is one; return the paths.

        Raises:
            SourceError: a path cannot be written; then nothing is.
        """
        check_places(path)
        sidecar, layers = beside(path)
        files = {sidecar: (json.dumps(self.info, indent=2) + "\n").encode()}
        if self.layers is not None:
            files[layers] = self.layers.encode()
        write_together(files | {path: self.data})  # the engine last: without the sidecar that names it, none is opened
        if self.layers is None:
            layers.unlink(missing_ok=True)  # of another engine
        return [path, *files]


def load_engine(path: Path) -> Engine:
    """Read an engine that `Engine.save` wrote, if it is the one that its sidecar speaks of. An engine can hold code: others are refused.

    Raises:
        SourceError: the engine or its sidecar is missing, unreadable, or of another engine.
    """
    sidecar, _ = beside(path)
    data = read_regular(path, DEFAULT_LIMITS.max_file_bytes)
    try:
        info = json.loads(read_regular(sidecar, DEFAULT_LIMITS.max_metadata_bytes))
        expected = info["engine"]["sha256"]
        _check_sidecar(info)
    except (SourceError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{path}: has no sidecar {sidecar.name} that says what it is ({error}); an engine can hold code, so it is not opened "
            "without: build it again with fusenms engine"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SourceError(
            f"{path}: is not the engine that {sidecar.name} speaks of (SHA-256 {found[:12]}…, expected {str(expected)[:12]}…); it was "
            "changed or replaced: build it again"
        )
    return Engine(data, info)


def _check_sidecar(info: Any) -> None:
    """Refuse a sidecar that lacks what `fusenms verify` needs, or names a file in another folder.

    Raises:
        KeyError, TypeError, ValueError: it does.
    """
    name, version, file = info["builder"]["name"], info["builder"]["version"], info["source"]["file"]
    if not all(isinstance(text, str) for text in (name, version, file, info["source"]["sha256"])):
        raise TypeError("builder and source are no text")
    if Path(file).name != file or not file.isprintable():
        raise ValueError("its source is no name of a file")
    if not info["inputs"] or not isinstance(info["metadata"], dict):
        raise ValueError("it names no inputs or no metadata")
    for shapes in info["inputs"].values():
        for key in ("min", "opt", "max"):
            if not isinstance(shapes[key], list) or not all(type(size) is int and size > 0 for size in shapes[key]):
                raise ValueError(f"the {key} shape of an input is {shapes[key]!r}")


def beside(path: Path) -> tuple[Path, Path]:
    """Where the sidecar and the layers of an engine stand."""
    return path.with_name(path.name + ".json"), path.with_name(path.name + ".layers.json")


def check_places(path: Path, source: Path | None = None) -> None:
    """Fail early where `Engine.save` would, and where it would destroy ``source``.

    Raises:
        SourceError: a path cannot be written.
    """
    for place in (path, *beside(path)):
        check_writable(place, source)


def describe(
    path: Path, model: onnx.ModelProto, data: bytes, builder: dict[str, Any], network: dict[str, Any]
) -> dict[str, Any]:
    """What the sidecar says of an engine: how it was built, from what, and all that the ONNX file says of itself."""
    from fusenms._version import __version__

    return {
        "fusenms": __version__,
        "builder": builder,
        "engine": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        **network,
        "metadata": read_metadata(model),
    }
