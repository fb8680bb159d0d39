"""Time the plugin's kernels on a GPU beside their floor and their peers, in one run: the tables of docs/benchmarks-gpu.md.

    python tests/benchmarks/gpu.py [--batch 1 32] [--runs 20] [--tensorrt PYTHON] [--out docs]
    ncu --set full python tests/benchmarks/gpu.py --launch crowded --batch 1

Needs an NVIDIA GPU, cuda-python and NVRTC. Peers are what else is there: PyTorch with torchvision, and a TensorRT with
EfficientNMS_TRT, for which PYTHON is a command that runs a Python with it (any version from 8.5 on).

Results are compared with the float64 reference first. Heads are those of a YOLOv8 of 80 classes at 640 pixels, made up, in
so many copies that none is in the GPU's cache when its turn comes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from driver import Gpu  # noqa: E402
from kernels import OnGpu  # noqa: E402
from raw_heads import LAYOUTS  # noqa: E402

from fusenms import PostprocessConfig  # noqa: E402
from fusenms.artifacts.raw import ImageInput  # noqa: E402
from fusenms.engines.plugin import SELECT_THREADS, SUPPRESS_THREADS, compile_ptx  # noqa: E402
from fusenms.fusion.backends.plugin import INPUTS, settings_of  # noqa: E402
from fusenms.fusion.candidates import Head  # noqa: E402
from fusenms.reference import Rows, candidates, postprocess  # noqa: E402
from fusenms.verification.synthetic_heads import Stage, heads  # noqa: E402

CLASSES, SIZE, CANDIDATES, STRIDES = 80, 640, 8400, (8, 16, 32)
LAYOUT = LAYOUTS["distances"](CLASSES)
CONFIG = PostprocessConfig(max_candidates=4096)
WIDTHS = {"dist": 64, "logits": CLASSES}
STAGE = Stage(LAYOUT, CONFIG, ImageInput("images", SIZE, SIZE, 32), CANDIDATES)
REPEAT = 64  # launches that are timed together
COPY = 256 << 20  # bytes
NOTHING = """extern "C" __global__ void nothing() {}"""
OURS, SELECT, SUPPRESS = "FusedNMS", "· its select", "· its suppress"
LAUNCHES, FLOOR = "two empty kernels", "floor: empty kernels + bytes / bandwidth"
SURVIVORS, WHOLE = "torchvision batched_nms, of what passes, decoded", "PyTorch: threshold, decode, batched_nms"
EFFICIENT = "EfficientNMS_TRT, of decoded boxes and scores"

Arrays = dict[str, np.ndarray]


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Centers ``[N, 2]`` and strides ``[N, 1]`` of the candidates, in pixels."""
    centers, strides = [], []
    for stride in STRIDES:
        ticks = (np.arange(SIZE // stride) + 0.5) * stride
        centers.append(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2))
        strides.append(np.full((len(centers[-1]), 1), stride))
    return np.concatenate(centers), np.concatenate(strides)


GRID = _grid()


def quiet(batch: int) -> Arrays:
    """Some 180 candidates an image that pass, here and there."""
    return heads(STAGE, ("random",) * batch, _shapes(), seed=1)


def scattered(batch: int) -> Arrays:
    """4096 candidates an image that pass, of ten classes, all over it: all rows are found before all of them are looked at."""
    head = heads(STAGE, ("empty",) * batch, _shapes(), seed=1)
    for i, logits in enumerate(head["logits"]):
        rng = np.random.default_rng([2, i])
        rows = rng.choice(CANDIDATES, CONFIG.max_candidates, replace=False)
        logits[rng.integers(10, size=len(rows)), rows] = rng.uniform(-1, 4, len(rows))
    return head


def crowded(batch: int) -> Arrays:
    """4096 candidates an image that pass, of 64 objects, in cells of 80 pixels: each is looked at, and nearly all are suppressed."""
    head = heads(STAGE, ("empty",) * batch, _shapes(), seed=1)
    centers, strides = GRID
    low = centers // 80 * 80
    sides = np.concatenate((centers - low, low + 80 - centers), 1) / strides  # of the cell, in strides
    for i, (logits, terms) in enumerate(zip(head["logits"], head["dist"], strict=True)):
        rng = np.random.default_rng([3, i])
        rows = rng.choice(CANDIDATES, CONFIG.max_candidates, replace=False)
        cell = (low[rows] // 80) @ [1, 8]
        label = np.where(rng.random(len(rows)) < 0.03, rng.integers(10, size=len(rows)), cell % 10).astype(int)
        logits[label, rows] = rng.uniform(-1, 4, len(rows))
        wanted = sides[rows] * rng.uniform(0.95, 1.05, (len(rows), 4))
        shares = np.clip(1 - np.abs(wanted[..., None] - np.arange(16)), 1e-9, None)  # of the two bins beside it
        terms[:, rows] = np.log(shares).reshape(len(rows), -1).T
    return head


SYNTHETIC_HEADS: dict[str, Callable[[int], Arrays]] = {"quiet": quiet, "scattered": scattered, "crowded": crowded}


def _shapes() -> dict[str, tuple[int, ...]]:
    return {name: (width, CANDIDATES) for name, width in WIDTHS.items()}


@dataclass(frozen=True)
class Result:
    """Times of one case at one batch size: name to microseconds, one number a run."""

    case: str
    batch: int
    runs: dict[str, list[float]]

    def median(self, name: str) -> float:
        return float(np.median(self.runs[name]))


def check(outputs: Arrays, head: Arrays) -> float:
    """Compare with the reference, and return the worst box error in pixels; AssertionError where they differ."""
    worst = 0.0
    for i, (count,) in enumerate(outputs["num_detections"]):
        boxes, scores = (outputs[name][i, :count].astype(np.float64) for name in ("boxes", "scores"))
        found = postprocess(
            candidates(head, i, LAYOUT, (SIZE, SIZE)), CONFIG, Rows(boxes, scores, outputs["labels"][i, :count])
        )
        np.testing.assert_array_equal(outputs["indices"][i, :count], found.indices)
        np.testing.assert_array_equal(outputs["labels"][i, :count], found.rows.labels)
        worst = max(worst, np.abs(boxes - found.rows.boxes).max(initial=0.0))
    assert worst < 2e-3, f"boxes are off by {worst} px"
    return worst


def launch(gpu: Gpu, case: str, batch: int, half: bool) -> None:
    """The kernels of one case, three times, for a profiler."""
    kernels = OnGpu(gpu, *_node(SYNTHETIC_HEADS[case](batch), half), (SIZE, SIZE))
    for _ in range(3):
        kernels.launch()
    gpu.synchronize()


def _node(head: Arrays, half: bool) -> tuple[Any, Arrays]:
    """Settings and inputs of a node that reads the head."""
    if half:
        head = {name: values.astype(np.float16) for name, values in head.items()}
    given = dict.fromkeys(INPUTS, head["logits"]) | {"boxes": head["dist"]}
    return settings_of(Head(LAYOUT, STAGE.image, WIDTHS, None), CONFIG), given


def bandwidth(gpu: Gpu, runs: int) -> float:
    """Bytes that a copy on the GPU reads and writes per microsecond."""
    there, here = gpu.allocate(COPY), gpu.allocate(COPY)
    copy = gpu.graph([lambda: gpu.call("cuMemcpyDtoDAsync", there, here, COPY, gpu.stream)] * 4)
    copy()
    return 4 * 2 * COPY / (1e3 * float(np.median([gpu.milliseconds(copy) for _ in range(runs)])))


def time_kernels(
    gpu: Gpu, case: str, batch: int, half: bool, runs: int, speed: float
) -> tuple[Result, Arrays, float, int]:
    """Our kernels and their floor, in turn; the head, the worst box error, and how many rows the first image has."""
    settings, given = _node(SYNTHETIC_HEADS[case](batch), half)
    head = {"logits": given["classes"], "dist": given["boxes"]}
    first = OnGpu(gpu, settings, given, (SIZE, SIZE))
    first.launch()
    outputs = first.outputs()
    error = check(outputs, head)
    bytes_read = sum(values.nbytes for values in head.values())
    copies = max(1, -(-2 * gpu.attribute("L2_CACHE_SIZE") // bytes_read))
    sets = [first, *(OnGpu(gpu, settings, given, (SIZE, SIZE), like=first) for _ in range(copies - 1))]
    for other in sets:
        other.launch()  # the keys that `suppress` alone is timed with
    (empty,) = gpu.kernels(compile_ptx(NOTHING), "nothing")

    def launch_nothing() -> None:
        gpu.launch(empty, (first.tiles, batch), SELECT_THREADS, [])
        gpu.launch(empty, (batch, 1), SUPPRESS_THREADS, [])

    turns = [sets[i % len(sets)] for i in range(REPEAT)]
    graphs = {
        OURS: gpu.graph([one.launch for one in turns]),
        SELECT: gpu.graph([one.select for one in turns]),
        SUPPRESS: gpu.graph([one.suppress for one in turns]),
        LAUNCHES: gpu.graph([launch_nothing] * REPEAT),
    }
    times = in_turn(
        {name: lambda graph=graph: 1e3 * gpu.milliseconds(graph) / REPEAT for name, graph in graphs.items()}, runs
    )
    moved = head["logits"].nbytes + sum(values.nbytes for values in outputs.values())
    times[FLOOR] = [launches + moved / speed for launches in times[LAUNCHES]]
    return Result(case, batch, times), head, error, int(outputs["num_detections"][0, 0])


def in_turn(timers: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Each in turn, twice, so often; the second time counts."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(runs):
        for name, timer in timers.items():
            timer()
            times[name].append(timer())
    return times


def time_torch(head: Arrays, runs: int) -> dict[str, list[float]]:
    """Suppression by torchvision, alone and with all that is before it. Its loop over images waits for the GPU, which counts."""
    import torch
    from torchvision.ops import batched_nms

    logits, terms = (torch.from_numpy(head[name]).cuda() for name in ("logits", "dist"))
    middle, stride = (torch.from_numpy(values.astype(np.float32)).cuda() for values in GRID)
    bins = torch.arange(16, device="cuda", dtype=torch.float32)

    def passing() -> list[tuple[Any, Any, Any]]:
        scores, labels = logits.sigmoid().max(1)
        found = []
        for i, image in enumerate(scores):
            rows = (image > CONFIG.score_threshold).nonzero()[:, 0]
            distances = (terms[i][:, rows].view(4, 16, -1).float().softmax(1) * bins[:, None]).sum(1).T
            distances = distances * stride[rows]
            low, high = middle[rows] - distances[:, :2], middle[rows] + distances[:, 2:]
            found.append((torch.cat((low, high), 1), image[rows].float(), labels[i, rows]))
        return found

    def suppress(found: list[tuple[Any, Any, Any]]) -> Any:
        return [batched_nms(*one, CONFIG.iou_threshold)[: CONFIG.max_detections] for one in found]

    decoded = passing()

    def timer(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(8):
            work()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / 8

    return in_turn(
        {SURVIVORS: lambda: timer(lambda: suppress(decoded)), WHOLE: lambda: timer(lambda: suppress(passing()))}, runs
    )


def time_efficient(python: str, head: Arrays, runs: int, work: Path) -> tuple[list[float], dict[str, Any]]:
    """TensorRT's plugin, of decoded boxes and scores, in an engine of nothing else; its times, and all that `engine_times.py` says."""
    batch = len(head["logits"])
    found = [candidates(head, i, LAYOUT, (SIZE, SIZE)) for i in range(batch)]
    given = {
        "boxes": np.stack([one.boxes for one in found]).astype(np.float32),
        "scores": np.stack([one.scores for one in found]).astype(np.float32),
    }
    np.savez(work / "given.npz", **given)
    rows = CONFIG.max_detections
    shapes = {
        "num_detections": [batch, 1],
        "boxes_out": [batch, rows, 4],
        "scores_out": [batch, rows],
        "labels": [batch, rows],
    }
    node = helper.make_node(
        "EfficientNMS_TRT", list(given), list(shapes), plugin_version="1", background_class=-1, box_coding=0, score_activation=0,
        score_threshold=CONFIG.score_threshold, iou_threshold=CONFIG.iou_threshold, max_output_boxes=rows,
    )  # fmt: skip
    kinds = (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32)
    graph = helper.make_graph(
        [node], "tail",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name, values in given.items()],
        [helper.make_tensor_value_info(name, kind, shape) for (name, shape), kind in zip(shapes.items(), kinds, strict=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, work / "tail.onnx")
    command = [
        *shlex.split(python),
        str(HERE / "engine_times.py"),
        str(work / "tail.onnx"),
        "--inputs",
        str(work / "given.npz"),
    ]
    done = subprocess.run([*command, "--runs", str(runs), "--json", "--no-libraries"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["files"]["tail.onnx"]["microseconds"], answer


def markdown(results: Sequence[Result], lines: Sequence[str], notes: Sequence[str]) -> str:
    """The page."""
    columns = [f"{r.case}, batch {r.batch}" for r in results]
    text = [
        "# Benchmarks on a GPU", "",
        "The plugin's kernels: from the class logits and box terms of a YOLOv8 head (8400 candidates, 80 classes, 640 pixels) to the "
        "detections. Made by `make bench-gpu`; medians of runs in turn, microseconds, and in brackets the ratio to FusedNMS. The floor is "
        "two empty kernels, launched the same way, and the time that a copy takes for the bytes of the class logits and the outputs.", "",
        *(f"- {line}" for line in lines), "",
        "| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns),
    ]  # fmt: skip
    for name in dict.fromkeys(name for r in results for name in r.runs):
        cells = [
            f"{r.median(name):.1f} ({r.median(name) / r.median(OURS):.2f})" if name in r.runs else "" for r in results
        ]
        text.append(f"| {'**' + name + '**' if name == OURS else name} | " + " | ".join(cells) + " |")
    text += ["", *(f"- {note}" for note in notes), ""] if notes else [""]
    return "\n".join(text)


def ratios(results: Sequence[Result]) -> list[str]:
    """What the project aims at, as measured."""
    by = {(r.case, r.batch): r for r in results}
    found = [
        f"{r.case}, batch {r.batch}: FusedNMS takes {r.median(OURS) / r.median(FLOOR):.2f} times its floor"
        for r in results
    ]
    for (case, batch), r in by.items():
        if case != "quiet":
            found.append(
                f"batch {batch}: {case} takes {r.median(OURS) / by['quiet', batch].median(OURS):.2f} times as long as quiet"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--half", action="store_true", help="a head in float16")
    parser.add_argument(
        "--tensorrt", metavar="PYTHON", help="a command that runs a Python with a TensorRT that has EfficientNMS_TRT"
    )
    parser.add_argument("--out", type=Path, help="folder for benchmarks-gpu.md")
    parser.add_argument(
        "--launch", choices=SYNTHETIC_HEADS, help="launch the kernels of one case and nothing else, for a profiler"
    )
    args = parser.parse_args()
    try:
        gpu = Gpu()
    except (AssertionError, ImportError, RuntimeError) as error:
        raise SystemExit(f"these times need an NVIDIA GPU, its driver and cuda-python: {error}") from error
    if args.launch:
        launch(gpu, args.launch, args.batch[0], args.half)
        return
    speed = bandwidth(gpu, args.runs)
    kind = "float16" if args.half else "float32"
    lines = [f"{gpu.name()}, a head in {kind}; a copy moves {speed / 1e3:.0f} GB/s", f"Python {sys.version.split()[0]}"]
    results, notes = [], []
    for batch in args.batch:
        for case in SYNTHETIC_HEADS:
            result, head, error, rows = time_kernels(gpu, case, batch, args.half, args.runs, speed)
            lines.append(
                f"{case}, batch {batch}: equal to the reference, worst box {error:.1e} px; {rows} rows in the first image"
            )
            try:
                result.runs.update(time_torch(head, args.runs))
            except (ImportError, RuntimeError, AssertionError) as failure:  # the last: PyTorch without CUDA
                notes.append(f"{SURVIVORS}: does not run here ({str(failure).splitlines()[0]})")
            if args.tensorrt:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        result.runs[EFFICIENT], answer = time_efficient(args.tensorrt, head, args.runs, Path(folder))
                        there = int(answer["files"]["tail.onnx"]["outputs"]["num_detections"][0][0])
                        lines.append(
                            f"{case}, batch {batch}: EfficientNMS_TRT of {answer['library']} finds {there} rows"
                        )
                    except RuntimeError as failure:
                        notes.append(f"{EFFICIENT}: does not run here ({failure})")
            results.append(result)
            gpu.close()
            print(
                f"{case}, batch {batch}: " + ", ".join(f"{name} {result.median(name):.1f}" for name in result.runs),
                flush=True,
            )
    page = markdown(results, [*lines, *ratios(results)], list(dict.fromkeys(notes)))
    print(page)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmarks-gpu.md").write_text(page)


if __name__ == "__main__":
    main()
