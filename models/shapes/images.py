"""Draw synthetic images of circles, squares and triangles with their boxes: the data of the demo detector.

Run as a script to write the sample images again:  python models/shapes/images.py [OUT_DIR]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

SUBPIXEL_BITS = 4
NAMES = ("circle", "square", "triangle")
SAMPLES = ("shapes0.jpg", "shapes1.jpg")
SAMPLE_SEED = 19


def outline(label: int, center: np.ndarray, radius: float, angle: float, squeeze: float) -> np.ndarray:
    """Return the outline ``[points, 2]`` (x, y in pixels) of one shape."""
    corners, first = {0: (40, 0.0), 1: (4, np.pi / 4), 2: (3, 0.0)}[label]
    turns = first + np.arange(corners) * 2 * np.pi / corners
    points = np.stack((np.cos(turns), np.sin(turns) * squeeze), 1) * radius
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T + center


def draw_image(
    rng: np.random.Generator,
    height: int = 480,
    width: int = 640,
    *,
    least: int = 1,
    most: int = 24,
    radii: tuple[float, float] = (24.0, 96.0),
    visible: float = 0.8,
    contrast: float = 90.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image: shapes in muted colors on a plain background.

    From `least` to `most` shapes are tried. Every shape that is drawn is listed.

    Args:
        rng: decides everything.
        height, width: of the image in pixels.
        least, most: shapes to try.
        radii: bounds of their radii in pixels.
        visible: least share of each shape that neither the image's edges nor shapes above it hide; else the later shape is left out.
        contrast: least distance (RGB, 0 to 255) between the color of a shape and those under it; else it is left out.

    Returns:
        the image ``[height, width, 3]`` uint8 RGB, the boxes ``[n, 4]`` float32 (xyxy in pixels) around whole shapes,
        cut at the image's edges, and the labels ``[n]`` int64.
    """
    canvas = background(rng, height, width)
    owner = np.full((height, width), -1, np.int16)
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    areas: list[float] = []
    seen = np.zeros(0, np.int64)
    for _ in range(int(rng.integers(least, most + 1))):
        label = int(rng.integers(len(NAMES)))
        radius = float(np.exp(rng.uniform(*np.log(radii))))
        squeeze = float(rng.uniform(0.6, 1.0)) if label != 2 else 1.0
        points = outline(label, rng.uniform((0, 0), (width, height)), radius, rng.uniform(0, 2 * np.pi), squeeze)
        color = muted(rng, 0.25, 0.75, 0.3, 0.95)
        polygon = np.round(points).astype(np.int32)
        fine = np.round((points - 0.5) * 2**SUBPIXEL_BITS).astype(
            np.int32
        )  # OpenCV's pixels have their center at 0, not at 0.5
        left, top = polygon.min(0).clip(0)
        right, bottom = np.minimum(polygon.max(0) + 1, (width, height))
        if right <= left or bottom <= top:
            continue
        inside = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(inside, [polygon], 1, offset=(-int(left), -int(top)))
        covered, window = inside > 0, np.s_[top:bottom, left:right]
        area, shown = float(cv2.contourArea(polygon)), int(covered.sum())
        hidden = np.bincount(owner[window][covered] + 1, minlength=len(boxes) + 1)[1:]
        differs = np.linalg.norm(canvas[window][covered] - color, axis=1) > contrast
        if shown < visible * area or (seen - hidden < visible * np.array(areas)).any() or differs.mean() < 0.95:
            continue
        seen = np.append(seen - hidden, shown)
        owner[window][covered] = len(boxes)
        cv2.fillPoly(canvas, [fine], color.tolist(), cv2.LINE_AA, SUBPIXEL_BITS)
        low, high = points.min(0) - 0.5, points.max(0) + 0.5  # OpenCV fills the pixels on the outline too
        boxes.append(np.concatenate((low.clip(0), np.minimum(high, (width, height)))))
        labels.append(label)
        areas.append(area)
    grain = rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(0, 6))
    image = np.clip(canvas + grain, 0, 255).astype(np.uint8)
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def muted(rng: np.random.Generator, grayest: float, purest: float, darkest: float, lightest: float) -> np.ndarray:
    """Return a color (RGB, 0 to 255) of random hue whose saturation and value lie between the bounds."""
    hue, saturation, value = rng.uniform((0, grayest, darkest), (1, purest, lightest))
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation * (1 - pure))


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a pale or dark gray background ``[height, width, 3]`` uint8 with a hint of color and of light from one side."""
    dark = rng.uniform() < 0.2
    color = muted(rng, 0.0, 0.08, 0.15 if dark else 0.75, 0.3 if dark else 0.95)
    slope = rng.uniform(-12, 12, 2)
    light = slope[0] * np.linspace(-1, 1, width)[None, :] + slope[1] * np.linspace(-1, 1, height)[:, None]
    return np.clip(color + light[..., None], 0, 255).astype(np.uint8)


def sample_images() -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Draw the sample images again: file name, image, boxes and labels of each, as `draw_image` returns them."""
    rng = np.random.default_rng(SAMPLE_SEED)
    for name in SAMPLES:
        yield name, *draw_image(rng, least=24, most=30)


def main(out: str = str(Path(__file__).parent)) -> None:
    for name, image, _, _ in sample_images():
        cv2.imwrite(str(Path(out) / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])


if __name__ == "__main__":
    main(*sys.argv[1:])
