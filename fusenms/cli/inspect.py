"""`fusenms inspect FILE`: what it is, its head (or why none fits), its metadata."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusenms import contract
from fusenms.artifacts.fused import load_fused
from fusenms.artifacts.raw import RawModel
from fusenms.cli.printing import Steps
from fusenms.errors import HeadError, SourceError
from fusenms.heads import recognize
from fusenms.layout import Layout
from fusenms.limits import Limits
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.sources import load
from fusenms.transforms.dynamic_batch import open_batch

NAME = "inspect"
HELP = "say what a file is: its kind, its head (or why none fits), its metadata"


DECODES = {
    "late": "late: only the chosen candidates are decoded",
    "full": "full: the file's own decode stays, since no tensor before it was shown to give the same",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint (.pt), a raw .onnx or a fused .onnx")


def run(args: argparse.Namespace) -> int:
    steps, path = Steps(args.json), Path(args.file)
    if path.suffix.lower() == ".onnx" and path.is_file():
        model = read_onnx(path, args.limits)
        metadata = read_metadata(model)
        if contract.KEY_BACKEND in metadata:
            _fused(path, steps, args.limits)
        else:
            _raw_onnx(path, steps, model, args.limits)
        _metadata(metadata, steps)
    else:
        _checkpoint(path, steps, args.limits)
    steps.finish(file=str(path))
    return 0


def _fused(path: Path, steps: Steps, limits: Limits) -> None:
    fused = load_fused(path, limits=limits)
    _tensors(fused.model, steps)
    by = f", suppression by {fused.suppressed_by}" if fused.suppressed_by else ""
    steps.line("kind", f"fused model · backend {fused.backend}{by} · {fused.precision} · from {fused.source}")
    steps.line("head", _layout_text(fused.layout.to_dict()))
    steps.line("decode", DECODES[fused.layout.decode_stage])
    config = fused.config.to_dict()
    steps.line("settings", " · ".join(f"{key} {value}" for key, value in config.items()))
    proof = read_metadata(fused.model).get(contract.KEY_VERIFICATION, contract.UNVERIFIED)
    steps.line("verified", proof)
    steps.values |= {
        "kind": "fused",
        "backend": fused.backend,
        "layout": fused.layout.to_dict(),
        "config": config,
        "verification": proof,
    }


def _raw_onnx(path: Path, steps: Steps, model: Any, limits: Limits) -> None:
    steps.line("kind", "raw ONNX")
    steps.values["kind"] = "onnx"
    _tensors(model, steps)
    try:
        raw = load(path, make_dynamic=True, limits=limits)
    except (SourceError, HeadError) as error:
        _no_head(error, steps)
        return
    for note in raw.notes[1:]:
        steps.line("read", note)
    layout = _head(raw, steps)
    if raw.frozen_batch is not None and layout is not None:
        steps.line("batch", f"frozen at {raw.frozen_batch}; --make-dynamic may open it")
        try:
            steps.line("opened", open_batch(raw, layout).notes[-1])
        except SourceError as error:
            steps.lines("opened", f"no: {error}")


def _checkpoint(path: Path, steps: Steps, limits: Limits) -> None:
    raw = load(path, limits=limits)
    steps.line("kind", "checkpoint, read as plain data")
    steps.values["kind"] = "checkpoint"
    steps.line("input", raw.notes[0])
    _head(raw, steps)
    steps.line("classes", f"{len(raw.names)}: {', '.join(raw.names[:8])}{', …' if len(raw.names) > 8 else ''}")
    steps.values["classes"] = list(raw.names)


def _head(raw: RawModel, steps: Steps) -> Layout | None:
    try:
        layout = recognize(raw)
    except (HeadError, SourceError) as error:
        _no_head(error, steps)
        return None
    steps.line("head", _layout_text(layout.to_dict()))
    steps.line("decode", DECODES[layout.decode_stage])
    steps.values |= {"layout": layout.to_dict(), "decode": layout.decode_stage}
    return layout


def _no_head(error: Exception, steps: Steps) -> None:
    steps.lines("head", f"none: {error}")
    steps.values |= {"layout": None, "reason": str(error)}


def _layout_text(layout: dict[str, Any]) -> str:
    classes = layout["classes"]["stop"] - layout["classes"]["start"]
    decode = {key: value for key, value in layout["decode"].items() if key != "kind" and value not in ((), [])}
    details = ", ".join(f"{key} {json.dumps(value)}" for key, value in decode.items())
    objectness = " · objectness" if layout["objectness"] else ""
    boxes = f"{layout['decode']['kind']} ({details})" + _further_text(layout)
    if layout["labels"]:
        return f"{layout['family']} · finished rows · boxes: {boxes}"
    nms = "" if layout["suppress"] else " · end-to-end"
    return f"{layout['family']} · {classes} classes{objectness}{nms} · scores: {layout['activation']} · boxes: {boxes}"


def _further_text(layout: dict[str, Any]) -> str:
    """What the head gives beside upright boxes."""
    masks, points, found = layout["masks"], layout["keypoints"], ""
    if masks:
        found += f" · masks: {masks['coefficients']['stop'] - masks['coefficients']['start']} coefficients"
    if points:
        count = (points["values"]["stop"] - points["values"]["start"]) // points["numbers"]
        found += f" · keypoints: {count} of {points['numbers']} numbers"
    return f"{found} · turned by an angle" if layout["angle"] else found


def _tensors(model: Any, steps: Steps) -> None:
    constants = {item.name for item in model.graph.initializer}  # old files list those among their inputs
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    for kind, entries in (("input", inputs), ("output", model.graph.output)):
        texts = []
        for entry in entries:
            dims = ", ".join(str(d.dim_value or d.dim_param or "?") for d in entry.type.tensor_type.shape.dim)
            texts.append(f"{entry.name}[{dims}]")
        steps.line(kind, ", ".join(texts))
        steps.values[f"{kind}s"] = texts


def _metadata(metadata: dict[str, str], steps: Steps) -> None:
    for key, value in metadata.items():
        steps.line("metadata", f"{key} = {value if len(value) <= 160 else value[:157] + '…'}")
    steps.values["metadata"] = metadata
