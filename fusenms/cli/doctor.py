"""`fusenms doctor TARGET`: says why a module does not export well, and where."""

from __future__ import annotations

import argparse
import re

from fusenms.cli.printing import Steps
from fusenms.diagnosis import Diagnosis
from fusenms.diagnosis.targets import examine_target

NAME = "doctor"
HELP = "say why a module does not export well, with the line of code and what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a checkpoint, a Hugging Face directory, an .onnx file, or FILE.py:NAME, where NAME() gives the module (the code is run)",
    )
    parser.add_argument(
        "--input",
        type=input_argument,
        metavar="1x3xHxW",
        help="shape of the images (default: that of the weights, or 1x3x640x640)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set of the export (default: 17)")


def input_argument(text: str) -> tuple[int, int]:
    """Parse ``1x3x480x640``, or ``480x640``."""
    found = re.fullmatch(r"(?:\d+x3x)?(\d+)x(\d+)", text.lower())
    if not found or not all(0 < int(side) <= 2**14 for side in found.groups()):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected 1x3xHEIGHTxWIDTH")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    steps, found = Steps(args.json), examine_target(args.target, args.input, args.limits, opset=args.opset)
    _print(steps, found)
    steps.finish(**found.to_dict())
    return 0 if found else 1


def _print(steps: Steps, found: Diagnosis) -> None:
    for finding in found.findings:
        code = f"  {finding.place.code[:100]}" if finding.place.code else ""
        steps.line(finding.kind, f"{finding.place}{code}")
        steps.line("", finding.message)
        steps.line("", f"do: {finding.remedy}")
    if not found.findings:
        steps.line("healthy", "nothing was found")
    for name, text in found.dynamic.items():
        steps.line("dynamic", f"{name}: {text}")
