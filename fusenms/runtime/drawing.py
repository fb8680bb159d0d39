"""Draw detections onto an image."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np

from fusenms.errors import InputError
from fusenms.runtime.detections import Detections
from fusenms.runtime.images import opencv
from fusenms.safety.files import write_atomically
from fusenms.safety.text import printable

OPACITY = 0.45
"""Of masks."""
VISIBLE = 0.25
"""Keypoints that are less visible are not drawn."""
LONGEST_NAME = 40
"""Characters of a class name that are drawn."""


def color_of(label: int) -> tuple[int, int, int]:
    """A color (RGB, 0 to 255) for a class; neighbors in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb((0.06 + label * 0.618034) % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(image: np.ndarray, detections: Detections) -> np.ndarray:
    """A copy of an image ``[height, width, 3]`` uint8 RGB with masks, boxes (turned ones as they lie), keypoints, names and scores, the
    best on top."""
    cv2 = opencv()
    canvas = np.array(image, order="C")
    unit = max(1, round(min(image.shape[:2]) / 320))
    scale = 0.45 * unit
    corners = detections.corners
    for i, (box, score, label) in reversed(list(enumerate(detections))):
        color = color_of(label)
        if len(detections.masks):
            mask = detections.masks[i]
            canvas[mask] = (canvas[mask] * (1 - OPACITY) + np.array(color) * OPACITY).astype(np.uint8)
        cv2.polylines(canvas, [corners[i].round().astype(np.int32)], True, color, 2 * unit)
        x1, y1 = (round(float(v)) for v in box[:2])
        for point in detections.keypoints[i]:
            if len(point) == 2 or point[2] >= VISIBLE:
                cv2.circle(canvas, (round(float(point[0])), round(float(point[1]))), 2 * unit, color, -1, cv2.LINE_AA)
        text = f"{printable(detections.name(label))[:LONGEST_NAME]} {score:.2f}"
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, unit)
        left, top = max(0, min(x1, image.shape[1] - width)), max(0, y1 - height - base)
        cv2.rectangle(canvas, (left, top), (left + width, top + height + base), color, -1)
        dark = sum(color) < 380
        cv2.putText(
            canvas,
            text,
            (left, top + height),
            cv2.FONT_HERSHEY_SIMPLEX,
            scale,
            (255,) * 3 if dark else (0,) * 3,
            unit,
            cv2.LINE_AA,
        )
    return canvas


def save_image(path: Path, image: np.ndarray) -> Path:
    """Write an image ``[height, width, 3]`` uint8 RGB; the suffix says the format.

    Raises:
        InputError: the format is unknown.
        SourceError: the path cannot be written.
    """
    cv2 = opencv()
    try:
        quality = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix.lower() in (".jpg", ".jpeg") else []
        done, data = cv2.imencode(path.suffix, image[..., ::-1], quality)
    except cv2.error as error:
        raise InputError(f"{printable(path)}: unknown image format {path.suffix!r}; expected .jpg or .png") from error
    assert done
    return write_atomically(path, data.tobytes())
