"""`fusenms extract`: write the part of a file from some tensors to others."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.printing import Steps
from fusenms.editing import extract

NAME = "extract"
HELP = "write the part of a file from some tensors to others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an .onnx file, raw or fused")
    parser.add_argument(
        "--inputs", nargs="+", required=True, metavar="TENSOR", help="tensors that the part begins with"
    )
    parser.add_argument("--outputs", nargs="+", required=True, metavar="TENSOR", help="tensors that it ends with")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write (default: FILE.part.onnx)")


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(Path(args.file).stem + ".part.onnx")
    steps.wrote(extract(args.file, args.inputs, args.outputs, output, limits=args.limits))
    return 0
