"""Measure the portable backend: rounds that real heads need, time and memory by K beside `ort`, engine build times.

    python tests/benchmarks/portable.py CHECKPOINT.pt --images FOLDER [--runs 25]

Prints the tables of docs/concepts/portable-nms.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from run import TAIL, crowd, fused_tail

from fusenms import FusedModel, PostprocessConfig, RawModel, fuse, load
from fusenms.benchmark import measure, peak_memory
from fusenms.boxes import pairwise_iou
from fusenms.engines import EngineSettings
from fusenms.engines.rtx import build_rtx
from fusenms.fusion.backends import portable
from fusenms.graph.model import with_outputs
from fusenms.graph.session import OnnxRuntimeRunner
from fusenms.reference import candidates
from fusenms.runtime.images import list_images, read_image
from fusenms.runtime.placement import letterbox, to_tensor


def rounds_needed(rivals: np.ndarray) -> int:
    """Rounds until nothing changes, that last one included, for ``rivals [n, n]`` (1: column j can suppress row i)."""
    keep, rounds = np.ones(len(rivals), bool), 0
    while True:
        after, rounds = ~(rivals & keep).any(1), rounds + 1
        if (after == keep).all():
            return rounds
        keep = after


def rounds_of(head: dict[str, np.ndarray], fused: FusedModel, score: float, iou: float) -> tuple[int, int, int]:
    """Candidates of one image, rounds of all at once, most rounds of a block."""
    found = candidates(head, 0, fused.layout, (fused.image.height, fused.image.width))
    best = found.scores.max(1)
    order = np.argsort(-best, kind="stable")
    order = order[best[order] > score][:3840]
    boxes, labels = found.boxes[order], found.scores[order].argmax(1)
    rivals = np.tril(pairwise_iou(boxes, boxes) > iou, -1) & (labels[:, None] == labels)
    size = portable.BLOCK
    parts = [rivals[i : i + size, i : i + size] for i in range(0, len(order), size)]
    return len(order), rounds_needed(rivals), max(map(rounds_needed, parts), default=1)


def heads_of(raw: RawModel, images: list[Path]) -> tuple[FusedModel, list[dict[str, np.ndarray]]]:
    fused = fuse(raw, unverified=True)
    runner = OnnxRuntimeRunner(with_outputs(fused.model, fused.layout.tensors))
    heads = []
    for path in images:
        image = to_tensor([letterbox(read_image(path), fused.image.height, fused.image.width)[0]])
        outputs = runner.infer(image)
        heads.append({name: outputs[name] for name in fused.layout.tensors})
    return fused, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=25)
    args = parser.parse_args()
    raw = load(args.checkpoint, size=640)
    fused, heads = heads_of(raw, list_images(args.images))

    print(
        f"rounds on {len(heads)} images (block {portable.BLOCK})\n\n| score | IoU | candidates, most | rounds, all at once | in a block |"
    )
    print("|--:|--:|--:|--:|--:|")
    for score, iou in ((0.25, 0.45), (0.25, 0.7), (0.05, 0.45), (0.001, 0.45), (0.001, 0.7)):
        found = np.array([rounds_of(head, fused, score, iou) for head in heads])
        low, middle, high = found[:, 1].min(), np.median(found[:, 1]), found[:, 1].max()
        print(f"| {score} | {iou} | {found[:, 0].max()} | {low} to {high}, median {middle:.0f} | {found[:, 2].max()} |")

    cases = {TAIL: heads[0], "tail, 1500 candidates": crowd(heads[0], fused, 1500)}
    images = np.zeros((1, 3, 640, 640), np.float32)
    print(
        "\ntail, ms (ratio to ort at the same K)\n\n| K | | quiet, batch 1 | quiet, 8 | crowded, 1 | crowded, 8 | peak MB, quiet, 8 |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|")
    for count in (300, 1024, 3840):
        kinds = {"ort": ("ort", {}), "portable": ("portable", {}), "portable, 12 rounds": ("portable", {"rounds": 12})}
        models = {
            name: fuse(raw, backend=backend, unverified=True, max_candidates=count, **more)
            for name, (backend, more) in kinds.items()
        }
        cells: dict[str, list[str]] = {name: [] for name in models}
        for part, head in cases.items():
            entries = [fused_tail(name, part, model, head).contestant(2) for name, model in models.items()]
            timings = measure(entries, images, batches=(1, 8), runs=args.runs)
            for t in timings:
                cells[t.name].append(f"{t.milliseconds:.2f} ({t.ratio:.2f})")
        with tempfile.TemporaryDirectory() as folder:
            for name, model in models.items():
                path = model.save(Path(folder) / "m.onnx", unverified=True)
                print(f"| {count} | {name} | {' | '.join(cells[name])} | {peak_memory(path, TAIL, 8) or 0:.1f} |")

    print("\nTensorRT-RTX builds, seconds, median of 5 in turn\n")
    with tempfile.TemporaryDirectory() as folder:
        from run import raw_model

        from fusenms.sources.checkpoint import load_checkpoint

        raw_model(load_checkpoint(args.checkpoint), 640, Path(folder) / "raw.onnx")
        files = {"raw model": Path(folder) / "raw.onnx"}
        for name, settings in (
            ("portable", {}),
            ("portable, 12 rounds, K = 960", {"rounds": 12, "max_candidates": 960}),
        ):
            model = fuse(raw, backend="portable", unverified=True, **PostprocessConfig(**settings).to_dict())
            files[name] = model.save(Path(folder) / f"{len(files)}.onnx", unverified=True)
        seconds: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(5):
            for name, path in files.items():
                start = time.perf_counter()
                build_rtx(str(path), EngineSettings())
                seconds[name].append(time.perf_counter() - start)
    first = np.median(seconds["raw model"])
    for name, values in seconds.items():
        print(f"- {name}: {np.median(values):.2f} ({np.median(values) / first:.2f})")


if __name__ == "__main__":
    main()
