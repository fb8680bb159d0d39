"""Time fusenms beside its peers, in one run, on one checkpoint: the table and the plot of docs/benchmarks.md.

    python tests/benchmarks/run.py CHECKPOINT.pt [--image FILE] [--calibrate DIR] [--runs 25] [--batch 1 8 16] [--out docs]

The raw model is the checkpoint with its usual decode in the graph: the output ``[B, 4 + C, N]`` that exporters write.

No thread pool spins: sessions that take turns on the same cores would disturb each other, and a tail of 1 ms would read as 7. Files are
also timed alone, each in a process of its own with ONNX Runtime's default settings (`alone.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch

import peers
import torch
from alone import alone
from torch import Tensor, nn

from fusenms import fuse
from fusenms.artifacts.fused import FusedModel
from fusenms.benchmark import TAIL, WHOLE, Contestant, Timing, measure, peak_memory
from fusenms.cli.bench import plot, print_table
from fusenms.errors import first_line
from fusenms.graph.model import cut_before, with_only_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import candidates
from fusenms.runtime.openvino import OpenVinoRunner
from fusenms.sources.checkpoint import Checkpoint, load_checkpoint
from fusenms.sources.torch_modules.layers import AnchorFreeDetect

RAW, FUSED, CUT = "raw model", "fusenms (ort)", "cut before the decode (floor)"
INT8, SLIM = "fusenms (ort, int8)", "fusenms (ort), written by onnxslim"
ULTRALYTICS = "Ultralytics nms=True"
CROWD, FULL = 1500, 3840
DECODE = "with the decode"
OPENVINO, ALONE = "whole model in OpenVINO", "alone"


class Decode(nn.Module):
    """The decode alone."""

    def __init__(self, whole: Decoded) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, boxes: Tensor, logits: Tensor) -> Tensor:
        return self.whole.decoded(boxes, logits)


class Decoded(nn.Module):
    """The checkpoint with its decode: ``[B, 4 + C, N]``."""

    def __init__(self, checkpoint: Checkpoint, size: int) -> None:
        super().__init__()
        if not isinstance(checkpoint.head, AnchorFreeDetect) or checkpoint.head.reg_max < 2:
            raise SystemExit(
                "expected a checkpoint with YOLOv8's head (YOLOv8, YOLOv9, YOLO11, YOLO12): the peers read no other"
            )
        self.network, self.bins = checkpoint.module, checkpoint.head.reg_max
        centers, strides = [], []
        for stride in checkpoint.strides:
            ticks = torch.arange(size // stride) + 0.5
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            centers.append(torch.stack((x, y)).flatten(1))
            strides.append(torch.full((1, ticks.numel() ** 2), float(stride)))
        self.centers, self.strides = torch.cat(centers, 1), torch.cat(strides, 1)
        self.expect = nn.Conv2d(self.bins, 1, 1, bias=False)  # as Ultralytics writes the mean over the bins
        self.expect.weight.data = torch.arange(self.bins, dtype=torch.float32).view(1, self.bins, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoded(*self.network(images))

    def decoded(self, boxes: Tensor, logits: Tensor) -> Tensor:
        """Head tensors ``[B, 4 * bins, N]`` and ``[B, C, N]`` to ``[B, 4 + C, N]``."""
        spread = boxes.unflatten(1, (4, self.bins)).transpose(1, 2).softmax(1)
        distance = self.expect(spread).squeeze(1)
        low, high = self.centers - distance[:, :2], self.centers + distance[:, 2:]
        return torch.cat((torch.cat(((low + high) / 2, high - low), 1) * self.strides, logits.sigmoid()), 1)


def raw_model(checkpoint: Checkpoint, size: int, path: Path) -> onnx.ModelProto:
    axes = {"images": {0: "batch"}, "output0": {0: "batch"}}
    module = Decoded(checkpoint, size).eval()
    torch.onnx.export(
        module, (torch.zeros(1, 3, size, size),), path, dynamo=False, opset_version=17,
        input_names=["images"], output_names=["output0"], dynamic_axes=axes,
    )  # fmt: skip
    return onnx.load(path)


def decode_model(checkpoint: Checkpoint, size: int, taps: dict[str, np.ndarray], path: Path) -> onnx.ModelProto:
    """The usual decode as a graph of its own, from the head's tensors to ``[B, 4 + C, N]``."""
    names = list(taps)
    values = tuple(torch.from_numpy(value) for value in taps.values())
    torch.onnx.export(
        Decode(Decoded(checkpoint, size).eval()), values, path, dynamo=False, opset_version=17,
        input_names=names, output_names=["output0"], dynamic_axes={name: {0: "batch"} for name in [*names, "output0"]},
    )  # fmt: skip
    return onnx.load(path)


