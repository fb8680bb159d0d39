"""Measure the demo detector on synthetic images that it was not trained on.

Run:  python models/shapes/evaluate.py [--images 300] [--checkpoint models/shapes/shapes.pt]

The checkpoint is fused and run as a user would do it. mAP is COCO's: the mean of the classes' average precision, each the mean of
the precision at 101 recalls; mAP50-95 is the mean over the IoU thresholds 0.5, 0.55, … 0.95.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

import fusenms
from fusenms.boxes import pairwise_iou
from images import NAMES, SAMPLES, draw_image, sample_images

SEED = 1
"""Not the seed of the training (0), nor that of the samples."""
THRESHOLDS = np.arange(0.5, 1.0, 0.05)
RECALLS = np.linspace(0, 1, 101)

Truth = tuple[np.ndarray, np.ndarray]
"""Boxes ``[n, 4]`` and labels ``[n]`` of an image."""


def mean_average_precision(truths: Sequence[Truth], found: Sequence[fusenms.Detections]) -> np.ndarray:
    """Return mAP ``[T]`` at each of `THRESHOLDS`."""
    precisions = []
    for label in range(len(NAMES)):
        scores, hits, total = [], [], 0
        for (boxes, labels), rows in zip(truths, found, strict=True):
            mine = rows.labels == label
            total += int((labels == label).sum())
            scores.append(rows.scores[mine])
            hits.append(matched(boxes[labels == label], rows.boxes[mine]))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        precisions.append([average_precision(hit, total) for hit in np.concatenate(hits, 1)[:, order]])
    return np.mean(precisions, 0)


def matched(truth: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether each box ``[m, 4]``, best first, finds a true one ``[n, 4]`` that no better box has found: ``[T, m]``."""
    hits = np.zeros((len(THRESHOLDS), len(boxes)), bool)
    for threshold, row in zip(THRESHOLDS, hits, strict=True):
        iou = pairwise_iou(boxes.astype(float), truth.astype(float))
        for i in range(len(boxes)):
            if len(truth) and iou[i].max() >= threshold:
                iou[:, iou[i].argmax()] = -1
                row[i] = True
    return hits


def average_precision(hits: np.ndarray, total: int) -> float:
    """Mean precision at `RECALLS` of detections, best first, of which some hit; there are so many true objects."""
    right = np.cumsum(hits)
    precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    place = np.searchsorted(right / total, RECALLS)
    return float(np.append(precision, 0.0)[place].mean())


def mistakes(truth: Truth, found: fusenms.Detections, least_iou: float = 0.7) -> list[str]:
    """What is wrong with the detections of one image: an object without one of its class, or a detection without its object."""
    boxes, labels = truth
    iou = pairwise_iou(found.boxes.astype(float), boxes.astype(float)) * (found.labels[:, None] == labels[None])
    missed = [
        f"missed: {NAMES[labels[j]]} {boxes[j].round()}"
        for j in range(len(labels))
        if not (iou[:, j] > least_iou).any()
    ]
    return missed + [
        f"false: {NAMES[label]} {score:.2f} {box.round()}"
        for i, (box, score, label) in enumerate(found)
        if not len(labels) or iou[i].max() <= least_iou or iou[:i, iou[i].argmax()].max(initial=0) > least_iou
    ]


def detections(checkpoint: Path, images: Sequence[np.ndarray], **config: float) -> list[fusenms.Detections]:
    """Fuse the checkpoint with these settings, and run it on images."""
    with tempfile.TemporaryDirectory() as folder:
        path = fusenms.fuse(checkpoint, unverified=True, **config).save(Path(folder) / "m.onnx", unverified=True)
        with fusenms.Detector(path) as detect:
            return detect(list(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).with_name("shapes.pt"))
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    images, truths = [], []
    for _ in range(args.images):
        image, boxes, labels = draw_image(rng)
        images.append(image)
        truths.append((boxes, labels))
    found = detections(args.checkpoint, images, score_threshold=0.001)
    values = mean_average_precision(truths, found)
    found = detections(args.checkpoint, images)
    wrong = [line for truth, rows in zip(truths, found, strict=True) for line in mistakes(truth, rows)]
    objects = sum(len(labels) for _, labels in truths)
    print(f"{args.images} images, {objects} objects: mAP50 {values[0]:.3f}, mAP50-95 {values.mean():.3f}")
    missed = sum(line.startswith("missed") for line in wrong)
    print(f"default thresholds, IoU with the truth > 0.7: {missed} missed, {len(wrong) - missed} false")
    stored = [cv2.imread(str(Path(__file__).with_name(name)))[..., ::-1] for name in SAMPLES]
    for (name, _, boxes, labels), rows in zip(sample_images(), detections(args.checkpoint, stored), strict=True):
        print(
            f"{name}: {len(labels)} objects, {len(rows)} detections, {mistakes((boxes, labels), rows) or 'no mistake'}"
        )


if __name__ == "__main__":
    main()
