"""`fusenms WEIGHTS`: the main job."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.preprocessing import PIXELS
from fusenms.cli.engine import TENSORRT, build, engine_path
from fusenms.cli.printing import Steps, megabytes, progress_bar, size_argument
from fusenms.config import PostprocessConfig
from fusenms.contract import MASK_KINDS, NAME_PRESETS
from fusenms.engines import BUILDERS, EngineSettings
from fusenms.engines.base import check_places
from fusenms.errors import BackendError, ConfigError
from fusenms.fusion.backends import BACKENDS, get_backend
from fusenms.fusion.tail import NO_SUPPRESSION, fuse_head
from fusenms.heads import HEADS, recognize
from fusenms.pipeline import in_precision, prove
from fusenms.runtime.pictures import list_pictures, load_tensor
from fusenms.safety.files import check_writable
from fusenms.sources import load
from fusenms.transforms.dynamic_batch import open_batch
from fusenms.transforms.half_precision import HALF, PRECISIONS
from fusenms.verification.agreement import drift
from fusenms.verification.checks import pictures_for, verify

NAME = "fuse"
HELP = "fuse the post-processing into a detector's weights, prove it, write the model (the default command)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = PostprocessConfig()
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a checkpoint (.pt), a raw .onnx, or the directory of a Hugging Face detector",
    )
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="ort", help="how to suppress (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write (default: WEIGHTS.BACKEND.onnx in this folder)",
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "none", *BUILDERS],
        default="auto",
        help="build an engine of the file too (default: with TensorRT where it is installed and the backend is trt)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="verify on these pictures too")
    parser.add_argument("--unverified", action="store_true", help="skip the verification; the file says so")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--size",
        type=size_argument,
        metavar="N|HxW",
        help="input size in pixels (default: what the weights say, or 640)",
    )
    model.add_argument("--dynamic-size", action="store_true", help="leave height and width open")
    model.add_argument("--opset", type=int, help="ONNX operator set of the export (default: 17)")
    model.add_argument(
        "--make-dynamic", action="store_true", help="open the frozen batch of an .onnx, where that is shown to be safe"
    )
    model.add_argument(
        "--one-to-many",
        action="store_true",
        help="YOLOv10, YOLO26: take the head that needs suppression (default: the other one)",
    )
    model.add_argument(
        "--pixels",
        choices=list(PIXELS),
        help="what the network wants for pixels (default: what the weights say, or what is usual in the family); "
        "the fused model takes RGB from 0 to 1 in any case",
    )
    model.add_argument(
        "--stretch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="pictures are stretched to the size of the model, not letterboxed (default: as for --pixels)",
    )
    model.add_argument(
        "--family",
        choices=[head.name for head in HEADS],
        help="detector family, where the file leaves more than one open",
    )
    model.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        default=PRECISIONS[0],
        help="of the network; the decode and all after it are float32 in any case (default: %(default)s)",
    )
    post = parser.add_argument_group("post-processing")
    post.add_argument(
        "--score-threshold",
        type=float,
        default=defaults.score_threshold,
        help="keep scores above this (default: %(default)s)",
    )
    post.add_argument(
        "--iou-threshold",
        type=float,
        default=defaults.iou_threshold,
        help="suppress boxes that overlap more than this (default: %(default)s)",
    )
    post.add_argument(
        "--max-detections",
        type=int,
        default=defaults.max_detections,
        help="output rows per image (default: %(default)s)",
    )
    post.add_argument(
        "--max-candidates",
        type=int,
        default=defaults.max_candidates,
        help="best candidates that enter suppression (default: %(default)s)",
    )
    post.add_argument("--class-agnostic", action="store_true", help="suppress across classes")
    post.add_argument(
        "--multi-label", action="store_true", help="every class above the threshold counts, not only the best of a box"
    )
    post.add_argument(
        "--rounds",
        type=rounds_argument,
        metavar="auto|N",
        help="portable: repeat suppression until nothing changes, or unroll N rounds (default: auto)",
    )
    post.add_argument(
        "--masks",
        choices=list(MASK_KINDS),
        default=defaults.masks,
        help="segmentation: give mask coefficients and prototypes, or masks at the prototypes' size (default: %(default)s)",
    )
    post.add_argument("--indices", action="store_true", help="add an output: the candidate that each row came from")
    post.add_argument(
        "--names", choices=list(NAME_PRESETS), default=defaults.names, help="output names (default: %(default)s)"
    )


LOADING = ("size", "dynamic_size", "opset", "make_dynamic", "one_to_many", "pixels", "stretch", "limits")
"""What `fusenms.load` takes of the command line."""


def engine_builder(asked: str, backend: str) -> str | None:
    """Which builder makes an engine of what was fused; None where none is wanted."""
    if asked != "auto":
        return None if asked == "none" else asked
    return "trt" if backend in TENSORRT and find_spec("tensorrt") is not None else None


def rounds_argument(text: str) -> int | None:
    """Rounds from their text; None for auto."""
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}; expected auto or a number of rounds")
    return None if text == "auto" else int(text)


def run(args: argparse.Namespace) -> int:
    start, steps = time.monotonic(), Steps(args.json)
    config = PostprocessConfig(**{field.name: getattr(args, field.name) for field in fields(PostprocessConfig)})
    backend = get_backend(args.backend, config)
    if args.unverified and args.images is not None:
        raise ConfigError("images are for verifying, and unverified leaves that out; leave one of them out")
    output = args.output or Path(Path(args.weights).stem + backend.suffix)
    check_writable(output, Path(args.weights))
    if (builder := engine_builder(args.engine, args.backend)) is not None:
        check_places(output.parent / engine_path(output, builder), Path(args.weights))
    if args.images is not None:
        list_pictures(args.images)  # fails early
    fused, full = make(args.weights, args.backend, config, steps, args)
    images = None
    if args.images is not None:
        images = load_tensor(args.images, fused.image.height, fused.image.width, fused.image.stretch, args.limits)
    if full is not None:
        changed = drift(full, fused, pictures_for(fused, images))
        steps.values["drift"] = changed.to_dict()
        hint = "" if changed.before or images is not None else " (give --images for pictures that show something)"
        steps.line("half", f"{changed.summary}{hint}")
        fused = replace(fused, notes=(*fused.notes, changed.summary))
    if not args.unverified:
        with progress_bar("verify") as progress:
            report = verify(fused, images=images, progress=progress)
        steps.values["verification"] = report.to_dict()
        fused = prove(fused, report)
        steps.line("verify", report.summary)
    fused.save(output, unverified=args.unverified)
    if builder is not None:
        own = Steps(args.json)
        try:
            written = build(output, builder, EngineSettings(), output.parent / engine_path(output, builder), own)
        except BackendError as error:
            if args.engine != "auto":
                raise
            steps.lines("engine", f"not built: {error}")  # nobody asked for it; the file is there
        else:
            steps.values["engine"] = own.values
            steps.line("wrote", ", ".join(map(str, written)))
    elif args.backend in TENSORRT and args.engine == "auto":
        steps.line(
            "engine", f"not built: TensorRT is not installed here; where it is: python -m fusenms engine {output}"
        )
    seconds = time.monotonic() - start
    note = " · UNVERIFIED, and marked as such" if args.unverified else ""
    steps.line("wrote", f"{output} ({megabytes(output.stat().st_size)}) in {seconds:.1f} s{note}")
    steps.finish(output=str(output), seconds=round(seconds, 3), verified=not args.unverified)
    return 0


def make(
    weights: str | Path,
    backend: str,
    config: PostprocessConfig,
    steps: Steps,
    options: argparse.Namespace | None = None,
) -> tuple[FusedModel, FusedModel | None]:
    """Load, recognize and fuse, with a line for each; in half precision, the same in float32 too."""
    chosen = {name: getattr(options, name) for name in LOADING} if options else {}
    raw = load(weights, **chosen)
    layout = recognize(raw, options.family if options else None)
    raw = open_batch(raw, layout)
    checkpoint = raw.layout is not None
    safe = " · no code executed" if checkpoint else ""
    steps.line("load", f"{raw.source} · {layout.family} {layout.task} · {layout.num_classes} classes{safe}")
    for note in raw.notes:
        steps.line("export" if checkpoint else "read", note)
    fused, full = fuse_head(raw, layout, config, backend), None
    if options is not None and options.precision != raw.precision:
        full, fused = fused, fuse_head(in_precision(raw, layout, options.precision), layout, config, backend)
    for note in fused.notes[len(raw.notes) :]:
        steps.line("half" if note == HALF else "fuse" if note.startswith(NO_SUPPRESSION) else "input", note)
    outputs = ", ".join(name for name, _ in layout.outputs(config))
    steps.line("fuse", f"{layout.decode_stage} decode · {fused.suppressed_by} · {outputs}")
    steps.values |= {
        "source": raw.source, "family": layout.family, "task": layout.task, "classes": list(fused.names), "notes": list(fused.notes),
        "backend": backend, "decode": layout.decode_stage, "layout": layout.to_dict(), "config": config.to_dict(),
    }  # fmt: skip
    return fused, full