@dataclass(frozen=True)
class Graph:
    """A graph to time: its model by batch size, and its inputs for a batch of images."""

    name: str
    part: str
    model: Callable[[int], onnx.ModelProto]
    inputs: Callable[[np.ndarray], dict[str, np.ndarray]]

    def contestant(self, threads: int, after: Callable[[np.ndarray], Any] | None = None, name: str = "") -> Contestant:
        """In ONNX Runtime, with what the host does with the first output."""

        def prepare(images: np.ndarray) -> Callable[[], Any]:
            runner, inputs = OnnxRuntimeRunner(self.model(len(images)), threads=threads), self.inputs(images)
            if after is None:
                return lambda: runner.run(inputs)
            return lambda: after(next(iter(runner.run(inputs).values())))

        return Contestant(name or self.name, self.part, prepare)

    def in_openvino(self, threads: int) -> Contestant:
        def prepare(images: np.ndarray) -> Callable[[], Any]:
            runner = OpenVinoRunner(self.model(len(images)), threads=threads, source=self.name)
            inputs = self.inputs(images)
            return lambda: runner.run(inputs)

        return Contestant(self.name, OPENVINO, prepare)

    def alone(self, images: np.ndarray, threads: int, runs: int, folder: Path) -> float:
        """Median ms in a process of its own."""
        path = folder / "alone.onnx"
        onnx.save(self.model(len(images)), path)
        return alone(path, self.inputs(images), folder, threads, runs)


def whole(name: str, model: onnx.ModelProto) -> Graph:
    return Graph(name, WHOLE, lambda _: model, lambda images: {"images": images})


def tail(name: str, part: str, model: Callable[[int], onnx.ModelProto], head: np.ndarray) -> Graph:
    """A graph that starts at the decoded head of one image, which is repeated; images, where it asks for their shape, are those given."""

    def inputs(images: np.ndarray) -> dict[str, np.ndarray]:
        heads = np.repeat(head, len(images), 0)
        return {entry.name: images if entry.name == "images" else heads for entry in model(len(images)).graph.input}

    return Graph(name, part, model, inputs)


def fused_tail(name: str, part: str, fused: FusedModel, taps: dict[str, np.ndarray]) -> Graph:
    model = cut_before(fused.model, {key: value.shape[1:] for key, value in taps.items()})
    return from_taps(name, part, lambda _: model, taps)


def from_taps(name: str, part: str, model: Callable[[int], onnx.ModelProto], taps: dict[str, np.ndarray]) -> Graph:
    """A graph that starts at the head's tensors of one image, which are repeated; it may also ask for the images' shape."""

    def inputs(images: np.ndarray) -> dict[str, np.ndarray]:
        names = [entry.name for entry in model(len(images)).graph.input]
        return {key: np.repeat(taps[key], len(images), 0) if key in taps else images for key in names}

    return Graph(name, part, model, inputs)


def on_host(name: str, part: str, work: Callable[[np.ndarray], Any], head: np.ndarray) -> Contestant:
    """Work on the decoded head of one image, which is repeated."""

    def prepare(images: np.ndarray) -> Callable[[], Any]:
        heads = np.repeat(head, len(images), 0)
        return lambda: work(heads)

    return Contestant(name, part, prepare)


