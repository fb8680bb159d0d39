"""`fusenms eval FILE --coco JSON | --yolo DIR`: how well a detector finds the objects of images, by COCO's metrics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fusenms.cli.bench import check_plot
from fusenms.cli.flags import add_fields, field_helps, fields_of
from fusenms.cli.fuse import printer
from fusenms.cli.printing import ProgressBar, Steps, size_argument
from fusenms.config import PostprocessConfig
from fusenms.errors import ConfigError
from fusenms.evaluation import Evaluation, evaluate
from fusenms.evaluation.models import SETTINGS
from fusenms.evaluation.result import TOLERANCE
from fusenms.heads import known_heads
from fusenms.runtime.opening import AUTO, ONNXRUNTIME, OPENVINO
from fusenms.safety.files import check_writable
from fusenms.safety.text import printable
from fusenms.sources import LoadOptions

NAME = "eval"
HELP = "compute COCO's mAP of a detector on images whose objects are known"
LOADING = ["size", "one_to_many", "pixels", "stretch"]
"""Fields of `LoadOptions` that are flags of this command."""
CHOSEN = ["score_threshold", "iou_threshold", "max_detections", "max_candidates", "class_agnostic", "multi_label"]
"""Fields of `PostprocessConfig` that are flags of this command."""
SHOWN_FAILURES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="weights, which are fused with settings that are right for mAP; or a fused .onnx, with the settings inside",
    )
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--coco", type=Path, metavar="JSON", help="ground truth in COCO's format")
    truth.add_argument(
        "--yolo",
        type=Path,
        metavar="DIR",
        help="ground truth in YOLO's format: a folder that holds images and labels, or one as data/images/val",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: that of the JSON)")
    parser.add_argument(
        "--against-raw",
        nargs="?",
        const=True,
        metavar="WEIGHTS",
        help="also run the raw model with the float64 reference behind it; exit status 1 if a metric differs by more than "
        f"{TOLERANCE:g} (of a fused FILE, name the weights)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw precision over recall, as .png, .svg or .pdf")
    parser.add_argument("--save", type=Path, metavar="JSON", help="write all detections as COCO's results")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images in one run (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="number of threads of a run (default: chosen by ONNX Runtime)")
    parser.add_argument(
        "--runtime",
        choices=[AUTO, ONNXRUNTIME, OPENVINO],
        default=AUTO,
        help="runtime that runs it (default: %(default)s)",
    )
    model = parser.add_argument_group("weights")
    model.add_argument(
        "--family", choices=[head.name for head in known_heads()], help="detector family, if several fit the file"
    )
    add_fields(model, LoadOptions, LOADING, size={"type": size_argument, "metavar": "N|HxW"})
    add_fields(model, PostprocessConfig, CHOSEN, **{name: _changes(name) for name in CHOSEN})


def _changes(name: str) -> dict[str, Any]:
    """Arguments of the flag of a setting: None where it is not given, and help that says the default for mAP."""
    default = SETTINGS.get(name, getattr(PostprocessConfig(), name))
    text = f"{field_helps(PostprocessConfig)[name]} (default: {default})"
    boolean = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {}
    return {"default": None, "help": text, **boolean}


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `LoadOptions` and `PostprocessConfig` whose flags were given."""
    fields = fields_of(args, LoadOptions, LOADING) | fields_of(args, PostprocessConfig, CHOSEN)
    if not args.one_to_many:
        del fields["one_to_many"]
    return {name: value for name, value in fields.items() if value is not None}


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_plot(args.plot)
    if args.save is not None:
        check_writable(args.save, args.coco)
    if args.batch < 1:
        raise ConfigError(f"--batch is {args.batch}; expected a whole number of at least 1")
    steps = Steps(args.json)
    with ProgressBar("eval") as bar:
        found = evaluate(
            args.file,
            coco=args.coco,
            images=args.images,
            yolo=args.yolo,
            family=args.family,
            against=args.against_raw,
            batch_size=args.batch,
            threads=args.threads,
            runtime=args.runtime,
            on_event=printer(steps, bar),
            progress=bar.update,
            limits=args.limits,
            **given_fields(args),
        )
    print_evaluation(found, steps, args.json)
    if args.save is not None:
        steps.line("wrote", str(found.save(args.save)))
    if args.plot is not None:
        from fusenms.evaluation.plot import plot

        plot(found, args.plot)
        steps.line("wrote", str(args.plot))
    steps.finish(**found.to_dict())
    return 0 if found.equals_raw and not found.failed else 1


def print_evaluation(found: Evaluation, steps: Steps, quiet: bool) -> None:
    """Print what was evaluated, the tables, and what limits the result."""
    config = found.config
    steps.line(
        "truth", f"{found.truth} · {found.images} images · {found.objects} objects · classes matched {found.matched}"
    )
    suppressed = f", IoU > {config.iou_threshold:g} suppressed" if found.suppress else ""
    labels = "every class of a box" if config.multi_label else "the best class of a box"
    steps.line(
        "eval", f"score > {config.score_threshold:g}{suppressed}, {labels}, at most {config.max_detections} per image"
    )
    speed = 1000 * found.seconds / found.images
    steps.line("eval", f"{len(found.results)} detections · {speed:.1f} ms per image, without reading it")
    for note in found.notes:
        steps.line("note", note)
    if not quiet:
        _print_tables(found)
    if found.raw_difference is not None:
        raw = ", ".join(f"{kind} {scores.map50_95:.4f}" for kind, scores in found.raw_scores.items())
        verdict = "equal" if found.equals_raw else f"DIFFERS, by more than {TOLERANCE:g}"
        steps.line(
            "raw",
            f"mAP50-95 of raw model and reference: {raw} · largest difference {found.raw_difference:.1e}: {verdict}",
        )
    for _, reason in found.failed[:SHOWN_FAILURES]:
        steps.line("failed", reason)
    if found.failed:
        steps.line(
            "failed",
            f"{len(found.failed)} of {len(found.failed) + found.images} images; the metrics are those of the others",
        )


def _print_tables(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    heads = ("mAP50-95", "mAP50", "mAP75", "small", "medium", "large", "recall")
    table = Table("", *(Column(head, justify="right") for head in heads))
    for kind, scores in found.scores.items():
        table.add_row(kind, *map(_number, scores.metrics.values()))
    console.print(table)
    for kind, scores in found.scores.items():
        rows = [each for each in scores.classes if each.objects]
        columns = (Column(head, justify="right") for head in ("objects", "AP50-95", "AP50", "AP75"))
        table = Table(Column("class", overflow="fold"), *columns, title=kind if len(found.scores) > 1 else None)
        for each in rows:
            table.add_row(
                Text(printable(each.name)), str(each.objects), *map(_number, (each.ap50_95, each.ap50, each.ap75))
            )
        console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
