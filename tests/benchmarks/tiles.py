"""Tiles in the graph beside SAHI and supervision's `InferenceSlicer`: what is found, and times of whole calls, in turns.

    python tests/benchmarks/tiles.py CHECKPOINT.pt IMAGE... [--tiles 2x2] [--size 640] [--truth FILE.json] [--only TOOL]

The peers run Ultralytics' package, which has to be installed beside fusenms, as do they: sahi, supervision, ultralytics (AGPL-3.0). A
peer that is not installed is left out. PyTorch's threads disturb those of ONNX Runtime in one process, so times are best taken with
``--only``, a process each, in turns. FILE.json holds the boxes of each image: ``{name: [[x1, y1, x2, y2, label], ...]}``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

import fusenms
from fusenms.boxes import pairwise_iou

SCORE, IOU, OVERLAP = 0.25, 0.45, 0.2
Found = np.ndarray
"""Rows ``[n, 6]``: x1, y1, x2, y2, score, label."""
Way = Callable[[np.ndarray], Found]


def ours(args: argparse.Namespace, whole: bool) -> Way:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    tiles = fusenms.Tiles(*args.tiles, OVERLAP, whole)
    fused = fusenms.fuse(args.checkpoint, size=args.size, tiles=tiles, max_detections=1000, unverified=True)
    detect = fusenms.Detector(fused, session_options=options)

    def way(image: np.ndarray) -> Found:
        found = detect(image)[0]
        return np.column_stack((found.boxes, found.scores, found.labels))

    return way


def tile_size(image: np.ndarray, args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the same tiles."""
    sides = zip(image.shape[:2], args.tiles, strict=True)
    height, width = (int(np.ceil(side / (1 + (count - 1) * (1 - OVERLAP)))) for side, count in sides)
    return height, width


def sahi(args: argparse.Namespace) -> Way:
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    model = AutoDetectionModel.from_pretrained(
        model_type="ultralytics", model_path=str(args.checkpoint), confidence_threshold=SCORE, device="cpu",
        image_size=args.size,
    )  # fmt: skip

    def way(image: np.ndarray) -> Found:
        height, width = tile_size(image, args)
        found = get_sliced_prediction(
            image, model, slice_height=height, slice_width=width, overlap_height_ratio=OVERLAP,
            overlap_width_ratio=OVERLAP, verbose=0,
        )  # fmt: skip
        rows = [[*one.bbox.to_xyxy(), one.score.value, one.category.id] for one in found.object_prediction_list]
        return np.array(rows, np.float64).reshape(-1, 6)

    return way


def slicer(args: argparse.Namespace) -> Way:
    import supervision
    from ultralytics import YOLO

    model = YOLO(str(args.checkpoint))

    def one(tile: np.ndarray) -> supervision.Detections:
        found = model(tile[..., ::-1], verbose=False, conf=SCORE, iou=IOU, imgsz=args.size)[0]
        return supervision.Detections.from_ultralytics(found)

    def way(image: np.ndarray) -> Found:
        height, width = tile_size(image, args)
        overlap = int(width * OVERLAP), int(height * OVERLAP)
        cut = supervision.InferenceSlicer(one, slice_wh=(width, height), overlap_wh=overlap, iou_threshold=IOU)
        found = cut(image)
        return np.column_stack((found.xyxy, found.confidence, found.class_id))

    return way


TOOLS: dict[str, Callable[[argparse.Namespace], Way]] = {
    "fusenms": lambda args: ours(args, False),
    "fusenms-whole": lambda args: ours(args, True),
    "slicer": slicer,
    "sahi": sahi,  # looks at the whole too
}


def matched(rows: Found, truth: np.ndarray) -> int:
    """Boxes ``[m, 5]`` (with their label) that rows find, the best row first, by an IoU of 0.5 and class."""
    free, count = np.ones(len(truth), bool), 0
    for row in rows[np.argsort(-rows[:, 4])]:
        iou = pairwise_iou(row[None, :4].astype(float), truth[:, :4])[0] * free * (truth[:, 4] == row[5])
        if len(iou) and iou.max() >= 0.5:
            free[int(iou.argmax())] = False
            count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--tiles", type=lambda text: tuple(map(int, text.split("x"))), default=(2, 2))
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--only", choices=TOOLS)
    args = parser.parse_args()
    ways = {}
    for name, make in TOOLS.items():
        try:
            if args.only in (None, name):
                ways[name] = make(args)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    images = {path.name: cv2.imread(str(path))[..., ::-1].copy() for path in args.images}
    known_boxes = {} if args.truth is None else json.loads(args.truth.read_text())
    truth = {name: known_boxes[name] for name in images if name in known_boxes}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, dict[str, Found]] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            rows[name] = {key: way(image) for key, image in images.items()}
            seconds[name].append(time.perf_counter() - start)
    for name, found in rows.items():
        hits = sum(matched(found[key], np.array(boxes, float).reshape(-1, 5)) for key, boxes in truth.items())
        known = f", {hits} of {sum(map(len, truth.values()))} objects" if truth else ""
        count = sum(map(len, found.values()))
        print(f"{name}: {count} rows{known}, {statistics.median(seconds[name]):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
