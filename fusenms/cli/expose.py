"""`fusenms expose`: write a file with inner tensors as further outputs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.printing import Steps
from fusenms.editing import expose

NAME = "expose"
HELP = "write a file with inner tensors as further outputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an .onnx file, raw or fused")
    parser.add_argument("tensors", nargs="+", metavar="TENSOR", help="name of a tensor outside of subgraphs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write (default: FILE.exposed.onnx)")


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(Path(args.file).stem + ".exposed.onnx")
    steps.wrote(expose(args.file, args.tensors, output, limits=args.limits))
    return 0
