"""`fusenms deploy FUSED --target NAME`: writes what another runtime or server needs to run a fused file, checked against it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusenms.artifacts.fused import load_fused
from fusenms.cli.printing import Steps
from fusenms.deployment import TARGETS, deploy
from fusenms.runtime.placement import load_tensor

NAME = "deploy"
HELP = (
    f"write what another runtime or server needs to run a fused file ({', '.join(TARGETS)}), checked against the file"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FUSED",
        help="a fused .onnx; for triton and deepstream also an engine of TensorRT with its sidecar",
    )
    parser.add_argument("--target", choices=list(TARGETS), required=True, help="the runtime or server")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder to write (default: NAME.TARGET in the current folder)"
    )
    parser.add_argument(
        "--half", action="store_true",
        help="ncnn, openvino: store weights as float16; deepstream: let TensorRT calculate in float16",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="ncnn, openvino: also compare on the images of this folder"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N",
        help="triton, deepstream: largest batch (default: 8, or what the file takes)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    output = args.output or Path(f"{Path(args.file).name.split('.')[0]}.{args.target}")
    images = None
    if args.images is not None:
        image = load_fused(args.file, limits=args.limits).image
        images = load_tensor(args.images, image.height, image.width, image.stretch, args.limits)
    written = deploy(
        args.file, output, target=args.target, half=args.half, images=images, batch=args.batch, limits=args.limits
    )
    found = written.agreement
    for line in written.checks:
        steps.line("check" if found is None else "compare", line)
    steps.line("wrote", str(written.folder))
    steps.finish(
        output=str(written.folder),
        files=[str(file) for file in written.files],
        checks=list(written.checks),
        drift=written.drift,
        agreement=None if found is None else found.to_dict(),
    )
    return 0
