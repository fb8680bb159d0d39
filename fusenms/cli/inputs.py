"""What the arguments of `fusenms detect` mean: images, videos, folders, patterns and cameras."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusenms.errors import InputError
from fusenms.runtime import images, video
from fusenms.safety.files import is_folder
from fusenms.safety.text import printable


@dataclass(frozen=True)
class Input:
    """An image, a video, or a camera by its number. ``drawn`` is the name of its annotated copy."""

    source: Path | int
    is_video: bool

    @property
    def name(self) -> str:
        return f"camera {self.source}" if isinstance(self.source, int) else str(self.source)

    @property
    def drawn(self) -> str:
        if isinstance(self.source, int):
            return f"camera{self.source}.mp4"
        if self.is_video:
            return self.source.with_suffix(".mp4").name
        return self.source.name if self.source.suffix.lower() in images.SUFFIXES else f"{self.source.name}.jpg"


def inputs_of(arguments: Sequence[str]) -> list[Input]:
    """Every image and video that the arguments name, in their order.

    1. A folder gives its images and videos, sorted by name.
    2. A pattern, as ``'photos/**/*.jpg'``, gives the files that fit, sorted; a file that has this very name comes first.
    3. A number is a camera, unless there is a file of that name.
    4. All else is an image, or a video by its suffix.

    Raises:
        InputError: a folder has neither, or no file fits a pattern.
    """
    return [each for argument in arguments for each in _inputs(argument)]


def _inputs(argument: str) -> list[Input]:
    path = Path(argument)
    if is_folder(path):
        return _of_folder(path)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # too long, or with a NUL: reading it says so
        exists = True
    if not exists and argument.isascii() and argument.isdigit():
        return [Input(int(argument), True)]
    if not exists and glob.has_magic(argument):
        found = [_of_file(file) for file in map(Path, sorted(glob.glob(argument, recursive=True))) if file.is_file()]
        if not found:
            raise InputError(f"{printable(argument)}: no file fits this pattern; expected images or videos")
        return found
    return [_of_file(path)]


def _of_file(path: Path) -> Input:
    return Input(path, path.suffix.lower() in video.SUFFIXES)


def _of_folder(folder: Path) -> list[Input]:
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (*images.SUFFIXES, *video.SUFFIXES))
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot be read ({error.strerror or error})") from error
    if not names:
        raise InputError(
            f"{printable(folder)}: has no images or videos; expected {', '.join((*images.SUFFIXES, *video.SUFFIXES))}"
        )
    return [_of_file(path) for path in names]
