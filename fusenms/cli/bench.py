"""`fusenms bench FILE...`: measures the run times of models."""

from __future__ import annotations

import argparse
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fusenms.benchmark import TAIL, Timing, contestants, default_shape, measure
from fusenms.cli.printing import ProgressBar, Steps
from fusenms.errors import BackendUnavailableError, InputError
from fusenms.heads.probe import probe_image
from fusenms.runtime.contestants import RUNTIMES, installed_runtimes, more_contestants
from fusenms.runtime.opening import ONNXRUNTIME
from fusenms.safety.files import check_writable, write_atomically
from fusenms.safety.text import printable

NAME = "bench"
HELP = "measure run times of raw and fused models by batch size: the model, its tail, whole calls, in each runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="raw or fused .onnx files; ratios are relative to the first"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="batch sizes (default: 1 8)")
    parser.add_argument(
        "--runs", type=int, default=25, help="number of rounds; each runs every file once (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="number of threads of a run (default: chosen by ONNX Runtime)")
    parser.add_argument("--image", type=Path, help="image to run on (default: a synthetic one)")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        metavar="NAME",
        help="runtimes to time: onnxruntime, which is always timed, and openvino (default: those that are installed)",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the table, as .png, .svg or .pdf (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_plot(args.plot)
    steps, shapes = Steps(args.json), {default_shape(path) for path in args.files}
    if len(shapes) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(shapes))
        raise InputError(f"the files take images of different sizes ({sizes}); expected files of one size")
    (shape,) = shapes
    images = probe_image(*shape)
    image = np.ascontiguousarray((images[0] * 255).astype(np.uint8).transpose(1, 2, 0))
    if args.image is not None:
        from fusenms.runtime.images import read_image
        from fusenms.runtime.placement import letterbox, to_tensor

        image = read_image(args.image, args.limits)
        images = to_tensor([letterbox(image, *shape)[0]])
    entries = contestants(args.files, args.threads)
    runtimes = args.runtimes or installed_runtimes()
    entries += more_contestants(args.files, image, dict.fromkeys((ONNXRUNTIME, *runtimes)), args.threads)
    with ProgressBar("bench") as bar:
        timings = measure(
            entries, images, batches=args.batch, runs=args.runs, memory=not args.no_memory, progress=bar.update
        )
    if all(timing.note for timing in timings):
        raise InputError(f"none of the files runs at batch {', '.join(map(str, args.batch))}: {timings[0].note}")
    if not args.json:
        print_table(timings, args.runs)
    if args.plot is not None:
        plot(timings, args.plot, {t.name for t in timings if t.part == TAIL})
    steps.finish(timings=[timing.to_dict() for timing in timings], runs=args.runs)
    return 0


def print_table(timings: list[Timing], runs: int) -> None:
    """Print the table: median, middle half, ratio to the first file, peak memory."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    name = Column("model", overflow="fold")
    caption = f"medians of {runs} interleaved runs"
    table = Table("batch", name, "part", "ms", "middle half", "ratio", "peak MB", caption=caption)
    for t in timings:
        if t.note:
            note = Text(f"does not run: {printable(t.note)}")
            table.add_row(str(t.batch), Text(printable(t.name)), t.part, "-", note, "-", "-")
            continue
        peak = "-" if t.memory_mb is None else f"{t.memory_mb:.1f}" if t.memory_mb >= 0.5 else "< 0.5"
        table.add_row(
            str(t.batch),
            Text(printable(t.name)),
            t.part,
            f"{t.milliseconds:.2f}",
            f"{t.low:.2f} to {t.high:.2f}",
            f"{t.ratio:.3f}",
            peak,
        )
    Console(highlight=False).print(table)


def check_plot(path: Path) -> None:
    """Check that `plot` can write its file, before anything is measured.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        InputError: the format is unknown.
        SourceError: the path cannot be written.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{printable(path)}: unknown format {path.suffix!r}; expected .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise BackendUnavailableError("drawing needs matplotlib; install it with: pip install 'fusenms[bench]'")
    check_writable(path)


def plot(timings: list[Timing], path: Path, highlight: set[str]) -> None:
    """Draw a bar for each model and batch size, with the middle half of its runs.

    Args:
        timings: rows of the table.
        path: file to write.
        highlight: names of the models whose bars have another color.
    """
    from matplotlib.figure import Figure

    shown = [t for t in timings if not t.note]
    parts = {t.part for t in shown}
    names = [
        printable(t.name).replace("$", r"\$") for t in shown
    ]  # matplotlib parses text between dollars as a formula
    labels = [name if len(parts) == 1 else f"{name} ({t.part})" for name, t in zip(names, shown, strict=True)]
    places = {label: -i for i, label in enumerate(dict.fromkeys(labels))}  # the first one on top
    batches = sorted({t.batch for t in shown}) or [1]
    figure = Figure(figsize=(2.6 * len(batches) + 3, 1.2 + 0.36 * max(1, len(places))), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False, sharey=True)[0], batches, strict=True):
        rows = [(places[label], t) for label, t in zip(labels, shown, strict=True) if t.batch == batch]
        spread = [[t.milliseconds - t.low for _, t in rows], [t.high - t.milliseconds for _, t in rows]]
        colors = ["#2a9d5c" if t.name in highlight else "#8a94a6" for _, t in rows]
        axes.barh([place for place, _ in rows], [t.milliseconds for _, t in rows], xerr=spread, color=colors)
        axes.set(xlabel="ms, median", title=f"batch {batch}")
        axes.set_yticks(list(places.values()), list(places))
        axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format=path.suffix[1:])
    write_atomically(path, drawn.getvalue())
