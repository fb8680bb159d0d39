"""`fusenms configure`: change settings of a fused file, without its weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.cli.convert import add_changes, changes_of, show
from fusenms.cli.printing import ProgressBar, Steps
from fusenms.conversion import configure
from fusenms.safety.files import check_writable

NAME = "configure"
HELP = "change settings and output names of a fused file, without its weights, and verify the result"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a fused .onnx")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: FILE itself, replaced once the result is verified)",
    )
    add_changes(parser)


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(args.file)
    check_writable(output)
    with ProgressBar("verify") as bar:
        made = configure(args.file, images=args.images, limits=args.limits, progress=bar.update, **changes_of(args))
    show(steps, made)
    made.save(output)
    steps.wrote(output)
    return 0
