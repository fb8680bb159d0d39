"""Time fusenms beside its peers, in one run, on one checkpoint: the table and the plot of docs/benchmarks.md.

    python tests/benchmarks/run.py CHECKPOINT.pt [--image FILE] [--runs 25] [--batch 1 8 16] [--out docs]

The raw model is the checkpoint with its usual decode in the graph: the output ``[B, 4 + C, N]`` that exporters write.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peers
import torch
from torch import Tensor, nn

from fusenms import fuse
from fusenms.artifacts.fused import FusedModel
from fusenms.benchmark import TAIL, WHOLE, Contestant, Timing, contestants, measure, peak_memory
from fusenms.cli.bench import plot, print_table
from fusenms.errors import first_line
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import candidates
from fusenms.sources.checkpoint import Checkpoint, load_checkpoint
from fusenms.sources.torch_modules.layers import AnchorFreeDetect

RAW, FUSED, CUT = "raw model", "fusenms (ort)", "cut before the decode (floor)"
ULTRALYTICS = "Ultralytics nms=True"
CROWD = 1500


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
        boxes, logits = self.network(images)
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


def whole(name: str, model: onnx.ModelProto, after: Callable[[np.ndarray], Any] | None, threads: int) -> Contestant:
    """A model, and what the host does with its first output."""

    def prepare(images: np.ndarray) -> Callable[[], Any]:
        runner = OnnxRuntimeRunner(model, threads=threads)
        if after is None:
            return lambda: runner.infer(images)
        return lambda: after(next(iter(runner.infer(images).values())))

    return Contestant(name, WHOLE, prepare)


def tail(name: str, part: str, work: Callable[[np.ndarray], Any], heads: Callable[[int], np.ndarray]) -> Contestant:
    """Work on the decoded head alone."""

    def prepare(images: np.ndarray) -> Callable[[], Any]:
        head = heads(len(images))
        return lambda: work(head)

    return Contestant(name, part, prepare)


def tail_model(
    name: str, part: str, model: onnx.ModelProto, heads: Callable[[int], np.ndarray], threads: int
) -> Contestant:
    """A graph that starts at the decoded head; images, where it asks for their shape, are those given."""

    def prepare(images: np.ndarray) -> Callable[[], Any]:
        runner, head = OnnxRuntimeRunner(model, threads=threads), heads(len(images))
        inputs = {key: images if key == "images" else head for key in runner.inputs}
        return lambda: runner.run(inputs)

    return Contestant(name, part, prepare)


def by_batch(name: str, part: str, make: Callable[[int], Callable[[np.ndarray], Callable[[], Any]]]) -> Contestant:
    """Something that is built anew for each batch size."""
    return Contestant(name, part, lambda images: make(len(images))(images))


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
        cut = onnx.ModelProto()
        cut.CopyFrom(with_outputs(fused.model, fused.layout.tensors))
        kept = [entry for entry in cut.graph.output if entry.name in fused.layout.tensors]
        del cut.graph.output[:]
        cut.graph.output.extend(kept)
        taps = OnnxRuntimeRunner(cut).infer(images)
        cases = {TAIL: taps, f"tail, {CROWD} candidates": crowd(taps, fused, CROWD)}

        entries = [whole(RAW, raw, None, args.threads), whole(CUT, cut, None, args.threads)]
        for entry in contestants([ours], args.threads):
            if entry.part == WHOLE:
                entries.append(Contestant(FUSED, WHOLE, entry.prepare))
        hosts: dict[str, Callable[[np.ndarray], Any]] = {"raw + cv2.dnn.NMSBoxesBatched": peers.opencv_batched}
        for name, make in (
            ("raw + Ultralytics predict NMS (PyTorch)", peers.ultralytics_predict),
            ("raw + torchvision batched_nms", peers.torchvision_batched),
        ):
            try:
                hosts[name] = make()
            except (ImportError, RuntimeError) as error:
                notes.append(f"{name}: cannot be run here ({first_line(error)})")
        recipes = {
            name: peers.recipe(name, len(checkpoint.class_names), taps[fused.layout.classes.tensor].shape[2])
            for name in peers.recipes()
        }
        exported = ultralytics_models(args, work, notes)
        entries += [whole(name, raw, after, args.threads) for name, after in hosts.items()]
        entries += [whole(name, peers.joined(raw, model), None, args.threads) for name, model in recipes.items()]
        if exported:
            entries.append(
                by_batch(ULTRALYTICS, WHOLE, lambda b: whole(ULTRALYTICS, exported[b], None, args.threads).prepare)
            )
        timings = measure(entries, images, batches=args.batch, runs=args.runs)

        tails: list[Contestant] = []
        for part, head in cases.items():
            flat = decode(head, fused)
            heads = lambda b, flat=flat: np.repeat(flat, b, 0)  # noqa: E731
            if part == TAIL:
                tails.append(tail("NumPy class maximum (for scale)", part, lambda h: h[:, 4:].max(1), heads))
            tails.append(fused_tail(FUSED, part, fused, head, args.threads))
            tails += [tail(name, part, after, heads) for name, after in hosts.items()]
            tails += [tail_model(name, part, model, heads, args.threads) for name, model in recipes.items()]
            if exported:
                models = {b: ultralytics_tail(model, flat.shape) for b, model in exported.items()}
                tails.append(
                    by_batch(
                        ULTRALYTICS,
                        part,
                        lambda b, m=models, h=heads: tail_model(ULTRALYTICS, TAIL, m[b], h, args.threads).prepare,
                    )
                )
        timings += measure(tails, images, batches=args.batch, runs=args.runs)
        memory = {str(b): peak_memory(ours, TAIL, b) or 0.0 for b in args.batch}
    return timings, notes, memory


def fused_tail(name: str, part: str, fused: FusedModel, taps: dict[str, np.ndarray], threads: int) -> Contestant:
    from fusenms.graph.model import cut_before

    model = cut_before(fused.model, {key: value.shape[1:] for key, value in taps.items()})

    def prepare(images: np.ndarray) -> Callable[[], Any]:
        runner = OnnxRuntimeRunner(model, threads=threads)
        inputs = {key: np.repeat(value, len(images), 0) for key, value in taps.items()}
        return lambda: runner.run(inputs)

    return Contestant(name, part, prepare)


def ultralytics_models(args: argparse.Namespace, work: Path, notes: list[str]) -> dict[int, onnx.ModelProto]:
    try:
        return {b: peers.export_ultralytics(args.checkpoint, b, args.size, work) for b in args.batch}
    except Exception as error:  # whatever a package of others raises
        notes.append(f"{ULTRALYTICS}: cannot be run here ({type(error).__name__}: {first_line(error)})")
        return {}


def ultralytics_tail(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """What follows the decoded head in Ultralytics' graph: the head is the Concat of boxes and the sigmoid of the scores."""
    from fusenms.graph.model import cut_before

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
        f"{args.checkpoint.name} at {args.size}, score threshold {peers.SCORE}, IoU {peers.IOU}, {peers.ROWS} rows; "
        f"medians of {args.runs} interleaved "
        f"runs in one process, "
        f"{args.threads} threads. ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}, {platform.system()} "
        f"{platform.machine()}, CPU only. Absolute times are this machine's; read the ratios.", "",
        "Made by `make bench CHECKPOINT=FILE.pt`. Other tasks: [benchmarks-tasks.md](benchmarks-tasks.md).", "",
        "![Whole model](benchmarks.svg)", "",
    ]  # fmt: skip
    for part in dict.fromkeys(t.part for t in timings):
        rows = [t for t in timings if t.part == part]
        batches = sorted({t.batch for t in rows})
        base = RAW if part == WHOLE else FUSED
        title = "Whole model" if part == WHOLE else f"{part[0].upper()}{part[1:]}"
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
                ratio = t.ratio if part == WHOLE else t.milliseconds / firsts[b]
                cells.append("does not run" if t.note else f"{t.milliseconds:.2f} ({ratio:.2f})")
            lines.append(f"| {'**' + name + '**' if name == FUSED else name} | " + " | ".join(cells) + " |")
        lines.append("")
    quiet = {t.batch: t.milliseconds for t in timings if (t.name, t.part) == (FUSED, TAIL)}
    crowded = {t.batch: t.milliseconds for t in timings if t.name == FUSED and t.part not in (WHOLE, TAIL)}
    factors = ", ".join(f"{crowded[b] / quiet[b]:.1f} at batch {b}" for b in quiet)
    lines += [f"Our tail on the crowded head takes so many times as long as on the quiet one: {factors}.", ""]
    peaks = ", ".join(f"{value:.1f} MB at batch {b}" for b, value in memory.items())
    lines += [f"Peak memory of our tail beyond the head's tensors, without ONNX Runtime's arena: {peaks}.", ""]
    lines += ["Not run:", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a YOLOv8-style checkpoint")
    parser.add_argument("--image", type=Path)
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
