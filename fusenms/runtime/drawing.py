"""Draw detections onto an image."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusenms.errors import InputError
from fusenms.runtime.images import opencv
from fusenms.runtime.labels import Obstacles, place_labels
from fusenms.safety.files import write_atomically
from fusenms.safety.text import printable

OPACITY = 0.45
"""Of masks."""
VISIBLE = 0.25
"""Keypoints that are less visible are not drawn."""
LONGEST_NAME = 40
"""Characters of a class name that are drawn."""
SHORT_NAME = 12
"""Characters of a class name that are drawn where there is no room for more."""
SMALLEST_TEXT = 10
"""Height of a line in pixels."""
SHRINK = (1.0, 0.85, 0.7, 0.55)
"""Sizes of the text that are tried until every label finds a place, in shares of the size that suits the image."""
BRIGHT = 140
"""Colors of a greater luminance (0 to 255) carry black text, others white text."""


class Drawable(Protocol):
    """What is drawn of `fusenms.Detections`, which are described there."""

    @property
    def boxes(self) -> np.ndarray: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def keypoints(self) -> np.ndarray: ...

    @property
    def corners(self) -> np.ndarray: ...

    @property
    def masks(self) -> Sequence[np.ndarray]: ...

    def name(self, label: int) -> str: ...

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, int]]: ...


def color_of(label: int) -> tuple[int, int, int]:
    """A color (RGB, 0 to 255) for a class; neighbors in number are far apart in hue."""
    red, green, blue = colorsys.hsv_to_rgb((0.06 + label * 0.618034) % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw(image: np.ndarray, detections: Drawable) -> np.ndarray:
    """Draw masks, boxes (oriented ones as they lie), keypoints and labels onto a copy of an image, the best on top.

    A label is the class name and the score. Text and lines are sized by the image. No label covers another or leaves the image. Where
    there is no room, long class names are cut, then the text becomes smaller, then it is the score alone, and at last the labels of the
    lowest scores are left out.

    Args:
        image: ``[height, width, 3]`` uint8 RGB.
        detections: of that image.

    Returns:
        ``[height, width, 3]`` uint8 RGB.
    """
    canvas = np.array(image, order="C")
    draw_shapes(canvas, detections)
    for label in labels_of(canvas.shape[0], canvas.shape[1], detections):
        label.draw(canvas)
    return canvas


def draw_shapes(canvas: np.ndarray, detections: Drawable) -> None:
    """Draw masks, boxes and keypoints onto an image."""
    cv2 = opencv()
    line = line_width(*canvas.shape[:2])
    corners = detections.corners
    for i, (_, _, label) in reversed(list(enumerate(detections))):
        color = color_of(label)
        if len(detections.masks):
            mask = detections.masks[i]
            canvas[mask] = (canvas[mask] * (1 - OPACITY) + np.array(color) * OPACITY).astype(np.uint8)
        cv2.polylines(canvas, [corners[i].round().astype(np.int32)], True, color, line, cv2.LINE_AA)
        for x, y in visible(detections.keypoints[i]):
            cv2.circle(canvas, (round(float(x)), round(float(y))), line + 1, color, -1, cv2.LINE_AA)


def visible(keypoints: np.ndarray) -> np.ndarray:
    """Those of the keypoints ``[..., P, 2 or 3]`` that are drawn, ``[n, 2]`` x, y in pixels."""
    points = keypoints.reshape(-1, keypoints.shape[-1])
    return points[points[:, 2] >= VISIBLE, :2] if points.shape[1] == 3 else points


def line_width(height: int, width: int) -> int:
    """Width of a line in pixels: 1 in an image of 32 x 32, 2 of 640 x 480, 7 of 3840 x 2160."""
    return max(1, round(0.7 + math.sqrt(height * width) / 450))


def text_height(height: int, width: int) -> float:
    """Height of a line of text in pixels: 10 in an image of 32 x 32, 16 of 640 x 480, 46 of 3840 x 2160."""
    return max(SMALLEST_TEXT, 9 + math.sqrt(height * width) / 77)


@dataclass(frozen=True)
class Font:
    """OpenCV's font, in a size such that a line of text is so many pixels high.

    Attributes:
        scale: as OpenCV takes it.
        thickness: of the strokes in pixels.
        ascent: pixels above the base line, a margin included.
        descent: pixels below the base line, a margin included.
        margin: pixels around the text.
    """

    scale: float
    thickness: int
    ascent: int
    descent: int
    margin: int

    @classmethod
    def of_height(cls, pixels: float) -> Font:
        cv2 = opencv()
        (_, above), below = cv2.getTextSize("Ag", cv2.FONT_HERSHEY_SIMPLEX, 1.0, 1)
        scale, margin = pixels / (above + below), round(pixels / 10)
        (_, above), below = cv2.getTextSize("Ag", cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        return cls(scale, max(1, round(pixels / 18)), above + margin, below + margin, margin)

    def size(self, text: str) -> tuple[int, int]:
        """Width and height of a label in pixels."""
        cv2 = opencv()
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, self.scale, self.thickness)
        return width + 2 * self.margin, self.ascent + self.descent


@dataclass(frozen=True)
class Label:
    """A text in its place on an image.

    Attributes:
        row: of the detection.
        text: what it says.
        box: left, top, right and bottom edge in pixels.
        color: of the ground, RGB from 0 to 255.
        font: of the text.
    """

    row: int
    text: str
    box: tuple[int, int, int, int]
    color: tuple[int, int, int]
    font: Font

    def draw(self, canvas: np.ndarray) -> None:
        """Draw it onto an image. Nothing is drawn outside of `box`."""
        cv2 = opencv()
        left, top, right, bottom = self.box
        ground = np.full((bottom - top, right - left, 3), self.color, np.uint8)
        luminance = np.dot(self.color, (0.299, 0.587, 0.114))
        ink = (0, 0, 0) if luminance > BRIGHT else (255, 255, 255)
        start, font = (self.font.margin, self.font.ascent), self.font
        cv2.putText(ground, self.text, start, cv2.FONT_HERSHEY_SIMPLEX, font.scale, ink, font.thickness, cv2.LINE_AA)
        canvas[top:bottom, left:right] = ground


def labels_of(height: int, width: int, detections: Drawable) -> list[Label]:
    """Labels of the detections in an image of that size, each in its place; those without room are missing."""
    obstacles = Obstacles(height, width, detections.boxes, visible(detections.keypoints))
    texts = [texts_of(detections.name(label), score) for _, score, label in detections]
    suitable = text_height(height, width)
    heights = sorted({max(SMALLEST_TEXT, round(suitable * share)) for share in SHRINK}, reverse=True)
    for pixels in heights:
        font, last = Font.of_height(pixels), pixels == heights[-1]
        sizes = [[font.size(text) for text in (row if last else row[:-1] or row)] for row in texts]
        places = place_labels(sizes, detections.corners, obstacles, all_or_none=not last)
        if places:
            break
    return list(_labels(places, texts, sizes, detections, font))


def _labels(places: Any, texts: Any, sizes: Any, detections: Drawable, font: Font) -> Iterator[Label]:
    for i, place in enumerate(places):
        if place is not None:
            number, left, top = place
            right, bottom = left + sizes[i][number][0], top + sizes[i][number][1]
            color = color_of(int(detections.labels[i]))
            yield Label(i, texts[i][number], (left, top, right, bottom), color, font)


def texts_of(name: str, score: float) -> list[str]:
    """Texts of a label, the longest first.

    >>> texts_of("refrigerator (open)", 0.5)
    ['refrigerator (open) 0.50', 'refrigerat.. 0.50', '0.50']
    """
    name = printable(name)[:LONGEST_NAME].strip()
    short = name if len(name) <= SHORT_NAME else f"{name[: SHORT_NAME - 2]}.."
    return [f"{text} {score:.2f}".lstrip() for text in dict.fromkeys((name, short, ""))]


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
