"""`fusenms verify FILE`: repeats the verification of a written file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fusenms.artifacts.fused import load_fused
from fusenms.cli.printing import ProgressBar, Steps
from fusenms.contract import KEY_IMAGE
from fusenms.engines.base import load_engine
from fusenms.engines.plugin import load_plugin_library
from fusenms.engines.running import ENGINES, compare_engine
from fusenms.errors import BackendUnavailableError, InputError
from fusenms.runtime.example_images import example_images
from fusenms.safety.text import printable
from fusenms.verification.checks import verify

NAME = "verify"
HELP = "compare a fused file with the float64 reference, at several batch sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a fused .onnx, or an engine that fusenms built")
    parser.add_argument("--images", type=Path, metavar="DIR", help="also verify on the images of this folder")
    parser.add_argument(
        "--plugin-library",
        type=Path,
        metavar="FILE",
        help="library with the plugin, for an engine that was built with one",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="B",
        help="batch sizes (default: 1 2 7, or the only one of a file with a fixed batch)",
    )


def run(args: argparse.Namespace) -> int:
    if Path(args.file).suffix in ENGINES:
        return _engine(args)
    steps, fused = Steps(args.json), load_fused(args.file, limits=args.limits)
    images = None
    if args.images is not None:
        from fusenms.runtime.placement import load_tensor

        images = load_tensor(args.images, fused.image.height, fused.image.width, fused.image.stretch, args.limits)
    elif fused.image.frames is not None:  # which are compared on objects too
        images = example_images(fused.image.height, fused.image.width)
    with ProgressBar("verify") as bar:
        report = verify(fused, images=images, batches=args.batch, progress=bar.update)
    steps.lines("verify" if report else "DIFFERS", str(report))
    steps.finish(file=args.file, verification=report.to_dict())
    return 0 if report else 1


WORST_BOX, WORST_SCORE = 2.0, 0.02
"""Maximum difference of an engine, in pixels and in score. It computes in TF32 or float16, and sums convolutions in another order."""


def _engine(args: argparse.Namespace) -> int:
    """Check that an engine matches its sidecar, and on a GPU that its detections agree with those of its ONNX file."""
    steps, path = Steps(args.json), Path(args.file)
    info = load_engine(path).info
    builder = info["builder"]
    steps.line("engine", f"{builder['name']} {builder['version']} · matches its sidecar")
    if args.plugin_library is not None:
        load_plugin_library(args.plugin_library)
    images = None
    if args.images is not None:
        from fusenms.runtime.placement import load_tensor

        stretch = json.loads(info["metadata"].get(KEY_IMAGE, "{}")).get("stretch", False)
        usual = next(iter(info["inputs"].values()))["opt"]
        if len(usual) != 4:
            raise InputError(f"{printable(path)}: its first input has the shape {usual}; expected that of images")
        height, width = usual[2:]
        images = load_tensor(args.images, height, width, stretch, args.limits)
    try:
        found = compare_engine(path, images=images)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f"{path}: the engine was not run: {error}") from error
    if not any(agreement.before for _, agreement in found):
        raise InputError(
            f"{path}: there are no detections in these images, so nothing was compared; choose others with --images DIR"
        )
    wrong = 0
    for batch, agreement in found:
        equal = (
            agreement.before == agreement.after == agreement.same
            and agreement.worst_box <= WORST_BOX
            and agreement.worst_score <= WORST_SCORE
        )
        wrong += not equal
        steps.line("verify" if equal else "DIFFERS", f"batch {batch} · {agreement.summary}")
    steps.finish(file=args.file, batches={batch: agreement.to_dict() for batch, agreement in found}, equal=not wrong)
    return 1 if wrong else 0
