"""Time masks, keypoints and oriented boxes: whole model beside the raw one, and the tail: the tables of docs/benchmarks-tasks.md.

    python tests/benchmarks/tasks.py CHECKPOINT.pt [CHECKPOINT.pt ...] [--image FILE] [--runs 25] [--batch 1 8] [--out docs]

The checkpoints have YOLOv8's head, one of each task or so. The raw model is the checkpoint with its usual decode in the graph, all
channels of a candidate in one output, prototypes in another.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import peers
import torch
from run import FUSED, RAW, ULTRALYTICS, Decoded, Graph, crowd, fused_tail, read, ultralytics_models, whole
from torch import Tensor

from fusenms import fuse, load
from fusenms.benchmark import TAIL, WHOLE, Contestant, Timing, measure, peak_memory
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.sources.checkpoint import load_checkpoint

ROWS, CROWD = 100, 1000
VARIANTS: dict[str, dict[str, Any]] = {
    FUSED: {},
    "fusenms (portable)": {"backend": "portable"},
    "fusenms (ort), masks in the graph": {"masks": "prototype"},
    "fusenms (portable), masks in the graph": {"backend": "portable", "masks": "prototype"},
}


class DecodedFurther(Decoded):
    """The checkpoint with its decode: ``[B, 4 + C + E, N]``, and prototypes where it has some."""

    def __init__(self, checkpoint: Any, size: int) -> None:
        super().__init__(checkpoint, size)
        self.task, self.head = checkpoint.task, checkpoint.head

    def forward(self, images: Tensor) -> Any:
        boxes, logits, *further = self.network(images)
        spread = boxes.unflatten(1, (4, self.bins)).transpose(1, 2).softmax(1)
        distance = self.expect(spread).squeeze(1)
        low, high = distance[:, :2], distance[:, 2:]
        center, size, terms = (high - low) / 2, low + high, further[:1]
        if self.task == "obb":
            angle = (further[0].sigmoid() - 0.25) * math.pi
            x, y = center.split(1, 1)
            center = torch.cat((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()), 1)
            terms = [angle]
        elif self.task == "pose":
            points = further[0].unflatten(1, tuple(self.head.kpt_shape))
            places = (points[:, :, :2] * 2 + (self.centers - 0.5)) * self.strides
            terms = [torch.cat((places, points[:, :, 2:].sigmoid()), 2).flatten(1, 2)]
        decoded = torch.cat((center + self.centers, size), 1) * self.strides
        joined = torch.cat((decoded, logits.sigmoid(), *terms), 1)
        return (joined, further[1]) if self.task == "segment" else joined


def raw_model(checkpoint: Any, size: int, path: Path) -> onnx.ModelProto:
    module = DecodedFurther(checkpoint, size).eval()
    names = ["output0", "output1"] if checkpoint.task == "segment" else ["output0"]
    torch.onnx.export(
        module, (torch.zeros(1, 3, size, size),), path, dynamo=False, opset_version=17,
        input_names=["images"], output_names=names, dynamic_axes={name: {0: "batch"} for name in ("images", *names)},
    )  # fmt: skip
    return onnx.load(path)


def run(path: Path, args: argparse.Namespace) -> tuple[list[Timing], dict[str, float], list[str]]:
    """Timings of one checkpoint, peak memory of each tail at batch 1, and what could not be run."""
    notes: list[str] = []
    checkpoint, raw, images = load_checkpoint(path), load(path, size=args.size), read(args.image, args.size)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entries = [whole(RAW, raw_model(checkpoint, args.size, work / "raw.onnx")).contestant(args.threads)]
        tails: list[Contestant] = []
        memory = {}
        for name, settings in VARIANTS.items():
            if "masks" in settings and checkpoint.task != "segment":
                continue
            fused = fuse(raw, max_detections=ROWS, **settings)
            entries.append(whole(name, fused.model).contestant(args.threads))
            taps = OnnxRuntimeRunner(with_outputs(fused.model, fused.layout.tensors)).infer(images)
            head = {tensor: taps[tensor] for tensor in fused.layout.tensors}
            for part, values in ((TAIL, head), (f"tail, {CROWD} candidates", crowd(head, fused, CROWD))):
                tails.append(fused_tail(name, part, fused, values).contestant(args.threads))
            memory[name] = peak_memory(fused.save(work / "fused.onnx"), TAIL, 1, images) or 0.0
        args.checkpoint = path
        if exported := ultralytics_models(args, work, notes):
            graph = Graph(ULTRALYTICS, WHOLE, exported.__getitem__, lambda images: {"images": images})
            entries.append(graph.contestant(args.threads))
        timings = measure(entries, images, batches=args.batch, runs=args.runs)
        timings += measure(tails, images, batches=args.batch, runs=args.runs)
    return timings, memory, [f"{path.name}, {note}" for note in notes]


def table(task: str, file: str, timings: list[Timing], memory: dict[str, float]) -> list[str]:
    parts = list(dict.fromkeys(t.part for t in timings))
    batches = sorted({t.batch for t in timings})
    heads = [f"{part}, batch {b}" for part in parts for b in batches]
    lines = [f"## {task}", "", f"{file}; ms, of the whole model with the ratio to the raw one", ""]
    lines += ["| | " + " | ".join(heads) + " | memory of the tail, batch 1 |", "|---|" + "--:|" * (len(heads) + 1)]
    for name in dict.fromkeys(t.name for t in timings):
        cells = []
        for part in parts:
            for b in batches:
                t = next((t for t in timings if (t.name, t.part, t.batch) == (name, part, b)), None)
                ratio = f" ({t.ratio:.2f})" if t is not None and part == WHOLE else ""
                cells.append("" if t is None else "does not run" if t.note else f"{t.milliseconds:.2f}{ratio}")
        cells.append(f"{memory[name]:.1f} MB" if name in memory else "")
        lines.append(f"| {'**' + name + '**' if name == FUSED else name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    lines = [
        "# Benchmarks of masks, keypoints and oriented boxes", "",
        f"At {args.size}, score threshold {peers.SCORE}, IoU {peers.IOU}, {ROWS} rows; medians of {args.runs} interleaved runs in one "
        f"process, {args.threads} threads, which do not spin. ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, CPU only. Absolute times are this machine's; read the ratios.", "",
        'Made by `make bench-tasks CHECKPOINTS="A-seg.pt B-pose.pt C-obb.pt"`.', "",
    ]  # fmt: skip
    missing: list[str] = []
    for path in args.checkpoints:
        timings, memory, notes = run(path, args)
        lines += table(load_checkpoint(path).task, path.name, timings, memory)
        missing += notes
    lines += ["Not run:", "", *(f"- {note}" for note in missing), ""] if missing else []
    (args.out / "benchmarks-tasks.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
