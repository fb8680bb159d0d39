"""Makes flags of the command line from the fields of a settings class: name, type, default, choices and help."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, Field, fields
from inspect import getdoc
from typing import Any, get_args, get_type_hints

from fusenms.config import PostprocessConfig
from fusenms.engines import EngineSettings
from fusenms.quantization import Int8Settings
from fusenms.sources import LoadOptions

DEFAULT = " (default: %(default)s)"


def add_fields(parser: Any, cls: type[Any], names: list[str] | None = None, **changes: dict[str, Any]) -> None:
    """Add a flag for each field of a dataclass, or for some of them.

    The help is the field's entry under ``Attributes`` in the docstring of the class.

    Args:
        parser: an argparse parser or argument group.
        cls: the dataclass.
        names: names of the fields; None for all.
        changes: by field name, arguments of ``add_argument`` to add or replace. The key ``flags`` gives additional names of the flag.
    """
    hints, helps = get_type_hints(cls), field_helps(cls)
    for field in fields(cls):
        if names is not None and field.name not in names:
            continue
        change = dict(changes.get(field.name, {}))
        flags = [_flag(field.name), *change.pop("flags", [])]
        arguments = _arguments(field, hints[field.name], helps[field.name]) | change
        if arguments["default"] in (None, argparse.SUPPRESS):
            arguments["help"] = arguments["help"].removesuffix(DEFAULT)
        parser.add_argument(*flags, dest=field.name, **arguments)


def fields_of(args: argparse.Namespace, cls: type[Any], names: list[str] | None = None) -> dict[str, Any]:
    """The values of the flags that `add_fields` added, by field name."""
    return {field.name: getattr(args, field.name) for field in fields(cls) if names is None or field.name in names}


def field_helps(cls: type[Any]) -> dict[str, str]:
    """The entries under ``Attributes`` in the docstring of a class: field name to its text, on one line."""
    section = re.search(r"^Attributes:\n((?:    .*\n|\n)*)", f"{getdoc(cls)}\n", re.M)
    entries = re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", section[1], re.M) if section else []
    return {name: re.sub(r"`+", "", " ".join(text.split())) for names, text in entries for name in names.split(", ")}


def _arguments(field: Field[Any], hint: Any, text: str) -> dict[str, Any]:
    kinds = set(get_args(hint)) or {hint}
    default = field.default
    assert default is not MISSING, field.name
    if bool in kinds:
        if type(None) in kinds:
            return {"action": argparse.BooleanOptionalAction, "default": default, "help": text}
        return {"action": "store_true", "default": default, "help": text}
    arguments: dict[str, Any] = {
        "default": default,
        "help": text if default is None else text + DEFAULT,
    }
    if "choices" in field.metadata:
        return arguments | {"choices": list(field.metadata["choices"])}
    return arguments | {"type": next((kind for kind in (int, float) if kind in kinds), str)}


def with_flags(message: str) -> str:
    """Replace parameters in a message by flags: ``family='yolov8'`` becomes ``--family yolov8``."""
    named = [
        field.name for cls in (LoadOptions, PostprocessConfig, EngineSettings, Int8Settings) for field in fields(cls)
    ]
    named = [name for name in [*named, "frame_channels"] if name not in ("limits", "example", "layout", "class_names")]
    names = "|".join(sorted([*named, *_OTHERS], key=len, reverse=True))
    message = re.sub(rf"(?<![\w.-])({names})=(True|'[^']*'|NAME|\d+)(?!\w)", _as_flag, message)
    parts = "|".join(name for name in named if "_" in name)
    return re.sub(rf"(?<![\w./-])({parts})(?![\w=]|\.\w)", lambda found: _flag(found[1]), message)


_OTHERS = ("anchors", "backend", "custom_ops", "family", "frames", "precision", "tiles")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_flag(found: re.Match[str]) -> str:
    value = found[2].strip("'")
    return _flag(found[1]) if value == "True" else f"{_flag(found[1])} {value}"
