"""`fusenms deploy FUSED`: writes a fused file for a runtime that reads no ONNX, and compares its detections there."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.artifacts.fused import load_fused
from fusenms.cli.printing import Steps
from fusenms.deployment import TARGETS, deploy
from fusenms.runtime.placement import load_tensor

NAME = "deploy"
HELP = "write a fused file for another runtime (ncnn), and compare its detections there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FUSED", help="a fused .onnx of float32 and of one image size")
    parser.add_argument("--target", choices=list(TARGETS), required=True, help="the runtime")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR",
        help="folder to write, which detect and Detector open (default: NAME.ncnn in the current folder)",
    )  # fmt: skip
    parser.add_argument(
        "--half", action="store_true", help="store weights as float16, and calculate so where the CPU does"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="also compare on the images of this folder")


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(f"{Path(args.file).name.split('.')[0]}.{args.target}")
    images = None
    if args.images is not None:
        image = load_fused(args.file, limits=args.limits).image
        images = load_tensor(args.images, image.height, image.width, image.stretch, args.limits)
    written = deploy(args.file, output, target=args.target, half=args.half, images=images, limits=args.limits)
    found = written.agreement
    steps.line("compare", f"head within {written.drift:.1g} of its largest value")
    steps.line(
        "compare",
        f"{found.images} images · {found.before} detections in the file, {found.after} in {args.target}, {found.same} the same",
    )
    steps.line("wrote", str(written.folder))
    steps.finish(output=str(written.folder), drift=written.drift, agreement=found.to_dict())
    return 0
