"""Runs `load` in a child process, which returns an ONNX file and JSON. The ONNX file is checked like any file of unknown origin."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusenms import errors
from fusenms.artifacts.preprocessing import Pixels
from fusenms.artifacts.raw import ImageInput, RawModel
from fusenms.errors import SourceError
from fusenms.graph.custom_ops import current_libraries
from fusenms.layout import Layout
from fusenms.limits import Limits
from fusenms.onnx_reading.files import read_onnx
from fusenms.safety.isolation import run_isolated
from fusenms.sources.options import LoadOptions

_CHILD = "fusenms.sources.isolated_child"
_MODEL, _REST, ERROR = "raw.onnx", "raw.json", "error.json"
_PLAIN = ("class_names", "task", "source", "notes", "stretch", "frozen_batch", "precision")


_OPTIONS = ("dynamic_size", "opset", "one_to_many")


def load_isolated(path: Path, options: LoadOptions) -> RawModel:
    """Run `fusenms.load` on a file in a child process.

    Raises:
        FusenmsError: `fusenms.load` raised it in the child process.
        SourceError: the child process exceeded its memory or time, or failed in another way.
    """
    with tempfile.TemporaryDirectory(prefix="fusenms-") as name:
        folder, limits = Path(name), options.limits
        said = {name: getattr(options, name) for name in _OPTIONS} | {"size": options.sides}
        task = json.dumps(
            {"path": str(path.resolve()), "options": said, "limits": asdict(limits)}
            | {"custom_ops": current_libraries()}
        )
        status = run_isolated(_CHILD, [name], limits, what=str(path), given=task.encode())
        if (folder / ERROR).exists():
            error = json.loads((folder / ERROR).read_text())
            kind = getattr(errors, str(error["error"]), SourceError)
            raise kind(str(error["message"]).replace(str(path.resolve()), str(path)))
        if status or not (folder / _REST).exists():
            raise SourceError(
                f"{path}: reading it failed in the child process (exit status {status}); "
                "if the file is trusted, read it without isolation to see why"
            )
        return _from_files(folder, limits)


def _from_files(folder: Path, limits: Limits) -> RawModel:
    rest = json.loads((folder / _REST).read_text())
    layout, pixels = rest["layout"], rest["pixels"]
    plain: dict[str, Any] = {name: tuple(rest[name]) if isinstance(rest[name], list) else rest[name] for name in _PLAIN}
    return RawModel(
        model=read_onnx(folder / _MODEL, limits),
        limits=limits,
        image=ImageInput(**rest["image"]),
        layout=None if layout is None else Layout.from_dict(layout),
        pixels=None
        if pixels is None
        else Pixels(pixels["channels"], pixels["scale"], tuple(pixels["mean"]), tuple(pixels["std"])),
        **plain,
    )


def write_raw(raw: RawModel, folder: Path) -> None:
    """Write a model into the folder from which `load_isolated` reads it."""
    (folder / _MODEL).write_bytes(raw.model.SerializeToString())
    rest = {name: getattr(raw, name) for name in _PLAIN} | {
        "image": asdict(raw.image),
        "layout": None if raw.layout is None else raw.layout.to_dict(),
        "pixels": None if raw.pixels is None else asdict(raw.pixels),
    }
    (folder / _REST).write_text(json.dumps(rest))
