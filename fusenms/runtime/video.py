"""Videos and cameras, by OpenCV: frames in, annotated frames out."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusenms.errors import InputError, SourceError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.headers import check_pixels
from fusenms.runtime.images import opencv
from fusenms.safety.files import check_writable, open_regular
from fusenms.safety.text import printable

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"v=0")
"""What files begin with that only name others, which FFmpeg would open."""
USUAL_FPS = 25.0
"""Frames per second, if a video does not say."""
SHORT = 0.98
"""A video that gives a smaller share of the frames that its header says is cut short or damaged. The header may be a few frames off."""


@dataclass(frozen=True)
class Frame:
    """One frame: its number from 0, its time in seconds, and its image ``[height, width, 3]`` uint8 RGB."""

    number: int
    seconds: float
    image: np.ndarray


class Video:
    """A video file or a camera, open for reading.

    Attributes:
        name: its path, or ``camera 0``.
        fps: frames per second.
        count: number of frames as its header says; 0 if it does not, as of a camera.
    """

    def __init__(self, source: Path | int, limits: Limits = DEFAULT_LIMITS) -> None:
        """Open it.

        Args:
            source: path of a file, or the number of a camera.
            limits: `Limits.max_pixels` bounds a frame.

        Raises:
            InputError: it cannot be read, is not a video, or has frames above the limit.
            BackendUnavailableError: OpenCV is not installed.
        """
        cv2 = opencv()
        self._lock, self._closed = threading.Lock(), False
        self.name = f"camera {source}" if isinstance(source, int) else printable(source)
        if isinstance(source, int):
            self._capture = _quietly(cv2.VideoCapture, source)
        else:
            with open_regular(source, limits.max_file_bytes, error=InputError) as file:
                start = file.read(16).lstrip(b"\xef\xbb\xbf\r\n\t ")
            if start.startswith(PLAYLISTS):
                raise InputError(f"{self.name}: names other files; expected a video")
            self._capture = _quietly(cv2.VideoCapture, str(source), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            expected = "no such camera, or it is in use" if isinstance(source, int) else "not a readable video"
            raise InputError(f"{self.name}: {expected}; expected one that OpenCV reads")
        width, height = (int(self._get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width > 0 and height > 0:
            check_pixels(height, width, self.name, limits)
        fps, count = self._get(cv2.CAP_PROP_FPS), self._get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if np.isfinite(fps) and 0 < fps <= 1000 else USUAL_FPS
        self.count = int(count) if not isinstance(source, int) and np.isfinite(count) and 0 < count < 2**40 else 0

    def _get(self, key: int) -> float:
        return float(self._capture.get(key))

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """The first frame, and of the others each ``every``-th.

        Raises:
            InputError: the video ends long before it should. All frames before are given.
        """
        number = 0
        while (image := self._next(number % every == 0)) is not None:
            if image.size:
                yield Frame(number, round(number / self.fps, 3), image)
            number += 1
        if self._closed:
            return
        if number < SHORT * self.count - 1 or not number:
            raise InputError(
                f"{self.name}: ends after {number} of {self.count or 'its'} frames; it is damaged or cut short"
            )

    def _next(self, wanted: bool) -> np.ndarray | None:
        """The next frame, an empty array if it is not wanted, or None at the end. Other threads may close the video meanwhile."""
        with self._lock:
            if self._closed or not self._capture.grab():
                return None
            if not wanted:
                return np.zeros(0, np.uint8)
            done, image = self._capture.retrieve()
        return np.ascontiguousarray(image[..., ::-1]) if done else None

    def close(self) -> None:
        """Close the file or the camera."""
        with self._lock:
            self._closed = True
            self._capture.release()


class VideoFile:
    """Writes an .mp4, under a temporary name beside it until `close`. The first frame sets its size."""

    def __init__(self, path: Path, fps: float) -> None:
        """Prepare the file.

        Raises:
            SourceError: the path cannot be written.
        """
        check_writable(path)
        self.path, self._fps = path, fps
        self._folder = tempfile.TemporaryDirectory(prefix=".fusenms-", dir=path.parent)
        self._temporary = Path(self._folder.name) / "video.mp4"
        self._writer: Any = None

    def write(self, image: np.ndarray) -> None:
        """Add a frame ``[height, width, 3]`` uint8 RGB.

        Raises:
            SourceError: OpenCV cannot write videos here.
        """
        cv2 = opencv()
        if self._writer is None:
            size = image.shape[1], image.shape[0]
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, code, self._fps, size)
            if not self._writer.isOpened():
                raise SourceError(f"{printable(self.path)}: OpenCV cannot write an .mp4 here; leave drawing out")
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def close(self, keep: bool = True) -> None:
        """Put the file in its place, if it has a frame and is to be kept.

        Raises:
            SourceError: it cannot be written.
        """
        try:
            if self._writer is not None:
                self._writer.release()
                if keep:
                    os.replace(self._temporary, self.path)
        except OSError as error:
            raise SourceError(f"{printable(self.path)}: cannot be written ({error.strerror or error})") from error
        finally:
            self._folder.cleanup()


def _quietly(call: Any, *arguments: Any) -> Any:
    """Call OpenCV without its warnings: errors are raised here."""
    log = opencv().utils.logging
    level = log.getLogLevel()
    log.setLogLevel(log.LOG_LEVEL_SILENT)
    try:
        return call(*arguments)
    finally:
        log.setLogLevel(level)
