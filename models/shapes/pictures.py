"""Draw synthetic pictures of circles, squares and triangles, with their boxes: the data of the demo detector.

Run as a script to write sample pictures:  python models/shapes/pictures.py OUT_DIR COUNT [SEED]
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

NAMES = ("circle", "square", "triangle")


def outline(label: int, center: np.ndarray, radius: float, angle: float, squeeze: float) -> np.ndarray:
    """Return the outline ``[points, 2]`` (x, y in pixels) of one shape."""
    corners = {0: 40, 1: 4, 2: 3}[label]
    turns = np.arange(corners) * 2 * np.pi / corners
    points = np.stack((np.cos(turns), np.sin(turns) * squeeze), 1) * radius
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T + center


def picture(
    rng: np.random.Generator, height: int = 256, width: int = 256, most: int = 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one picture.

    Returns the picture ``[height, width, 3]`` uint8 RGB, the boxes ``[n, 4]`` float32 (xyxy in pixels)
    and the labels ``[n]`` int64. Shapes that are mostly covered by later ones are not listed.
    """
    ramp = np.linspace(0, 1, width)[None, :, None] * rng.uniform(-1, 1, 3)
    ramp = ramp + np.linspace(0, 1, height)[:, None, None] * rng.uniform(-1, 1, 3)
    canvas = np.clip(rng.uniform(40, 215, 3) + 60 * ramp, 0, 255).astype(np.uint8)
    owner = np.full((height, width), -1, np.int16)
    shapes = []
    for _ in range(int(rng.integers(1, most + 1))):
        label = int(rng.integers(3))
        radius = float(np.exp(rng.uniform(np.log(8), np.log(0.22 * min(height, width)))))
        center = rng.uniform((0.5 * radius, 0.5 * radius), (width - 0.5 * radius, height - 0.5 * radius))
        squeeze = float(rng.uniform(0.6, 1.0)) if label != 2 else 1.0
        points = outline(label, center, radius, float(rng.uniform(0, 2 * np.pi)), squeeze)
        around = canvas[int(np.clip(center[1], 0, height - 1)), int(np.clip(center[0], 0, width - 1))].astype(float)
        color = rng.uniform(0, 255, 3)
        while np.abs(color - around).sum() < 120:
            color = rng.uniform(0, 255, 3)
        polygon = [np.round(points).astype(np.int32)]
        cv2.fillPoly(canvas, polygon, color.tolist(), cv2.LINE_AA)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, polygon, 1)
        owner[mask > 0] = len(shapes)
        low, high = points.min(0).clip(0), np.minimum(points.max(0), (width, height))
        shapes.append((label, [*low, *high], int(mask.sum())))
    noisy = canvas + rng.normal(0, rng.uniform(0, 14), canvas.shape)
    seen = [i for i, (_, _, area) in enumerate(shapes) if area and (owner == i).sum() > 0.35 * area]
    boxes = np.array([shapes[i][1] for i in seen], np.float32).reshape(-1, 4)
    labels = np.array([shapes[i][0] for i in seen], np.int64)
    return np.clip(noisy, 0, 255).astype(np.uint8), boxes, labels


def main(out: str, count: str, seed: str = "0") -> None:
    rng = np.random.default_rng(int(seed))
    Path(out).mkdir(parents=True, exist_ok=True)
    for i in range(int(count)):
        image, _, _ = picture(rng, 480, 640, most=24)
        cv2.imwrite(str(Path(out) / f"shapes{i}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])


if __name__ == "__main__":
    main(*sys.argv[1:])
