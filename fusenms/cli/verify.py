"""`fusenms verify FILE`: repeat the proof on a written file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.artifacts import load_fused
from fusenms.cli.printing import Steps, progress_bar
from fusenms.verification import BATCHES, verify

NAME = "verify"
HELP = "compare a fused file with the float64 reference, at several batch sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a fused .onnx")
    parser.add_argument("--images", type=Path, metavar="DIR", help="verify on these pictures too")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=list(BATCHES), metavar="B", help="batch sizes (default: 1 2 7)"
    )


def run(args: argparse.Namespace) -> int:
    steps, fused = Steps(args.json), load_fused(args.file)
    images = None
    if args.images is not None:
        from fusenms.runtime.pictures import load_tensor

        images = load_tensor(args.images, fused.image.height, fused.image.width, fused.image.stretch)
    with progress_bar("verify") as progress:
        report = verify(fused, images=images, batches=args.batch, progress=progress)
    steps.line("verify" if report else "DIFFERS", str(report))
    steps.finish(file=args.file, verification=report.to_dict())
    return 0 if report else 1