def crowd(taps: dict[str, np.ndarray], fused: FusedModel, count: int) -> dict[str, np.ndarray]:
    """The head of the image with ``count`` more candidates above the threshold, near each other."""
    crowded = {name: value.copy() for name, value in taps.items()}
    logits = crowded[fused.layout.classes.tensor]
    rng = np.random.default_rng(0)
    rows = rng.choice(logits.shape[2], count, replace=False)
    logits[:, rng.integers(min(10, logits.shape[1]), size=count), rows] = rng.uniform(-1, 4, count)
    return crowded


def decode(taps: dict[str, np.ndarray], fused: FusedModel) -> np.ndarray:
    """Head tensors of one image to the decoded head ``[1, 4 + C, N]`` float32."""
    found = candidates(taps, 0, fused.layout, (fused.image.height, fused.image.width))
    low, high = found.boxes[:, :2], found.boxes[:, 2:]
    return np.concatenate(((low + high) / 2, high - low, found.scores), 1).T[None].astype(np.float32)


def run(args: argparse.Namespace) -> tuple[list[Timing], list[str], dict[str, float]]:
    """All timings, what could not be run, and the peak memory of our tail."""
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = load_checkpoint(args.checkpoint)
        raw = raw_model(checkpoint, args.size, work / "raw.onnx")
        fused = fuse(args.checkpoint, size=args.size)
        ours = fused.save(work / "fused.onnx")
        images = read(args.image, args.size)
        cut = with_only_outputs(fused.model, fused.layout.tensors)
        taps = OnnxRuntimeRunner(cut).infer(images)
        cases = {TAIL: taps} | {f"tail, {count} candidates": crowd(taps, fused, count) for count in (CROWD, FULL)}

        graphs = [whole(RAW, raw), whole(CUT, cut), whole(FUSED, fused.model), *variants(args, fused, notes)]
        recipes = {
            name: peers.recipe(name, len(checkpoint.class_names), taps[fused.layout.classes.tensor].shape[2])
            for name in peers.recipes()
        }
        graphs += [whole(name, peers.joined(raw, model)) for name, model in recipes.items()]
        if exported := ultralytics_models(args, work, notes):
            graphs.append(Graph(ULTRALYTICS, WHOLE, exported.__getitem__, lambda images: {"images": images}))
        hosts = host_work(notes)
        entries = [graph.contestant(args.threads) for graph in graphs]
        entries += [graphs[0].contestant(args.threads, after, name) for name, after in hosts.items()]
        timings = measure(entries, images, batches=args.batch, runs=args.runs)

        order = {name: taps[name] for name in (fused.layout.boxes.tensor, fused.layout.classes.tensor)}
        decoding = decode_model(checkpoint, args.size, order, work / "decode.onnx")
        tails, graph_tails = list[Contestant](), list[Graph]()
        for part, head in cases.items():
            flat = decode(head, fused)
            if part == TAIL:
                tails.append(on_host("NumPy class maximum (for scale)", part, lambda h: h[:, 4:].max(1), flat))
            own = [fused_tail(FUSED, part, fused, head)]
            own += [tail(name, part, lambda _, model=model: model, flat) for name, model in recipes.items()]
            if exported:
                models = {b: ultralytics_tail(model, flat.shape) for b, model in exported.items()}
                own.append(tail(ULTRALYTICS, part, models.__getitem__, flat))
            tails += [graph.contestant(args.threads) for graph in own]
            if not part.startswith(f"{TAIL}, {FULL}"):  # some take seconds for each image
                tails += [on_host(name, part, after, flat) for name, after in hosts.items()]
            if part != TAIL:  # also with the decode that ours has inside
                behind = [fused_tail(FUSED, f"{part}, {DECODE}", fused, head)]
                behind += [
                    from_taps(g.name, f"{part}, {DECODE}", lambda b, g=g: peers.joined(decoding, g.model(b)), head)
                    for g in own[1:]
                ]
                tails += [graph.contestant(args.threads) for graph in behind]
            graph_tails += own
        timings += measure(tails, images, batches=args.batch, runs=args.runs)
        if find_spec("openvino") is not None:
            shown = [graph for graph in graphs if graph.name in (RAW, FUSED, INT8, ULTRALYTICS)]
            beside = [graph.in_openvino(args.threads) for graph in shown]
            beside[:0] = [
                replace(graph.contestant(args.threads), part=OPENVINO, name=f"{graph.name}, in ONNX Runtime")
                for graph in shown
            ]
            timings += measure(beside, images, batches=[b for b in args.batch if b <= 8], runs=args.runs)
        shown = [graph for graph in (*graphs, *graph_tails) if graph.name in (RAW, FUSED, INT8, ULTRALYTICS)]
        timings += by_itself(shown, images, args, work)
        memory = {str(b): peak_memory(ours, TAIL, b) or 0.0 for b in args.batch}
    return timings, notes, memory


