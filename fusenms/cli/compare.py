"""`fusenms compare A B`: whether two forms of a network compute the same, and where they part."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.printing import ProgressBar, Steps, size_argument
from fusenms.comparison import compare
from fusenms.comparison.runs import PRECISIONS
from fusenms.safety.files import check_writable, write_atomically

NAME = "compare"
HELP = "compare two forms of a network tensor by tensor, and name the first place where they part"
STATUS_OF_ERRORS = 2
"""As of diff: 0 equal, 1 different, 2 trouble."""
TARGET = "a checkpoint, a Hugging Face directory, an .onnx file (raw or fused), an engine, or FILE.py:NAME, where NAME() gives the module"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=f"{TARGET} (the code is run)")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of images to run (default: images of the package)"
    )
    parser.add_argument(
        "--size", type=size_argument, metavar="N|HxW", help="height and width in pixels (default: of the files)"
    )
    parser.add_argument(
        "--rounding",
        choices=list(PRECISIONS),
        help="precision whose rounding is no difference (default: the coarser one of both)",
    )
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="also draw the error along the graph")
    parser.add_argument(
        "--rows", action="store_true", help="print every pair of tensors, not only those around the place"
    )


def run(args: argparse.Namespace) -> int:
    if args.chart is not None:
        check_writable(args.chart)
    steps = Steps(args.json)
    with ProgressBar("compare") as bar:
        found = compare(
            args.a,
            args.b,
            images=args.images,
            size=args.size,
            rounding=args.rounding,
            limits=args.limits,
            progress=bar.update,
        )
    for head, text in found.lines(len(found.rows) if args.rows else 3):
        steps.line(head, text)
    if args.chart is not None:
        from fusenms.comparison.chart import svg

        steps.line("wrote", str(write_atomically(args.chart, svg(found).encode())))
    steps.finish(**found.to_dict())
    return 0 if found else 1
