"""`fusenms WEIGHTS`: fuses, verifies and writes a model. This is the default command."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from fusenms.artifacts.frames import CHANNELS, Tiles
from fusenms.artifacts.fused import FusedModel
from fusenms.cli.arguments import (
    add_anchors,
    add_pixels,
    batch_argument,
    frames_argument,
    keep_float_argument,
    pixels_of,
    read_layout,
    rounds_argument,
    tiles_argument,
    tiles_of,
)
from fusenms.cli.engine import build, engine_path
from fusenms.cli.flags import add_fields, fields_of
from fusenms.cli.printing import ProgressBar, Steps, megabytes, size_argument
from fusenms.config import PostprocessConfig
from fusenms.engines import BUILDERS, TENSORRT, EngineSettings
from fusenms.engines.base import check_places
from fusenms.errors import BackendError, ConfigError
from fusenms.evaluation.between import check_truth, map_between
from fusenms.events import Compared, Event, Fused, OnEvent, Progress, QuantizedNetwork, Recognized, Verified
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.fusion.tail import NO_SUPPRESSION
from fusenms.heads import known_heads
from fusenms.pipeline import fuse
from fusenms.quantization import Int8Settings
from fusenms.runtime.images import list_images
from fusenms.safety.files import check_writable
from fusenms.sources import LoadOptions
from fusenms.transforms.half_precision import HALF, PRECISIONS

NAME = "fuse"
SHOWN = 5
"""Convolutions that are printed of the ranking; `--json` has all."""
HELP = "fuse the post-processing into a detector, verify the result, and write the model (the default command)"
LOADING = ["size", "dynamic_size", "opset", "batch", "make_dynamic", "one_to_many", "pixels", "stretch", "ignore"]
"""Fields of `LoadOptions` that are flags of this command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a checkpoint (.pt), a raw .onnx, or the directory of a Hugging Face detector",
    )
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="ort", help="backend for the suppression (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: WEIGHTS.BACKEND.onnx in the current folder)",
    )
    parser.add_argument(
        "--engine", choices=["auto", "none", *BUILDERS], default="auto",
        help="also build an engine from the file (default: with TensorRT, if it is installed and the backend is trt or plugin)",
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=frames_argument, metavar="HxW|dynamic",
        help="take frames, uint8 [batch, height, width, 3], of this size or of any, and letterbox or stretch them in the graph; boxes and "
        "keypoints are in pixels of the frame. Backends ort and portable; not for masks",
    )  # fmt: skip
    parser.add_argument(
        "--frame-channels", choices=list(CHANNELS), default=CHANNELS[0],
        help="order of the colors of frames; bgr is what OpenCV reads, nv12 what video decoders give (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tiles", type=tiles_argument, metavar="RxC",
        help="cut frames into this many rows and columns of tiles in the graph, which the network sees as one batch; the candidates of all "
        "tiles suppress each other once. Takes frames of any size, if --frames names none",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, metavar="SHARE",
        help=f"share of a tile that the next one covers too (default: {Tiles.overlap})",
    )  # fmt: skip
    parser.add_argument(
        "--and-whole", action="store_true", help="also look at the whole frame, for objects larger than a tile"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="also verify on the images of this folder, and look at eight of them for what the head means",
    )
    parser.add_argument(
        "--strict", action="store_true",
        help="refuse weights that find no objects in the example images or those of --images, and again in their mirror images",
    )  # fmt: skip
    parser.add_argument(
        "--unverified", action="store_true", help="skip the verification, and mark the file as unverified"
    )
    model = parser.add_argument_group("model")
    add_fields(
        model,
        LoadOptions,
        LOADING,
        size={"type": size_argument, "metavar": "N|HxW"},
        batch={"type": batch_argument, "metavar": "N|dynamic"},
        ignore={
            "action": "append",
            "default": [],
            "metavar": "OUTPUT",
            "help": "name of an output of an .onnx that means nothing for its detections; may be given several times",
        },
    )
    add_pixels(model)
    model.add_argument(
        "--family",
        choices=[head.name for head in known_heads()],
        help="detector family, if several fit the file",
    )
    add_anchors(model)
    model.add_argument(
        "--layout",
        type=Path,
        metavar="FILE.json",
        help="the layout of a raw .onnx, instead of recognizing its head; `inspect FILE --layout` prints one to start from",
    )
    model.add_argument(
        "--precision", choices=list(PRECISIONS), default=PRECISIONS[0],
        help="precision of the network; the decode and everything after it are always float32 (default: %(default)s)",
    )  # fmt: skip
    _add_int8(parser)
    post = parser.add_argument_group("post-processing")
    rounds = {"type": rounds_argument, "metavar": "auto|N"}
    add_fields(post, PostprocessConfig, rounds=rounds, output_preset={"flags": ["--names"]})


