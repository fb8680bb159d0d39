"""`fusenms convert`: fuse a file with suppression inside again for another backend, or cut it back to its head."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusenms.artifacts.report import counted
from fusenms.cli.arguments import add_anchors, add_pixels, pixels_of, rounds_argument
from fusenms.cli.flags import add_fields
from fusenms.cli.printing import ProgressBar, Steps, megabytes
from fusenms.config import PostprocessConfig
from fusenms.conversion import RAW, TARGETS, Conversion, convert, layout_path
from fusenms.events import Fused
from fusenms.fusion.backends import BACKENDS
from fusenms.heads import known_heads
from fusenms.safety.files import check_writable
from fusenms.sources.options import LoadOptions

NAME = "convert"
HELP = "fuse a file that has suppression inside again for another backend, without its weights, and verify the result"
BOOLEANS = ("class_agnostic", "multi_label", "indices", "runtime_thresholds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an .onnx with suppression inside, of fusenms or of others")
    parser.add_argument(
        "--backend",
        choices=list(TARGETS),
        default="ort",
        help="backend of the new file; raw: the network up to its head, with its layout beside it (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: FILE.BACKEND.onnx in the current folder)",
    )
    parser.add_argument(
        "--keep-semantics",
        action="store_true",
        help="take thresholds, rows, multi-label and class-agnostic suppression from a file that others fused, and output names "
        "that are those of a preset; what fusenms has no setting for is said",
    )
    parser.add_argument(
        "--family",
        choices=[head.name for head in known_heads()],
        help="detector family of a file that others fused, if several fit",
    )
    others = parser.add_argument_group("network of a file that others fused")
    add_fields(others, LoadOptions, ["pixels", "stretch"])
    add_pixels(others)
    add_anchors(others)
    add_changes(parser)


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, whose default is what the file has, and that for images."""
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="compare and verify on the images of this folder too"
    )
    post = parser.add_argument_group("settings (default: those of a file of fusenms)")
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    own: dict[str, dict[str, Any]] = dict.fromkeys(PostprocessConfig.__dataclass_fields__, unset)
    own |= {name: unset | {"action": argparse.BooleanOptionalAction} for name in BOOLEANS}
    own["rounds"] = unset | {"type": rounds_argument, "metavar": "auto|N"}
    own["output_preset"] = unset | {"flags": ["--names"]}
    add_fields(post, PostprocessConfig, None, **own)


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    return {name: value for name, value in vars(args).items() if name in PostprocessConfig.__dataclass_fields__}


def run(args: argparse.Namespace) -> int:
    steps = Steps(args.json)
    suffix = f".{RAW}.onnx" if args.backend == RAW else BACKENDS[args.backend].suffix
    output = args.output or Path(_stem(Path(args.file)) + suffix)
    check_writable(output, Path(args.file))
    if args.backend == RAW:
        check_writable(layout_path(output), Path(args.file))
    with ProgressBar("verify") as bar:
        made = convert(
            args.file,
            args.backend,
            keep_semantics=args.keep_semantics,
            family=args.family,
            pixels=pixels_of(args),
            stretch=args.stretch,
            anchors=args.anchors,
            images=args.images,
            limits=args.limits,
            progress=bar.update,
            **changes_of(args),
        )
    show(steps, made)
    made.save(output)
    steps.line("wrote", f"{output} ({megabytes(output.stat().st_size)})")
    if made.model is None:
        stretch = "--stretch" if made.raw.stretch else "--no-stretch"
        steps.line("wrote", str(layout_path(output)))
        pixels = "" if made.semantics is not None else f" --pixels rgb {stretch}"
        steps.line("next", f"python -m fusenms {output} --layout {layout_path(output)}{pixels}")
    else:
        steps.line("next", f"python -m fusenms verify {output} --images DIR")
    steps.finish(output=str(output))
    return 0


def show(steps: Steps, made: Conversion) -> None:
    """Print what was found, what changed, and what was compared."""
    steps.line("read", f"{made.source} · {made.found}")
    if made.rows is not None and made.semantics is not None:
        steps.line("rows", made.rows.summary)
        steps.line("rows", made.rows.verdict)
        for line in made.semantics.others:
            if line not in made.lost:
                steps.line("read", line)
        steps.values |= {"semantics": made.semantics.to_dict(), "rows": asdict(made.rows)}
    for line in made.meaning:
        steps.line("head", line)
    steps.values["meaning"] = list(made.meaning)
    for line in made.lost:
        steps.line("lost", line)
    steps.values["lost"] = list(made.lost)
    for line in made.changes:
        steps.line("changed", line)
    steps.values |= {"source": made.source, "found": made.found, "changes": list(made.changes)}
    steps.values["layout"] = made.layout.to_dict()
    if made.model is None:
        return
    steps.line("fuse", Fused(raw=made.raw, model=made.model).summary)
    steps.values |= {"backend": made.model.backend, "config": made.model.config.to_dict()}
    if made.agreement is not None:
        found = made.agreement
        steps.values["agreement"] = found.to_dict()
        steps.line(
            "rows",
            f"{counted(found.images, 'image')} · {found.before} detections before, {found.after} now, {found.same} the same · "
            f"worst box {found.worst_box:.2g} px, worst score {found.worst_score:.2g}",
        )
    assert made.report is not None
    steps.values["verification"] = made.report.to_dict()
    steps.line("verify", made.report.summary)


def _stem(path: Path) -> str:
    """Name of a file without the suffix of its backend."""
    suffixes = [backend.suffix for backend in BACKENDS.values()]
    return next((path.name.removesuffix(suffix) for suffix in suffixes if path.name.endswith(suffix)), path.stem)