def variants(args: argparse.Namespace, fused: FusedModel, notes: list[str]) -> list[Graph]:
    """Our model in int8, and written by onnxslim."""
    found = []
    if args.calibrate is None:
        notes.append(f"{INT8}: there were no images to calibrate on (--calibrate)")
    else:
        quantized = fuse(args.checkpoint, size=args.size, precision="int8", calibrate=args.calibrate, max_drift=1.0)
        found.append(whole(INT8, quantized.model))
    try:
        import onnxslim
    except ImportError as error:
        notes.append(f"{SLIM}: cannot be run here ({first_line(error)})")
    else:
        found.append(whole(SLIM, onnxslim.slim(onnx.ModelProto.FromString(fused.model.SerializeToString()))))
    return found


def host_work(notes: list[str]) -> dict[str, Callable[[np.ndarray], Any]]:
    """What peers do on the host with the raw model's output."""
    hosts: dict[str, Callable[[np.ndarray], Any]] = {"raw + cv2.dnn.NMSBoxesBatched": peers.opencv_batched}
    for name, make in (
        ("raw + Ultralytics predict NMS (PyTorch)", peers.ultralytics_predict),
        ("raw + torchvision batched_nms", peers.torchvision_batched),
    ):
        try:
            hosts[name] = make()
        except (ImportError, RuntimeError) as error:
            notes.append(f"{name}: cannot be run here ({first_line(error)})")
    return hosts


def by_itself(graphs: list[Graph], images: np.ndarray, args: argparse.Namespace, folder: Path) -> list[Timing]:
    """Timings of graphs, each in a process of its own; the median of three processes, in turns."""
    timings, nan = [], float("nan")
    for batch in args.batch:
        filled = images[np.arange(batch) % len(images)]
        rounds = [[graph.alone(filled, args.threads, args.runs, folder) for graph in graphs] for _ in range(3)]
        middle = {
            (g.name, g.part): float(np.median(times))
            for g, times in zip(graphs, zip(*rounds, strict=True), strict=True)
        }
        for (name, part), milliseconds in middle.items():
            base = middle[RAW, WHOLE] if part == WHOLE else middle[FUSED, part]
            timings.append(Timing(name, f"{part}, {ALONE}", batch, milliseconds, nan, nan, milliseconds / base))
    return timings


def ultralytics_models(args: argparse.Namespace, work: Path, notes: list[str]) -> dict[int, onnx.ModelProto]:
    try:
        return {b: peers.export_ultralytics(args.checkpoint, b, args.size, work) for b in args.batch}
    except Exception as error:  # whatever a package of others raises
        notes.append(f"{ULTRALYTICS}: cannot be run here ({type(error).__name__}: {first_line(error)})")
        return {}


