"""`fusenms detect FUSED IMAGE...`: detects objects, prints them and draws them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.cli.printing import Steps
from fusenms.errors import InputError
from fusenms.runtime import Detections, Detector
from fusenms.runtime.drawing import VISIBLE, draw, save_image
from fusenms.runtime.images import SUFFIXES, list_images, read_image
from fusenms.safety.files import is_folder, make_folder
from fusenms.safety.text import printable

NAME = "detect"
HELP = "run a fused model on images, print a table of the detections, and write annotated images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="FUSED",
        help="a fused .onnx that runs in ONNX Runtime (backend ort or portable, or one without a plugin)",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="images, or folders of images")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("detections"),
        metavar="DIR",
        help="folder for annotated images (default: %(default)s)",
    )
    parser.add_argument("--no-draw", action="store_true", help="do not write annotated images")


def run(args: argparse.Namespace) -> int:
    paths = [path for given in args.images for path in (list_images(given) if is_folder(given) else [given])]
    steps = Steps(args.json)
    with Detector(args.model, limits=args.limits) as detect:
        steps.finish(images=detect_and_draw(detect, paths, None if args.no_draw else args.output, args.json))
    return 0


def detect_and_draw(detect: Detector, paths: Sequence[Path], folder: Path | None, quiet: bool) -> list[dict[str, Any]]:
    """Run the model on each image, print a table, and write the annotated image. Return the results as plain values.

    Args:
        detect: the fused model.
        paths: paths of the images.
        folder: folder for the annotated images; None to write none.
        quiet: print no tables.

    Raises:
        InputError: an image is unreadable, or an annotated image would overwrite another image.
    """
    names = [drawn_name(path) for path in paths]
    if folder is not None and (twice := {name for name in names if names.count(name) > 1}):
        raise InputError(
            f"found more than one image named {printable(', '.join(sorted(twice)))}; "
            f"they would overwrite each other in {printable(folder)}; use --no-draw or separate runs"
        )
    results = []
    for path in paths:
        image = read_image(path, detect.limits)
        found = detect([image])[0]
        result: dict[str, Any] = {
            "image": str(path),
            "height": image.shape[0],
            "width": image.shape[1],
            "detections": found.to_dicts(),
            "converged": found.converged,
        }
        if folder is not None:
            make_folder(folder)
            target = folder / drawn_name(path)
            if target.exists() and target.samefile(path):
                raise InputError(
                    f"{printable(path)}: would be overwritten by its annotated copy; choose another folder with -o"
                )
            result["annotated"] = str(save_image(target, draw(image, found)))
        results.append(result)
        if not quiet:
            _print_table(result, found)
    return results


def drawn_name(path: Path) -> str:
    """Name of the annotated copy: the name of the image, with .jpg appended if its suffix is not one of an image format."""
    return path.name if path.suffix.lower() in SUFFIXES else f"{path.name}.jpg"


def _print_table(result: dict[str, Any], found: Detections) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    drawn = f" · drawn: {result['annotated']}" if "annotated" in result else ""
    line = f"{result['image']} ({result['width']}x{result['height']}) · {len(found)} detections{drawn}"
    console.print(Text(printable(line)), soft_wrap=True)
    if not len(found):
        return
    turned = found.oriented
    columns = ["cx", "cy", "w", "h", "angle"] if turned else ["x1", "y1", "x2", "y2"]
    boxes = found.oriented_boxes if turned else found.boxes
    if len(found.masks):
        columns.append("mask")
    if found.keypoints.shape[1]:
        columns.append("keypoints")
    table = Table("name", "score", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for i, (_, score, label) in enumerate(found):
        cells = [f"{v:.1f}" for v in boxes[i][:4]] + ([f"{np.degrees(boxes[i][4]):.1f}°"] if turned else [])
        if len(found.masks):
            cells.append(f"{found.masks[i].sum()} px")
        if found.keypoints.shape[1]:
            points = found.keypoints[i]
            seen = (points[:, 2] >= VISIBLE).sum() if points.shape[1] == 3 else len(points)
            cells.append(f"{seen} of {len(points)}")
        table.add_row(Text(printable(found.name(label))), f"{score:.3f}", *cells)
    console.print(table)
