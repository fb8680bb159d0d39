"""The reference of frames, in NumPy and float64: what a model is given for them, and where its results lie in them.

It shares no code with the graph or with the preprocessing of `Detector`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusenms import contract
from fusenms.artifacts.frames import NV12
from fusenms.artifacts.raw import ImageInput
from fusenms.layout import Layout

Size = tuple[int, int]
Outputs = dict[str, np.ndarray]


def in_colors(frames: np.ndarray, channels: str) -> np.ndarray:
    """Frames as ``[B, height, width, 3]`` RGB, in levels from 0 to 255. Source of NV12: BT.601 as OpenCV has it."""
    if channels != NV12:
        return frames if channels == "rgb" else frames[..., ::-1]
    batch, rows, width = frames.shape
    height = rows * 2 // 3
    colors = frames[:, height:].reshape(batch, height // 2, width // 2, 2).astype(np.float64) - 128
    u, v = np.moveaxis(colors.repeat(2, 1).repeat(2, 2), 3, 0)
    light = 1.164 * np.maximum(frames[:, :height].astype(np.float64) - 16, 0)
    rgb = np.stack((light + 1.596 * v, light - 0.813 * v - 0.391 * u, light + 2.018 * u), 3)
    return np.clip(np.rint(rgb), 0, 255)


def as_frames(colors: np.ndarray, channels: str) -> np.ndarray:
    """RGB ``[B, height, width, 3]`` uint8 as frames of a form, to run a model on. Those of NV12 are similar colors."""
    if channels != NV12:
        return np.ascontiguousarray(colors if channels == "rgb" else colors[..., ::-1])
    batch, height, width, _ = colors.shape
    light = 16 + colors @ (0.257, 0.504, 0.098)
    few = colors.reshape(batch, height // 2, 2, width // 2, 2, 3).mean((2, 4))
    pairs = 128 + np.stack((few @ (-0.148, -0.291, 0.439), few @ (0.439, -0.368, -0.071)), 3)
    return np.rint(np.concatenate((light, pairs.reshape(batch, height // 2, width)), 1)).astype(np.uint8)


def letterboxed(frames: np.ndarray, image: ImageInput, channels: str) -> np.ndarray:
    """What a model is given for frames ``[B, h, w, 3]`` uint8, or NV12: ``[B, 3, height, width]`` float64, RGB, in levels from 0 to 255."""
    given = in_colors(frames, channels)
    place = Place.of(given.shape[1], given.shape[2], image)
    colors = given.transpose(0, 3, 1, 2)
    scaled = np.rint(resized(colors, place.inner))
    whole = np.full((len(frames), 3, image.height, image.width), 114.0)
    whole[:, :, place.top : place.top + place.inner[0], place.left : place.left + place.inner[1]] = scaled
    return whole


def resized(colors: np.ndarray, size: Size) -> np.ndarray:
    """Resize ``[B, C, h, w]`` between the centers of pixels, with the border repeated, in float64."""
    value = colors
    for axis, length in ((2, size[0]), (3, size[1])):
        there = value.shape[axis]
        position = np.clip((np.arange(length) + 0.5) * (there / length) - 0.5, 0, there - 1)
        first = np.floor(position).astype(np.int64)
        share = (position - first).reshape((-1, 1) if axis == 2 else (1, -1))
        one, two = (value.take(i, axis).astype(np.float64) for i in (first, np.minimum(first + 1, there - 1)))
        value = one + (two - one) * share
    return value


@dataclass(frozen=True)
class Place:
    """Where a frame of ``height`` x ``width`` lies in the model's input."""

    height: int
    width: int
    inner: Size
    top: int
    left: int

    @classmethod
    def of(cls, height: int, width: int, image: ImageInput) -> Place:
        if image.stretch:
            return cls(height, width, (image.height, image.width), 0, 0)
        scale = min(image.height / height, image.width / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        return cls(
            height,
            width,
            (rows, columns),
            round((image.height - rows) / 2 - 0.1),
            round((image.width - columns) / 2 - 0.1),
        )


def in_frame(outputs: Outputs, layout: Layout, boxes: str, place: Place) -> Outputs:
    """Boxes and keypoints of a model ``[B, K, …]`` in pixels of the frame, float64. Rows past ``num_detections`` mean nothing."""
    found = {}
    x, y = place.width / place.inner[1], place.height / place.inner[0]

    def moved(values: np.ndarray, axis: int) -> np.ndarray:
        horizontal = axis % 2 == 0
        return (values - (place.left if horizontal else place.top)) * (x if horizontal else y)

    for name in (boxes, contract.KEYPOINTS):
        if name not in outputs:
            continue
        values = outputs[name].astype(np.float64)
        turned = name == boxes and layout.angle is not None
        for axis in range(2 if turned or name != boxes else 4):
            most = place.width if axis % 2 == 0 else place.height
            values[..., axis] = moved(values[..., axis], axis)
            if not turned:
                values[..., axis] = np.minimum(np.maximum(values[..., axis], 0), most)
        if turned:
            values[..., 2], values[..., 3] = values[..., 2] * x, values[..., 3] * y
        found[name] = values
    return found