def ultralytics_tail(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """What follows the decoded head in Ultralytics' graph: the head is the Concat of boxes and the sigmoid of the scores."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    joins = [
        n for n in model.graph.node if n.op_type == "Concat" and [makers.get(i) for i in n.input] == ["Mul", "Sigmoid"]
    ]
    return cut_before(model, {joins[-1].output[0]: tuple(shape[1:])})


def read(path: Path | None, size: int) -> np.ndarray:
    from fusenms.heads.probe import probe_image
    from fusenms.runtime.images import read_image
    from fusenms.runtime.placement import letterbox, to_tensor

    return probe_image(size, size) if path is None else to_tensor([letterbox(read_image(path), size, size)[0]])


def markdown(timings: list[Timing], notes: list[str], memory: dict[str, float], args: argparse.Namespace) -> str:
    """The page: a table for the whole model, one for each kind of tail, what could not be run."""
    lines = [
        "# Benchmarks", "",
        f"{args.checkpoint.name} at {args.size}, score threshold {peers.SCORE}, IoU {peers.IOU}, {peers.ROWS} rows; medians of {args.runs} "
        f"interleaved runs in one process, {args.threads} threads, which do not spin. Alone: each file in a process of its own, with ONNX "
        f"Runtime's default settings; the median of three. {processor()} ONNX Runtime {onnxruntime.__version__}, PyTorch "
        f"{torch.__version__}, {platform.system()}. Absolute times are this machine's; read the ratios.", "",
        "Made by `make bench CHECKPOINT=FILE.pt`. Other tasks: [benchmarks-tasks.md](benchmarks-tasks.md).", "",
        "![Whole model](benchmarks.svg)", "",
    ]  # fmt: skip
    for part in dict.fromkeys(t.part for t in timings):
        rows = [t for t in timings if t.part == part]
        batches = sorted({t.batch for t in rows})
        of_model = part.startswith(WHOLE)
        base = f"{RAW}, in ONNX Runtime" if part == OPENVINO else RAW if of_model else FUSED
        title = part.replace(WHOLE, "whole model") if part != OPENVINO else part
        title = f"{title[0].upper()}{title[1:]}"
        lines += [
            f"## {title}",
            "",
            f"ms (ratio to {base})",
            "",
            "| | " + " | ".join(f"batch {b}" for b in batches) + " |",
        ]
        lines += ["|---|" + "--:|" * len(batches)]
        firsts = {t.batch: t.milliseconds for t in rows if t.name == base}
        for name in dict.fromkeys(t.name for t in rows):
            cells = []
            for b in batches:
                t = next(t for t in rows if t.name == name and t.batch == b)
                ratio = t.ratio if of_model and not np.isnan(t.ratio) else t.milliseconds / firsts[b]
                cells.append("does not run" if t.note else f"{t.milliseconds:.2f} ({ratio:.2f})")
            lines.append(f"| {'**' + name + '**' if name == FUSED else name} | " + " | ".join(cells) + " |")
        lines.append("")
    quiet = {t.batch: t.milliseconds for t in timings if (t.name, t.part) == (FUSED, TAIL)}
    crowded = {t.batch: t.milliseconds for t in timings if (t.name, t.part) == (FUSED, f"{TAIL}, {CROWD} candidates")}
    factors = ", ".join(f"{crowded[b] / quiet[b]:.1f} at batch {b}" for b in quiet)
    lines += [f"Our tail on the crowded head takes so many times as long as on the quiet one: {factors}.", ""]
    peaks = ", ".join(f"{value:.1f} MB at batch {b}" for b, value in memory.items())
    lines += [f"Peak memory of our tail beyond the head's tensors, without ONNX Runtime's arena: {peaks}.", ""]
    lines += ["Not run:", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join(lines)


def processor() -> str:
    """Its name, and whether it has VNNI, which int8 is fast with."""
    path = Path("/proc/cpuinfo")
    said = path.read_text() if path.exists() else ""
    name = next((line.partition(":")[2].strip() for line in said.splitlines() if line.startswith("model name")), "")
    return f"{name or platform.processor()}{', with VNNI' if 'vnni' in said else ''}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a YOLOv8-style checkpoint")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="images to calibrate int8 on")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    timings, notes, memory = run(args)
    print_table(timings, args.runs)
    for note in notes:
        print(note)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.md").write_text(markdown(timings, notes, memory, args))
    (args.out / "benchmarks.json").write_text(json.dumps([t.to_dict() for t in timings], indent=1) + "\n")
    plot([t for t in timings if t.part == WHOLE and t.name != CUT], args.out / "benchmarks.svg", {FUSED})


if __name__ == "__main__":
    main()
