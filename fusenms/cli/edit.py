"""`fusenms edit`: writes a file with changed nodes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusenms.cli.printing import Steps
from fusenms.editing import edit
from fusenms.errors import ConfigError
from fusenms.graph.editing import Op

NAME = "edit"
HELP = "write a file with renamed tensors, and with nodes changed, removed, inserted or replaced"
OP = 'OP is a type, as Relu or com.example::Fold, or JSON: {"op": "Mul", "inputs": [0.5], "attributes": {}}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an .onnx file, raw or fused")
    several: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--rename", metavar="OLD=NEW", help="rename a tensor", **several)
    parser.add_argument(
        "--set-attribute", metavar="NODE:NAME=JSON", help="set an attribute of a node; null removes it", **several
    )
    parser.add_argument(
        "--remove", metavar="NODE", help="remove a node; what read its output reads its first input", **several
    )
    parser.add_argument("--insert", metavar="TENSOR=OP", help=f"insert an operator behind a tensor; {OP}", **several)
    parser.add_argument(
        "--replace", metavar="NODE=OP", help="replace a node, whose first input and outputs stay", **several
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write (default: FILE.edited.onnx)")


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    attributes = {}
    for place, value in _pairs("--set-attribute", args.set_attribute, "NODE:NAME=JSON"):
        node, _, name = place.rpartition(":")
        if not node or not name:
            raise ConfigError(f"found --set-attribute {place}={value}; expected NODE:NAME=JSON")
        attributes[node, name] = _json("--set-attribute", value)
    written = edit(
        args.file,
        args.output or Path(Path(args.file).stem + ".edited.onnx"),
        rename=dict(_pairs("--rename", args.rename, "OLD=NEW")),
        attributes=attributes,
        remove=args.remove,
        insert={name: _op("--insert", text) for name, text in _pairs("--insert", args.insert, "TENSOR=OP")},
        replace={name: _op("--replace", text) for name, text in _pairs("--replace", args.replace, "NODE=OP")},
        limits=args.limits,
    )
    steps.wrote(written)
    return 0


def _pairs(flag: str, texts: Sequence[str], form: str) -> list[tuple[str, str]]:
    found = []
    for text in texts:
        left, mark, right = text.partition("=")
        if not (left and mark and right):
            raise ConfigError(f"found {flag} {text}; expected {form}")
        found.append((left, right))
    return found


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f'found {flag} {text}; expected JSON, as 0.5, [1, 1] or "constant" ({error})') from error


def _op(flag: str, text: str) -> Op:
    if not text.startswith("{"):
        return Op(text)
    values = _json(flag, text)
    if not set(values) <= {"op", "inputs", "attributes"} or "op" not in values:
        raise ConfigError(f"found {flag} {text}; expected an object with op, and maybe inputs and attributes")
    return Op(values["op"], tuple(values.get("inputs", ())), values.get("attributes", {}))
