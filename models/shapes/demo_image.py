"""Draw the image of the README: what the demo detector gives without suppression, and what comes out of the fused model.

Run:  python models/shapes/demo_image.py [--out docs/demo.jpg]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import fusenms
from fusenms.runtime.drawing import Font, color_of, draw, save_image
from images import SAMPLES

FOLDER = Path(__file__).parent
PANEL = (360, 480)
"""Height and width of each half in pixels."""
GAP, TITLE = 16, 34
"""Pixels between the halves, and of the line above them."""
INK = (60, 60, 60)


def detect(image: np.ndarray, **config: Any) -> fusenms.Detections:
    """Fuse the demo detector with these settings and run it; the boxes are in pixels of a half."""
    with tempfile.TemporaryDirectory() as folder:
        fused = fusenms.fuse(FOLDER / "shapes.pt", unverified=True, **config)
        with fusenms.Detector(fused.save(Path(folder) / "shapes.onnx", unverified=True)) as detector:
            found = detector(image)[0]
    scale = np.float32(PANEL[1] / image.shape[1])
    rows = found.oriented_boxes * np.array([scale, scale, scale, scale, 1], np.float32)
    return replace(found, boxes=found.boxes * scale, oriented_boxes=rows)


def draw_candidates(image: np.ndarray, candidates: fusenms.Detections) -> np.ndarray:
    """Draw boxes without labels onto a copy of an image, those of low scores in gray and faint."""
    canvas = image.copy()
    for box, score, label in reversed(list(candidates)):
        sure = score > 0.25
        above = canvas.copy()
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(above, (x1, y1), (x2, y2), color_of(label) if sure else (90, 90, 90), 1)
        canvas = cv2.addWeighted(above, 0.9 if sure else 0.08, canvas, 0.1 if sure else 0.92, 0)
    return canvas


def titled(text: str, half: np.ndarray) -> np.ndarray:
    """Put a line of text above one half."""
    ground, font = np.full((TITLE, half.shape[1], 3), 255, np.uint8), Font.of_height(20)
    cv2.putText(ground, text, (0, 23), cv2.FONT_HERSHEY_SIMPLEX, font.scale, INK, font.thickness, cv2.LINE_AA)
    return np.concatenate((ground, half))


def demo_image() -> np.ndarray:
    """Return ``[height, width, 3]`` uint8 RGB: candidates on the left, detections on the right."""
    image = cv2.imread(str(FOLDER / SAMPLES[0]))[..., ::-1]
    candidates = detect(image, score_threshold=0.0, iou_threshold=1.0, max_detections=3840)
    detections = detect(image)
    small = cv2.resize(image, PANEL[::-1], interpolation=cv2.INTER_AREA)
    left = titled(f"raw model: {len(candidates)} candidates", draw_candidates(small, candidates))
    right = titled(f"fused model: {len(detections)} detections", draw(small, detections))
    return np.concatenate((left, np.full((len(left), GAP, 3), 255, np.uint8), right), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER.parents[1] / "docs" / "demo.jpg")
    args = parser.parse_args()
    save_image(args.out, demo_image())


if __name__ == "__main__":
    main()
