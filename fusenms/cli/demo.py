"""`fusenms demo`: the whole line on our own tiny detector."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.detect import detect_and_draw
from fusenms.cli.fuse import printer
from fusenms.cli.printing import ProgressBar, Steps, megabytes
from fusenms.errors import SourceError
from fusenms.pipeline import fuse
from fusenms.runtime import Detector
from fusenms.safety.files import check_writable, make_folder

NAME = "demo"
HELP = "run the whole line on the embedded demo detector: fuse, verify, detect, draw"
IMAGES = ("shapes0.jpg", "shapes1.jpg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("fusenms-demo"),
        metavar="DIR",
        help="where the results go (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    steps, source = Steps(args.json), shapes_folder()
    make_folder(args.output)
    target = args.output / "shapes.ort.onnx"
    check_writable(target)
    with ProgressBar("verify") as bar:
        fuse(source / "shapes.pt", on_event=printer(steps, bar)).save(target)
    steps.line("wrote", f"{target} ({megabytes(target.stat().st_size)})")
    with Detector(target) as detect:
        images = detect_and_draw(detect, [source / name for name in IMAGES], args.output, args.json)
    steps.finish(output=str(target), images=images)
    return 0


def shapes_folder() -> Path:
    """Where the demo detector lies: in the installed package, or in the source tree.

    Raises:
        SourceError: it is in neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_shapes", package.parent / "models" / "shapes"):
        if (folder / "shapes.pt").is_file():
            return folder
    raise SourceError("the demo detector is missing from this installation; install fusenms again")