def _add_int8(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("int8")
    group.add_argument(
        "--calibrate", type=Path, metavar="DIR|LIST",
        help="images to calibrate --precision int8 on: a folder, or a text file with the path of an image in each line; at least 16, "
        "better 100, as the model sees them in use. Where enough are left, every fourth is held out to measure the drift",
    )  # fmt: skip
    add_fields(group, Int8Settings, keep_float={"type": keep_float_argument, "metavar": "N|auto"})
    truth = group.add_mutually_exclusive_group()
    truth.add_argument(
        "--coco",
        type=Path,
        metavar="JSON",
        help="ground truth in COCO's format, to compare the mAP of float32 and of int8",
    )
    truth.add_argument("--yolo", type=Path, metavar="DIR", help="the same in YOLO's format, as for eval")


def engine_builder(asked: str, backend: str) -> str | None:
    """The builder for the engine of a fused file, or None if no engine is wanted.

    Args:
        asked: value of ``--engine``.
        backend: name of the backend.
    """
    if asked != "auto":
        return None if asked == "none" else asked
    return "trt" if backend in TENSORRT and find_spec("tensorrt") is not None else None


def run(args: argparse.Namespace) -> int:
    start, steps = time.monotonic(), Steps(args.json)
    config, tiles = PostprocessConfig(**fields_of(args, PostprocessConfig)), tiles_of(args)
    backend = get_backend(args.backend, config)
    output = args.output or Path(Path(args.weights).stem + backend.suffix)
    check_writable(output, Path(args.weights))
    if (builder := engine_builder(args.engine, args.backend)) is not None:
        if args.frames is not None or args.tiles is not None:
            given = "--frames" if args.tiles is None else "--tiles"
            raise ConfigError(f"found {given} and --engine {builder}; an engine is given images: leave one of them out")
        check_places(output.parent / engine_path(output, builder), Path(args.weights))
    if args.images is not None:
        list_images(args.images)  # fail early
    truth = {name: path for name in ("coco", "yolo") if (path := getattr(args, name)) is not None}
    if truth and args.precision != "int8":
        raise ConfigError(
            f"found --{next(iter(truth))} with --precision {args.precision}, but mAP is compared for int8 only; for that of one file: "
            "python -m fusenms eval"
        )
    if truth:
        check_truth(**truth, limits=args.limits)  # fail early
    seen: list[Event] = []
    with ProgressBar("verify") as bar:
        fused = fuse(
            args.weights,
            backend=args.backend,
            family=args.family,
            anchors=args.anchors,
            precision=args.precision,
            calibrate=args.calibrate,
            **fields_of(args, Int8Settings),
            frames=args.frames,
            frame_channels=args.frame_channels,
            tiles=tiles,
            images=args.images,
            unverified=args.unverified,
            strict=args.strict,
            config=config,
            options=LoadOptions(
                **fields_of(args, LoadOptions, LOADING) | {"pixels": pixels_of(args)},
                layout=read_layout(args),
                limits=args.limits,
            ),
            on_event=_also(printer(steps, bar), seen.append if truth else None),
        )
        if truth:
            fused = _with_map(fused, seen, truth, steps, bar)
    fused.save(output, unverified=args.unverified)
    engine = _engine(args, builder, output, steps)
    seconds = time.monotonic() - start
    note = " · UNVERIFIED, and marked as such" if args.unverified else ""
    steps.line("wrote", f"{output} ({megabytes(output.stat().st_size)}) in {seconds:.1f} s{note}")
    for command in next_commands(fused, output, engine):
        steps.line("next", command)
    steps.finish(output=str(output), seconds=round(seconds, 3), verified=not args.unverified)
    return 0


def _also(first: OnEvent, second: OnEvent | None) -> OnEvent:
    def both(event: Event) -> None:
        first(event)
        if second is not None and not isinstance(event, Progress):
            second(event)

    return both


def _with_map(
    fused: FusedModel, seen: list[Event], truth: dict[str, Path], steps: Steps, bar: ProgressBar
) -> FusedModel:
    """The model, with a note about the mAP of float32 and of int8."""
    recognized = next(event for event in seen if isinstance(event, Recognized))
    quantized = next(event.quantized for event in seen if isinstance(event, QuantizedNetwork))
    found = map_between(recognized.raw, quantized.raw, recognized.layout, progress=bar.update, **truth)
    steps.line("int8", found.summary)
    steps.values["int8"]["map"] = found.to_dict()
    return replace(fused, notes=(*fused.notes, f"int8: {found.summary}"))


def _engine(args: argparse.Namespace, builder: str | None, output: Path, steps: Steps) -> bool:
    """Build the engine that was requested, or the default one if TensorRT is installed. Return whether an engine was written."""
    if builder is None:
        if args.backend in TENSORRT and args.engine == "auto":
            text = f"not built: TensorRT is not installed; on a machine with TensorRT, run: python -m fusenms engine {output}"
            steps.line("engine", text)
        return False
    own = Steps(args.json)
    try:
        written = build(output, builder, EngineSettings(), output.parent / engine_path(output, builder), own)
    except BackendError as error:
        if args.engine != "auto":
            raise
        steps.lines("engine", f"not built: {error}")  # the engine was not requested, and the file is written
        return False
    steps.values["engine"] = own.values
    steps.line("wrote", ", ".join(map(str, written)))
    return True


def printer(steps: Steps, bar: ProgressBar) -> OnEvent:
    """A function that prints a line for each event of `fuse`."""
    shown: list[str] = []  # notes about int8

    def recognized(event: Recognized) -> None:
        raw, layout = event.raw, event.layout
        checkpoint = raw.layout is not None
        steps.line("load", f"{event.summary}{' · no code executed' if checkpoint else ''}")
        for note in raw.notes[: len(raw.notes) - len(event.meaning)]:
            steps.line("export" if checkpoint else "read", note)
        for line in event.meaning:
            steps.line("head", line)
        steps.values |= {"source": raw.source, "family": layout.family, "task": layout.task}

    def quantized(event: QuantizedNetwork) -> None:
        found = event.quantized
        for note in found.raw.notes[-2:]:
            steps.line("int8", note)
        if found.costs:
            steps.line(
                "int8", f"the dearest: {', '.join(f'{cost.layer} {cost.error:.2%}' for cost in found.costs[:SHOWN])}"
            )
        steps.values["int8"] = {
            "drift": found.drift.to_dict() | {"share": found.drift.drift, "held_out": found.held_out},
            "kept": list(found.kept),
            "costs": [asdict(cost) for cost in found.costs],
        }
        shown.extend(found.raw.notes[-2:])

    def fused(event: Fused) -> None:
        model, config = event.model, event.model.config
        for note in model.notes[len(event.raw.notes) + len(shown) :]:
            steps.line("half" if note == HALF else "fuse" if note.startswith(NO_SUPPRESSION) else "input", note)
        steps.line("fuse", event.summary)
        if model.layout.suppress:
            thresholds = f"score > {config.score_threshold:g}, IoU > {config.iou_threshold:g} suppressed"
        else:
            thresholds = f"score > {config.score_threshold:g}"
        if config.runtime_thresholds:
            names = ", ".join(given.name for given in model.layout.runtime_inputs(config))
            thresholds += f" (defaults of the inputs {names})"
        steps.line("settings", f"{thresholds}, at most {config.max_detections} detections per image")
        steps.values |= {
            "classes": list(model.class_names), "notes": list(model.notes), "backend": model.backend,
            "decode": model.layout.decode_stage, "layout": model.layout.to_dict(), "config": config.to_dict(),
        }  # fmt: skip

    def compared(event: Compared) -> None:
        hint = "" if event.agreement.before or event.own_images else " (give --images for images that show something)"
        steps.values["agreement"] = event.agreement.to_dict()
        steps.line("half", f"{event.summary}{hint}")

    def verified(event: Verified) -> None:
        steps.values["verification"] = event.report.to_dict()
        if event.report:
            steps.line("verify", event.summary)

    printers = {
        Recognized: recognized,
        QuantizedNetwork: quantized,
        Fused: fused,
        Compared: compared,
        Verified: verified,
    }

    def on_event(event: Event) -> None:
        if isinstance(event, Progress):
            bar.update(event.what, event.done, event.total)
        else:
            bar.close()
            printers[type(event)](event)  # type: ignore[operator]

    return on_event


def next_commands(fused: FusedModel, output: Path, engine: bool) -> list[str]:
    """Suggested commands for a written file."""
    commands = [f"python -m fusenms verify {output} --images DIR"]
    if BACKENDS[fused.backend].runs_on_onnxruntime:
        commands.append(f"python -m fusenms detect {output} IMAGE")
    if not engine and fused.backend != "ort":
        commands.append(f"python -m fusenms engine {output}")
    return commands
