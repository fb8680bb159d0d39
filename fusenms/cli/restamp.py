"""`fusenms restamp`: give a fused file that was edited elsewhere its metadata again, if it is still equal to the reference."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.printing import Steps
from fusenms.editing import restamp

NAME = "restamp"
HELP = "give a fused file that was edited elsewhere its metadata again, if it is still equal to the reference"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the edited .onnx file")
    parser.add_argument("--like", required=True, metavar="FUSED", help="the fused file, as it was written")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file to write (default: FILE.restamped.onnx)"
    )


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(Path(args.file).stem + ".restamped.onnx")
    steps.wrote(restamp(args.file, args.like, output, limits=args.limits))
    return 0
