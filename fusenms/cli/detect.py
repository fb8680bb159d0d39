"""`fusenms detect FUSED IMAGE...`: detects objects in images, folders, videos and cameras, prints them and draws them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fusenms.cli import detect_ray
from fusenms.cli.inputs import Input, inputs_of
from fusenms.cli.printing import ProgressBar, Steps
from fusenms.errors import ConfigError, InputError, SourceError
from fusenms.runtime import Detections, Detector
from fusenms.runtime.drawing import VISIBLE, draw, save_image
from fusenms.runtime.images import read_image
from fusenms.runtime.video import Frame, Video, VideoFile
from fusenms.safety.files import check_writable, make_folder, write_atomically
from fusenms.safety.text import printable

NAME = "detect"
HELP = "run a fused model on images and videos, print a table of the detections, and write annotated copies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="FUSED",
        help="a fused .onnx that runs in ONNX Runtime (backend ort or portable, or one without a plugin)",
    )
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="images, videos, folders of them, quoted patterns such as 'photos/**/*.jpg', or the number of a camera",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="folder for annotated images and videos (default: detections); with --ray, for Parquet files",
    )
    parser.add_argument("--no-draw", action="store_true", help="do not write annotated images and videos")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a video, every N-th frame only (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="most images in one run; 1 for cameras (default: %(default)s)"
    )
    parser.add_argument(
        "--jsonl",
        metavar="FILE|-",
        help="write a line of JSON for each image as soon as it is done; - is standard output",
    )
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="FILE",
        help="write all detections as COCO's results at the end; category_id is the class number",
    )
    detect_ray.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("every", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; expected a whole number of at least 1")
    detect_ray.check(args)
    if args.ray is not None:
        return detect_ray.run(args, args.output)
    if args.json and args.jsonl == "-":
        raise ConfigError("found --json and --jsonl -, which both write to standard output; leave one of them out")
    inputs = inputs_of(args.images)
    folder = None if args.no_draw else Path(args.output or "detections")
    check_places(inputs, folder, [Path(each) for each in (args.jsonl, args.coco) if each not in (None, "-")])
    steps = Steps(args.json)
    with contextlib.ExitStack() as stack:
        detect = stack.enter_context(Detector(args.model, batch_size=args.batch, limits=args.limits))
        lines = _open_lines(args.jsonl, stack)
        quiet = args.json or lines is not None
        out = Output(folder, quiet, keep=args.json, lines=lines, coco=None if args.coco is None else [])
        bar = stack.enter_context(ProgressBar("detect"))
        process(detect, inputs, out, args.every, args.batch, bar)
    if args.coco is not None:
        write_atomically(args.coco, json.dumps(out.coco).encode())
        if args.jsonl != "-":
            steps.line("wrote", str(args.coco))
    steps.finish(images=out.results, failed=[{"image": name, "message": message} for name, message in out.failed])
    return out.report()


def _open_lines(path: str | None, stack: contextlib.ExitStack) -> TextIO | None:
    """The stream for lines of JSON."""
    if path is None or path == "-":
        return None if path is None else sys.stdout
    try:
        return stack.enter_context(open(path, "w", encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{printable(path)}: cannot be written ({error})") from error


def check_places(inputs: Sequence[Input], folder: Path | None, files: Sequence[Path]) -> None:
    """Check that nothing that is written replaces an input or another result.

    Raises:
        InputError: two annotated copies have one name, or one would replace its source.
        SourceError: a file cannot be written, or is an input.
    """
    sources = [each.source for each in inputs if isinstance(each.source, Path)]
    for file in files:
        check_writable(file)
        for source in sources:
            if _same(file, source):
                check_writable(file, source)
    if folder is None:
        return
    names = [each.drawn for each in inputs]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        shown = printable(", ".join(twice[:5])) + (", …" if len(twice) > 5 else "")
        raise InputError(
            f"found more than one image named {shown}; they would overwrite each other in {printable(folder)}; "
            "use --no-draw or separate runs"
        )
    for each in inputs:
        if isinstance(each.source, Path) and _same(folder / each.drawn, each.source):
            raise InputError(
                f"{printable(each.source)}: would be overwritten by its annotated copy; choose another folder with -o"
            )


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file. False for an invalid path, which is said when it is read."""
    try:
        return one.exists() and other.exists() and one.samefile(other)
    except (OSError, ValueError):
        return False


