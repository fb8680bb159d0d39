"""Where an image lies in the input of a model: scales images to it, and takes boxes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusenms.errors import InputError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.images import has_opencv, list_images, opencv, read_image

GREY = 114


@dataclass(frozen=True)
class Placement:
    """The position of an image in the model's input, in whole pixels. Each axis has its own scale, because the size is rounded.

    Attributes:
        height, width: size of the image.
        left, top: position of the image's corner in the input.
        inner_height, inner_width: size of the scaled image in the input.
    """

    height: int
    width: int
    left: int
    top: int
    inner_height: int
    inner_width: int

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes ``[n, 4]`` xyxy from pixels of the input to pixels of the image, float32, clipped to the image."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height] * 2)
        moved = (boxes - np.array([self.left, self.top] * 2)) / gain
        return np.clip(moved, 0, [self.width, self.height] * 2).astype(np.float32)

    def points_to_image(self, points: np.ndarray) -> np.ndarray:
        """Convert points ``[..., 2 or more]``, x and y first, from pixels of the input to pixels of the image, float32, clipped to it."""
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = np.clip((points[..., :2] - np.array([self.left, self.top])) / gain, 0, [self.width, self.height])
        return np.concatenate((moved, points[..., 2:]), -1).astype(np.float32)

    def oriented_to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Convert oriented boxes ``[n, 5]`` from pixels of the input to pixels of the image, float32. They are not clipped.

        As in Ultralytics, the sides are scaled as if the box were upright. This is exact if both axes have the same scale.
        """
        gain = np.array([self.inner_width / self.width, self.inner_height / self.height])
        moved = (boxes[:, :2] - np.array([self.left, self.top])) / gain
        return np.concatenate((moved, boxes[:, 2:4] / gain, boxes[:, 4:]), 1).astype(np.float32)


def letterbox(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to fit the input, and center it on gray.

    Return the input ``[height, width, 3]`` uint8, and the placement of the image in it. Sizes are rounded as in Ultralytics, because its
    models are trained and evaluated that way.
    """
    gain = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, round(image.shape[1] * gain)), max(1, round(image.shape[0] * gain)))
    left, top = (round((side - part) / 2 - 0.1) for side, part in zip((width, height), inner, strict=True))
    scaled = image if inner == (image.shape[1], image.shape[0]) else _resize(image, inner)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + inner[1], left : left + inner[0]] = scaled
    return canvas, Placement(image.shape[0], image.shape[1], left, top, inner[1], inner[0])


def rectangle(image: np.ndarray, height: int, width: int, stride: int) -> tuple[int, int]:
    """Height and width of the smallest input that holds an image ``[h, w, 3]`` scaled to fit ``height`` x ``width``, in whole strides.

    The rule is that of Ultralytics (``LetterBox`` with ``auto``).
    """
    gain = min(height / image.shape[0], width / image.shape[1])
    inner = max(1, round(image.shape[0] * gain)), max(1, round(image.shape[1] * gain))
    rows, columns = (part + (side - part) % stride for part, side in zip(inner, (height, width), strict=True))
    return rows, columns


def stretched(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Placement]:
    """Scale an image ``[h, w, 3]`` uint8 to ``[height, width, 3]``, ignoring its aspect ratio. Return it with its placement."""
    whole = Placement(image.shape[0], image.shape[1], 0, 0, height, width)
    if image.shape[:2] == (height, width):
        return image, whole
    return _resize(image, (width, height)), whole


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    cv2 = opencv()
    try:
        return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    except cv2.error as error:
        raise InputError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels cannot be scaled to {size[0]} x {size[1]} ({error.err})"
        ) from error


def to_tensor(canvases: list[np.ndarray]) -> np.ndarray:
    """Stack images ``[height, width, 3]`` uint8 RGB of one size into ``[B, 3, height, width]`` float32, 0 to 1."""
    tensor = np.empty((len(canvases), 3, *canvases[0].shape[:2]), np.float32)
    for planes, canvas in zip(tensor, canvases, strict=True):
        for plane, channel in zip(planes, _channels(canvas), strict=True):
            np.divide(channel, np.float32(255), out=plane)
    return tensor


def _channels(canvas: np.ndarray) -> Sequence[np.ndarray]:
    """The channels ``[height, width]`` of an image; by OpenCV, where it is there, in half the time."""
    if not has_opencv():
        return list(canvas.transpose(2, 0, 1))
    channels: Sequence[np.ndarray] = opencv().split(canvas)
    return channels


def load_tensor(folder: Path, height: int, width: int, stretch: bool, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Read all images of a folder, letterboxed or stretched, into ``[n, 3, height, width]`` float32, 0 to 1.

    Raises:
        InputError: the folder has no images, or an image is unreadable.
    """
    fit = stretched if stretch else letterbox
    return to_tensor([fit(read_image(path, limits), height, width)[0] for path in list_images(folder)])
