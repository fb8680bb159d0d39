"""`fusenms inspect FILE`: shows the kind of a file, its head (or why none is recognized) and its metadata."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fusenms.artifacts.fused import FusedModel
from fusenms.cli.printing import Steps
from fusenms.deployment.base import labels_file
from fusenms.errors import HeadNotRecognizedError, SourceError
from fusenms.inspection import Inspection, inspect
from fusenms.layout import Activation, Layout
from fusenms.safety.files import check_writable, write_atomically

NAME = "inspect"
HELP = "show the kind of a file, its head (or why none is recognized), and its metadata"
KINDS = {"checkpoint": "checkpoint, read as plain data", "onnx": "raw ONNX"}
DECODES = {
    "late": "late: only the candidates that enter suppression are decoded",
    "full": "full: the file's own decode remains, because no tensor before it was shown to give the same result",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a checkpoint (.pt), a raw .onnx or a fused .onnx")
    parser.add_argument(
        "--layout",
        action="store_true",
        help="print only the layout of the head, as JSON that `fusenms FILE --layout` reads",
    )

    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="also write the class names into a file, one on each line, in order"
    )


def run(args: argparse.Namespace) -> int:
    if args.labels is not None:
        check_writable(args.labels, Path(args.file))
    steps, found = Steps(args.json), inspect(args.file, limits=args.limits)
    if args.labels is not None:
        _write_labels(args.labels, args.file, found.class_names)
    if args.layout:
        if found.layout is None:
            raise HeadNotRecognizedError(found.reason)
        print(json.dumps(found.layout.to_dict(), indent=2))
        return 0
    steps.values["kind"] = found.kind
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        if tensors:
            steps.line(kind, ", ".join(map(str, tensors)))
            steps.values[f"{kind}s"] = [str(tensor) for tensor in tensors]
    if dynamic := _dynamic(found):
        steps.line("dynamic", " · ".join(f"{tensor}: {', '.join(sizes)}" for tensor, sizes in dynamic.items()))
        steps.values["dynamic"] = dynamic
    steps.line("kind", _fused_text(found.fused) if found.fused else KINDS[found.kind])
    if found.fused is not None and (frames := found.fused.image.frames) is not None:
        image = found.fused.image
        way = "stretched" if image.stretch else "letterboxed"
        steps.line(
            "frames", f"{frames}, {way} inside to {image.height}x{image.width}; results are in pixels of the frame"
        )
        own = frames.to_dict()
        steps.values["frames"] = {key: own[key] for key in ("height", "width", "channels", "tiles") if key in own}
    if found.fused is None:
        for note in found.notes[found.kind == "onnx" :]:  # the first note of an ONNX file repeats its input
            steps.line("read", note)
    _head(found, steps)
    if found.fused is not None:
        config = found.fused.config.to_dict()
        steps.line("settings", " · ".join(f"{key} {value}" for key, value in config.items()))
        steps.line("verified", found.verification)
        steps.values |= {"backend": found.fused.backend, "config": config, "verification": found.verification}
    if names := found.class_names:
        steps.line("classes", f"{len(names)}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}")
    steps.values["classes"] = list(names)
    if found.frozen_batch is not None and found.layout is not None:
        steps.line("batch", f"frozen at {found.frozen_batch}")
        steps.lines("opened", found.opened)
    for key, value in found.metadata.items():
        steps.line("metadata", f"{key} = {value if len(value) <= 160 else value[:157] + '…'}")
    if found.kind != "checkpoint":
        steps.values["metadata"] = found.metadata
    if args.labels is not None:
        steps.line("labels", str(args.labels))
    steps.finish(file=str(args.file))
    return 0


def _write_labels(path: Path, file: str, names: tuple[str, ...]) -> None:
    """Write class names into a file.

    Raises:
        SourceError: there are none, or the file cannot be written.
    """
    if not names:
        raise SourceError(f"{file}: has no class names, so {path} was not written")
    write_atomically(path, labels_file(file, names))


def _dynamic(found: Inspection) -> dict[str, list[str]]:
    """Names of the open sizes of each input."""
    sizes = {one.name: [size for size in one.shape if isinstance(size, str)] for one in found.inputs}
    return {name: names for name, names in sizes.items() if names}


def _head(found: Inspection, steps: Steps) -> None:
    if found.layout is None:
        steps.lines("head", f"none: {found.reason}")
        steps.values |= {"layout": None, "reason": found.reason}
        return
    steps.line("head", layout_text(found.layout))
    for line in found.meaning:
        steps.line("head", line)
    steps.line("decode", DECODES[found.layout.decode_stage])
    steps.values |= {
        "layout": found.layout.to_dict(),
        "meaning": list(found.meaning),
        "decode": found.layout.decode_stage,
    }


def _fused_text(fused: FusedModel) -> str:
    by = f", suppression by {fused.suppressed_by}" if fused.suppressed_by else ""
    return f"fused model · backend {fused.backend}{by} · {fused.precision} · from {fused.source}"


def layout_text(layout: Layout) -> str:
    """A layout as one line of text."""
    said = layout.to_dict()["decode"]
    usual = {"values": (), "pixels": False, "anchors": 1, "anchors_last": False, "y_first": False, "log_limit": None}
    decode = {key: value for key, value in said.items() if key != "kind" and (key not in usual or value != usual[key])}
    details = ", ".join(f"{key} {json.dumps(value)}" for key, value in decode.items())
    boxes = f"boxes: {layout.decode.kind} ({details}){_task_outputs_text(layout)}"
    if layout.labels is not None:
        return f"{layout.family} · finished rows · {boxes}"
    objectness = " · objectness" if layout.objectness else ""
    end_to_end = "" if layout.suppress else " · end-to-end"
    scores = "scores: probabilities" if layout.activation is Activation.NONE else f"scores: {layout.activation.value}"
    return f"{layout.family} · {layout.num_classes} classes{objectness}{end_to_end} · {scores} · {boxes}"


def _task_outputs_text(layout: Layout) -> str:
    masks, points, text = layout.masks, layout.keypoints, ""
    if masks is not None:
        text += f" · masks: {masks.coefficients.channels} coefficients"
    if points is not None:
        text += f" · keypoints: {points.count} of {points.dims} numbers"
    return f"{text} · turned by an angle" if layout.angle is not None else text