@dataclass
class Output:
    """Where results go.

    Attributes:
        folder: for annotated images and videos; None: none are written.
        quiet: print no tables.
        keep: collect the results of all images, for ``--json``.
        lines: stream for lines of JSON; None: none.
        coco: collected results in COCO's format; None: none.
        results, failed, done: results so far, names and messages of what failed, number of images done.
    """

    folder: Path | None
    quiet: bool
    keep: bool = True
    lines: TextIO | None = None
    coco: list[dict[str, Any]] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    done: int = 0

    def put(self, result: dict[str, Any], found: Detections, key: int | str) -> None:
        """Take the results of one image."""
        self.done += 1
        if self.keep:
            self.results.append(result)
        self._line(result)
        if self.coco is not None:
            self.coco += [row | {"image_id": key} for row in found.to_coco(0)]

    def fail(self, name: str, error: InputError) -> None:
        """Take the error of an image or a video."""
        self.failed.append((name, str(error)))
        self._line({"image": name, "error": str(error)})

    def _line(self, values: dict[str, Any]) -> None:
        if self.lines is not None:
            try:
                self.lines.write(json.dumps(values) + "\n")
                self.lines.flush()
            except OSError as error:
                raise SourceError(f"the lines of JSON cannot be written ({error.strerror or error})") from error

    def report(self) -> int:
        """Print what failed; return the exit status."""
        if len(self.failed) + self.done > 1:
            for _, message in self.failed:
                print(f"fusenms: {printable(message)}", file=sys.stderr)
            if self.failed:
                print(f"fusenms: {len(self.failed)} failed, {self.done} done", file=sys.stderr)
        return 1 if self.failed else 0


def process(detect: Detector, inputs: Sequence[Input], out: Output, every: int, batch: int, bar: ProgressBar) -> None:
    """Run the model on every input. What cannot be read is taken down, and the rest goes on.

    Raises:
        InputError: there is one input, and it cannot be read.
        FusenmsError: the model fails, or a result cannot be written.
    """
    images: list[Path] = []
    for each in inputs:
        if not each.is_video and isinstance(each.source, Path):
            images.append(each.source)
            continue
        _images(detect, images, out, batch, bar, len(inputs))
        images = []
        _video(detect, each, out, every, batch, bar, len(inputs))
    _images(detect, images, out, batch, bar, len(inputs))


def _images(detect: Detector, paths: Sequence[Path], out: Output, batch: int, bar: ProgressBar, total: int) -> None:
    for path, found in zip(paths, detect.stream(paths, batch_size=batch), strict=True):
        if isinstance(found, InputError):
            if total == 1:
                raise found
            out.fail(str(path), found)
            continue
        result = _result(str(path), found)
        if out.folder is not None:
            make_folder(out.folder)
            target = out.folder / Input(path, False).drawn
            result["annotated"] = str(save_image(target, draw(read_image(path, detect.limits), found)))
        out.put(result, found, int(path.stem) if path.stem.isdecimal() else path.stem)
        if out.quiet:
            bar.update("images", out.done + len(out.failed), total)
        else:
            _print_table(result, found)


def _video(detect: Detector, source: Input, out: Output, every: int, batch: int, bar: ProgressBar, total: int) -> None:
    camera = isinstance(source.source, int)
    try:
        video = Video(source.source, detect.limits)
    except InputError as error:
        if total == 1:
            raise
        out.fail(source.name, error)
        return
    if out.folder is not None:
        make_folder(out.folder)
    target = None if out.folder is None else VideoFile(out.folder / source.drawn, max(video.fps / every, 1.0))
    wanted, count, objects = -(-video.count // every), 0, 0
    frames: deque[Frame] = deque()
    errors: list[InputError] = []

    def images() -> Iterator[np.ndarray]:
        try:
            for frame in video.frames(every):
                frames.append(frame)
                yield frame.image
        except InputError as error:  # after the frames that it gave
            errors.append(error)

    try:
        for found in detect.stream(images(), batch_size=1 if camera else batch):
            frame = frames.popleft()
            if isinstance(found, InputError):
                errors.append(found)
                continue
            result = _result(source.name, found) | {"frame": frame.number, "seconds": frame.seconds}
            if target is not None:
                target.write(draw(frame.image, found))
            out.put(result, found, f"{Path(source.name).stem}:{frame.number}")
            count, objects = count + 1, objects + len(found)
            bar.update(printable(source.name), count, max(wanted, count))
    finally:
        bar.close()
        video.close()
        if target is not None:
            target.close(keep=count > 0)
    if errors:
        out.fail(source.name, errors[0])
    if not out.quiet:
        drawn = f" · drawn: {target.path}" if target is not None and count else ""
        print(printable(f"{source.name} · {count} frames · {objects} detections{drawn}"), flush=True)


def _result(name: str, found: Detections) -> dict[str, Any]:
    place = found.masks.place
    return {
        "image": name,
        "height": place.height,
        "width": place.width,
        "detections": found.to_dicts(),
        "converged": found.converged,
    }


def detect_and_draw(detect: Detector, paths: Sequence[Path], folder: Path | None, quiet: bool) -> list[dict[str, Any]]:
    """Run the model on each image, print a table, and write the annotated image. Return the results as plain values.

    Args:
        detect: the fused model.
        paths: paths of the images.
        folder: folder for the annotated images; None to write none.
        quiet: print no tables.

    Raises:
        InputError: an annotated image would overwrite another image.
    """
    inputs, out = [Input(path, False) for path in paths], Output(folder, quiet)
    check_places(inputs, folder, [])
    with ProgressBar("detect") as bar:
        process(detect, inputs, out, 1, 1, bar)
    return out.results


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
