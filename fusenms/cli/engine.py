"""`fusenms engine FILE`: builds an engine from an ONNX file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fusenms.cli.printing import ProgressBar, Steps, megabytes
from fusenms.contract import KEY_BACKEND
from fusenms.engines import BUILDERS, TENSORRT, EngineSettings, build_engine
from fusenms.engines.base import check_places
from fusenms.engines.trt_check import check_trt_graph
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.safety.files import check_writable

NAME = "engine"
SUFFIXES = {"rtx": ".rtx", "trt": ".engine"}
HELP = "build an engine from a fused file (or from any .onnx), with a sidecar that describes it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="an .onnx file; for builder rtx, fused with --backend portable"
    )
    parser.add_argument(
        "--builder",
        choices=list(BUILDERS),
        help="rtx: TensorRT-RTX, which needs no GPU; trt: TensorRT, for the GPU of this machine (default: trt for files fused with "
        "--backend trt or plugin, else rtx)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: NAME.rtx or NAME.engine in the current folder)",
    )
    parser.add_argument(
        "--batch",
        type=three,
        metavar="N|MIN,OPT,MAX",
        help="minimum, optimum and maximum batch size (default: 1,8,32 if the batch of the file is dynamic)",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=three,
            metavar="N|MIN,OPT,MAX",
            help=f"input {side} in pixels, if it is dynamic in the file (default: the {side} in its metadata)",
        )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="M.N",
        help="GPUs to build for, such as 8.6 12.0 (default: chosen by the builder)",
    )
    parser.add_argument("--workspace", type=int, metavar="MIB", help="maximum memory of a layer while it runs")
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="file of measured times, read if it exists and written after the build",
    )
    parser.add_argument("--version-compatible", action="store_true", help="make the engine run with later versions too")
    parser.add_argument(
        "--hardware-compatible", action="store_true", help="make the engine run on later GPUs too (Ampere and newer)"
    )
    parser.add_argument(
        "--plugin-library", type=Path, metavar="FILE",
        help="library with the plugin FusedNMS (make plugin), for TensorRT 8.5 to 10.8; later versions include it in the engine",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="build nothing; check that the parser of TensorRT-RTX, which is the parser of TensorRT without plugins, accepts the file, "
        "and compare the plugin node of a trt file with its published interface",
    )  # fmt: skip


def three(text: str) -> tuple[int, int, int]:
    """Parse ``8`` or ``1,8,32``."""
    sizes = [int(word) for word in text.split(",") if word.strip().isdigit()]
    if len(sizes) not in (1, 3) or len(sizes) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected one size (8) or MIN,OPT,MAX (1,8,32)")
    return (sizes[0], sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])


def run(args: argparse.Namespace) -> int:
    start, steps = time.monotonic(), Steps(args.json)
    if args.check:
        checked = check_trt_graph(str(args.file))
        steps.line("check", checked.summary)
        steps.finish(file=str(args.file), parser=checked.parser, nodes=checked.nodes, plugin=checked.plugin)
        return 0
    settings = EngineSettings(
        batch=args.batch, height=args.height, width=args.width, compute_capabilities=tuple(args.compute_capability),
        workspace=args.workspace, timing_cache=args.timing_cache, version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible, plugin_library=args.plugin_library,
    )  # fmt: skip
    if args.timing_cache is not None:
        check_writable(args.timing_cache, args.file)
    backend = read_metadata(read_onnx(args.file)).get(KEY_BACKEND)
    builder = args.builder or ("trt" if backend in TENSORRT else "rtx")
    output = args.output or engine_path(args.file, builder)
    check_places(output, args.file)
    steps.line("read", f"{args.file.name} · {f'fused, backend {backend}' if backend else 'not fused by fusenms'}")
    written = build(args.file, builder, settings, output, steps)
    steps.values["seconds"] = round(time.monotonic() - start, 3)
    steps.line(
        "wrote",
        f"{', '.join(map(str, written))} ({megabytes(output.stat().st_size)}) in {time.monotonic() - start:.1f} s",
    )
    steps.finish()
    return 0


def engine_path(file: Path, builder: str) -> Path:
    """The default path of the engine of a file, in the current folder."""
    return Path(file.name.removesuffix(".onnx").removesuffix(".portable") + SUFFIXES[builder])


def build(file: Path, builder_name: str, settings: EngineSettings, output: Path, steps: Steps) -> list[Path]:
    """Build an engine and write it with its sidecar. Print a line for each step. Return the paths of the files."""
    with ProgressBar("engine") as bar:
        engine = build_engine(file, builder=builder_name, settings=settings, progress=bar.update)
    builder, inputs = engine.info["builder"], engine.info["inputs"]
    targets = builder["compute_capabilities"]
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    steps.line(
        "engine", f"{builder['name']} {builder['version']} · compute capability {targets} · {builder['layers']} layers"
    )
    for name, shapes in inputs.items():
        steps.line("input", f"{name} {' / '.join(str(shapes[key]) for key in ('min', 'opt', 'max'))}")
    run_on = (
        "opened on this machine's GPU, layers listed"
        if engine.layers
        else "not opened: no suitable GPU in this machine"
    )
    steps.line("inspect", run_on)
    steps.values |= {"output": str(output), "opened": engine.layers is not None, **engine.info}
    return engine.save(output)
