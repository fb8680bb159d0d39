"""`ImageSet`: many images of the user, each read and scaled when it is asked for, so that one is in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from fusenms.errors import InputError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.runtime.images import SUFFIXES, list_images, read_image
from fusenms.runtime.placement import letterbox, stretched, to_tensor
from fusenms.safety.files import is_folder, read_regular
from fusenms.safety.text import printable


def listed(given: Any, limits: Limits = DEFAULT_LIMITS) -> Sequence[Any] | np.ndarray:
    """The images that an argument names, unread.

    Args:
        given: a folder of images; a text file with the path of an image in each line, relative to its folder (``#`` starts a comment); a
            sequence of what `fusenms.runtime.images.read_image` takes; or an array ``[n, 3, height, width]`` float32, RGB, 0 to 1.

    Raises:
        InputError: there are none, or a path of the list is no file.
    """
    if isinstance(given, np.ndarray):
        return given
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        return list_images(path) if is_folder(path) else _of_list(path, limits)
    if isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray)):
        return given
    raise InputError(
        f"found {printable(type(given).__name__)}; expected a folder of images, a text file with their paths, a sequence or an array"
    )


def _of_list(path: Path, limits: Limits) -> list[Path]:
    shown = printable(path)
    if path.suffix.lower() in SUFFIXES:
        raise InputError(f"{shown}: is one image; expected a folder of images, or a text file with a path in each line")
    try:
        text = read_regular(path, limits.max_metadata_bytes, error=InputError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: is no text; expected the path of an image in each line") from error
    lines = [line.strip() for line in text.splitlines()]
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise InputError(f"{shown}: names no images; expected the path of an image in each line")
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(
            f"{shown}: {len(missing)} of {len(files)} images are not there, the first is {printable(missing[0])}; expected paths relative "
            "to the folder of the list"
        )
    return files


class ImageSet(Sequence[np.ndarray]):
    """Images ``[3, height, width]`` float32, RGB, 0 to 1, at the size of a model."""

    def __init__(
        self, images: Sequence[Any] | np.ndarray, size: tuple[int, int], stretch: bool, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """Take what `listed` returned.

        Args:
            size: height and width of the model's images.
            stretch: stretch images to the size instead of letterboxing them.

        Raises:
            InputError: an array has another size or type.
        """
        if isinstance(images, np.ndarray) and (images.dtype != np.float32 or images.shape[1:] != (3, *size)):
            raise InputError(
                f"found images {images.dtype}{list(images.shape)}; expected float32 [n, 3, {size[0]}, {size[1]}], RGB, 0 to 1"
            )
        self._images, self._size, self._stretch, self._limits = images, size, stretch, limits

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> ImageSet: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | ImageSet:
        if isinstance(index, slice):
            return ImageSet(self._images[index], self._size, self._stretch, self._limits)
        if isinstance(self._images, np.ndarray):
            return self._images[index]
        fit = stretched if self._stretch else letterbox
        return to_tensor([fit(read_image(self._images[index], self._limits), *self._size)[0]])[0]

    def split(self, every: int) -> tuple[ImageSet, ImageSet]:
        """All but every n-th image, and every n-th."""
        ours = [i for i in range(len(self)) if i % every != every - 1]
        return self._chosen(ours), self[every - 1 :: every]

    def _chosen(self, numbers: list[int]) -> ImageSet:
        images = self._images
        some = images[numbers] if isinstance(images, np.ndarray) else [images[i] for i in numbers]
        return ImageSet(some, self._size, self._stretch, self._limits)
