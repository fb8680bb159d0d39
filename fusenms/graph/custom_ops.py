"""Libraries of custom operators for ONNX Runtime. The user names them; no file does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms.errors import BackendUnavailableError, ConfigError, first_line

if TYPE_CHECKING:
    import onnx

MISSING = "ONNX Runtime is not installed; install it with: pip install 'fusenms[cpu]' or 'fusenms[gpu]'"
KNOWN_DOMAINS = frozenset(
    ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft")
)
"""Domains whose operators ONNX Runtime has itself."""
_libraries: ContextVar[tuple[str, ...]] = ContextVar("custom_ops", default=())


@contextmanager
def custom_ops(*libraries: str | os.PathLike[str]) -> Iterator[None]:
    """Use ONNX Runtime custom-op libraries for everything that runs a model in this block, beside those of blocks around it.

    A library is code, and it is opened here: name only those that you trust. Nothing that a model file says opens a library.

    Args:
        libraries: paths of shared libraries that export ``RegisterCustomOps``.

    Raises:
        ConfigError: a file is missing, or ONNX Runtime cannot use it.
        BackendUnavailableError: ONNX Runtime is not installed.

    Example:
        >>> import fusenms
        >>> with fusenms.custom_ops():  # here: paths, as "libfold.so"
        ...     fused = fusenms.fuse("yolov8n.pt", size=64)
        >>> bool(fused.report)
        True
    """
    token = _libraries.set((*_libraries.get(), *(_checked(path) for path in libraries)))
    try:
        yield
    finally:
        _libraries.reset(token)


def current_libraries() -> tuple[str, ...]:
    """Absolute paths of the libraries in use here."""
    return _libraries.get()


def register(options: Any) -> None:
    """Register the libraries in use here with the options of a session."""
    for path in current_libraries():
        options.register_custom_ops_library(path)


def _checked(path: str | os.PathLike[str]) -> str:
    """The absolute path of a library, which was opened once: a bare name would be looked for in the system's folders."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"custom_ops has a {type(path).__name__}; expected paths of libraries")
    if not Path(path).is_file():
        raise ConfigError(f"custom_ops names {path}: no such file; expected a shared library with custom operators")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(MISSING) from error
    found = str(Path(path).resolve())
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(found)
    except Exception as error:  # ONNX Runtime raises its own exception types
        raise ConfigError(
            f"custom_ops names {path}: ONNX Runtime cannot use it ({first_line(error)}); expected a shared library for this system that "
            "exports RegisterCustomOps"
        ) from error
    return found


def foreign_operators(model: onnx.ModelProto) -> dict[str, str]:
    """Operators of other domains than ONNX Runtime's own ones, without the model's functions: ``domain::operator`` to a node's name."""
    own = {(function.domain, function.name) for function in model.functions}
    found = dict[str, str]()
    todo = list(model.graph.node)
    for node in todo:
        todo += [inner for attribute in node.attribute for inner in attribute.g.node]
        if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in own:
            found.setdefault(f"{node.domain}::{node.op_type}", node.name)
    return found
